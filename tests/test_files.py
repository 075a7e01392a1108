"""Files written whole or not at all."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from audit.output import Output
from runtime.files import (
    WRITTEN,
    file_sha256,
    mark_output_folder,
    write_atomically,
    write_json,
    write_output,
)
from runtime.log import close_log, log, log_to_file

ROOT = Path(__file__).resolve().parents[1]
ExpectInputError = Callable[..., AbstractContextManager[None]]


def test_write_atomically_creates_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.csv"
    for text in ("first", "second"):
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "file.csv"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"  # the old file stands until the new one is whole
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_before_anything_is_written_keeps_its_own_error(tmp_path: Path) -> None:
    def write(_temporary: Path) -> None:
        raise RuntimeError("early")

    with pytest.raises(RuntimeError, match="early"):
        write_atomically(tmp_path / "new.csv", write)
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_file_has_the_suffix_and_the_folder_of_the_final_one(tmp_path: Path) -> None:
    # a writer chooses its format by the suffix; a move is atomic within a file system only
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.touch()

    write_atomically(tmp_path / "volume.nii.gz", write)
    assert seen[0].name.endswith("volume.nii.gz")
    assert seen[0].parent == tmp_path
    assert seen[0] != tmp_path / "volume.nii.gz"


def test_write_json_round_trip(tmp_path: Path) -> None:
    content = {"dice": 0.1 + 0.2, "n": 3, "name": "Zürich", "none": None, "list": [1, [2, True]]}
    write_json(tmp_path / "new" / "summary.json", content)
    text = (tmp_path / "new" / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("}\n")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_write_json_refuses_what_json_does_not_know(number: float, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"dice": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"dice": {"mean": [0.5, number]}})
    assert json.loads(path.read_text()) == {"dice": 0.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 3, 2**20, 2**20 + 1, 3 * 2**20 - 1])
def test_file_sha256_over_all_blocks(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_file_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "file") == expected


def test_a_link_is_replaced_or_refused_and_its_target_stays(tmp_path, input_error):
    target = tmp_path / "elsewhere" / "precious"
    target.parent.mkdir()
    target.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.txt", f".{os.getpid()}.y.txt", "train.log"):
        (out / name).symlink_to(target)
    for name in ("x.txt", "y.txt"):
        write_atomically(out / name, lambda path: path.write_text("new"))
        assert (out / name).read_text() == "new"
        assert not (out / name).is_symlink()
    log_to_file(out / "train.log")
    log.warning("said")
    close_log()
    assert "said" in (out / "train.log").read_text()
    (out / WRITTEN).symlink_to(target)
    for write in (lambda: mark_output_folder(out), lambda: write_output(out / "z.txt", Path.touch)):
        with input_error(out / WRITTEN, "is a link"):
            write()
    assert not (out / "z.txt").exists()
    (out / "p").symlink_to(target.parent)
    with input_error(out / "p", "is a link"):
        Output(out, ("WT",)).write(out / "p" / "p_1_mask.png", Path.touch)
    assert [path.name for path in target.parent.iterdir()] == ["precious"]
    assert target.read_text() == "precious"
