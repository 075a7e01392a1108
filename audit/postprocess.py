"""From probabilities to masks: threshold, nesting, post-processing, and its choice on validation."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from audit.lesions import NEIGHBOURS_26
from cohort.labels import nested_order
from utils_v2 import Overlap, bounding_box

COMPONENT_CANDIDATES_MM3 = (0.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
TOTAL_CANDIDATES_MM3 = {"ET": (0.0, 25.0, 50.0, 100.0, 200.0, 500.0)}  # other regions: never emptied
SMALLEST_GAIN = 1e-4  # of the mean Dice per case; less is no reason to touch a mask

Settings = Mapping[str, Mapping[str, Any]]
NO_CHANGE = {"min_component_mm3": 0.0, "fill_holes": False, "min_total_mm3": 0.0}


def settings_of(checkpoint: Mapping[str, Any]) -> Settings:
    """Return the post-processing a checkpoint was given; empty where it has none."""
    return (checkpoint.get("postprocessing") or {}).get("settings", {})


def join_settings(choices: Sequence[Settings]) -> dict[str, dict[str, Any]]:
    """Return one setting per region for the mean of several networks, each with settings of its own.

    Of each figure it is the median, the lower of two, so that it is one of those chosen; holes are filled
    where more than half of the networks fill them. A region without a setting counts as one that changes
    nothing.
    """
    joined = {}
    for region in dict.fromkeys(region for choice in choices for region in choice):
        settings = [choice.get(region, NO_CHANGE) for choice in choices]
        middle = {name: statistics.median_low(each[name] for each in settings) for name in NO_CHANGE}
        if middle != NO_CHANGE:
            joined[region] = middle
    return joined


def kept_components(voxels: np.ndarray, voxel_mm3: float, minimum_mm3: float) -> np.ndarray:
    """Return which labels stay, (N,) bool, from the voxels of each; label 0 is background and does not.

    A component stays from `minimum_mm3` on; the largest stays in any case, so that this alone never empties a
    mask.
    """
    volumes_mm3 = voxels * voxel_mm3
    volumes_mm3[0] = 0
    kept = volumes_mm3 >= min(minimum_mm3, volumes_mm3.max())
    kept[0] = False
    return kept


def clean_region(
    mask: np.ndarray, spacing_mm: Sequence[float], setting: Mapping[str, Any], within: np.ndarray | None
) -> np.ndarray:
    """Return one region's mask (D, H, W) bool after one setting; the input stays as it was.

    In this order: holes are filled, what reaches out of `within` is cut, small components go, and a mask with
    less than the smallest total volume is emptied.
    """
    if not mask.any():
        return mask
    voxel_mm3 = float(np.prod(spacing_mm))
    cleaned = np.zeros_like(mask)
    box = bounding_box(mask)
    inside = ndimage.binary_fill_holes(mask[box]) if setting["fill_holes"] else mask[box]
    if within is not None:
        inside = inside & within[box]
    if setting["min_component_mm3"] > 0 and inside.any():
        components, _ = ndimage.label(inside, NEIGHBOURS_26)
        inside = kept_components(np.bincount(components.ravel()), voxel_mm3, setting["min_component_mm3"])[
            components
        ]
    if np.count_nonzero(inside) * voxel_mm3 >= setting["min_total_mm3"]:
        cleaned[box] = inside
    return cleaned


def postprocess(
    masks: np.ndarray, regions: Sequence[str], spacing_mm: Sequence[float], settings: Settings | None
) -> np.ndarray:
    """Return masks (R, D, H, W) bool after post-processing, ET inside TC inside WT.

    Regions are cleaned from the outside in, each one cut to what is left of the next outer one. Without
    settings the masks come back as they are.
    """
    if not settings:
        return masks
    masks = masks.copy()
    outer = None
    for region in nested_order(regions):
        index = list(regions).index(region)
        if outer is not None:
            masks[index] &= outer
        if region in settings:
            masks[index] = clean_region(masks[index], spacing_mm, settings[region], outer)
        outer = masks[index]
    return masks


# ------------------------------------------------------------------------------------------------------------
# Choosing on validation
# ------------------------------------------------------------------------------------------------------------


@dataclass
class CroppedCase:
    """A validation case cut to the box of its masks, beyond which no setting changes anything."""

    masks: np.ndarray  # (R, d, h, w) bool, as the threshold made them
    reference: np.ndarray  # (R, d, h, w) bool
    missed: np.ndarray  # (R,) voxels of the reference outside of the box
    spacing_mm: tuple[float, ...]


def crop_case(masks: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]) -> CroppedCase:
    """Return a case as `choose_postprocessing` takes it; masks and reference (R, D, H, W) bool."""
    box = bounding_box(masks.any(0)) if masks.any() else (slice(0, 1),) * 3
    inside = np.array(reference[(slice(None), *box)])
    missed = np.asarray(reference).sum((1, 2, 3)) - inside.sum((1, 2, 3))
    return CroppedCase(np.array(masks[(slice(None), *box)]), inside, missed, tuple(spacing_mm))


def _dice(case: CroppedCase, index: int, voxels: int, overlap: int) -> float:
    """Dice of a mask by its voxels and those it shares with the case's reference of region `index`."""
    reference = int(np.count_nonzero(case.reference[index])) + int(case.missed[index])
    return Overlap(overlap, voxels - overlap, reference - overlap).dice


