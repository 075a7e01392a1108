"""Label values: which numbers in a mask file make up which tumour region, in each data set's convention."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from runtime.command import Distinct
from runtime.errors import InputError

Region = Literal["WT", "TC", "ET"]
Regions = Annotated[tuple[Region, ...], Distinct()]  # as a setting
OUTER_TO_INNER = ("WT", "TC", "ET")


def nested_order(regions: Sequence[str]) -> list[str]:
    """Return the regions from the outermost to the innermost."""
    return [region for region in OUTER_TO_INNER if region in regions]


# Which file values make up each region. TC and ET lie inside WT; a convention without them has binary masks.
LABEL_CONVENTIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "brats": {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},  # 1 necrotic core, 2 edema, 4 enhancing
    "brats2023": {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
    "brats2024": {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
    "msd": {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)},  # 1 edema, 2 non-enhancing core
    "binary": {"WT": (1,)},
}
NO_REGION = {"brats2024": (4,)}  # known values that belong to no region: the resection cavity
# Written back from the largest region to the smallest, so that each reads as its convention means it.
OUTPUT_LABELS = {
    "brats": {"WT": 2, "TC": 1, "ET": 4},
    "brats2023": {"WT": 2, "TC": 1, "ET": 3},
    "brats2024": {"WT": 2, "TC": 1, "ET": 3},
    "msd": {"WT": 1, "TC": 2, "ET": 3},
    "binary": {"WT": 1, "TC": 1, "ET": 1},
}
LABEL_TOLERANCE = 1e-3  # float masks may miss an integer by so much


def round_labels(labels: np.ndarray) -> np.ndarray:
    """Return float labels with those within 1e-3 of an integer rounded to it and the others as they are."""
    if labels.dtype.kind in "iub":
        return labels
    rounded = np.rint(labels)
    return np.where(np.abs(labels - rounded) <= LABEL_TOLERANCE, rounded, labels)


def regions_from_labels(labels: np.ndarray, convention: str, regions: Sequence[str]) -> np.ndarray:
    """Return bool masks (R, D, H, W) of the named regions; InputError where there is none of one."""
    table = LABEL_CONVENTIONS[convention]
    if missing := [region for region in regions if region not in table]:
        raise InputError(f"--regions {missing[0]}", f"{convention} masks hold only {', '.join(table)}")
    return np.stack([np.isin(labels, table[region]) for region in regions])


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------


def labels_from_regions(masks: np.ndarray, regions: Sequence[str], convention: str = "brats") -> np.ndarray:
    """Return labels (D, H, W) uint8 of region masks (R, D, H, W), in the values of a label convention.

    In BraTS 2021's ET becomes 4, the rest of TC 1, the rest of WT 2; a network of WT alone says nothing of
    the core and writes 2.
    """
    labels = np.zeros(masks.shape[1:], np.uint8)
    for region, value in OUTPUT_LABELS[convention].items():
        if region in regions:
            labels[masks[list(regions).index(region)]] = value
    return labels
