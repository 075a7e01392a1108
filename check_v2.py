"""Look through a whole cohort before hours are spent on it: every file read once, every disagreement listed.

`dataset_balance_v2.py --check` prints and writes what is found; `train_drunet_v2.py --skip-bad` leaves the
cases with errors out.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from tqdm import tqdm

from cases_v2 import AFFINE_TOLERANCE_MM, MODALITIES, Case, read_labels, read_modality
from layouts_v2 import missing_modality_message, scan_cases
from utils_v2 import InputError, write_atomically

CASES_A_WORKER = 4  # fewer are not worth a process, which takes seconds to start


class Problem(NamedTuple):
    """One finding: an error makes a case unusable, a warning deserves a look."""

    case: str
    file: str
    severity: Literal["error", "warning"]
    problem: str


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
    return f"its affine differs from that of the case's {first.name}"


def check_intensities(array: np.ndarray) -> Iterator[tuple[Literal["error", "warning"], str]]:
    """Yield (severity, problem) of one modality (D, H, W), in the type of its file."""
    if not np.isfinite(array).all():
        yield "error", "holds NaN or infinite values"
    elif array.min() == array.max():
        yield "error", f"is constant, {array.flat[0]:g} everywhere"
    elif array.dtype.newbyteorder("=") == np.int16 and (cut := int((array == 2**15 - 1).sum())):
        yield "warning", f"{cut} voxels are at 32767, the largest value of int16: brighter ones were cut off"
    elif array.dtype.newbyteorder("=") == np.int32 and array.max() >= 2**15:
        yield "warning", "holds 32768 and more: int32, or int16 that wrapped around and was put right"


def check_case(case: Case, modalities: Sequence[str] = (), every_file: bool = True) -> list[Problem]:
    """Return what is wrong with a case's files, each read whole: the modalities it must have, or all it has.

    Unreadable files, NaN, constant volumes, unknown labels, and grids that differ are errors; an empty mask
    is a warning.
    """
    problems: list[Problem] = []

    def note(severity: Literal["error", "warning"], sentence: str, file: Path | None = None) -> None:
        place, text = (str(file), sentence) if file else sentence.split(": ", 1)
        problems.append(Problem(case.case_id, place, severity, text.removesuffix(".")))

    first: Grid | None = None
    decoded: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
    for name in MODALITIES:
        if name not in modalities and not (every_file and name in case.modalities):
            continue
        if name not in case.modalities:
            note("error", missing_modality_message(case, name))
            continue
        path = case.modalities[name][0]
        try:
            array, affine = read_modality(case, name, decoded)
        except InputError as error:
            note("error", str(error))
            continue
        for severity, problem in check_intensities(array):
            note(severity, problem, path)
        first = first or Grid(name, array.shape, affine)
        if difference := compare_grids(array.shape, affine, first):
            note("error", difference, path)
    if case.mask:
        try:
            labels, affine = read_labels(case)
        except InputError as error:
            note("error", str(error))
            return problems
        if first and (difference := compare_grids(labels.shape, affine, first)):
            note("error", difference, case.mask[0])
        if not labels.any():
            note("warning", "the mask is empty", case.mask[0])
    return problems


def check_cases(
    cases: Sequence[Case],
    modalities: Sequence[str] = (),
    every_file: bool = True,
    workers: int | None = None,
) -> list[Problem]:
    """Return the problems of all cases, in their order, found in parallel with a progress bar.

    `workers` None takes a process per core, as far as there is work for them; 1 checks in this process.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, len(cases) // CASES_A_WORKER)
    check = partial(check_case, modalities=modalities, every_file=every_file)
    progress = partial(tqdm, total=len(cases), desc="checking", unit="case", leave=False)
    if workers <= 1:
        return [problem for case in progress(cases) for problem in check(case)]
    context = multiprocessing.get_context("spawn")  # fork would copy torch's threads in mid-air
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [problem for found in progress(pool.map(check, cases)) for problem in found]


def check_cohort(
    data_dir: str | Path,
    modalities: Sequence[str],
    slice_channel: int = 1,
    layout: str = "auto",
    mapping: str | Path | None = None,
    every_file: bool = True,
    workers: int | None = None,
) -> tuple[list[Case], list[Problem]]:
    """Return (every case below a folder, all that is wrong with them).

    The modalities asked for must be there; `every_file` checks the others too. What keeps a folder from being
    resolved at all is listed without a case.
    """
    errors: list[InputError] = []
    cases = scan_cases(data_dir, slice_channel, layout, mapping, errors)
    problems = [Problem("", *_place(error)) for error in errors]
    problems += check_cases(cases, modalities, every_file, workers)
    if every_file:
        problems += find_unlike(cases, modalities)
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


def _place(error: InputError) -> tuple[str, Literal["error"], str]:
    place, text = str(error).split(": ", 1)
    return place, "error", text.removesuffix(".")


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems as CSV: case, file, severity, problem."""
    table = pd.DataFrame(problems, columns=Problem._fields)
    write_atomically(path, lambda target: table.to_csv(target, index=False))


def has_error(problems: Sequence[Problem]) -> set[str]:
    """Return the ids of the cases with an error."""
    return {problem.case for problem in problems if problem.severity == "error"} - {""}


def summarise_problems(cases: Sequence[Case], problems: Sequence[Problem], shown: int = 20) -> list[str]:
    """Return the lines to print: the first problems, then the counts."""
    lines = [
        f"{problem.severity:<7} {problem.case or '-'}  {problem.file}: {problem.problem}"
        for problem in problems[:shown]
    ]
    if len(problems) > shown:
        lines.append(f"... and {len(problems) - shown:,} more")
    counts = Counter(problem.severity for problem in problems)
    unmasked = sum(not case.mask for case in cases)
    lines.append(
        f"checked {len(cases):,} cases: {counts['error']:,} errors in {len(has_error(problems)):,} cases, "
        f"{counts['warning']:,} warnings"
        + (f"; {unmasked:,} cases without a mask, for prediction only" if unmasked else "")
    )
    return lines
