"""Files that are not what they should be, and places that cannot be written: one sentence each."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from audit.compare import COMPARED, find_scores, read_rows
from audit.facts import check_facts
from audit.figures import read_epochs
from audit.output import FINISHED, Output, find_done, note_finished, read_finished
from cohort import cache as cache_module
from cohort.cache import prepare_cases, read_facts
from cohort.cases import Case
from cohort.layouts import CaseSource, find_cases
from cohort.patients import map_patients, read_sheet
from cohort.split import read_split, split_sha256
from runtime.command import Range, from_plain
from runtime.errors import InputError
from runtime.exhausted import explain_exhausted
from runtime.files import check_output, check_output_folder, read_json, write_atomically
from runtime.plain import find_misfit, parse_json
from runtime.tables import parse_csv
from tests.fuzz.targets import FACTS, network_content
from training.settings import TrainConfig

# ------------------------------------------------------------------------------------------------------------
# Plain values
# ------------------------------------------------------------------------------------------------------------


class Inner(TypedDict):
    """A part of a file."""

    low: float


class Content(TypedDict):
    """A file."""

    names: list[str]
    inner: Inner


@pytest.mark.parametrize(
    ("value", "kind", "wrong"),
    [
        (3, int, None),
        (True, int, "it is True, not a whole number"),
        (3.0, int, "it is 3.0, not a whole number"),
        (3, float, None),
        (False, float, "it is False, not a finite number"),
        (float("nan"), float, "it is nan, not a finite number"),
        (10**400, float, "it is a huge number, not a finite number"),
        (10**400, int, "it is a huge number, not a whole number"),
        (None, str | None, None),
        (1, str | None, "it is 1, not text"),
        ("b", Literal["a", "b"], None),
        (True, Literal[1, 2], "it is True, not one of 1, 2"),
        ([1, 2], tuple[int, ...], None),
        ((1, 2), list[int], None),
        ([1, "x"], list[int], "it[1] is 'x', not a whole number"),
        ([1], tuple[int, int], "it has 1 values, not 2"),
        ({"a": 1}, dict[str, int], None),
        ({"a": "b"}, dict[str, int], "it['a'] is 'b', not a whole number"),
        ([], dict, "it is a list of 0, not an object"),
        ("x" * 99, int, f"it is '{'x' * 39}..., not a whole number"),
        (0.5, Annotated[float, Range(0, 1)], None),
        (1.5, Annotated[float, Range(0, 1)], "it is 1.5, not a number from 0 to 1"),
        ([2.0], tuple[Annotated[float, Range(0, 1)], ...], "it[0] is 2.0, not a number from 0 to 1"),
        ({"names": [], "inner": {"low": 1}, "more": 0}, Content, None),
        ({"names": []}, Content, "inner is missing"),
        ({"names": [], "inner": {}}, Content, "inner has no low"),
        ({"names": [], "inner": {"low": "a\nb"}}, Content, r"inner.low is 'a\nb', not a finite number"),
        ([[]], Any, None),
    ],
)
def test_values_are_held_against_types(value, kind, wrong):
    assert find_misfit(value, kind) == wrong


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[1, -Infinity]", "[" * 100_000, b"\xff\xfe\x00", "1" * 9999]
)
def test_text_that_is_no_json_is_a_value_error_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_json(text)


@pytest.mark.parametrize(
    ("plain", "flag"),
    [
        ({"widths": "8 16"}, "--widths"),
        ({"widths": [8, [16]]}, "--widths"),
        ({"size": "256"}, "--size"),
        ({"size": None}, "--size"),
        ({"modalities": ["flair", {}]}, "--modalities"),
        ({"layout": 3}, "--layout"),
        ({"amp": "yes"}, "--amp"),
        ({"max_minutes": []}, "--max-minutes"),
        ({"data_dir": {"a": 1}}, "--data-dir"),
    ],
)
def test_settings_of_a_wrong_type_are_named(plain, flag, input_error):
    with input_error(flag):
        from_plain(TrainConfig, plain)


# ------------------------------------------------------------------------------------------------------------
# Splits, sheets, tables
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {"train": [["a"], ["b"]], "validation": [["c"]], "test": [["d"]]},
        {"train": [1, 2], "validation": [3], "test": [4]},
        {"train": "abc", "validation": "d", "test": "e"},
        {"train": ["a"], "validation": [], "test": ["b"]},
        {"train": {"a": 1}, "validation": {}, "test": {}},
    ],
    ids=["lists", "numbers", "text", "empty part", "objects"],
)
def test_a_split_of_anything_but_ids_is_named(tmp_path, input_error, parts):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({**parts, "sha256": split_sha256(parts)}))
    with input_error(path):
        read_split(path)


@pytest.mark.parametrize(
    "content",
    [
        b"BraTS2021_00000,a\rb\x00c\n",
        b'BraTS2021_00000,"a\nBraTS2021_00001,b\n',
        b'a,"b"c\n',
        b"a," + b'"' + b"x" * 200_000 + b'"\n',
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"\xff\xfea",
    ],
    ids=["zero byte", "open quote", "text after a quote", "endless cell", "a picture", "half of UTF-16"],
)
def test_a_mapping_sheet_that_is_none_is_named(tmp_path, input_error, content):
    path = tmp_path / "mapping.csv"
    path.write_bytes(content)
    cases = [Case("x", "x", "made", "brats2021", "brats", {}, ())]
    for sheets, given in (([path], None), ([], path)):
        with input_error(path):
            map_patients(cases, sheets, given)


def test_sheets_that_were_read_are_read_alike(tmp_path):
    path = tmp_path / "mapping.csv"
    rows = [["id", "patient, name"], ["a", 'the "first"'], ["b", ""]]
    for content in (
        b'id,"patient, name"\r\na,"the ""first"""\r\nb,\r\n',
        b'id\t"patient, name"\t\na \t the "first"\t\nb\t\t\n',
        'id,"patient, name"\na,"the ""first"""\nb,\n'.encode("utf-16"),
    ):
        path.write_bytes(content)
        assert [row[:2] for row in read_sheet(path)] == rows
    assert parse_csv("a;\xe4\n".encode("latin-1"), "x") == [["a;\xe4"]]


