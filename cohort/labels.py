"""Label values: which numbers in a mask file make up which tumour region, in each data set's convention."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    "brats-ped": {"WT": (1, 2, 3, 4), "TC": (1, 2, 3), "ET": (1,)},  # 2 non-enhancing, 3 cyst, 4 edema
    "binary": {"WT": (1,)},
}
NO_REGION = {"brats2024": (4,)}  # known values that belong to no region: the resection cavity
# Written back from the largest region to the smallest, so that each reads as its convention means it.
OUTPUT_LABELS = {
    "brats": {"WT": 2, "TC": 1, "ET": 4},
    "brats2023": {"WT": 2, "TC": 1, "ET": 3},
    "brats2024": {"WT": 2, "TC": 1, "ET": 3},
    "msd": {"WT": 1, "TC": 2, "ET": 3},
    "brats-ped": {"WT": 4, "TC": 2, "ET": 1},
    "binary": {"WT": 1, "TC": 1, "ET": 1},
}
# What a dataset.json may call its labels: the first pattern that a name holds says which tissue it is.
TISSUE_NAMES = (
    ("whole", r"whole|\bwt\b|^(brain )?(tumou?r|glioma|lesion|abnormality|foreground|mask)$"),
    ("edema", r"edema|\bed\b|peritum|infiltrat|invaded|snfh"),
    ("core", r"non.?enhanc|necro|\bncr\b|\bnetc?\b|core|\btc\b|cyst"),
    ("enhancing", r"enhanc|\bet\b|active"),
)
LABEL_TOLERANCE = 1e-3  # float masks may miss an integer by so much


def round_labels(labels: np.ndarray) -> np.ndarray:
    """Return float labels with those within 1e-3 of an integer rounded to it and the others as they are."""
    if labels.dtype.kind in "iub":
        return labels
    rounded = np.rint(labels)
    return np.where(np.abs(labels - rounded) <= LABEL_TOLERANCE, rounded, labels)


def values_of(convention: str) -> dict[str, tuple[int, ...]]:
    """Return which file values make up each region.

    A convention that is no key of LABEL_CONVENTIONS spells its tissues out: "core=2+4,edema=1,enhancing=3".
    """
    if "=" not in convention:
        return LABEL_CONVENTIONS[convention]
    tissues = {
        tissue: tuple(map(int, values.split("+")))
        for tissue, values in (entry.split("=") for entry in convention.split(","))
    }
    enhancing, core = tissues.get("enhancing", ()), tissues.get("core", ())
    table = {
        "WT": (*core, *tissues.get("edema", ()), *enhancing, *tissues.get("whole", ())),
        "TC": (*core, *enhancing),
        "ET": enhancing,
    }
    return {region: tuple(sorted(values)) for region, values in table.items() if values}


def output_values_of(convention: str) -> dict[str, int]:
    """Return the value that each region is written with, from the largest region to the smallest."""
    if "=" not in convention:
        return OUTPUT_LABELS[convention]
    table = values_of(convention)
    only = {
        region: sorted(set(table[region]) - set(table.get(inner, ())))
        for region, inner in (("WT", "TC"), ("TC", "ET"), ("ET", ""))
        if region in table
    }
    return {region: (values or table[region])[0] for region, values in only.items()}


def convention_of_names(names: Mapping[str, int | Sequence[int]], path: Path) -> str:
    """Return the label convention of a dataset.json's labels: {name: value, or the values of a region}.

    A key of LABEL_CONVENTIONS where one says the same. Raises InputError where a name is of no known tissue.
    """
    values: dict[str, set[int]] = {}
    for name, value in names.items():
        own = {value} if isinstance(value, int) else set(value)
        if own == {0}:
            continue
        plain = re.sub(r"[_\W]+", " ", name.lower())
        tissue = next((tissue for tissue, pattern in TISSUE_NAMES if re.search(pattern, plain)), None)
        if tissue is None:
            raise InputError(path, f"label {name!r} is no known tissue", "call it edema, core or enhancing")
        values[tissue] = values.get(tissue, set()) | own
    if any(not isinstance(value, int) for value in names.values()):  # regions, which hold each other
        inner = values.get("enhancing", set())
        core = values.get("core", set()) - inner
        values = {"enhancing": inner, "core": core, "edema": values.get("whole", set()) - core - inner}
    if not any(values.values()):
        raise InputError(path, "names no label", "it must say what the values of the masks mean")
    spelt = ",".join(
        f"{tissue}={'+'.join(map(str, sorted(own)))}" for tissue, own in sorted(values.items()) if own
    )
    table = values_of(spelt)
    if set(table) == {"WT"} and table["WT"] == (1,):
        return "binary"
    return next((name for name, known in LABEL_CONVENTIONS.items() if known == table), spelt)


def regions_from_labels(labels: np.ndarray, convention: str, regions: Sequence[str]) -> np.ndarray:
    """Return bool masks (R, D, H, W) of the named regions; InputError where there is none of one."""
    table = values_of(convention)
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
    for region, value in output_values_of(convention).items():
        if region in regions:
            labels[masks[list(regions).index(region)]] = value
    return labels
