"""What the audit measures of a case, and how report and figures show it: by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pandas as pd
import pytest
import torch

from audit import plots
from audit.figures import CAPTIONS, draw_figures, rank_cases
from audit.measure import count_overlap_per_slice, measure_case, summarise_all
from audit.overlays import REFERENCE_COLOUR, grey_window, plot_batch, take_picture
from audit.postprocess import threshold_regions
from audit.report import list_warnings, tabulate_gains, tabulate_scores, write_report
from audit.results import AuditResults, CaseVolumes
from audit.statistics import CALIBRATION_EDGES, reliability_counts, summarise, summarise_calibration
from utils_v2 import THRESHOLDS, Overlap, overlap_at_thresholds

SPACING_MM = (2.0, 1.0, 1.0)
SHAPE = (6, 12, 12)


def block(*place: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[place] = True
    return mask


REFERENCE = block(slice(1, 4), slice(2, 8), slice(2, 8))  # 3 slices of 36 voxels
HALF = block(slice(1, 4), slice(2, 8), slice(2, 5))  # the left 18 of each
FAR = block(slice(5, 6), slice(9, 11), slice(9, 11))  # 4 voxels beyond it


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def test_overlap_is_counted_per_slice() -> None:
    expected = [[0, 0, 0], [18, 0, 18], [18, 0, 18], [18, 0, 18], [0, 0, 0], [0, 4, 0]]
    assert count_overlap_per_slice(REFERENCE, HALF | FAR).tolist() == expected
    with pytest.raises(ValueError, match="bool"):
        count_overlap_per_slice(REFERENCE, HALF.astype(np.uint8))
    with pytest.raises(ValueError, match="shape"):
        count_overlap_per_slice(REFERENCE, HALF[1:])


def test_metrics_of_a_case_by_hand() -> None:
    row = measure_case(REFERENCE, HALF | FAR, SPACING_MM)
    assert (row["tp"], row["fp"], row["fn"]) == (54, 4, 54)
    assert row["dice"] == 2 * 54 / (2 * 54 + 4 + 54)
    assert row["precision"] == 54 / 58
    assert row["recall"] == 54 / 108
    assert row["dice_slice"] == pytest.approx(2 * 18 / (18 + 36))  # the slice without reference is left out
    assert row["tumour_slices"] == 3
    assert row["reference_ml"] == pytest.approx(108 * 2 / 1000)
    assert row["prediction_ml"] == pytest.approx(58 * 2 / 1000)
    assert row["volume_error_ml"] == pytest.approx((4 - 54) * 2 / 1000)
    # the voxels beyond touch the lesion dilated by 3
    assert (row["lesions_tp"], row["lesions_fp"], row["lesions_fn"]) == (1, 0, 0)


def test_metrics_of_a_case_without_tumour() -> None:
    empty = np.zeros(SHAPE, bool)
    row = measure_case(empty, empty, SPACING_MM)
    assert row["dice"] == 1
    assert row["tumour_slices"] == 0
    assert np.isnan([row["precision"], row["recall"], row["dice_slice"]]).all()


def test_masks_are_nested_whatever_the_order_of_the_regions() -> None:
    probabilities = np.array([0.9, 0.9, 0.1], np.float32).reshape(3, 1, 1, 1)  # ET and TC without WT
    assert not threshold_regions(probabilities, (0.5, 0.5, 0.5), ("ET", "TC", "WT")).any()


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------


def test_a_picture_shows_the_slice_with_most_tumour() -> None:
    intensities = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    reference = REFERENCE | block(slice(2, 3), slice(0, 12), slice(0, 12))
    picture = take_picture(intensities, reference, FAR, SPACING_MM)
    assert picture.z == 2
    assert np.array_equal(picture.pixels, intensities[2])
    assert np.array_equal(picture.reference, reference[2])
    assert not picture.prediction.any()
    assert picture.window == grey_window(intensities)
    assert all(array.base is None for array in picture[1:4])  # the volume can be let go


def test_a_picture_without_reference_shows_the_prediction_and_without_either_the_middle() -> None:
    empty, intensities = np.zeros(SHAPE, bool), np.zeros(SHAPE, np.float16)
    assert take_picture(intensities, empty, FAR, SPACING_MM).z == 5
    assert take_picture(intensities, empty, empty, SPACING_MM).z == 3


def test_cases_are_ranked_by_dice_with_tta_and_each_is_named_once() -> None:
    rows = pd.DataFrame(
        [
            {"cohort": "internal", "region": "WT", "mode": mode, "case": case, "dice": dice}
            for case, dice in (("a", 0.2), ("b", 0.9), ("c", 0.5))
            for mode, dice in (("tta", dice), ("plain", 1 - dice))
        ]
    )
    assert rank_cases(rows, "WT", "internal") == {
        "best": ("b", 0.9),
        "median": ("c", 0.5),
        "worst": ("a", 0.2),
    }
    assert list(rank_cases(rows[rows["case"] != "a"], "WT", "internal")) == ["best", "worst"]
    assert list(rank_cases(rows[rows["case"] == "a"], "WT", "internal")) == ["best"]


def read_picture(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1].astype(int)  # (H, W, RGB)


def share_near(pixels: np.ndarray, colour: str) -> float:
    """Return the share of pixels within 40 of a colour in each channel."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((abs(pixels - wanted) <= 40).all(-1).mean())


