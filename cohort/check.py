"""Look through a whole cohort before hours are spent on it: every file read once, every disagreement listed.

`dataset_balance_v2.py --check` prints and writes what is found; `train_drunet_v2.py --skip-bad` leaves the
cases with errors out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes

from cohort.cases import MODALITIES, Case, find_copy, read_labels, read_modality
from cohort.layouts import CaseSource, missing_modality, scan_cases
from cohort.nifti import AFFINE_TOLERANCE_MM, describe_affine, find_geometry_conflicts
from cohort.patients import describe_likely_visits
from cohort.preprocess import (
    brain_mask,
    fill_air,
    find_doubts,
    find_fault,
    find_no_brain,
)
from cohort.resolvers import find_gap
from runtime.errors import InputError
from runtime.log import log
from runtime.processes import map_in_processes
from runtime.tables import write_table


class Problem(NamedTuple):
    """One finding: an error makes a case unusable, a warning deserves a look."""

    case: str
    file: str
    severity: Literal["error", "warning"]
    problem: str

    @classmethod
    def of(cls, error: InputError, case: str = "") -> "Problem":
        """Return the finding that an InputError stands for, of no case by default."""
        return cls(case, error.place, "error", "; ".join(filter(None, (error.problem, error.remedy))))


class Grid(NamedTuple):
    """The grid of a case's first readable file, which the others must share."""

    name: str
    shape: tuple[int, ...]
    affine: np.ndarray  # (4, 4)


def compare_grids(shape: tuple[int, ...], affine: np.ndarray, first: Grid) -> str | None:
    """Return how a file's grid differs from the first one's, None where it does not."""
    if shape != first.shape:
        return f"has shape {shape}, the case's {first.name} {first.shape}"
    if np.allclose(affine, first.affine, atol=AFFINE_TOLERANCE_MM):
        return None
    sizes, first_sizes = (voxel_sizes(matrix)[::-1].round(4).tolist() for matrix in (affine, first.affine))
    if not np.allclose(sizes, first_sizes, atol=AFFINE_TOLERANCE_MM):
        return f"has a spacing of {sizes} mm, the case's {first.name} {first_sizes}"
    return (
        f"its affine differs from that of the case's {first.name}, {describe_affine(affine)} from "
        f"{describe_affine(first.affine)}"
    )


def check_intensities(array: np.ndarray) -> Iterator[tuple[Literal["error", "warning"], str]]:
    """Yield (severity, problem) of one modality (D, H, W), in the type of its file."""
    array = fill_air(array)
    if fault := find_fault(array):
        yield "error", fault
        return
    if problem := find_no_brain(array, bool(brain_mask(array.astype(np.float32)).any())):
        yield "error", problem
        return
    for doubt in find_doubts(array):
        yield "warning", doubt
    if array.dtype.newbyteorder("=") == np.int16 and (cut := int((array == 2**15 - 1).sum())):
        yield "warning", f"{cut} voxels are at 32767, the largest value of int16: brighter ones were cut off"
    elif array.dtype.newbyteorder("=") == np.int32 and array.max() >= 2**15:
        yield "warning", "holds 32768 and more: int32, or int16 that wrapped around and was put right"


