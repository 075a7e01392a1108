"""Dice over every patient of a cohort: k runs, each tested on a k-th of the patients that it has not seen.

    python -m benchmarks.cross_validation --data-dir data/lgg --name lgg --train "--widths 16 32 64 128 256"

A single test set of few patients is hard or easy by luck; here each patient is a test patient once. Folds are
by patient. In each, validation patients are drawn from the rest, and choose epoch, threshold and
post-processing as always. Stopped, it goes on when run again; folds that have been audited are kept.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from audit.measure import summarise_cohort
from audit.statistics import format_spread
from benchmarks.common import print_table, write_result
from cohort.cases import Case, with_reference
from cohort.layouts import find_cases
from cohort.phantom import PHANTOM_NOTE
from cohort.split import SPLIT_PARTS, read_split, split_sha256
from runtime.checkpoints import load_checkpoint
from runtime.command import flag_of, from_plain, parse, run_command, to_plain
from runtime.errors import InputError
from runtime.files import write_json
from train_drunet_v2 import RESUMABLE, TrainConfig

# What a fold decides itself, or what would take patients out of it.
NOT_IN_TRAIN = {"data_dir", "split", "run", "results_dir", "resume", "config", "hold_out_dir", "skip_bad"}


@dataclass(frozen=True)
class CrossValidationConfig:
    """Settings of the cross-validation."""

    data_dir: str = "data/BraTS2021"
    """folder with the cases"""
    train: str = ""
    """further flags of train_drunet_v2.py, in one string"""
    folds: int = 5
    """runs, and parts of the patients"""
    only: tuple[int, ...] | None = None
    """folds to run now, from 0; default: all"""
    validation_share: float = 0.15
    """share of a fold's other patients that are validated on"""
    name: str = "cohort"
    """runs are results/cross_validation_NAME_0 and so on"""
    seed: int = 0
    """seed of the folds"""


@dataclass(frozen=True)
class Fold:
    """One run of a cross-validation."""

    run: Path
    split: dict[str, Any]

    def is_trained(self) -> bool:
        """Return whether training has come to its end, which is the choice of post-processing."""
        path = self.run / "best.pt"
        return path.exists() and "postprocessing" in load_checkpoint(path)

    def is_audited(self) -> bool:
        """Return whether the audit has been written."""
        return (self.run / "evaluation" / "summary.json").exists()


def parse_training(config: CrossValidationConfig) -> tuple[list[str], TrainConfig]:
    """Return the flags in --train, and the settings they stand for; InputError where one has no place."""
    try:
        flags = shlex.split(config.train)
    except ValueError as error:
        raise InputError(f"--train {config.train!r}", str(error), "close the quotes") from error
    defaults = from_plain(TrainConfig, {"data_dir": config.data_dir})
    settings = parse(TrainConfig, "Flags in --train.", defaults, flags)
    usual = to_plain(defaults)
    if taken := [name for name in NOT_IN_TRAIN if to_plain(settings)[name] != usual[name]]:
        flag = flag_of(min(taken))
        raise InputError(
            "--train", f"{flag} has no place in it, as it would change the folds", "leave it out"
        )
    return flags, settings