def test_a_batch_is_drawn_by_its_middle_slices_with_targets_in_colour(tmp_path: Path) -> None:
    # 2 modalities of 3 slices: all is bright but the middle slice of the first, where a corner is
    slabs = torch.full((3, 6, 64, 64), 3.0)
    slabs[:, 1] = 0
    slabs[:, 1, :8, :8] = 3
    targets = torch.zeros(3, 1, 64, 64)
    plot_batch(tmp_path / "none.png", slabs, targets, 1, "a note")
    none = read_picture(tmp_path / "none.png")
    assert share_near(none, "#ffffff") < 0.05
    assert share_near(none, REFERENCE_COLOUR) == 0
    targets[:, :, 20:50, 20:50] = 1
    plot_batch(tmp_path / "some.png", slabs, targets, 1, "a note")
    assert share_near(read_picture(tmp_path / "some.png"), REFERENCE_COLOUR) > 0.005


def test_a_batch_of_many_slabs_and_nested_regions_is_drawn(tmp_path: Path) -> None:
    slabs = torch.randn(20, 3, 32, 32)
    targets = torch.zeros(20, 3, 32, 32)
    targets[:, 0, 5:25, 5:25] = targets[:, 1, 9:20, 9:20] = targets[:, 2, 12:16, 12:16] = 1
    plot_batch(tmp_path / "twenty.png", slabs, targets, 1, "")
    plot_batch(tmp_path / "sixteen.png", slabs[:16], targets[:16], 1, "")
    twenty, sixteen = (read_picture(tmp_path / f"{name}.png") for name in ("twenty", "sixteen"))
    assert np.array_equal(twenty, sixteen)


# ------------------------------------------------------------------------------------------------------------
# Report and figures
# ------------------------------------------------------------------------------------------------------------


def make_results(run: Path, odd_id: str) -> AuditResults:
    """Return an audit of two cohorts of two cases: one segmented exactly, one by half."""
    rows, counts = [], {}
    for cohort in ("validation", "internal"):
        counts[cohort] = np.zeros((1, len(THRESHOLDS), 3), np.int64)
        for case, prediction in ((odd_id, HALF), ("exact", REFERENCE)):
            counts[cohort][0] += overlap_at_thresholds(
                0.9 * prediction.astype(np.float32), REFERENCE, THRESHOLDS
            )
            for mode, mask in (("plain", HALF), ("tta", prediction)):
                row = {"cohort": cohort, "case": case, "patient": case, "region": "WT", "mode": mode}
                row |= {"uncertainty": 0.1 if mode == "tta" else np.nan}
                rows.append(row | {"seen_in_training": False} | measure_case(REFERENCE, mask, SPACING_MM))
    table = pd.DataFrame(rows)
    bins = reliability_counts(np.full(SHAPE, 0.4), REFERENCE, CALIBRATION_EDGES)
    summary: dict[str, Any] = {
        "data_kind": "phantom",
        "seen_in_training": {"internal": {"cases": 2, "seen": 0, "unseen": 2}},
        "cohorts": summarise_all(table, ["WT"], 0),
        "calibration": {"WT": {mode: summarise_calibration(bins) for mode in ("plain", "tta")}},
        "postprocessing": None,
        "threshold": {"WT": 0.35},
        "command": "python final_evaluation_v2.py",
        "checkpoint_sha256": "c0ffee",
        "split_sha256": "5eed",
        "hardware": {"device": "cpu"},
        "versions": {"torch": "2.9"},
    }
    masks = {odd_id: HALF, "exact": REFERENCE}
    leakage = pd.DataFrame(columns=["cohort", "case"])
    return AuditResults(run, summary, table, leakage, counts, lambda _, case: volumes_of(masks[case]))


def volumes_of(prediction: np.ndarray, reference: np.ndarray = REFERENCE) -> CaseVolumes:
    """Return a case whose image is its reference."""
    image = {"flair": REFERENCE.astype(np.float16)}
    return CaseVolumes(image, reference[None], {"prediction": prediction[None]}, None, SPACING_MM)


