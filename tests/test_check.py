"""The preflight: each kind of damage is found and named, sound cohorts pass, training goes on without it."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_balance_v2
from cohort.check import Problem, check_case, check_cases, check_cohort, has_error, log_problems
from cohort.layouts import CaseSource, find_cases
from cohort.selection import TrainingSource, find_sound_cases
from dataset_balance_v2 import BalanceConfig

ROOT = Path(__file__).resolve().parents[1]
FLAIR = np.arange(1, 61, dtype=np.int16).reshape(3, 4, 5)
SEG = np.array([0, 1, 2, 4], np.uint8)[FLAIR % 4]
LPS_1MM = np.diag([-1.0, -1.0, 1.0, 1.0])
SHIFTED = LPS_1MM + np.array([[0, 0, 0, 5.0], [0] * 4, [0] * 4, [0] * 4])


@pytest.fixture
def sound(tmp_path, write_nifti):
    """Folder of two sound cases, a and b, with FLAIR, T1 and mask."""
    for case_id in ("a", "b"):
        for name, array in (("flair", FLAIR), ("t1", FLAIR[::-1]), ("seg", SEG)):
            write_nifti(tmp_path / "data" / case_id / f"{case_id}_{name}.nii.gz", array)
    return tmp_path / "data"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def damage_header(path: Path) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[70:72] = struct.pack("<h", 9999)
    path.write_bytes(gzip.compress(bytes(raw)))


NAN = np.where(FLAIR == 7, np.nan, FLAIR).astype(np.float32)
WRAPPED = (FLAIR.astype(np.int32) * 560).astype(np.int16)  # 59 and 60 times 560 exceed 32767
ODD = np.where(FLAIR == 7, 9, SEG).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "affine", "severity", "words"),
    [
        ("t1", FLAIR[:2], LPS_1MM, "error", "has shape (5, 4, 2), the case's flair (5, 4, 3)"),
        ("t1", FLAIR, np.diag([-1, -1, 2.5, 1]), "error", "spacing of [2.5, 1.0, 1.0] mm"),
        ("t1", FLAIR, SHIFTED, "error", "affine differs from that of the case's flair"),
        ("flair", NAN, LPS_1MM, "error", "NaN"),
        ("t1", np.full_like(FLAIR, 3), LPS_1MM, "error", "is constant, 3 everywhere"),
        (
            "t1",
            np.where(FLAIR > 58, 32767, FLAIR.clip(9)).astype(np.int16),
            LPS_1MM,
            "warning",
            "2 voxels are",
        ),
        ("flair", WRAPPED, LPS_1MM, "warning", "wrapped"),
        ("seg", np.zeros_like(SEG), LPS_1MM, "warning", "empty"),
        ("seg", ODD, LPS_1MM, "error", "unknown label 9"),
        ("seg", SEG[:2], LPS_1MM, "error", "has shape"),
        ("seg", SEG, SHIFTED, "error", "affine differs"),
    ],
)
def test_each_fault_is_found_and_its_file_named(sound, write_nifti, name, content, affine, severity, words):
    path = write_nifti(sound / "b" / f"b_{name}.nii.gz", content, affine)
    cases, problems = check_cohort(CaseSource(sound), ("flair",))
    assert [case.case_id for case in cases] == ["a", "b"]
    assert [(found.case, found.file, found.severity) for found in problems] == [("b", str(path), severity)]
    assert words in problems[0].problem


@pytest.mark.parametrize("name", ["flair", "t1", "seg"])
@pytest.mark.parametrize("harm", [truncate, damage_header])
def test_unreadable_files_are_found(sound, name, harm):
    path = sound / "a" / f"a_{name}.nii.gz"
    harm(path)
    _, problems = check_cohort(CaseSource(sound), ("flair",))
    assert [(found.case, found.file, found.severity) for found in problems] == [("a", str(path), "error")]


def test_all_that_is_wrong_is_listed_not_the_first_alone(sound, write_nifti):
    truncate(sound / "a" / "a_flair.nii.gz")
    write_nifti(sound / "a" / "a_t1.nii.gz", np.zeros_like(FLAIR))
    write_nifti(sound / "a" / "a_seg.nii.gz", ODD)
    (sound / "b" / "b_t1.nii.gz").unlink()
    _, problems = check_cohort(CaseSource(sound), ("flair",))
    assert [found.case for found in problems] == ["a", "a", "a"]  # one of two has t1: not most
    _, problems = check_cohort(CaseSource(sound), ("flair", "t1"))
    assert [found.case for found in problems] == ["a", "a", "a", "b"]
    assert "has no t1 file" in problems[3].problem
    assert has_error(problems) == {"a", "b"}


def test_a_modality_most_others_have_is_missed_with_a_warning(sound):
    shutil.copytree(sound / "a", sound / "c")
    for path in sorted((sound / "c").iterdir()):
        path.rename(path.with_name("c" + path.name[1:]))
    (sound / "b" / "b_t1.nii.gz").unlink()
    _, problems = check_cohort(CaseSource(sound), ("flair",))
    assert [(found.case, found.severity) for found in problems] == [("b", "warning")]
    assert "no t1 file" in problems[0].problem


def test_files_not_asked_for_are_checked_only_where_every_file_is(sound):
    truncate(sound / "a" / "a_t1.nii.gz")
    assert check_cohort(CaseSource(sound), ("flair",), every_file=False)[1] == []
    assert len(check_cohort(CaseSource(sound), ("flair",))[1]) == 1


def test_a_folder_that_cannot_be_resolved_is_listed_and_the_rest_checked(sound, write_slices):
    pixels = FLAIR[0].astype(np.uint8)
    write_slices(sound / "c", "c", {1: pixels, 2: pixels}, {1: pixels})
    write_slices(sound / "d", "d", {1: pixels, 4: pixels})
    shutil.copytree(sound / "a", sound / "copy")
    cases, problems = check_cohort(CaseSource(sound), ("flair",))
    assert [case.case_id for case in cases] == ["b", "d"]  # which a is meant, nobody knows
    severities = [(found.case, found.severity) for found in problems]
    assert severities == [("", "error"), ("", "error"), ("d", "warning")]
    assert "no _mask" in problems[0].problem
    assert "case a is there twice" in problems[1].problem
    assert "slice 2 is missing" in problems[2].problem


def test_processes_find_what_one_process_finds_in_the_same_order(tmp_path, sound):
    script = tmp_path / "several.py"
    script.write_text(
        "import sys\nfrom cohort.check import check_cases\n"
        "from cohort.layouts import CaseSource, find_cases\n"
        "from runtime import processes\n"
        "if __name__ == '__main__':\n"
        "    processes.count_cores, processes.ITEMS_A_PROCESS = lambda: 2, 1\n"
        "    print(check_cases(find_cases(CaseSource(sys.argv[1]))))\n"
    )
    for path in sound.glob("*/*_flair.nii.gz"):
        truncate(path)
    alone = check_cases(find_cases(CaseSource(sound)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, sound],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=True,
    )
    assert len(alone) == 2
    assert done.stdout.strip() == str(alone)


def test_the_command_writes_the_table_and_ends_with_one_on_errors(sound, tmp_path, caplog):
    caplog.set_level("INFO", "drunet")
    table = tmp_path / "out" / "check.csv"
    config = BalanceConfig(CaseSource(str(sound)), check=True, check_csv=str(table))
    dataset_balance_v2.main(config)
    assert pd.read_csv(table).empty
    assert caplog.messages[0] == "BraTS 2021: 2 cases, 2 with masks, 2 modalities"
    truncate(sound / "a" / "a_t1.nii.gz")
    with pytest.raises(SystemExit) as ended:
        dataset_balance_v2.main(config)
    assert ended.value.code == 1
    rows = pd.read_csv(table)
    assert rows.columns.tolist() == ["case", "file", "severity", "problem"]
    assert rows.loc[0, ["case", "severity"]].tolist() == ["a", "error"]
    assert "1 errors in 1 cases, 0 warnings" in caplog.messages[-2]
    assert str(table) in caplog.messages[-1]


def test_the_log_counts_what_it_does_not_show(make_cases, caplog):
    caplog.set_level("INFO", "drunet")
    cases = make_cases([("a", "a"), ("b", "b")])
    problems = [Problem("a", "x", "error", "bad")] * 30 + [Problem("b", "y", "warning", "odd")]
    log_problems(cases, problems, shown=2)
    assert caplog.messages == [
        "error   a  x: bad",
        "error   a  x: bad",
        "... and 29 more",
        "checked 2 cases: 30 errors in 1 cases, 1 warnings; 2 cases without a mask, for prediction only",
    ]


def test_cases_to_train_on_are_those_without_errors(sound, tmp_path, write_nifti, input_error):
    write_nifti(sound / "a" / "a_seg.nii.gz", np.zeros_like(SEG))  # a warning keeps a case
    truncate(sound / "b" / "b_flair.nii.gz")
    folder = tmp_path / "run"
    cases, skipped = find_sound_cases(TrainingSource(str(sound)), folder)
    assert [case.case_id for case in cases] == ["a", "b"]
    assert skipped == []
    assert not folder.exists()
    cases, skipped = find_sound_cases(TrainingSource(str(sound), skip_bad=True), folder)
    assert [case.case_id for case in cases] == ["a"]
    assert skipped == ["b"]
    rows = pd.read_csv(folder / "skipped.csv")
    assert rows[["case", "severity"]].values.tolist() == [["b", "error"]]
    truncate(sound / "a" / "a_flair.nii.gz")
    with input_error(sound, "--check"):
        find_sound_cases(TrainingSource(str(sound), skip_bad=True), folder)


def test_training_ends_at_a_bad_case_or_leaves_it_out_and_says_so(tmp_path, phantom_cohort):
    data = tmp_path / "data"
    shutil.copytree(phantom_cohort, data)
    bad = sorted(data.glob("*/*_flair.nii.gz"))[4]
    truncate(bad)
    command = [sys.executable, ROOT / "train_drunet_v2.py", "--data-dir", data, "--epochs", 1, "--size", 48]
    command += ["--widths", 4, 8, 16, "--batch-size", 8, "--slabs-per-epoch", 16, "--workers", 0]
    command += ["--device", "cpu", "--run"]
    results = []
    for more in (["ends"], ["goes_on", "--skip-bad"]):
        results.append(
            subprocess.run(
                list(map(str, command + more)),
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        )
    ended, went_on = results
    assert ended.returncode == 2
    assert f"error: {bad}" in ended.stderr
    assert went_on.returncode == 0, went_on.stderr
    run = tmp_path / "results" / "goes_on"
    case_id = bad.parent.name
    assert pd.read_csv(run / "skipped.csv")["case"].tolist() == [case_id]
    assert json.loads((run / "config.json").read_text())["skipped"] == [case_id]
    assert f"left out: {case_id}  {bad}: " in (run / "train.log").read_text()
    split = json.loads((run / "split.json").read_text())
    assert sum(len(split[part]) for part in ("train", "validation", "test")) == 7
    assert case_id not in str(split)


@pytest.mark.skipif("DRUNET_DATA" not in os.environ, reason="DRUNET_DATA names no folder")
def test_real_cohorts_pass_and_what_is_no_layout_is_named(input_error):
    data = Path(os.environ["DRUNET_DATA"])
    for name in ("brats21", "kaggle_3m"):
        assert check_cohort(CaseSource(data / name), ("flair",))[1] == []
    with input_error(data / "brats13", "no case"):
        check_cohort(CaseSource(data / "brats13"), ("flair",))


@pytest.mark.skipif("DRUNET_DATA" not in os.environ, reason="DRUNET_DATA names no folder")
def test_brats13_under_a_2021_name_fails_for_its_labels(tmp_path):
    folder = Path(os.environ["DRUNET_DATA"]) / "brats13" / "brats_2013_pat0001_1"
    for name, source in (
        ("flair", "Flair_subtrMeanDivStd"),
        ("t1ce", "T1c_subtrMeanDivStd"),
        ("seg", "OTMultiClass"),
    ):
        shutil.copy(folder / f"{source}.nii.gz", tmp_path / f"x_{name}.nii.gz")
    problems = check_case(find_cases(CaseSource(tmp_path))[0])
    assert [(found.file, found.severity) for found in problems] == [(str(tmp_path / "x_seg.nii.gz"), "error")]
    assert "unknown label 3" in problems[0].problem
