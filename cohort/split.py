"""The split into training, validation and test: by patient, seeded, frozen with a hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from cohort.cases import Case
from runtime.errors import InputError
from runtime.files import read_json

# ------------------------------------------------------------------------------------------------------------
# Split
# ------------------------------------------------------------------------------------------------------------

SPLIT_PARTS = ("train", "validation", "test")


class SplitFile(TypedDict):
    """What a split file holds at least."""

    train: list[str]
    validation: list[str]
    test: list[str]
    sha256: str


def split_cases(
    cases: Sequence[Case], seed: int = 0, fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)
) -> dict[str, Any]:
    """Return a split by patient: seed, fractions, the case ids of each part, and a SHA-256 of them.

    Patients are sorted, then shuffled by the seed, so the split depends on the ids alone. Each part gets at
    least one patient; fewer than three patients raise InputError.
    """
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 3:
        raise InputError(
            "the split",
            f"{len(patients)} patient(s) cannot be split into train, validation and test",
            "3 are needed",
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    validation = max(1, min(round(fractions[1] * len(patients)), len(patients) - 2))
    test = max(1, min(round(fractions[2] * len(patients)), len(patients) - validation - 1))
    edges = [0, validation, validation + test, len(patients)]
    part_of = {}
    for part, start, stop in zip(("validation", "test", "train"), edges, edges[1:], strict=False):
        part_of |= {patients[index]: part for index in order[start:stop]}
    parts = {
        part: sorted(case.case_id for case in cases if part_of[case.patient_id] == part)
        for part in SPLIT_PARTS
    }
    return {"seed": seed, "fractions": list(fractions), **parts, "sha256": split_sha256(parts)}


def split_folds(
    cases: Sequence[Case], folds: int, seed: int = 0, validation_share: float = 0.15
) -> list[dict[str, Any]]:
    """Return one split per fold, by patient; over all folds each patient is a test patient once.

    Patients are sorted, shuffled by the seed and dealt out in turn, those of one cohort after those of
    another, so that the test parts differ by one patient at most, in all and of each cohort. In each fold a
    share of the other patients is validated on, of all cohorts as evenly as their number allows. A patient of
    several cohorts counts for the first by name. InputError where a fold would leave fewer than two patients
    to train and validate on.
    """
    home = home_of_patients(cases, sorted({case.cohort for case in cases}))
    patients = sorted(home)
    if not 2 <= folds <= len(patients) or len(patients) - -(-len(patients) // folds) < 2:
        raise InputError(
            f"--folds {folds}",
            f"not possible with {len(patients)} patient(s)",
            "each fold needs one to test and two more",
        )
    order = [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]
    order.sort(key=home.__getitem__)  # stable: a cohort's own order stays random
    splits = []
    for fold in range(folds):
        rest = mix_cohorts([patient for index, patient in enumerate(order) if index % folds != fold], home)
        count = max(1, min(round(validation_share * len(rest)), len(rest) - 1))
        # the next fold validates on others of the patients that both train on
        start = fold * len(rest) // folds
        validation = {rest[(start + index) % len(rest)] for index in range(count)}
        part_of = dict.fromkeys(order, "test") | dict.fromkeys(rest, "train")
        part_of |= dict.fromkeys(validation, "validation")
        parts = {
            part: sorted(case.case_id for case in cases if part_of[case.patient_id] == part)
            for part in SPLIT_PARTS
        }
        splits.append({"seed": seed, "fold": fold, "folds": folds, **parts, "sha256": split_sha256(parts)})
    return splits


def home_of_patients(cases: Sequence[Case], cohorts: Sequence[str]) -> dict[str, str]:
    """Return {patient: cohort}, of a patient of several the first of `cohorts`, in the order of cohorts."""
    home: dict[str, str] = {}
    for name in cohorts:
        for case in cases:
            if case.cohort == name:
                home.setdefault(case.patient_id, name)
    return home


def mix_cohorts(patients: Sequence[str], home: Mapping[str, str]) -> list[str]:
    """Return patients so that any stretch of them has its share of each cohort, each in its own order."""
    members: dict[str, list[str]] = {}
    for patient in patients:
        members.setdefault(home[patient], []).append(patient)
    place = {
        patient: (index + 0.5) / len(own) for own in members.values() for index, patient in enumerate(own)
    }
    return sorted(patients, key=place.__getitem__)


def split_sha256(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the case ids in train, validation and test."""
    return hashlib.sha256(json.dumps([parts[part] for part in SPLIT_PARTS]).encode()).hexdigest()


def read_split(path: str | Path) -> dict[str, Any]:
    """Read a split file; raises InputError where it is missing, altered, or its parts share a case."""
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "no such split file", "give the split.json of a run")
    split = read_json(path, "", "the split.json of a run", SplitFile)
    if split["sha256"] != split_sha256(split):
        raise InputError(
            path, "the case ids do not match their SHA-256", "the split was altered, take the original"
        )
    ids = [case_id for part in SPLIT_PARTS for case_id in split[part]]
    if len(ids) != len(set(ids)):
        raise InputError(path, "a case is in more than one part of the split")
    if empty := [part for part in SPLIT_PARTS if not split[part]]:
        raise InputError(path, f"its {empty[0]} part has no case", "draw a new split")
    return split


def cases_of_split(
    cases: Sequence[Case], split: Mapping[str, Any], part: str, data_dir: str | Path
) -> list[Case]:
    """Return the cases of one part in the split's order; raises InputError where one is not among `cases`."""
    by_id = {case.case_id: case for case in cases}
    if missing := [case_id for case_id in split[part] if case_id not in by_id]:
        raise InputError(
            data_dir, f"{len(missing)} {part} case(s) of the split are not there, first {missing[0]}"
        )
    return [by_id[case_id] for case_id in split[part]]


def without_cases(split: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Return a split without some cases, under its own hash; InputError where a part of it would be empty."""
    parts = {name: [case_id for case_id in split[name] if case_id not in left_out] for name in SPLIT_PARTS}
    if empty := [name for name in SPLIT_PARTS if not parts[name]]:
        raise InputError("--split", f"all its {empty[0]} cases are left out of this run", "draw a new one")
    return {**split, **parts, "sha256": split_sha256(parts)}
