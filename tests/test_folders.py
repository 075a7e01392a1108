"""Folders walked: nothing vanishes without a word, loops end, and links are followed once."""

import os
from pathlib import Path

import numpy as np
import pytest

from cohort.check import check_cohort
from cohort.layouts import CaseSource, find_cases, scan_cases
from cohort.patients import find_sheets
from cohort.predictions import match_predictions
from runtime import folders
from runtime.errors import InputError
from runtime.folders import walk_tree

FLAIR = np.arange(1, 61, dtype=np.int16).reshape(3, 4, 5)
SEG = np.array([0, 1, 2, 4], np.uint8)[FLAIR % 4]


@pytest.fixture
def cohort(tmp_path, write_nifti):
    """Folder of three cases, a, b and c, each in a folder of its own."""
    for case_id in "abc":
        for name, array in (("flair", FLAIR), ("seg", SEG)):
            write_nifti(tmp_path / "data" / case_id / f"{case_id}_{name}.nii.gz", array)
    return tmp_path / "data"


@pytest.fixture
def forbid(monkeypatch):
    """Function that takes the permission to list a folder away; root has it whatever the bits say."""

    def take(forbidden: Path) -> None:
        scandir = os.scandir

        def refuse(path: str | Path) -> object:
            if Path(path) == forbidden:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        if os.geteuid():
            forbidden.chmod(0)

    return take


def ids(cases):
    return [case.case_id for case in cases]


def test_a_folder_without_permission_is_an_error_that_names_it(cohort, forbid, input_error):
    forbid(cohort / "b")
    with input_error(cohort / "b", "Permission denied"):
        find_cases(CaseSource(str(cohort)))
    errors: list[InputError] = []
    assert ids(scan_cases(CaseSource(str(cohort)), errors)) == ["a", "c"]
    assert [error.place for error in errors] == [str(cohort / "b")]
    _, problems = check_cohort(CaseSource(str(cohort)), ("flair",))
    assert [(found.file, found.severity) for found in problems] == [(str(cohort / "b"), "error")]
    with input_error(cohort / "b"):
        match_predictions(cohort, [])


def test_the_root_without_permission_is_no_empty_folder(cohort, forbid, input_error):
    forbid(cohort)
    with input_error(cohort, "Permission denied"):
        find_cases(CaseSource(str(cohort)))


@pytest.mark.parametrize("letter", ["\n", "\r", "\t", "\x1b", "\x85", "\u2028"])
def test_a_control_character_in_a_name_is_an_error_on_one_line(cohort, letter, input_error):
    odd = cohort / f"b{letter}2"
    (cohort / "b").rename(odd)
    shown = letter.encode("unicode_escape").decode()
    with input_error(f"b{shown}2", "rename it"):
        find_cases(CaseSource(str(cohort)))
    odd.rename(cohort / "b")
    (cohort / "b" / "b_flair.nii.gz").rename(cohort / "b" / f"b{letter}_flair.nii.gz")
    with input_error(f"b{shown}_flair.nii.gz"):
        find_cases(CaseSource(str(cohort)))


def test_names_that_systems_make_and_names_that_are_no_utf8_are_no_error(cohort):
    (cohort / "Icon\r").touch()
    (cohort / ".hidden\n").touch()
    (cohort / "b").rename(os.fsdecode(os.fsencode(cohort) + b"/b\xff"))
    assert ids(find_cases(CaseSource(str(cohort)))) == ["a", "b", "c"]


def test_masks_beside_the_data_that_cannot_be_read_are_an_error(
    tmp_path, write_slices, monkeypatch, input_error
):
    pixels = {z: np.full((4, 4), z, np.uint8) for z in (1, 2)}
    for name in ("images", "masks"):
        write_slices(tmp_path / name, "p", pixels)
    masks, iterdir = tmp_path / "masks", Path.iterdir

    def refuse(path: Path) -> object:
        if path == masks:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with input_error(masks, "Permission denied"):
        find_cases(CaseSource(str(tmp_path / "images")))


def test_a_folder_of_sheets_that_cannot_be_read_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(path: Path) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find_sheets([tmp_path]) == []
    assert str(tmp_path) in caplog.text


def test_loops_of_links_end_and_every_case_is_there_once(cohort, caplog):
    before = find_cases(CaseSource(str(cohort)))
    (cohort / "loop").symlink_to(cohort)
    (cohort / "a" / "up").symlink_to("../..")
    (cohort / "a" / "b").symlink_to(cohort / "b")
    (cohort / "b" / "a").symlink_to(cohort / "a")
    (cohort / "self").symlink_to("self")
    assert find_cases(CaseSource(str(cohort))) == before
    for name in ("loop", "a/up", "self"):
        assert str(cohort / name) in caplog.text
    assert len(list(walk_tree(cohort))) == 4


def test_links_that_lead_out_are_followed_once(cohort, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (cohort / "b").rename(tmp_path / "elsewhere" / "b")
    for name in ("x", "y"):
        (cohort / name).symlink_to(tmp_path / "elsewhere")
    found = find_cases(CaseSource(str(cohort)))
    assert ids(found) == ["a", "b", "c"]
    assert found[1].mask == (cohort / "x" / "b" / "b_seg.nii.gz",)


def test_a_link_to_a_folder_that_is_gone_is_an_error(cohort, tmp_path, input_error):
    (cohort / "d").symlink_to(tmp_path / "gone")
    with input_error(cohort / "d", "No such file"):
        find_cases(CaseSource(str(cohort)))
    (cohort / "d").unlink()
    (cohort / "a" / "a_t1.nii.gz").symlink_to(tmp_path / "gone.nii.gz")  # as git-annex keeps what is not here
    assert ids(find_cases(CaseSource(str(cohort)))) == ["a", "b", "c"]


def test_a_path_is_shown_on_one_line():
    assert folders.printable("a\nb\x1b[31m\u00e9") == "a\\nb\\x1b[31m\u00e9"