def test_tables_hold_the_numbers_of_the_summary() -> None:
    summary = make_results(Path("run"), "half").summary
    scores = tabulate_scores(summary).set_index(["cohort", "mode"])
    # Dice 2/3 of the half and 1 of the exact one; plain is the half twice
    assert scores.loc[("internal", "TTA"), "Dice per case"] == "0.833"
    assert scores.loc[("internal", "plain"), "Dice per case"] == "0.667"
    assert scores.loc[("internal", "TTA"), "95 % CI"] == "range 0.667 to 1.000, n = 2"
    assert scores.loc[("internal", "TTA"), "cases / patients"] == "2 / 2"
    gains = tabulate_gains(summary)
    assert gains["effect of"].tolist() == ["TTA", "TTA"]
    assert gains["change of Dice per case"].tolist() == ["+0.1667", "+0.1667"]


def test_plots_of_few_patients_say_range_and_n_and_draw_no_interval(tmp_path: Path, monkeypatch) -> None:
    results = make_results(Path("run"), "half")
    rows = results.rows[results.rows["cohort"] == "internal"]
    cohorts = results.summary["cohorts"]
    paired = rows.rename(columns={"dice": "dice_a"}).assign(dice_b=0.5)
    difference = summarise(paired["dice_a"] - 0.5, ["a", "b", "a", "b"]) | {"p_sign_flip": 1.0}
    compared = {"internal": {"WT": {"tta": {"dice": {"difference": difference}}}}}
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: drawn.append(figure))
    plots.plot_dice_per_case(tmp_path, rows, cohorts, "")
    plots.plot_tta_gain(tmp_path, rows, cohorts, "")
    plots.plot_bland_altman(tmp_path, rows, cohorts, "")
    plots.plot_comparison(tmp_path, paired, compared, ("a", "b"), "")
    spreads = [
        "range 0.667 to 1.000, n = 2",
        "range +0.0000 to +0.3333, n = 2",
        "range -0.1 ml to +0.0 ml, n = 2",
        "range +0.1667 to +0.5000, n = 4",
    ]
    for figure, spread in zip(drawn, spreads, strict=True):
        (axes,) = figure.axes
        legend = axes.get_legend()
        words = [axes.get_title(), *(text.get_text() for text in (legend.get_texts() if legend else ()))]
        assert any(spread in text for text in words), words
        assert not any("95 %" in text for text in words)
        assert not axes.patches or axes.get_ylabel() == "WT Dice, TTA - plain"  # whose bars are patches


def test_seen_cases_are_warned_of() -> None:
    summary = make_results(Path("run"), "half").summary
    assert list_warnings(summary) == ["These are synthetic phantoms, not a BraTS result."]
    summary = summary | {"data_kind": "real"}
    assert list_warnings(summary) == []
    summary["seen_in_training"] = {"external": {"cases": 3, "seen": 3, "unseen": 0}}
    (warning,) = list_warnings(summary)
    assert "3 of 3 cases were in training or validation, 0 unseen" in warning
    assert "no unseen case is left, so this cohort is not a test set" in warning


def test_report_shows_ids_whole_and_as_text(tmp_path: Path) -> None:
    odd_id = f"<b>{'x' * 80}&</b>"
    results = make_results(tmp_path / "<i>run", odd_id)
    figures = draw_figures(results, tmp_path / "figures")
    names = [path.name for path in figures.values()]
    assert names == [name for name in CAPTIONS if name != "training_curves.png"] + ["cases_internal.png"]
    write_report(tmp_path / "report.html", results, figures)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f">&lt;b&gt;{'x' * 80}&amp;&lt;/b&gt;</button>" in text
    assert "<title>Audit of &lt;i&gt;run</title>" in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "Each tested case was compared with all cases of training" in text
    assert text.count("data:image/png;base64,") == 1  # the case pictures; charts are SVG
    assert text.count("<svg ") == len(figures) - 1
    assert "torch 2.9" in text


def test_report_lists_what_leaked(tmp_path: Path) -> None:
    row = {"cohort": "internal", "case": "half", "evidence": "content", "similarity": 0.98765}
    leakage = pd.DataFrame([row | {"correlation": np.nan}])
    results = dataclasses.replace(make_results(tmp_path, "half"), leakage=leakage)
    write_report(tmp_path / "report.html", results, {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">content</td>" in text
    assert ">0.988</td>" in text
    assert ">-</td>" in text
    assert "No tested case was found in training" not in text


def test_report_with_a_gap_in_its_template_is_not_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "report.html.j2").write_text("{{ run }} {{ not_there }}")
    monkeypatch.setattr("audit.page.TEMPLATES", tmp_path)
    with pytest.raises(jinja2.UndefinedError, match="not_there"):
        write_report(tmp_path / "report.html", make_results(tmp_path, "half"), {})
    assert not (tmp_path / "report.html").exists()


def test_pooled_dice_is_of_the_counts_of_all_cases() -> None:
    summary = make_results(Path("run"), "half").summary
    # 54 and 108 of 108 voxels each
    expected = Overlap(162, 0, 54).dice
    assert summary["cohorts"]["internal"]["WT"]["tta"]["dice_pooled"] == expected == 2 * 162 / (2 * 162 + 54)
