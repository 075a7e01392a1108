"""What the audit measures: of one region of one case, and of a cohort."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from audit.lesions import score_lesions
from audit.statistics import compare_paired, limits_of_agreement, rank_correlation, summarise
from utils_v2 import Overlap, check_masks, surface_metrics

SURFACE_TOLERANCE_MM = 1.0
# Keys of measure_case that get a mean, SD and interval. A new one is shown where audit/report.py tabulates
# it; --compare has a list of its own, compare.COMPARED.
AVERAGED = (
    "dice", "precision", "recall", "hd95_mm", "nsd_1mm", "volume_error_ml", "lesion_dice", "lesion_hd95_mm",
)  # fmt: skip


def count_overlap_per_slice(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return TP, FP and FN of each slice of two bool masks (D, H, W), shape (D, 3) int64."""
    check_masks(reference, prediction)
    shared, predicted, present = (
        np.count_nonzero(mask, axis=(1, 2)) for mask in (reference & prediction, prediction, reference)
    )
    return np.stack([shared, predicted - shared, present - shared], axis=1)


def measure_case(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, Any]:
    """Return every metric of one region of one case; both masks (D, H, W) bool on the native grid."""
    per_slice = count_overlap_per_slice(reference, prediction)  # (D, 3)
    overlap = Overlap(*per_slice.sum(0).tolist())
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    slices = [Overlap(*counts) for counts in per_slice.tolist()]
    slice_dice = [of_slice.dice for of_slice in slices if of_slice.tp + of_slice.fn]  # with reference tumour
    hd95_mm, nsd = surface_metrics(reference, prediction, spacing_mm, SURFACE_TOLERANCE_MM)
    lesions = score_lesions(reference, prediction, spacing_mm)
    return {
        "dice": overlap.dice,
        "precision": overlap.precision,
        "recall": overlap.recall,
        "hd95_mm": hd95_mm,
        "nsd_1mm": nsd,
        "dice_slice": float(np.mean(slice_dice)) if slice_dice else float("nan"),
        "tumour_slices": len(slice_dice),
        "reference_ml": (overlap.tp + overlap.fn) * voxel_ml,
        "prediction_ml": (overlap.tp + overlap.fp) * voxel_ml,
        "volume_error_ml": (overlap.fp - overlap.fn) * voxel_ml,
        "lesion_dice": lesions.dice,
        "lesion_hd95_mm": lesions.hd95_mm,
        "lesions_tp": lesions.tp,
        "lesions_fp": lesions.fp,
        "lesions_fn": lesions.fn,
        **overlap._asdict(),
    }


def mean_uncertainty(views: np.ndarray, prediction: np.ndarray, brain: np.ndarray) -> float:
    """Return how much the views of a region disagree, 0 to 0.47: their SD, mean over the predicted voxels.

    `views` (V, D, H, W) are the probabilities of each view of TTA; the SD is that of the V values (divisor
    V). `prediction` (D, H, W) bool is the mask of their mean; where it is empty the voxels of `brain` are
    taken, and NaN where that is empty too.
    """
    voxels = prediction if prediction.any() else brain
    return float(views[:, voxels].std(0, dtype=np.float64).mean()) if voxels.any() else float("nan")


def mean_spread(spread: np.ndarray, prediction: np.ndarray, brain: np.ndarray) -> float:
    """Return `mean_uncertainty` of the networks of an ensemble in place of views, from their SD (D, H, W)."""
    voxels = prediction if prediction.any() else brain
    return float(spread[voxels].mean(dtype=np.float64)) if voxels.any() else float("nan")


def summarise_cohort(rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return the summary of one cohort, region and mode from its per-case rows."""
    patients = rows["patient"].tolist()
    summary: dict[str, Any] = {metric: summarise(rows[metric], patients, seed) for metric in AVERAGED}
    summary["volume_error_ml"]["limits_of_agreement"] = limits_of_agreement(rows["volume_error_ml"])
    slices = rows[rows["tumour_slices"] > 0]
    total = int(slices["tumour_slices"].sum())
    return summary | {
        "dice_slice": float((slices["dice_slice"] * slices["tumour_slices"]).sum() / total)
        if total
        else None,
        "n_slices": total,
        "dice_pooled": Overlap(*(int(rows[name].sum()) for name in Overlap._fields)).dice,
        **{name: int(rows[name].sum()) for name in ("lesions_tp", "lesions_fp", "lesions_fn")},
        "n_cases": rows["case"].nunique(),  # of several folds, a case of validation may have several rows
        "n_patients": rows["patient"].nunique(),
        "n_empty_reference": int((rows["reference_ml"] == 0).sum()),
        "n_empty_prediction": int((rows["prediction_ml"] == 0).sum()),
    }


def summarise_all(rows: pd.DataFrame, regions: Sequence[str], seed: int) -> dict[str, Any]:
    """Return {cohort: {region: {mode: summary, and paired Dice differences}}} of all per-case rows.

    "tta_gain" is TTA minus plain; masks of another tool are plain alone and have none. Where post-processing
    is on, "postprocessing_gain" is with minus without it, both with TTA. "uncertainty_and_dice" is the rank
    correlation over cases of the two, with TTA.
    """
    cohorts: dict[str, Any] = {}
    for (cohort, region), of_region in rows.groupby(["cohort", "region"], sort=False):
        modes = {mode: table.reset_index(drop=True) for mode, table in of_region.groupby("mode", sort=False)}
        patients = next(iter(modes.values()))["patient"].tolist()
        dice = {mode: table["dice"].to_numpy() for mode, table in modes.items()}
        summary = {mode: summarise_cohort(table, seed) for mode, table in modes.items()}
        if "tta" in modes:
            summary["tta_gain"] = compare_paired(dice["tta"], dice["plain"], patients, seed)
        if "tta_raw" in modes:
            summary["postprocessing_gain"] = compare_paired(dice["tta"], dice["tta_raw"], patients, seed)
        if "tta" in modes and "uncertainty" in rows:
            summary["uncertainty_and_dice"] = rank_correlation(modes["tta"]["uncertainty"], dice["tta"])
        cohorts.setdefault(cohort, {})[region] = summary
    return {
        cohort: {region: by_region[region] for region in regions} for cohort, by_region in cohorts.items()
    }
