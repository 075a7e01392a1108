"""Folds of a cross-validation, and what is said of them all together."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.measure import AVERAGED
from benchmarks import cross_validation
from benchmarks.cross_validation import CrossValidationConfig, main, make_table, split_folds
from cohort.cases import Case
from cohort.split import SPLIT_PARTS, split_sha256
from runtime.checkpoints import save_checkpoint
from runtime.command import parse, to_plain
from runtime.files import write_json
from train_drunet_v2 import TrainConfig


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
    share=st.floats(0.01, 0.99),
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
    dice = {"mean": 0.7, "sd": 0.2, "median": 0.7, "ci95": [0.5, 0.9], "range": [0.4, 1.0], "n": 3}
    (row,) = make_table({"WT": {"plain": {"n_cases": 3, "n_patients": 2, "dice": dice}}}, folds)
    assert (row["cases"], row["patients"], row["ci95"]) == (3, 2, "0.500 to 0.900")
    few = {"WT": {"plain": {"n_cases": 3, "n_patients": 2, "dice": dice | {"ci95": None}}}}
    assert make_table(few, folds)[0]["ci95"] == "range 0.400 to 1.000, n = 3"
    np.testing.assert_allclose([row["mean"], row["fold 0"], row["fold 1"]], [0.7, 0.6, 0.9])


# ------------------------------------------------------------------------------------------------------------
# The command, with training and audit stood in for
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[list[str]]:
    """Run in an empty folder, on ten cases; return the commands called, which write what the real ones do."""
    called: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        assert not check
        script, *flags = command[1:]
        called.append([script, *flags])
        if script == "train_drunet_v2.py":
            settings = parse(TrainConfig, "", None, flags)
            folder = Path(settings.resume or f"results/{settings.run}")
            if not settings.resume:
                write_json(folder / "config.json", to_plain(settings))
            save_checkpoint(folder / "last.pt", {"model": {}})
            if "--epochs" in flags:  # stands for a run that is stopped
                return SimpleNamespace(returncode=1)
            save_checkpoint(folder / "best.pt", {"model": {}, "postprocessing": {}})
        else:
            folder = Path(flags[1])
            split = json.loads((folder / "split.json").read_text())
            facts = {"data_kind": "phantom", "averaged_over": "cases", "checkpoint_sha256": "c"}
            write_json(folder / "evaluation" / "summary.json", facts | {"split_sha256": split["sha256"]})
            row = dict.fromkeys(
                (*AVERAGED, "dice_slice", "tp", "fp", "fn", "reference_ml", "prediction_ml"), 1
            )
            row |= dict.fromkeys(("lesions_tp", "lesions_fp", "lesions_fn", "tumour_slices"), 1)
            row |= {"cohort": "internal", "region": "WT", "mode": "plain"}
            rows = [
                row | {"case": case, "patient": case[:4], "dice": int(case[1:4]) / 10}
                for case in split["test"]
            ]
            other = [row | {"case": "v", "patient": "v", "cohort": "validation", "dice": 0}]
            pd.DataFrame(rows + other).to_csv(folder / "evaluation" / "metrics_per_case.csv", index=False)
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cross_validation.subprocess, "run", run)
    monkeypatch.setattr(cross_validation, "find_cases", lambda *_: make_cases([1] * 10))
    monkeypatch.setattr(cross_validation, "with_reference", lambda cases, _: cases)
    monkeypatch.setattr(cross_validation, "write_result", lambda name, content: (name, content))
    return called


def test_all_cases_are_pooled_once_and_finished_folds_are_kept(commands, capsys) -> None:
    config = CrossValidationConfig(name="made", train="--widths 4 8 --device cpu --no-amp")
    main(dataclasses.replace(config, only=(0, 3)))
    assert [command[0] for command in commands] == ["train_drunet_v2.py", "final_evaluation_v2.py"] * 2
    assert "--no-amp" in commands[1]
    assert (
        "cross_validation_made_1, cross_validation_made_2, cross_validation_made_4" in capsys.readouterr().out
    )
    main(config)
    assert len(commands) == 10
    out = capsys.readouterr().out
    assert "synthetic phantoms, not a BraTS result" in out
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["WT", "plain"]]
    assert line.split()[2:5] == ["10", "10", "0.45"]  # the mean of 0.0 to 0.9


def test_a_fold_that_was_stopped_goes_on_and_one_that_was_trained_is_audited(commands, input_error) -> None:
    stopped = CrossValidationConfig(name="made", train="--epochs 3", only=(0,))
    with input_error("cross_validation_made_0", "train_drunet_v2.py", "run this again"):
        main(stopped)
    main(CrossValidationConfig(name="made", only=(0,)))  # epochs may change, as with --resume
    assert commands[1] == ["train_drunet_v2.py", "--resume", "results/cross_validation_made_0"]
    Path("results/cross_validation_made_0/evaluation/summary.json").unlink()
    main(CrossValidationConfig(name="made", only=(0,)))
    assert [command[0] for command in commands[3:]] == ["final_evaluation_v2.py"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": "--widths 4 8 16"}, "--widths"),
        ({"data_dir": "elsewhere"}, "--data-dir"),
        ({"seed": 1}, "patients"),
        ({"folds": 4}, "patients"),
    ],
)
def test_folds_of_another_cross_validation_are_refused(commands, input_error, changes, named) -> None:
    config = CrossValidationConfig(name="made", train="--widths 4 8")
    main(dataclasses.replace(config, only=(0,)))
    with input_error("results/cross_validation_made_0", named, "--name"):
        main(dataclasses.replace(config, only=(1,), **changes))
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": "--run x"}, "--run"),
        ({"train": "--split=x"}, "--split"),
        ({"train": "--skip-bad"}, "--skip-bad"),
        ({"train": "--widths '4"}, "quotes"),
        ({"name": "a/b"}, "--name"),
        ({"only": (5,)}, "--only 5"),
        ({"validation_share": 1.0}, "--validation-share"),
        ({"validation_share": float("nan")}, "--validation-share"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_input_is_named_before_anything_is_run(commands, input_error, changes, named) -> None:
    with input_error(named):
        main(CrossValidationConfig(**changes))
    assert not commands
