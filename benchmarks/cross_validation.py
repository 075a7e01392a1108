"""Dice over every patient of a cohort: k runs, each tested on a k-th of the patients that it has not seen.

    python -m benchmarks.cross_validation --data-dir data/lgg --train "--widths 16 32 64 128 256"

A single test set of few patients is hard or easy by luck; here each patient is a test patient once. Folds are
by patient. In each, validation patients are drawn from the rest, and choose epoch, threshold and
post-processing as always. Run it again to go on: folds that have been audited are kept.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common import print_table, write_result
from cases_v2 import Case
from dataset_balance_v2 import SPLIT_PARTS, read_split, split_sha256
from layouts_v2 import find_cases
from measure_v2 import summarise_cohort
from utils_v2 import InputError, option, run_command, write_json

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class CrossValidationConfig:
    """Settings of the cross-validation."""

    data_dir: str = option("data/BraTS2021", "folder with the cases")
    train: str = option("", "further flags of train_drunet_v2.py, in one string")
    folds: int = option(5, "runs, and parts of the patients")
    only: tuple[int, ...] | None = option(None, "folds to run now, from 0; default: all")
    validation_share: float = option(0.15, "share of a fold's other patients that are validated on")
    name: str = option("cross_validation", "runs are results/NAME_0 and so on, the result is NAME.json")
    seed: int = option(0, "seed of the folds")


def split_folds(
    cases: Sequence[Case], folds: int, validation_share: float, seed: int
) -> list[dict[str, Any]]:
    """Return one split per fold, by patient; over all folds each patient is a test patient once.

    Patients are sorted, shuffled by the seed and dealt out in turn, so that parts differ by one at most.
    InputError where a fold would leave fewer than two patients to train and validate on.
    """
    patients = sorted({case.patient_id for case in cases})
    if not 2 <= folds <= len(patients) or len(patients) - -(-len(patients) // folds) < 2:
        raise InputError(
            f"--folds {folds}: not possible with {len(patients)} patient(s); each fold needs one to test and "
            f"two more."
        )
    order = [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]
    splits = []
    for fold in range(folds):
        rest = [patient for index, patient in enumerate(order) if index % folds != fold]
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


def run_fold(config: CrossValidationConfig, split: dict[str, Any]) -> Path:
    """Train and audit one fold unless that is done, and return its run folder."""
    run = ROOT / "results" / f"{config.name}_{split['fold']}"
    if (run / "evaluation" / "summary.json").exists():
        if read_split(run / "split.json")["sha256"] != split["sha256"]:
            raise InputError(f"{run}: a fold of other patients; remove it or choose another --name.")
        return run
    split_path = ROOT / "results" / f"{run.name}_split.json"
    write_json(split_path, split)
    train = ["train_drunet_v2.py", "--data-dir", config.data_dir, "--split", str(split_path)]
    train += ["--run", run.name, *shlex.split(config.train)]
    for command in (train, ["final_evaluation_v2.py", "--run", f"results/{run.name}"]):
        if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            raise InputError(f"fold {split['fold']}: {command[0]} failed; see above, then run this again.")
    split_path.unlink()
    return run


def read_fold(run: Path) -> pd.DataFrame:
    """Return the per-case rows of a fold's test patients."""
    rows = pd.read_csv(run / "evaluation" / "metrics_per_case.csv", dtype={"case": str, "patient": str})
    return rows[rows["cohort"] == "internal"]


def summarise_folds(rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return {region: {mode: summary}} over the test cases of all folds, for modes "plain" and "tta"."""
    summary: dict[str, Any] = {}
    for (region, mode), part in rows.groupby(["region", "mode"], sort=False):
        if mode in ("plain", "tta"):
            summary.setdefault(region, {})[mode] = summarise_cohort(part.reset_index(drop=True), seed)
    return summary


def make_table(summary: dict[str, Any], by_fold: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """Return a row per region and mode: Dice over the cases of all folds, and the mean of each fold."""
    table = []
    for region, by_mode in summary.items():
        for mode, found in by_mode.items():
            dice = found["dice"]
            row = {"region": region, "mode": mode, "n": found["n_cases"]}
            row |= {name: dice[name] for name in ("mean", "sd", "median")}
            row |= {"ci95": "{:.3f} to {:.3f}".format(*dice["ci95"])}
            for fold, rows in enumerate(by_fold):
                row[f"fold {fold}"] = rows[(rows["region"] == region) & (rows["mode"] == mode)]["dice"].mean()
            table.append(row)
    return table


def main(config: CrossValidationConfig) -> None:
    """Run the folds that are asked for; once all are there, print and write what they come to."""
    splits = split_folds(
        find_cases(ROOT / config.data_dir), config.folds, config.validation_share, config.seed
    )
    chosen = range(config.folds) if config.only is None else config.only
    if unknown := set(chosen) - set(range(config.folds)):
        raise InputError(f"--only {min(unknown)}: folds are 0 to {config.folds - 1}.")
    for fold in chosen:
        run_fold(config, splits[fold])
    runs = [ROOT / "results" / f"{config.name}_{fold}" for fold in range(config.folds)]
    if missing := [run.name for run in runs if not (run / "evaluation" / "summary.json").exists()]:
        print(f"to do before there is a result: {', '.join(missing)}")
        return
    by_fold = [read_fold(run) for run in runs]
    summary = summarise_folds(pd.concat(by_fold), config.seed)
    table = make_table(summary, by_fold)
    print("Dice per case, mean over the test cases of all folds, each by the fold that has not seen it")
    print_table(table)
    print(write_result(config.name, {"folds": config.folds, "summary": summary, "table": table}))


if __name__ == "__main__":
    run_command(main, CrossValidationConfig, "Cross-validate a training over all patients of a cohort.")
