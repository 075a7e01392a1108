"""What the audit measures: of one region of one case, and of a cohort."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lesions_v2 import score_lesions
from statistics_v2 import compare_paired, limits_of_agreement, summarise
from utils_v2 import count_overlap, dice_from_counts, precision, recall, surface_metrics

SURFACE_TOLERANCE_MM = 1.0
AVERAGED = (
    "dice", "precision", "recall", "hd95_mm", "nsd_1mm", "volume_error_ml", "lesion_dice", "lesion_hd95_mm",
)  # fmt: skip


def slice_dice(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return the Dice of each slice that has reference tumour, shape (slices with tumour,)."""
    slices = np.flatnonzero(reference.any((1, 2)))
    return np.array([dice_from_counts(*count_overlap(reference[z], prediction[z])) for z in slices])


def measure_case(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, Any]:
    """Return every metric of one region of one case; both masks (D, H, W) bool on the native grid."""
    tp, fp, fn = count_overlap(reference, prediction)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    per_slice = slice_dice(reference, prediction)
    hd95_mm, nsd = surface_metrics(reference, prediction, spacing_mm, SURFACE_TOLERANCE_MM)
    lesions = score_lesions(reference, prediction, spacing_mm)
    return {
        "dice": dice_from_counts(tp, fp, fn),
        "precision": precision(reference, prediction),
        "recall": recall(reference, prediction),
        "hd95_mm": hd95_mm,
        "nsd_1mm": nsd,
        "dice_slice": float(per_slice.mean()) if len(per_slice) else float("nan"),
        "tumour_slices": len(per_slice),
        "reference_ml": (tp + fn) * voxel_ml,
        "prediction_ml": (tp + fp) * voxel_ml,
        "volume_error_ml": (fp - fn) * voxel_ml,
        "lesion_dice": lesions.dice,
        "lesion_hd95_mm": lesions.hd95_mm,
        "lesions_tp": lesions.tp,
        "lesions_fp": lesions.fp,
        "lesions_fn": lesions.fn,
        "tp": tp,
        "fp": fp,
        "fn": fn,
    }


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
        "dice_pooled": dice_from_counts(*(int(rows[name].sum()) for name in ("tp", "fp", "fn"))),
        **{name: int(rows[name].sum()) for name in ("lesions_tp", "lesions_fp", "lesions_fn")},
        "n_cases": len(rows),
        "n_patients": rows["patient"].nunique(),
        "n_empty_reference": int((rows["reference_ml"] == 0).sum()),
        "n_empty_prediction": int((rows["prediction_ml"] == 0).sum()),
    }


def summarise_all(rows: pd.DataFrame, regions: Sequence[str], seed: int) -> dict[str, Any]:
    """Return {cohort: {region: {mode: summary, and paired Dice differences}}} of all per-case rows.

    "tta_gain" is TTA minus plain. Where post-processing is on, "postprocessing_gain" is with minus without
    it, both with TTA.
    """
    cohorts: dict[str, Any] = {}
    for (cohort, region), chosen in rows.groupby(["cohort", "region"], sort=False):
        modes = {mode: part.reset_index(drop=True) for mode, part in chosen.groupby("mode", sort=False)}
        patients = modes["tta"]["patient"].tolist()
        dice = {mode: part["dice"].to_numpy() for mode, part in modes.items()}
        summary = {mode: summarise_cohort(part, seed) for mode, part in modes.items()}
        summary["tta_gain"] = compare_paired(dice["tta"], dice["plain"], patients, seed)
        if "tta_raw" in modes:
            summary["postprocessing_gain"] = compare_paired(dice["tta"], dice["tta_raw"], patients, seed)
        cohorts.setdefault(cohort, {})[region] = summary
    return {
        cohort: {region: by_region[region] for region in regions} for cohort, by_region in cohorts.items()
    }