def audited(folder: Path, change: dict[str, Any]) -> Path:
    """Write the metrics of one case, some cells changed, and return the run's folder."""
    row = {"cohort": "internal", "case": "a", "patient": "p", "region": "WT", "mode": "tta"}
    row |= dict.fromkeys((*COMPARED, "reference_ml"), 0.5) | {"seen_in_training": False}
    (folder / "evaluation").mkdir(parents=True)
    pd.DataFrame([row | change]).to_csv(folder / "evaluation" / "metrics_per_case.csv", index=False)
    return folder


def test_metrics_are_read_and_those_that_are_none_named(tmp_path, input_error):
    assert read_rows(audited(tmp_path / "sound", {"hd95_mm": np.nan}))["dice"].tolist() == [0.5]
    for index, change in enumerate(({"dice": "x"}, {"hd95_mm": np.inf}, {"region": None}, {"dice": 1 + 2j})):
        with input_error("metrics_per_case.csv", "audit", next(iter(change))):
            read_rows(audited(tmp_path / str(index), change))
    path = audited(tmp_path / "bytes", {}) / "evaluation" / "metrics_per_case.csv"
    for content in (b"", b"\xff\xfe\x00", b'cohort,"case\n', b"a,b\n1,2,3\n1,2,3,4\n"):
        path.write_bytes(content)
        with input_error(path):
            read_rows(tmp_path / "bytes")


