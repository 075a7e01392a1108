"""Which label convention the masks of a cohort follow: what its files hold decides, not its name."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cohort.cases import Case
from cohort.labels import round_labels, values_of
from cohort.nifti import read_nifti_volume
from cohort.resolvers import LAYOUTS
from runtime.errors import InputError

DETECTED = ("brats", "brats2023", "msd")  # conventions that others may be hidden under
MASKS_TO_DECIDE, MASKS_TO_READ = 3, 24  # how many masks tell 3 from 4, and how many are read to find them


def detect_convention(cases: Sequence[Case], usual: str) -> str:
    """Return "brats" or "brats2023", by the value, 4 or 3, that most masks of a cohort hold, or "binary".

    A cohort decides, not a case: masks spread over it are read until three hold one of the two. It is binary
    where those read hold 0 and 1, or 0 and 255, alone. `usual` is returned where they do not tell. Unreadable
    masks, and those that hold both 3 and 4, are left to who reads them.
    """
    masked = [case for case in cases if case.mask]
    votes = {"brats": 0, "brats2023": 0}
    values: set[float] = set()
    order = np.linspace(0, len(masked) - 1, min(len(masked), MASKS_TO_READ)).astype(int)
    for index in order:
        try:
            own = set(np.unique(round_labels(read_nifti_volume(masked[index].mask[0])[0])).tolist())
        except InputError:
            continue
        values |= own
        if (3 in own) != (4 in own):
            votes["brats" if 4 in own else "brats2023"] += 1
        is_settled = usual not in votes and values - {0, 1, 255}
        if is_settled or sum(votes.values()) == MASKS_TO_DECIDE:
            break
    if values - {0} in ({1}, {255}):
        return "binary"
    if usual not in votes:
        return usual
    other = next(name for name in votes if name != usual)
    return other if votes[other] > votes[usual] else usual


def settle_conventions(cases: Sequence[Case]) -> list[Case]:
    """Return the cases with the label convention of their cohort: one per layout."""
    convention_of = {}
    for name in sorted({case.layout for case in cases}):
        usual = LAYOUTS[name].convention
        group = [case for case in cases if case.layout == name]
        if usual in DETECTED and name != "nnunet":
            convention_of[name] = detect_convention(group, usual)
    return [
        dataclasses.replace(case, convention=convention_of.get(case.layout, case.convention))
        for case in cases
    ]


def check_regions(cases: Sequence[Case], regions: Sequence[str]) -> None:
    """Raise InputError where the masks of a cohort cannot show a region: binary ones hold WT alone."""
    for case in cases:
        if not case.mask:
            continue
        if missing := [name for name in regions if name not in values_of(case.convention)]:
            held = " and ".join(values_of(case.convention))
            raise InputError(
                f"--regions {' '.join(regions)}",
                f"the masks ({LAYOUTS[case.layout].title}, first {case.mask[0]}) show {held} alone",
                f"pass --regions {' '.join(name for name in regions if name not in missing) or 'WT'}",
            )