def split_folds(
    cases: Sequence[Case], folds: int, validation_share: float, seed: int
) -> list[dict[str, Any]]:
    """Return one split per fold, by patient; over all folds each patient is a test patient once.

    Patients are sorted, shuffled by the seed and dealt out in turn, so that parts differ by one at most.
    InputError where a fold would leave fewer than two patients to train and validate on.
    """
    if not 0 < validation_share < 1 or seed < 0:
        raise InputError(
            f"--validation-share {validation_share} --seed {seed}",
            "the share must be between 0 and 1, the seed 0 or more",
        )
    patients = sorted({case.patient_id for case in cases})
    if not 2 <= folds <= len(patients) or len(patients) - -(-len(patients) // folds) < 2:
        raise InputError(
            f"--folds {folds}",
            f"not possible with {len(patients)} patient(s)",
            "each fold needs one to test and two more",
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


def check_fold(fold: Fold, settings: TrainConfig) -> None:
    """Raise InputError where a fold's run folder holds a run of other patients or other settings."""
    if not (fold.run / "config.json").exists():
        return
    before = to_plain(from_plain(TrainConfig, json.loads((fold.run / "config.json").read_text())))
    free = NOT_IN_TRAIN - {"data_dir"} | set(RESUMABLE)
    asked = to_plain(settings)
    other = [flag_of(name) for name in asked if name not in free and before[name] != asked[name]]
    if read_split(fold.run / "split.json")["sha256"] != fold.split["sha256"]:
        other.append("patients in its parts")
    if other:
        raise InputError(fold.run, f"a run with other {', '.join(other)}", "choose another --name")


def run_fold(fold: Fold, flags: list[str], settings: TrainConfig) -> None:
    """Train and audit a fold, as far as that is not done."""
    commands = []
    if not fold.is_trained():
        train = ["train_drunet_v2.py", *flags]
        if (fold.run / "last.pt").exists():
            train += ["--resume", str(fold.run)]
        else:
            write_json(fold.run / "split.json", fold.split)
            train += ["--data-dir", settings.source.data_dir, "--split", str(fold.run / "split.json")]
            train += ["--run", fold.run.name]
        commands.append(train)
    if not fold.is_audited():
        audit = ["final_evaluation_v2.py", "--run", str(fold.run), "--cache-dir", settings.source.cache_dir]
        audit += ["--device", settings.device, "--amp" if settings.amp else "--no-amp"]
        commands.append(audit)
    for command in commands:
        if subprocess.run([sys.executable, *command], check=False).returncode:
            raise InputError(fold.run.name, f"{command[0]} failed, see above", "run this again to go on")


def pool_folds(folds: Sequence[Fold], seed: int) -> dict[str, Any]:
    """Return summary and table over the test cases of all folds, and what they come from."""
    summaries = [json.loads((fold.run / "evaluation" / "summary.json").read_text()) for fold in folds]
    rows = []
    for fold in folds:
        table = pd.read_csv(
            fold.run / "evaluation" / "metrics_per_case.csv", dtype={"case": str, "patient": str}
        )
        rows.append(table[(table["cohort"] == "internal") & table["mode"].isin(("plain", "tta"))])
    summary: dict[str, Any] = {}
    for (region, mode), part in pd.concat(rows).groupby(["region", "mode"], sort=False):
        summary.setdefault(region, {})[mode] = summarise_cohort(part.reset_index(drop=True), seed)
    return {
        "data_kind": summaries[0]["data_kind"],
        "averaged_over": summaries[0]["averaged_over"],
        "summary": summary,
        "table": make_table(summary, rows),
        "split_sha256": [found["split_sha256"] for found in summaries],
        "checkpoint_sha256": [found["checkpoint_sha256"] for found in summaries],
    }


def make_table(summary: dict[str, Any], by_fold: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """Return a row per region and mode: Dice over the cases of all folds, and the mean of each fold."""
    table = []
    for region, by_mode in summary.items():
        for mode, found in by_mode.items():
            dice = found["dice"]
            row = {"region": region, "mode": mode, "cases": found["n_cases"], "patients": found["n_patients"]}
            row |= {name: dice[name] for name in ("mean", "sd", "median")}
            row |= {"ci95": format_spread(dice, "{:.3f}")}
            for fold, rows in enumerate(by_fold):
                row[f"fold {fold}"] = rows[(rows["region"] == region) & (rows["mode"] == mode)]["dice"].mean()
            table.append(row)
    return table


def main(config: CrossValidationConfig) -> None:
    """Run the folds that are asked for; once all are there, print and write what they come to."""
    if Path(config.name).name != config.name:
        raise InputError(f"--name {config.name!r}", "a plain name is needed, without a folder")
    flags, settings = parse_training(config)
    cases = with_reference(find_cases(settings.source, settings.source.modalities), config.data_dir)
    splits = split_folds(cases, config.folds, config.validation_share, config.seed)
    name = f"cross_validation_{config.name}"
    folds = [Fold(Path("results") / f"{name}_{index}", split) for index, split in enumerate(splits)]
    chosen = range(config.folds) if config.only is None else config.only
    if unknown := set(chosen) - set(range(config.folds)):
        raise InputError(f"--only {min(unknown)}", f"folds are 0 to {config.folds - 1}")
    for fold in folds:
        check_fold(fold, settings)
    for index in chosen:
        run_fold(folds[index], flags, settings)
    if missing := [fold.run.name for fold in folds if not fold.is_audited()]:
        print(f"to do before there is a result: {', '.join(missing)}")
        return
    pooled = pool_folds(folds, config.seed)
    if pooled["data_kind"] == "phantom":
        print(PHANTOM_NOTE)
    print("Dice per case, mean over the test cases of all folds, each by the fold that has not seen it")
    print_table(pooled["table"])
    print(write_result(name, pooled))


if __name__ == "__main__":
    run_command(main, CrossValidationConfig, "Cross-validate a training over all patients of a cohort.")