def test_an_audit_does_without_the_curves_of_a_log_that_is_none(tmp_path, caplog):
    path = tmp_path / "log.csv"
    head = "epoch,train_loss,train_dice,learning_rate,validation_dice_WT\n"
    path.write_text(f"{head}1,0.5,0.6,0.001,0.7\n")
    assert read_epochs(path)["validation_dice_WT"].tolist() == [0.7]
    assert caplog.text == ""
    for content in ("", "\x00\xff", "a,b\n1,2\n", f"{head}1,x,0.6,0.001,0.7\n", f"{head}1,0.5,0.6,0.001,y\n"):
        caplog.clear()
        path.write_text(content)
        assert read_epochs(path).empty
        assert "no training curves" in caplog.text
    path.unlink()
    assert read_epochs(path).empty


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"data_kind": 3}', '{"data_kind": "real", "predictions": [1]}']
)
def test_a_summary_that_is_none_is_named(tmp_path, input_error, content):
    (tmp_path / "evaluation").mkdir()
    if content is not None:
        (tmp_path / "evaluation" / "summary.json").write_text(content)
    with input_error("summary.json"):
        find_scores(tmp_path)


def test_json_that_is_far_too_large_is_not_read(tmp_path, input_error):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with input_error("--config", path, "64 MiB"):
        read_json(path, "--config", "a run's config.json")


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        '{"channel_names": ["FLAIR"], "labels": {"edema": 1}}',
        '{"channel_names": {"x": "FLAIR"}, "labels": {"edema": 1}}',
        '{"channel_names": {"0": "FLAIR"}, "labels": [1]}',
        '{"channel_names": {"0": "CT"}, "labels": {"edema": 1}}',
        '{"modality": {}, "labels": {"0": "background", "1": "edema"}}',
        '{"channel_names": {"0": "FLAIR"}, "labels": {"edema": 257}}',
        '{"channel_names": {"0": "FLAIR"}, "labels": {"edema": [[1]]}}',
    ],
)
def test_a_dataset_json_that_cannot_be_read_is_named(tmp_path, input_error, facts):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0000.nii.gz").touch()
    (tmp_path / "dataset.json").write_text(facts)
    with input_error(tmp_path / "dataset.json"):
        find_cases(CaseSource(str(tmp_path)), ("flair",))


# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": {"modalities": ["flair"]}},
        {"config": FACTS["config"] | {"regions": "WT"}},
        {"config": FACTS["config"] | {"regions": []}},
        {"config": FACTS["config"] | {"regions": ["WT", "WT"]}},
        {"config": FACTS["config"] | {"size": 0}},
        {"config": FACTS["config"] | {"context": 10**7}},
        {"thresholds": [0.5, 0.5]},
        {"thresholds": [float("nan")]},
        {"thresholds": [5]},
        {"thresholds": "5"},
        {"postprocessing": {"settings": {"WT": {"fill_holes": True}}}},
        {"postprocessing": []},
        {"spacing_mm": {"in_plane": {"low": 1.0, "high": 2.0}}},
        {"reference_ml": {"WT": [1.0]}},
        {"data_kind": "other"},
    ],
    ids=str,
)
def test_facts_of_a_network_that_cannot_be_are_named(change, input_error):
    check_facts("best.pt", FACTS)
    with input_error("best.pt", *(name for name in change if name != "config")):
        check_facts("best.pt", FACTS | change)


# ------------------------------------------------------------------------------------------------------------
# The cache and the outputs
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_case(tmp_path, write_nifti) -> Case:
    """A case of 4 slices."""
    array = np.zeros((24, 24, 4), np.int16)
    array[4:20, 4:20] = np.random.default_rng(0).integers(100, 900, (16, 16, 4))
    write_nifti(tmp_path / "in" / "x_flair.nii.gz", array)
    return find_cases(CaseSource(str(tmp_path / "in")))[0]


def test_altered_facts_of_the_cache_are_made_again(one_case, tmp_path, caplog):
    (prepared,) = prepare_cases([one_case], ("flair",), (), tmp_path / "cache")
    path = prepared.folder / "facts.json"
    facts = json.loads(path.read_text())
    for name, value in (("background", [-9.0]), ("spacing_mm", [1, 1, 9]), ("box", 3), ("shape", [4, 24])):
        path.write_text(json.dumps(facts | {name: value}))
        assert read_facts(prepared.folder) is None
        assert prepare_cases([one_case], ("flair",), (), tmp_path / "cache") == [prepared]
        assert "damaged" in caplog.text
    assert json.loads(path.read_text()) == facts