def candidate_settings(region: str) -> list[dict[str, Any]]:
    """Return the settings tried for a region, the one that changes nothing first."""
    totals = TOTAL_CANDIDATES_MM3.get(region, (0.0,))
    return [
        {"min_component_mm3": component, "fill_holes": fill, "min_total_mm3": total}
        for component, fill, total in itertools.product(COMPONENT_CANDIDATES_MM3, (False, True), totals)
    ]


def _score_candidates(
    case: CroppedCase,
    index: int,
    masks: np.ndarray,
    within: np.ndarray | None,
    candidates: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Return the Dice of region `index` under each candidate, as `clean_region` would give it.

    Components are labelled once with holes and once without; a candidate is then a sum over components.
    """
    voxel_mm3 = float(np.prod(case.spacing_mm))
    tables = {}
    for fill in (False, True):
        mask = ndimage.binary_fill_holes(masks[index]) if fill else masks[index]
        if within is not None:
            mask = mask & within
        components, _ = ndimage.label(mask, NEIGHBOURS_26)
        hit = np.bincount(components[case.reference[index]], minlength=int(components.max()) + 1)
        tables[fill] = np.bincount(components.ravel()), hit
    scores = []
    for candidate in candidates:
        voxels, hit = tables[candidate["fill_holes"]]
        kept = kept_components(voxels, voxel_mm3, candidate["min_component_mm3"])
        total, overlap = int(voxels[kept].sum()), int(hit[kept].sum())
        if total * voxel_mm3 < candidate["min_total_mm3"]:
            total = overlap = 0
        scores.append(_dice(case, index, total, overlap))
    return scores


def choose_postprocessing(cases: Sequence[CroppedCase], regions: Sequence[str]) -> dict[str, Any]:
    """Return {"settings", "validation_dice_before", "validation_dice_after"} for validation cases.

    From the outermost region in, each takes the setting with the highest mean Dice per case, on masks cut to
    the outer regions as already chosen; the first of equals. A region whose gain is no more than
    SMALLEST_GAIN gets none, and no region does where the mean over regions gains no more. The two Dice are
    per region, mean over cases.
    """
    settings: dict[str, dict[str, Any]] = {}
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for region in nested_order(regions):
        index = list(regions).index(region)
        candidates = candidate_settings(region)
        scores, raw = [], []
        for case in cases:
            masks = postprocess(case.masks, regions, case.spacing_mm, settings)
            outer = nested_order(regions)[: nested_order(regions).index(region)]
            within = masks[list(regions).index(outer[-1])] if outer else None
            scores.append(_score_candidates(case, index, masks, within, candidates))
            mask = case.masks[index]
            overlap = int(np.count_nonzero(mask & case.reference[index]))
            raw.append(_dice(case, index, int(np.count_nonzero(mask)), overlap))
        mean = np.mean(scores, axis=0)
        chosen = int(mean.argmax())
        if mean[chosen] > mean[0] + SMALLEST_GAIN:
            settings[region] = candidates[chosen]
        before[region] = float(np.mean(raw))
        after[region] = float(mean[chosen if region in settings else 0])
    if sum(after.values()) <= sum(before.values()) + SMALLEST_GAIN * len(before):
        settings, after = {}, dict(before)
    return {"settings": settings, "validation_dice_before": before, "validation_dice_after": after}


def describe_postprocessing(settings: Settings | None) -> str:
    """Return the settings in words, one clause a region."""
    if not settings:
        return "none"
    clauses = []
    for region, setting in settings.items():
        parts = []
        if setting["fill_holes"]:
            parts.append("holes filled")
        if setting["min_component_mm3"]:
            parts.append(
                f"components below {setting['min_component_mm3']:g} mm3 dropped, but for the largest"
            )
        if setting["min_total_mm3"]:
            parts.append(f"emptied below {setting['min_total_mm3']:g} mm3 in all")
        clauses.append(f"{region}: {', '.join(parts)}")
    return "; ".join(clauses)


def threshold_regions(
    probabilities: np.ndarray, thresholds: Sequence[float], regions: Sequence[str]
) -> np.ndarray:
    """Return masks (R, D, H, W) bool: probability at or above the threshold, ET inside TC inside WT."""
    masks = probabilities >= np.reshape(np.asarray(thresholds, probabilities.dtype), (-1, 1, 1, 1))
    nested = [list(regions).index(region) for region in nested_order(regions)]
    for outer, inner in itertools.pairwise(nested):
        masks[inner] &= masks[outer]
    return masks
