"""The split by patient: who goes where, and what a split file must hold."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cohort.split import SPLIT_PARTS, cases_of_split, read_split, split_cases, split_folds, split_sha256

SCANS_PER_PATIENT = st.lists(st.integers(1, 4), min_size=3, max_size=40)


def ids_of(scans_per_patient: list[int]) -> list[tuple[str, str]]:
    return [
        (f"BraTS-GLI-{patient:05d}-{scan:03d}", f"BraTS-GLI-{patient:05d}")
        for patient, scans in enumerate(scans_per_patient)
        for scan in range(scans)
    ]


@given(scans=SCANS_PER_PATIENT, seed=st.integers(0, 10_000))
def test_every_case_is_in_one_part_and_every_patient_too(make_cases, scans, seed):
    ids = ids_of(scans)
    split = split_cases(make_cases(ids), seed)
    assert sorted(case_id for part in SPLIT_PARTS for case_id in split[part]) == sorted(id_ for id_, _ in ids)
    patient_of = dict(ids)
    patients = {part: {patient_of[case_id] for case_id in split[part]} for part in SPLIT_PARTS}
    assert sum(map(len, patients.values())) == len(scans)  # no patient is counted twice
    assert all(patients.values())
    share = max(1, round(0.15 * len(scans)))
    assert (len(patients["validation"]), len(patients["test"])) == (share, share)
    assert all(split[part] == sorted(split[part]) for part in SPLIT_PARTS)


@given(scans=SCANS_PER_PATIENT, seed=st.integers(0, 10_000), random=st.randoms(use_true_random=False))
def test_the_split_depends_on_ids_and_seed_alone(make_cases, scans, seed, random):
    cases = make_cases(ids_of(scans))
    split = split_cases(cases, seed)
    random.shuffle(cases)
    assert split_cases(cases, seed) == split


def test_another_seed_gives_another_split_of_the_same_sizes(make_cases):
    cases = make_cases(ids_of([1] * 20))
    splits = [split_cases(cases, seed) for seed in range(5)]
    assert len({split["sha256"] for split in splits}) == 5
    assert {tuple(len(split[part]) for part in SPLIT_PARTS) for split in splits} == {(14, 3, 3)}


def test_patients_are_shuffled_before_they_are_dealt(make_cases):
    split = split_cases(make_cases(ids_of([1] * 100)), 0)
    first_15 = {f"BraTS-GLI-{patient:05d}-000" for patient in range(15)}
    for part in ("validation", "test"):
        assert len(first_15 & set(split[part])) < 10


def test_other_fractions_are_kept(make_cases):
    split = split_cases(make_cases(ids_of([1] * 20)), 0, (0.5, 0.3, 0.2))
    assert [len(split[part]) for part in SPLIT_PARTS] == [10, 6, 4]
    assert split["fractions"] == [0.5, 0.3, 0.2]


def test_each_part_gets_a_patient_whatever_the_fractions(make_cases):
    split = split_cases(make_cases(ids_of([1] * 10)), 0, (0.02, 0.49, 0.49))
    assert all(split[part] for part in SPLIT_PARTS)


@pytest.mark.parametrize("scans", [[], [3], [2, 5]])
def test_fewer_than_three_patients_cannot_be_split(make_cases, input_error, scans):
    with input_error(len(scans), "3"):
        split_cases(make_cases(ids_of(scans)), 0)


@given(
    scans=st.lists(st.integers(1, 3), min_size=4, max_size=40),
    folds=st.integers(2, 6),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_each_patient_is_tested_once_and_never_seen_by_that_fold(make_cases, scans, folds, share, seed):
    cases, folds = make_cases(ids_of(scans)), min(folds, len(scans))
    splits = split_folds(cases, folds, seed, share)
    assert splits == split_folds(cases[::-1], folds, seed, share)
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


def test_folds_validate_on_different_patients(make_cases):
    splits = split_folds(make_cases(ids_of([1] * 20)), 5, validation_share=0.25)
    validations = [set(split["validation"]) for split in splits]
    assert [len(part) for part in validations] == [4] * 5
    assert len(set.union(*validations)) > 8


@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=3),
    folds=st.integers(2, 6),
    seed=st.integers(0, 5),
)
def test_each_cohort_is_spread_over_the_folds(make_cases, counts, folds, seed):
    cases = [
        dataclasses.replace(case, cohort=cohort)
        for cohort, count in zip("abc", counts, strict=False)
        for case in make_cases([(f"{cohort}{number}", f"{cohort}{number}") for number in range(count)])
    ]
    folds = min(folds, len(cases))
    if len(cases) - -(-len(cases) // folds) < 2:
        return
    splits = split_folds(cases, folds, seed, 0.2)
    for cohort, count in zip("abc", counts, strict=False):
        of_each = [sum(case_id[0] == cohort for case_id in split["test"]) for split in splits]
        assert max(of_each) - min(of_each) <= 1
        for split in splits:
            rest = len(split["train"]) + len(split["validation"])
            own = count - sum(case_id[0] == cohort for case_id in split["test"])
            chosen = sum(case_id[0] == cohort for case_id in split["validation"])
            assert abs(chosen - len(split["validation"]) * own / rest) <= 2


def test_a_patient_of_two_cohorts_is_in_one_part_of_a_fold(make_cases):
    cases = [
        dataclasses.replace(case, cohort=cohort)
        for cohort in "ab"
        for case in make_cases([(f"{cohort}{number}", f"p{number}") for number in range(6)])
    ]
    for split in split_folds(cases, 3):
        for part in SPLIT_PARTS:
            assert {case_id[1] for case_id in split[part] if case_id[0] == "a"} == {
                case_id[1] for case_id in split[part] if case_id[0] == "b"
            }


@pytest.mark.parametrize(("patients", "folds"), [(2, 2), (3, 2), (3, 4), (9, 1)])
def test_too_few_patients_or_folds(make_cases, input_error, patients, folds):
    with input_error("--folds", patients):
        split_folds(make_cases(ids_of([1] * patients)), folds)


def write_split(path: Path, **changes: object) -> Path:
    """Write a split of five cases, altered by `changes` after it was hashed."""
    parts = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e"]}
    split = {"seed": 0, "fractions": [0.7, 0.15, 0.15], **parts, "sha256": split_sha256(parts)}
    path.write_text(json.dumps(split | changes))
    return path


def test_a_split_reads_back_as_it_was_made(make_cases, tmp_path):
    split = split_cases(make_cases(ids_of([2] * 7)), 3)
    (tmp_path / "split.json").write_text(json.dumps(split))
    assert read_split(tmp_path / "split.json") == split


def test_the_hash_is_of_the_ids_of_the_parts_in_order():
    parts = {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
    assert split_sha256(parts) == hashlib.sha256(b'[["a", "b"], ["c"], ["d"]]').hexdigest()
    swapped = {"train": ["a", "b"], "validation": ["d"], "test": ["c"]}
    assert split_sha256(swapped) != split_sha256(parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": ["a", "b"]},
        {"train": ["a", "b", "c", "e"]},
        {"validation": ["e"], "test": ["d"]},
        {"test": ["f"]},
        {"sha256": "0" * 64},
    ],
)
def test_an_altered_split_is_refused(tmp_path, input_error, changes):
    path = write_split(tmp_path / "split.json", **changes)
    with input_error(path, "SHA-256"):
        read_split(path)


def test_a_case_in_two_parts_is_refused_even_under_a_valid_hash(tmp_path, input_error):
    parts = {"train": ["a", "b"], "validation": ["b"], "test": ["c"]}
    path = write_split(tmp_path / "split.json", **parts, sha256=split_sha256(parts))
    with input_error(path, "more than one part"):
        read_split(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"null", b'{"sha256": "0", "train": []}', b"PK\x03\x04\xff\xfe\x80"],
    ids=["empty", "cut short", "list", "no keys", "null", "keys missing", "a checkpoint"],
)
def test_a_file_that_is_no_split_is_named(tmp_path, input_error, content):
    path = tmp_path / "split.json"
    path.write_bytes(content)
    with input_error(path):
        read_split(path)


def test_a_split_that_does_not_exist_is_named(tmp_path, input_error):
    with input_error(tmp_path / "split.json"):
        read_split(tmp_path / "split.json")


def test_cases_of_a_part_come_in_the_order_of_the_split(make_cases):
    cases = make_cases([(name, name) for name in "abcde"])
    split = {"train": ["d", "a"], "validation": ["e"], "test": ["b"]}
    assert [case.case_id for case in cases_of_split(cases, split, "train", "data")] == ["d", "a"]
    assert cases_of_split(cases, split, "test", "data") == [cases[1]]


def test_a_case_of_the_split_that_is_not_there_is_named(make_cases, input_error):
    split = {"train": ["a", "x", "y"], "validation": [], "test": []}
    with input_error("data/here", "2 train", "x"):
        cases_of_split(make_cases([("a", "a")]), split, "train", "data/here")
