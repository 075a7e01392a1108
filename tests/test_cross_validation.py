"""Folds of a cross-validation, and what is said of them all together."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cross_validation import make_table, split_folds
from cases_v2 import Case
from dataset_balance_v2 import SPLIT_PARTS, split_sha256


def make_cases(scans: list[int]) -> list[Case]:
    """Return so many scans of each patient."""
    return [
        Case(f"P{patient:03}_{scan}", f"P{patient:03}", "BraTS", "brats21", "brats21", {}, ())
        for patient, count in enumerate(scans)
        for scan in range(count)
    ]


@given(
    scans=st.lists(st.integers(1, 3), min_size=4, max_size=40),
    folds=st.integers(2, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_each_patient_is_tested_once_and_never_seen_by_that_fold(
    scans: list[int], folds: int, share: float, seed: int
) -> None:
    cases, folds = make_cases(scans), min(folds, len(scans))
    splits = split_folds(cases, folds, share, seed)
    assert splits == split_folds(cases[::-1], folds, share, seed)
    patient_of = {case.case_id: case.patient_id for case in cases}
    tested = [case_id for split in splits for case_id in split["test"]]
    assert sorted(tested) == sorted(patient_of)
    counts = [len({patient_of[case_id] for case_id in split["test"]}) for split in splits]
    assert max(counts) - min(counts) <= 1
    for split in splits:
        parts = [{patient_of[case_id] for case_id in split[part]} for part in SPLIT_PARTS]
        assert all(parts)
        assert sum(len(part) for part in parts) == len(scans) == len(set.union(*parts))
        assert split["sha256"] == split_sha256(split)


def test_folds_validate_on_different_patients() -> None:
    validations = [set(split["validation"]) for split in split_folds(make_cases([1] * 20), 5, 0.25, 0)]
    assert [len(part) for part in validations] == [4] * 5
    assert len(set.union(*validations)) > 8


@pytest.mark.parametrize(("patients", "folds"), [(2, 2), (3, 2), (3, 4), (9, 1)])
def test_too_few_patients_or_folds(input_error: object, patients: int, folds: int) -> None:
    with input_error("--folds", str(patients)):
        split_folds(make_cases([1] * patients), folds, 0.15, 0)


def test_table_gives_each_fold_its_own_mean() -> None:
    folds = [
        pd.DataFrame({"region": "WT", "mode": "plain", "dice": dice}) for dice in ([0.5, 0.7], [0.9])
    ]  # fmt: skip
    dice = {"mean": 0.7, "sd": 0.2, "median": 0.7, "ci95": [0.5, 0.9]}
    (row,) = make_table({"WT": {"plain": {"n_cases": 3, "dice": dice}}}, folds)
    assert (row["n"], row["ci95"]) == (3, "0.500 to 0.900")
    np.testing.assert_allclose([row["mean"], row["fold 0"], row["fold 1"]], [0.7, 0.6, 0.9])
