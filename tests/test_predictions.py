"""Masks of another tool: matched, read, scored without a network, compared."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from audit.compare import compare_runs
from audit.score import ScoreSettings, choose_scoring, score_predictions
from cohort.layouts import CaseSource, scan_cases
from cohort.predictions import match_predictions, name_of_case
from final_evaluation_v2 import EvaluationConfig, ExternalSource
from runtime.checkpoints import save_checkpoint
from runtime.claims import LOCK
from runtime.files import write_json

SHAPE = (8, 10, 6)  # X, Y, Z
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def labels_of(case: int) -> np.ndarray:
    """Return labels (X, Y, Z): 48 voxels of edema with 16 of core and 8 of ET in it, moved by case."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 1 + case : 5 + case, 1:4] = 2
    labels[1:3, 1 + case : 5 + case, 1:3] = 1
    labels[1:3, 1 + case : 3 + case, 1:3] = 4
    return labels


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_nifti: Callable[..., Path]) -> Path:
    """A cohort of three BraTS 2021 cases."""
    monkeypatch.chdir(tmp_path)
    for case in range(3):
        stem = tmp_path / "data" / f"BraTS2021_0000{case}" / f"BraTS2021_0000{case}"
        image = np.random.default_rng(case).integers(1, 500, SHAPE).astype(np.int16)
        write_nifti(Path(f"{stem}_flair.nii.gz"), image, AFFINE)
        write_nifti(Path(f"{stem}_seg.nii.gz"), labels_of(case), AFFINE)
    return tmp_path / "data"


@pytest.fixture
def masks(tmp_path: Path, data: Path, write_nifti: Callable[..., Path]) -> Path:
    """Predictions of the three: without the last slice of tumour, under three kinds of name."""
    assert data
    folder = tmp_path / "other tool"
    for case, name in enumerate(("BraTS2021_00000.nii.gz", "sub/BraTS2021_00001_pred_v2.nii.gz")):
        write_nifti(folder / name, cut(labels_of(case)), AFFINE)
    array, affine = cut(labels_of(2)), AFFINE
    turned = nib.as_closest_canonical(nib.Nifti1Image(array, affine))  # RAS: the same place, other axes
    nib.save(turned, folder / "BraTS2021_00002-seg.nii.gz")
    return folder