def check_case(case: Case, modalities: Sequence[str] = (), every_file: bool = True) -> list[Problem]:
    """Return what is wrong with a case's files, each read whole: the modalities it must have, or all it has.

    Unreadable files, NaN, constant volumes, no brain, unknown labels, and grids that differ are errors; an
    empty mask, a modality that is a copy of another, and a header that disagrees with itself are warnings.
    """
    problems: list[Problem] = []

    def note(severity: Literal["error", "warning"], problem: str, file: Path) -> None:
        problems.append(Problem(case.case_id, str(file), severity, problem))

    def note_conflicts(path: Path) -> None:
        if case.layout != "slices" and str(path) not in geometry_seen:  # the four of MSD share one file
            geometry_seen.add(str(path))
            for conflict in find_geometry_conflicts(path):
                note("warning", conflict, path)

    geometry_seen: set[str] = set()
    first: Grid | None = None
    seen: dict[str, str] = {}
    decoded: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    for name in MODALITIES:
        if name not in modalities and not (every_file and name in case.modalities):
            continue
        if name not in case.modalities:
            problems.append(Problem.of(missing_modality(case, name), case.case_id))
            continue
        path = case.modalities[name][0]
        try:
            array, affine = read_modality(case, name, decoded)
        except InputError as error:
            problems.append(Problem.of(error, case.case_id))
            continue
        note_conflicts(path)
        for severity, problem in check_intensities(array):
            note(severity, problem, path)
        first = first or Grid(name, array.shape, affine)
        if difference := compare_grids(array.shape, affine, first):
            note("error", difference, path)
        elif copy := find_copy(name, array, seen):
            note("warning", copy, path)
    gap = find_gap(case.modalities["flair"]) if case.layout == "slices" else None
    if gap is not None:
        folder = case.modalities["flair"][0].parent
        note("warning", f"slice {gap} is missing, and its neighbours are taken as adjacent", folder)
    if case.mask:
        try:
            labels, affine = read_labels(case)
        except InputError as error:
            return [*problems, Problem.of(error, case.case_id)]
        note_conflicts(case.mask[0])
        if first and (difference := compare_grids(labels.shape, affine, first)):
            note("error", difference, case.mask[0])
        if not labels.any():
            note("warning", "the mask is empty", case.mask[0])
    return problems


def check_cases(
    cases: Sequence[Case], modalities: Sequence[str] = (), every_file: bool = True
) -> list[Problem]:
    """Return the problems of all cases, in their order, found in parallel."""
    check = partial(check_case, modalities=modalities, every_file=every_file)
    return [
        problem for problems in map_in_processes(check, cases, "checking", "case") for problem in problems
    ]


def check_cohort(
    source: CaseSource, modalities: Sequence[str], every_file: bool = True
) -> tuple[list[Case], list[Problem]]:
    """Return (every case of a source, all that is wrong with them).

    The modalities asked for must be there; `every_file` checks the others too. What keeps a folder from being
    resolved at all is listed without a case.
    """
    errors: list[InputError] = []
    cases = scan_cases(source, errors)
    problems = [Problem.of(error) for error in errors]
    problems += check_cases(cases, modalities, every_file)
    if every_file:
        problems += find_unlike(cases, modalities)
    if likely_visits := describe_likely_visits(cases):
        problems.append(Problem("", str(source.data_dir), "warning", likely_visits))
    return cases, problems


def find_unlike(cases: Sequence[Case], modalities: Sequence[str]) -> list[Problem]:
    """Return a warning for each modality, not among those asked for, that most others of a layout have."""
    size = Counter(case.layout for case in cases)
    having = Counter((case.layout, name) for case in cases for name in case.modalities)
    problems = []
    for case in cases:
        missing = [name for name in MODALITIES if name not in {*modalities, *case.modalities}]
        for name in missing:
            if 2 * having[case.layout, name] > size[case.layout]:
                folder = str(next(iter((*case.modalities.values(), case.mask)))[0].parent)
                sentence = f"has no {name} file, which most other cases have"
                problems.append(Problem(case.case_id, folder, "warning", sentence))
    return problems


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems as CSV: case, file, severity, problem."""
    write_table(path, pd.DataFrame(problems, columns=Problem._fields))


def has_error(problems: Sequence[Problem]) -> set[str]:
    """Return the ids of the cases with an error."""
    return {problem.case for problem in problems if problem.severity == "error"} - {""}


def log_problems(cases: Sequence[Case], problems: Sequence[Problem], shown: int = 20) -> None:
    """Log the first problems, then the counts."""
    for problem in problems[:shown]:
        log.info("%-7s %s  %s: %s", problem.severity, problem.case or "-", problem.file, problem.problem)
    if len(problems) > shown:
        log.info(f"... and {len(problems) - shown:,} more")
    counts = Counter(problem.severity for problem in problems)
    unmasked = sum(not case.mask for case in cases)
    log.info(
        f"checked {len(cases):,} cases: {counts['error']:,} errors in {len(has_error(problems)):,} cases, "
        f"{counts['warning']:,} warnings"
        + (f"; {unmasked:,} cases without a mask, for prediction only" if unmasked else "")
    )
