"""Masks that another tool made: which file is of which case, on the grid of the case's reference."""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cohort.cases import Case, read_labels
from cohort.labels import regions_from_labels, values_of
from cohort.nifti import AFFINE_TOLERANCE_MM, measure_spacing
from runtime.errors import InputError
from runtime.folders import walk_tree
from runtime.processes import map_in_processes

# What may follow a case id in the name of its mask: _seg, -seg, _pred, _prediction, _pred_final, _mask, ...
ENDING = r"[_-](?:seg|segm|segmentation|pred[a-z]*|mask|dseg|label|labels)(?:[_.-].*)?"
SLICE_NAME = re.compile(r"(.+)_(\d+)(?:_(?:mask|seg|pred[a-z]*))?\.(?:png|tiff?)", re.IGNORECASE)
SHOWN = 10  # names listed in a message


@dataclass(frozen=True)
class Matched:
    """The masks of a folder, sorted out: each pair is a case whose `mask` is that of the reference."""

    pairs: list[tuple[Case, tuple[Path, ...]]]  # and the files of its prediction
    missing: list[str]  # ids of the cases with a reference and no prediction
    unknown: list[str]  # masks that belong to no case with a reference
    ignored: list[str]  # other files of cases that have a prediction, such as probability maps


def match_predictions(folder: Path, cases: Sequence[Case]) -> Matched:
    """Return which masks below a folder are of which case, by the case id in their names.

    `<case>.nii[.gz]`, or with an ending such as `_seg`, `-seg` or `_pred`; for picture cases the slices
    `<case>_<z>_mask.png`, in a folder of the case or not. Raises InputError where a case has two predictions,
    slices are missing, or a file is an input or reference itself.
    """
    if not folder.is_dir():
        raise InputError(f"--predictions {folder}", "no such folder", "give the folder that holds the masks")
    volumes: dict[str, list[Path]] = defaultdict(list)
    slices: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    ids = {case.case_id for case in cases if case.layout != "slices"}
    for parent, _, names in walk_tree(folder):
        for name in [name for name in names if not name.startswith(".")]:
            path = parent / name
            if name.lower().endswith((".nii", ".nii.gz")):
                volumes[name_of_case(name, ids)].append(path)
            elif match := SLICE_NAME.fullmatch(name):
                slices[match[1]][int(match[2])].append(path)
    pairs, missing = [], []
    for case in cases:
        is_slices = case.layout == "slices"
        found = match_slices(case, slices) if is_slices else match_volume(case, volumes)
        if found:
            pairs.append((case, found))
        else:
            missing.append(case.case_id)
    scored = tuple(f"{case.case_id}{joint}" for case, _ in pairs for joint in "_-.")
    others = [path for paths in volumes.values() for path in paths]
    ignored = [str(path) for path in others if path.name.startswith(scored)]
    unknown = [str(path) for path in others if not path.name.startswith(scored)]
    if any(case.layout == "slices" for case in cases):  # elsewhere pictures are previews
        unknown += [f"{case_id} ({len(numbers)} slices)" for case_id, numbers in slices.items()]
    refuse_own_files(pairs, cases)
    return Matched(pairs, missing, sorted(unknown), sorted(ignored))


def name_of_case(name: str, ids: set[str]) -> str:
    """Return the case id a NIfTI mask is named after; its whole stem where it names none of them."""
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    if stem in ids:
        return stem
    cuts = [match.start() for match in re.finditer("[_-]", stem)]
    fitting = [stem[:cut] for cut in cuts if re.fullmatch(ENDING, stem[cut:], re.IGNORECASE)]
    return next((case_id for case_id in reversed(fitting) if case_id in ids), stem)


def match_volume(case: Case, volumes: dict[str, list[Path]]) -> tuple[Path, ...]:
    """Take the one NIfTI file of a case out of `volumes`; empty where there is none."""
    paths = volumes.pop(case.case_id, [])
    if len(paths) > 1:
        raise InputError(
            paths[1], f"{case.case_id} has another prediction, {paths[0]}", "keep one of the two"
        )
    return tuple(paths)