def test_a_cache_that_is_deleted_meanwhile_is_one_sentence_in_workers_too(one_case, tmp_path, input_error):
    (prepared,) = prepare_cases([one_case], ("flair",), (), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with input_error(prepared.folder, "--resume"):
        prepared.slab(0, 1)

    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Slabs(prepared), num_workers=1)))
    explained = explain_exhausted(caught.value, ())
    assert isinstance(explained, InputError)
    assert re.fullmatch(r"a loader worker: [^\n]*volume\.npy: [^\n]*--resume[^\n]*\.", str(explained))
    assert str(pickle.loads(pickle.dumps(explained))) == str(explained)


class Slabs(Dataset):
    """The first slab of a case."""

    def __init__(self, prepared: cache_module.PreparedCase) -> None:
        self.prepared = prepared

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.prepared.slab(index, 1))


def test_a_cache_or_an_output_below_a_file_is_named(one_case, tmp_path, input_error):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        with input_error("--cache-dir", place):
            prepare_cases([one_case], ("flair",), (), place)
        for overwrite in (False, True):
            with input_error(file, "is a file"):
                check_output(place / "x.nii.gz", overwrite)
            with input_error(file, "is a file"):
                check_output_folder(place, overwrite)
        with input_error(file, "is a file"):
            write_atomically(place / "x", Path.touch)
    assert file.read_text() == "mine"


def test_a_full_disk_inside_the_cache_is_one_sentence_and_leaves_nothing(
    one_case, tmp_path, monkeypatch, input_error
):
    def fail(path: Path, array: np.ndarray) -> None:
        Path(path).write_bytes(b"\x93NUMPY")
        raise OSError(f"{array.size} requested and 0 written")  # what NumPy says, without a number

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with input_error("--cache-dir", tmp_path / "cache", "0 written", "free space"):
            prepare_cases([one_case], ("flair",), (), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "entries").iterdir())
    assert len(prepare_cases([one_case], ("flair",), (), tmp_path / "cache")) == 1


def test_a_stamp_that_is_no_key_is_made_again(one_case, tmp_path):
    (prepared,) = prepare_cases([one_case], ("flair",), (), tmp_path / "cache")
    (stamp,) = (tmp_path / "cache" / "stamps").iterdir()
    for content in (b"../" * 10 + b"xx", b"\xff" * 32, b""):
        stamp.write_bytes(content)
        assert prepare_cases([one_case], ("flair",), (), tmp_path / "cache") == [prepared]


def test_altered_lines_of_finished_cases_are_done_again(one_case, tmp_path):
    output = Output(tmp_path, ("WT",))
    note_finished(output, one_case, [], [{"case": "x", "volume_ml": 12.5}])
    assert read_finished(tmp_path)["x"]["rows"] == [{"case": "x", "volume_ml": 12.5}]
    line = (tmp_path / FINISHED).read_text()
    for other in (line.replace("12.5", "92.5"), "[]", "3", '{"case": []}', line[:-20], "\x00"):
        (tmp_path / FINISHED).write_text(other)
        assert read_finished(tmp_path) == {}
        assert find_done(output, [one_case]) == {}


def test_an_exported_file_of_which_a_bit_is_other_is_refused(tmp_path, input_error):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from inference_v2 import load_model
    from tests.fuzz.targets import onnx_seeds

    (whole,) = onnx_seeds()
    path = tmp_path / "x.onnx"
    path.write_bytes(whole)
    assert load_model(path, torch.device("cpu")).thresholds == tuple(network_content()["thresholds"])
    for at in np.random.default_rng(0).integers(0, len(whole), 20):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with input_error(path):
            load_model(path, torch.device("cpu"))
