"""What an audit hands to its report and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pandas as pd

from audit.kinds import kind_of
from runtime.files import read_json


class _Scored(TypedDict, total=False):
    predictions: dict[str, Any] | None
    kinds: dict[str, str]


class SummaryFile(_Scored):
    """What is read again of a summary.json."""

    data_kind: str


def read_summary(path: Path) -> dict[str, Any]:
    """Return what a summary.json holds; InputError where it is missing or none."""
    return read_json(path, "", "a folder that final_evaluation_v2.py has written", SummaryFile)


def headline_mode(rows: pd.DataFrame) -> str:
    """Return the mode whose numbers come first: TTA, or plain where the rows have none."""
    return "tta" if (rows["mode"] == "tta").any() else "plain"


class CasePicture(NamedTuple):
    """One slice of a case with its masks."""

    z: int
    pixels: np.ndarray  # (H, W), normalised
    reference: np.ndarray  # (H, W) bool
    prediction: np.ndarray  # (H, W) bool
    window: tuple[float, float]  # the values shown as black and white
    spacing_mm: tuple[float, float, float]  # (D, H, W)


class CaseVolumes(NamedTuple):
    """What a viewer shows of one case, on its native grid."""

    images: dict[str, np.ndarray]  # per modality (D, H, W); the first is shown first
    reference: np.ndarray  # (R, D, H, W) bool
    predictions: dict[str, np.ndarray]  # by name (R, D, H, W) bool; two where runs are compared
    probability: np.ndarray | None  # (R, D, H, W) in steps of browse.PROBABILITY_STEPS; None: masks alone
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class AuditResults:
    """The numbers and cases of one audited run."""

    run: Path
    summary: dict[str, Any]  # what summary.json holds
    rows: pd.DataFrame  # what metrics_per_case.csv holds
    leakage: pd.DataFrame  # what leakage.csv holds
    counts: dict[str, np.ndarray]  # per cohort TP, FP and FN with TTA at each of THRESHOLDS, (R, T, 3)
    open_case: Callable[[str, str], CaseVolumes]  # of a test cohort and a case id
    notes: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)  # odd things, by the same
    phantoms: frozenset[tuple[str, str]] = frozenset()  # which of the cases are synthetic, by the same

    def is_phantom(self, cohort: str, case_id: str) -> bool:
        """Return whether a test case is synthetic."""
        return (cohort, case_id) in self.phantoms or kind_of(self.summary, cohort) == "phantom"


def rank_cases(rows: pd.DataFrame, region: str, cohort: str) -> dict[str, tuple[str, float]]:
    """Return id and Dice of the cases with the best, median and worst Dice (TTA, if any); each case once.

    Two cases are the best and the worst, one is the best.
    """
    of_cohort = rows[(rows["cohort"] == cohort) & (rows["region"] == region)]
    of_cohort = of_cohort[of_cohort["mode"] == headline_mode(of_cohort)]
    ordered = of_cohort.sort_values("dice", ascending=False)
    cases = list(zip(ordered["case"], ordered["dice"], strict=True))
    ranked: dict[str, tuple[str, float]] = {}
    places = {"best": 0, "median": len(cases) // 2, "worst": len(cases) - 1}
    if len(cases) < 3:
        del places["median"]
    for rank, position in places.items():
        if cases[position] not in ranked.values():
            ranked[rank] = cases[position]
    return ranked