def match_slices(case: Case, slices: dict[str, dict[int, list[Path]]]) -> tuple[Path, ...]:
    """Take the slices of a case out of `slices`, in the order of its reference; empty where there is none."""
    by_number = slices.pop(case.case_id, {})
    if not by_number:
        return ()
    numbers = [int(SLICE_NAME.fullmatch(path.name)[2]) for path in case.mask]
    if absent := [z for z in numbers if z not in by_number]:
        path = by_number[min(by_number)][0].parent
        raise InputError(
            path,
            f"slice {absent[0]} of {case.case_id} has no predicted mask",
            "write one per slice, empty ones too",
        )
    if extra := sorted(set(by_number) - set(numbers)):
        raise InputError(
            by_number[extra[0]][0], f"{case.case_id} has no reference for slice {extra[0]}", "take it out"
        )
    for paths in by_number.values():
        if len(paths) > 1:
            raise InputError(paths[1], f"the slice has another prediction, {paths[0]}", "keep one of the two")
    return tuple(by_number[z][0] for z in numbers)


def refuse_own_files(pairs: Sequence[tuple[Case, tuple[Path, ...]]], cases: Sequence[Case]) -> None:
    """Raise InputError where a prediction is a file of the cases: a reference would score 1 on itself."""
    own = {
        path.resolve() for case in cases for paths in (*case.modalities.values(), case.mask) for path in paths
    }
    for case, paths in pairs:
        for path in paths:
            if path.resolve() in own:
                raise InputError(
                    f"--predictions {path}",
                    f"is a file of case {case.case_id} in --data-dir, not a prediction",
                    "give the folder that the other tool wrote to",
                )


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


class MaskPair(NamedTuple):
    """Reference and prediction of a case on one grid."""

    reference: np.ndarray  # (R, D, H, W) bool
    prediction: np.ndarray  # (R, D, H, W) bool
    spacing_mm: tuple[float, float, float]  # (D, H, W)


def read_pair(
    case: Case, paths: tuple[Path, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Return (reference labels (D, H, W), predicted labels (D, H, W), spacing in mm), canonical.

    Raises InputError where the two differ in shape or affine, or hold a label that the cohort's convention
    does not have.
    """
    reference, affine = read_labels(case)
    prediction, own_affine = read_labels(dataclasses.replace(case, mask=paths))
    if prediction.shape != reference.shape:
        raise InputError(
            paths[0],
            f"has shape {prediction.shape}, the reference {case.mask[0]} {reference.shape}",
            "score masks on the grid of the reference",
        )
    if not np.allclose(own_affine, affine, atol=AFFINE_TOLERANCE_MM):
        own, other = (np.round(matrix[:3], 3).tolist() for matrix in (own_affine, affine))
        raise InputError(
            paths[0],
            f"lies elsewhere than the reference {case.mask[0]}: affine {own}, the reference's {other}",
            "write the mask with the geometry of the scan",
        )
    return reference, prediction, measure_spacing(affine)


def find_values(pair: tuple[Case, tuple[Path, ...]]) -> set[int]:
    """Return the label values of a case's prediction; see `read_pair` for what is refused."""
    return set(np.unique(read_pair(*pair)[1]).tolist())


def collect_values(pairs: Sequence[tuple[Case, tuple[Path, ...]]]) -> set[int]:
    """Return the label values of all predictions, each file checked against its reference."""
    return set().union(*map_in_processes(find_values, pairs, "checking masks", "case"))


def usual_regions(cases: Sequence[Case]) -> tuple[str, ...]:
    """Return the regions that the label conventions of all cases have."""
    tables = [values_of(convention) for convention in sorted({case.convention for case in cases})]
    return tuple(region for region in tables[0] if all(region in table for table in tables))


def is_binary(convention: str, values: set[int], regions: Sequence[str]) -> bool:
    """Return whether predictions of one region are 0 and 1 alone where references tell parts of the tumour.

    Raises InputError where several regions are asked of masks with one label: it may be the whole tumour, and
    would be read as the necrotic core or edema.
    """
    present = values - {0}
    if len(values_of(convention)) == 1 or len(present) != 1:
        return False
    if len(regions) > 1:
        raise InputError(
            "--predictions",
            f"the masks hold no other label than {min(present)}, which cannot show {', '.join(regions)} each",
            "name the one region they show, such as --regions WT",
        )
    return present == {1}


def read_masks(pair: tuple[Case, tuple[Path, ...]], regions: Sequence[str], is_binary: bool) -> MaskPair:
    """Return the region masks of a case; `is_binary` takes every predicted voxel as the one region."""
    case, _ = pair
    reference, prediction, spacing_mm = read_pair(*pair)
    masks = functools.partial(regions_from_labels, convention=case.convention, regions=regions)
    predicted = prediction[None] > 0 if is_binary else masks(prediction)
    return MaskPair(masks(reference), predicted, spacing_mm)
