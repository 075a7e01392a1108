"""What an audit hands to its report and figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pandas as pd

from runtime.files import read_json


class _Scored(TypedDict, total=False):
    predictions: dict[str, Any] | None


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


@dataclass(frozen=True)
class AuditResults:
    """The numbers and pictures of one audited run."""

    run: Path
    summary: dict[str, Any]  # what summary.json holds
    rows: pd.DataFrame  # what metrics_per_case.csv holds
    leakage: pd.DataFrame  # what leakage.csv holds
    counts: dict[str, np.ndarray]  # per cohort TP, FP and FN with TTA at each of THRESHOLDS, (R, T, 3)
    pictures: dict[str, dict[str, CasePicture]]  # per test cohort and case, of the first region