def cut(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[:, :, 3] = 0
    return labels


def score(data: Path, masks: Path, **settings: object) -> tuple[dict, pd.DataFrame, Path]:
    """Score masks; return summary, rows and the folder that --compare takes."""
    values = {"regions": None, "allow_missing": False, "output": None, "seed": 0} | settings
    score_predictions(ScoreSettings(masks, CaseSource(str(data)), **values))
    folder = Path("results") / f"scores_{masks.name}"
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    return summary, pd.read_csv(folder / "evaluation" / "metrics_per_case.csv"), folder


def test_masks_are_scored_on_the_native_grid_whatever_their_orientation(data: Path, masks: Path) -> None:
    summary, rows, folder = score(data, masks)
    assert set(summary["cohorts"]) == {"predictions"}
    assert set(summary["cohorts"]["predictions"]) == {"WT", "TC", "ET"}
    assert set(summary["cohorts"]["predictions"]["WT"]) == {"plain"}  # no TTA, and no number for it
    # WT: 48 voxels in 3 slices, of which 32 are predicted; core and ET lie in the two slices
    whole = summary["cohorts"]["predictions"]["WT"]["plain"]
    assert whole["dice"]["mean"] == pytest.approx(2 * 32 / (32 + 48))
    assert whole["n_cases"] == 3
    assert summary["cohorts"]["predictions"]["ET"]["plain"]["dice"]["mean"] == 1
    first = rows[rows["region"] == "WT"].iloc[0]
    assert first["reference_ml"] == pytest.approx(48 * 12 / 1000)
    assert first["prediction_ml"] == pytest.approx(32 * 12 / 1000)
    assert rows["seen_in_training"].isna().all()  # not known, and not False
    assert summary["includes_seen_cases"] is None
    assert summary["leakage"].startswith("unknown")
    assert summary["calibration"] == {}
    assert summary["predictions"]["n_identical"] == 0
    names = {path.name for path in (folder / "evaluation").iterdir()} - {LOCK}  # a command takes it away
    assert names == {
        "summary.json", "metrics_per_case.csv", "report.html", "dice_per_case.png", "dice_against_volume.png",
        "volume_bland_altman.png", "cases_predictions.png", "dice_per_case.svg", "dice_against_volume.svg",
        "volume_bland_altman.svg",
    }  # fmt: skip
    report = (folder / "evaluation" / "report.html").read_text()
    assert "no search for leakage was made" in report
    assert "Each tested case was compared" not in report
    assert "with TTA" not in report
    assert ">as given</td>" in report


def test_what_is_missing_is_refused_or_said(data: Path, masks: Path, input_error: Callable) -> None:
    (masks / "BraTS2021_00000.nii.gz").rename(masks / "BraTS2021_00009.nii.gz")
    with input_error(
        "1 of 3 cases have no prediction", "1 prediction(s)", "--allow-missing", "BraTS2021_00000"
    ):
        score(data, masks)
    assert not Path("results").exists()
    summary, rows, folder = score(data, masks, allow_missing=True)
    assert summary["predictions"]["missing"] == ["BraTS2021_00000"]
    assert summary["predictions"]["unknown"] == [str(masks / "BraTS2021_00009.nii.gz")]
    assert rows["case"].nunique() == 2
    report = (folder / "evaluation" / "report.html").read_text()
    assert "1 of 3 cases have no prediction" in report


@pytest.mark.parametrize(
    ("spoil", "culprits"),
    [
        (lambda labels: (labels[:, :-1], AFFINE), ["(6, 9, 8)", "(6, 10, 8)"]),
        (lambda labels: (labels, np.eye(4)), ["lies elsewhere"]),
        (lambda labels: (np.where(labels == 4, 3, labels), AFFINE), ["unknown label 3"]),
        (lambda labels: (labels * np.float32(0.3), AFFINE), ["unknown label 0.3"]),
    ],
)
def test_masks_of_another_grid_or_convention_are_refused(
    data: Path,
    masks: Path,
    write_nifti: Callable,
    input_error: Callable,
    spoil: Callable,
    culprits: list[str],
) -> None:
    path = write_nifti(masks / "BraTS2021_00000.nii.gz", *spoil(labels_of(0)))
    with input_error(path, *culprits):
        score(data, masks)


def test_masks_of_one_label_are_whole_tumour_or_nothing(
    data: Path, masks: Path, tmp_path: Path, write_nifti: Callable, input_error: Callable
) -> None:
    for case in range(3):
        mask = (labels_of(case) > 0).astype(np.uint8)
        write_nifti(tmp_path / "binary" / f"BraTS2021_0000{case}.nii.gz", mask, AFFINE)
        core = np.isin(labels_of(case), (1, 4)).astype(np.uint8)
        write_nifti(tmp_path / "core" / f"BraTS2021_0000{case}.nii.gz", core, AFFINE)
    assert masks
    with input_error("no other label than 1", "--regions WT"):
        score(data, tmp_path / "binary")
    summary, _, _ = score(data, tmp_path / "binary", regions=("WT",))
    assert summary["predictions"]["n_identical"] == 3  # which deserves a warning
    for region, name in (("WT", "binary"), ("TC", "core")):
        summary, _, _ = score(data, tmp_path / name, regions=(region,))
        assert summary["cohorts"]["predictions"][region]["plain"]["dice"]["mean"] == 1


def test_inputs_and_references_are_no_predictions(data: Path, masks: Path, input_error: Callable) -> None:
    assert masks
    with input_error("is a file of case", "--predictions"):
        score(data, data, allow_missing=True)


def test_other_files_beside_a_prediction_are_no_predictions(data: Path, masks: Path) -> None:
    shutil.copy(masks / "BraTS2021_00000.nii.gz", masks / "BraTS2021_00000_WT_probability.nii.gz")
    summary, _, _ = score(data, masks)
    assert summary["predictions"]["unknown"] == []
    assert summary["cohorts"]["predictions"]["WT"]["plain"]["n_cases"] == 3


def test_two_predictions_of_a_case_are_refused(data: Path, masks: Path, input_error: Callable) -> None:
    shutil.copy(masks / "BraTS2021_00000.nii.gz", masks / "BraTS2021_00000_seg.nii.gz")
    with input_error("BraTS2021_00000 has another prediction"):
        score(data, masks)


def test_a_folder_with_other_scores_is_not_written_over(
    data: Path, masks: Path, tmp_path: Path, input_error: Callable
) -> None:
    score(data, masks)
    other = shutil.copytree(masks, tmp_path / "elsewhere" / masks.name)
    with input_error("--output"):
        score(data, other)
    score(data, masks)  # its own again


def test_the_longest_case_id_in_a_name_is_meant() -> None:
    ids = {"a", "a_seg", "a_pred_b"}
    assert name_of_case("a.nii.gz", ids) == "a"
    assert name_of_case("a_seg.nii.gz", ids) == "a_seg"
    assert name_of_case("a_pred_b_mask.nii", ids) == "a_pred_b"
    assert name_of_case("a-PRED.nii.gz", ids) == "a"
    assert name_of_case("a_t1.nii.gz", ids) == "a_t1"  # another modality is no mask
    assert name_of_case("ab.nii.gz", ids) == "ab"


def test_slices_are_scored_as_inference_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_slices: Callable, input_error: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((3, 12, 12), np.uint8)
    mask[:, 2:6, 2:6] = 255
    numbers = (8, 9, 10)  # sorted as numbers
    image = np.random.default_rng(0).integers(1, 255, (3, 12, 12)).astype(np.uint8)
    write_slices(
        tmp_path / "data" / "p",
        "p",
        dict(zip(numbers, image, strict=True)),
        dict(zip(numbers, mask, strict=True)),
    )
    predicted = mask.copy()
    predicted[2] = 0
    write_slices(tmp_path / "masks" / "p", "p", {}, dict(zip(numbers, predicted, strict=True)))
    summary, _, _ = score(tmp_path / "data", tmp_path / "masks")
    assert summary["cohorts"]["predictions"]["WT"]["plain"]["dice"]["mean"] == pytest.approx(
        2 * 32 / (32 + 48)
    )
    assert summary["cohorts"]["predictions"]["WT"]["plain"]["n_cases"] == 1
    (tmp_path / "masks" / "p" / "p_9_mask.png").unlink()
    with input_error("slice 9 of p"):
        score(tmp_path / "data", tmp_path / "masks")
    cases = scan_cases(CaseSource(str(tmp_path / "data")))
    shutil.rmtree(tmp_path / "masks" / "p")
    assert match_predictions(tmp_path / "masks", cases).missing == ["p"]


def write_run(folder: Path, rows: pd.DataFrame) -> Path:
    """Write the audit of a run that tested two of the cases, plain 0.1 and TTA 0.05 below the masks given."""
    tested = rows[rows["case"] != "BraTS2021_00000"].assign(cohort="internal", seen_in_training=False)
    modes = [tested.assign(mode=m, dice=tested["dice"] - less) for m, less in (("plain", 0.1), ("tta", 0.05))]
    (folder / "evaluation").mkdir(parents=True)
    pd.concat(modes).to_csv(folder / "evaluation" / "metrics_per_case.csv", index=False)
    write_json(folder / "evaluation" / "summary.json", {"data_kind": "real"})
    # it has trained on the third case, which the other tool's scores hold too
    save_checkpoint(
        folder / "best.pt", {"model": {}, "seen": [["BraTS2021_00000", "BraTS2021_00000", "sha"]]}
    )
    return folder


def test_scores_are_compared_with_a_run_over_the_cases_it_tested(
    data: Path, masks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, rows, scores = score(data, masks)
    run = write_run(Path("results") / "run", rows)
    caplog.set_level("INFO")
    for first, second, sign in ((scores, run, 1), (run, scores, -1)):
        compare_runs([str(first), str(second)], "out", 0)
        content = json.loads(Path("out/comparison.json").read_text())
        assert set(content["cohorts"]) == {"internal"}
        entry = content["cohorts"]["internal"]["WT"]
        assert entry["n_cases"] == 2
        assert entry["plain"]["dice"]["difference"]["mean"] == pytest.approx(0.1 * sign)
        assert entry["tta"]["dice"]["difference"]["mean"] == pytest.approx(0.05 * sign)
        assert content["masks_as_given"] == {"a": sign == 1, "b": sign == -1}
        alone = (content["n_cases_only_a"], content["n_cases_only_b"])
        assert alone == ((1, 0) if sign == 1 else (0, 1))  # the case that the run has trained on
        given = "A" if sign == 1 else "B"
        assert f"with TTA, masks of {given} as given" in Path("out/comparison.html").read_text()
    assert Path("out/comparison.png").is_file()


def test_labels_in_an_order_of_ones_own_are_scored(data: Path, masks: Path, monkeypatch) -> None:
    own = "core=1,edema=2,enhancing=4"  # as a dataset.json of nnU-Net spells them out

    def scan(source: CaseSource) -> list:
        return [replace(case, convention=own) for case in scan_cases(source)]

    monkeypatch.setattr("audit.score.scan_cases", scan)
    spelled, _, _ = score(data, masks)
    monkeypatch.undo()
    monkeypatch.chdir(data.parent)
    usual, _, _ = score(data, masks)
    assert spelled["cohorts"] == usual["cohorts"]


def test_volumes_of_a_sheared_grid_are_those_of_the_determinant(
    tmp_path: Path, write_nifti, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[0, 1] = 0.5
    stem = tmp_path / "data" / "BraTS2021_00000" / "BraTS2021_00000"
    write_nifti(Path(f"{stem}_flair.nii.gz"), np.ones(SHAPE, np.int16), affine)
    for path in (f"{stem}_seg.nii.gz", tmp_path / "masks" / "BraTS2021_00000.nii.gz"):
        write_nifti(Path(path), labels_of(0), affine)
    _, rows, _ = score(tmp_path / "data", tmp_path / "masks")
    voxels = np.count_nonzero(labels_of(0))
    assert rows.loc[rows["region"] == "WT", "reference_ml"].item() == pytest.approx(voxels * 12 / 1000)


def test_scores_of_two_tools_are_compared(data: Path, masks: Path, tmp_path: Path) -> None:
    _, _, first = score(data, masks)
    _, _, second = score(data, shutil.copytree(masks, tmp_path / "copy"))
    compare_runs([str(first), str(second)], "out", 0)
    content = json.loads(Path("out/comparison.json").read_text())
    entry = content["cohorts"]["predictions"]["WT"]
    assert entry["plain"]["dice"]["difference"]["mean"] == 0
    assert "tta" not in entry


def test_flags_at_odds_are_refused(input_error: Callable) -> None:
    assert choose_scoring(EvaluationConfig()) is None
    with input_error("--allow-missing"):
        choose_scoring(EvaluationConfig(allow_missing=True))
    with input_error("--data-dir"):
        choose_scoring(EvaluationConfig(predictions="x"))
    with input_error("--run"):
        choose_scoring(EvaluationConfig(predictions="x", data_dir="d", run="r"))
    settings = choose_scoring(
        EvaluationConfig(predictions="x", data_dir="d", external=ExternalSource(layout="msd"))
    )
    assert settings.source == CaseSource("d", "msd")
