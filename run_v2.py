"""A training run's settings and its folder: the demo, resuming, the split, the log and the clock."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from cache_v2 import CACHE_GB, open_cache
from cases_v2 import Case, is_phantom, with_reference
from check_v2 import Problem, check_cohort, has_error, write_problems
from dataset_balance_v2 import (
    DEMO_DATA,
    SPLIT_PARTS,
    choose_data_dir,
    read_split,
    split_cases,
    split_sha256,
)
from distributed_v2 import from_main, is_main, world_size
from layouts_v2 import LayoutName, describe_cases, find_cases
from leakage_v2 import find_held_out, fingerprint_modality, identify_cases
from model_drunet_v2 import WIDTHS
from plots_v2 import plot_curves
from utils_v2 import InputError, load_checkpoint, option, typed_options, write_atomically, write_json


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are those of the published method."""

    data_dir: str | None = option(
        None, "folder with the cases; default: data/BraTS2021, or the demo without it"
    )
    results_dir: str = option("results", "folder that holds the runs")
    run: str | None = option(None, "name of the run folder; default: the data folder's name and the time")
    resume: str | None = option(
        None,
        "run folder to go on with, under its own settings, a dropped learning rate included; --epochs and "
        "the like count",
    )
    split: str | None = option(None, "split.json of another run to use instead of drawing a split")
    hold_out_dir: str | None = option(
        None, "cohort kept for testing: its patients are left out by id, mapping and content of the scans"
    )
    cache_dir: str = option("cache", "folder of decoded volumes")
    layout: LayoutName = option("auto", "layout of the cases; auto tells it by what is there")
    mapping: str | None = option(None, "CSV sheet of ids, beside the mapping sheets found with the cases")
    skip_bad: bool = option(False, "check every case first and leave out those with errors; see skipped.csv")
    cache_gb: float = option(CACHE_GB, "largest size of that folder in GB; what is unused longest goes first")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR")
    modalities: tuple[str, ...] = option(("flair",), "modalities, in channel order: flair, t1, t1ce, t2")
    regions: tuple[str, ...] = option(("WT",), "tumour regions, one sigmoid each: WT, TC, ET")
    context: int = option(1, "neighbouring slices on each side of the one segmented")
    size: int = option(256, "height and width of the network's input")
    widths: tuple[int, ...] = option(WIDTHS, "filters per level, the last is the bottleneck")
    epochs: int = option(100, "epochs at most")
    max_minutes: float | None = option(None, "wall-clock limit; the run still ends with validation and plots")
    slabs_per_epoch: int | None = option(
        None, "slabs drawn per epoch; default: as many as there are training slices"
    )
    batch_size: int = option(16, "slabs a step, on each rank under torchrun")
    accumulate: int = option(1, "steps whose gradients are added up before the weights move")
    learning_rate: float = option(1e-4, "AdamW learning rate after warm-up")
    min_learning_rate: float = option(1e-5, "learning rate after the drop")
    warmup_steps: int = option(200, "optimiser steps of linear warm-up, at most one epoch")
    weight_decay: float = option(1e-2, "AdamW weight decay")
    patience: int = option(5, "epochs without a better validation Dice before the learning rate drops")
    drop_by: float = option(0.75, "share of the epochs or minutes after which the drop comes in any case")
    early_stop: int = option(15, "epochs without a better validation Dice before the run ends")
    clip_norm: float = option(5.0, "largest gradient norm")
    ema: float = option(0.0, "decay of the averaged weights that are validated and kept; 0 is off")
    focal_weight: float = option(1.0, "weight of the focal loss")
    dice_weight: float = option(1.0, "weight of the Dice loss")
    tumour_share: float = option(0.5, "share of draws that show tumour")
    empty_share: float = option(0.02, "share of draws that show no brain")
    amp: bool = option(
        True, "mixed precision: bfloat16, or float16 with loss scaling, where the device has it"
    )
    compile: bool = option(False, "compile the network with torch.compile; where that fails, go on without")
    checkpointing: bool = option(False, "compute activations anew in the backward pass: less memory, slower")
    sync_batchnorm: bool = option(False, "batch statistics over the slabs of all ranks, under torchrun")
    probe: bool = option(True, "say before the first epoch what memory a step of full size needs")
    workers: int = option(2, "loader processes; 0 loads in the training process")
    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "where to compute")
    seed: int = option(0, "seed of weights, split, draws and augmentation")


# What the demo sets, where the command line says nothing else.
DEMO: dict[str, Any] = {
    "size": 128,
    "widths": (16, 32, 64, 128, 256),
    "max_minutes": 6.0,
    "slabs_per_epoch": 1024,
    "learning_rate": 2e-3,
    "min_learning_rate": 2e-4,
    "warmup_steps": 50,
    "ema": 0.98,
}
# What a resumed run may change: how long it goes on and where, never what it computes.
RESUMABLE = ("resume", "epochs", "max_minutes", "early_stop", "workers", "device", "cache_dir", "cache_gb")
RESUMABLE += ("compile", "checkpointing", "probe")


def prepare_config(config: TrainConfig) -> TrainConfig:
    """Return the settings the run will use: those of the run resumed, of the demo, or as given."""
    if config.resume:
        return resume_config(config)
    data_dir = choose_data_dir(config.data_dir)
    if config.data_dir is None and Path(data_dir) == DEMO_DATA:
        untouched = {k: value for k, value in DEMO.items() if getattr(config, k) == getattr(TrainConfig, k)}
        config = dataclasses.replace(config, **untouched)
    config = dataclasses.replace(config, data_dir=data_dir)
    if config.run is None:
        name = f"{Path(config.data_dir).resolve().name}_{datetime.now():%Y%m%d_%H%M%S}"
        config = dataclasses.replace(config, run=name)
    if (Path(config.results_dir) / config.run / "last.pt").exists():
        raise InputError(f"--run {config.run}: this run exists; choose another name or --resume it.")
    return config


def resume_config(config: TrainConfig) -> TrainConfig:
    """Return the settings of the run in --resume; InputError where the command line contradicts them."""
    folder = Path(config.resume)
    checkpoint = load_checkpoint(folder / "last.pt")
    saved = checkpoint["config"]
    saved = TrainConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
    place = {"results_dir": str(folder.parent), "run": folder.name}
    typed = typed_options()
    for field in dataclasses.fields(TrainConfig):
        asked = getattr(config, field.name)
        is_asked = field.name in typed or asked != field.default
        if field.name not in (*RESUMABLE, "results_dir") and is_asked and asked != getattr(saved, field.name):
            flag = "--" + field.name.replace("_", "-")
            raise InputError(
                f"{flag} {asked}: {folder} was trained with {getattr(saved, field.name)}; leave the flag out."
            )
    saved = share_batch(saved, checkpoint.get("ranks", 1), world_size(), folder)
    kept = {
        name: getattr(config, name)
        for name in RESUMABLE
        if name in typed or getattr(config, name) != getattr(TrainConfig, name)
    }
    return dataclasses.replace(saved, **{"max_minutes": config.max_minutes, **kept, **place})


def choose_cases(config: TrainConfig) -> tuple[list[Case], list[Problem]]:
    """Return the cases of --data-dir and, with --skip-bad, the errors of those left out for them."""
    where = (config.data_dir, config.modalities, config.slice_channel, config.layout, config.mapping)
    if not config.skip_bad:
        return find_cases(*where), []
    cases, problems = check_cohort(*where, every_file=False)
    bad = has_error(problems)
    kept = [case for case in cases if case.case_id not in bad]
    if not kept:
        raise InputError(f"{config.data_dir}: all {len(cases)} cases have errors; look at them with --check.")
    return kept, [problem for problem in problems if problem.severity == "error"]


def share_batch(config: TrainConfig, before: int, now: int, folder: Path) -> TrainConfig:
    """Return settings by which `now` ranks move the weights after as many slabs as `before` ranks did.

    Where it can, --accumulate changes and the batch on each rank stays; else that batch. InputError where the
    slabs cannot be shared equally.
    """
    if (config.accumulate * before) % now == 0:
        return dataclasses.replace(config, accumulate=config.accumulate * before // now)
    if (config.batch_size * before) % now == 0:
        return dataclasses.replace(config, batch_size=config.batch_size * before // now)
    slabs = config.batch_size * config.accumulate * before
    raise InputError(
        f"--nproc-per-node: {now} ranks cannot share the {slabs} slabs "
        f"after which {folder} moves its weights; resume it on {before} rank(s) or another divisor."
    )


@dataclass(frozen=True)
class Data:
    """What a run works on, decided by the main rank."""

    cases: list[Case]  # with a mask, not held out, not bad
    split: dict[str, Any]
    facts: dict[str, Any]  # data_kind, and the ids of those left out: held_out, skipped
    lines: list[str]  # all of it in words


def choose_data(config: TrainConfig, folder: Path) -> Data:
    """Return the run's cases and split, and write into its folder who was left out and why."""
    found, problems = choose_cases(config)
    with_mask = with_reference(found, config.data_dir)
    cases, held_out_lines = hold_out(config, with_mask, folder)
    if config.skip_bad:
        write_problems(folder / "skipped.csv", problems)
    kept_ids = {case.case_id for case in cases}
    lines = describe_cases(found)
    lines += [f"left out: {problem.case or '-'}  {problem.file}: {problem.problem}" for problem in problems]
    facts = {
        "data_kind": "phantom" if is_phantom(with_mask[0]) else "real",
        "held_out": [case.case_id for case in with_mask if case.case_id not in kept_ids],
        "skipped": sorted({problem.case or problem.file for problem in problems}),
    }
    split = choose_split(config, cases, folder, {*facts["held_out"], *facts["skipped"]})
    return Data(cases, split, facts, lines + held_out_lines)


def choose_split(
    config: TrainConfig, cases: Sequence[Case], folder: Path, left_out: set[str]
) -> dict[str, Any]:
    """Return the run's split, its own, that of --split or one drawn anew, and freeze it in split.json.

    --split may name cases that are left out of the run; they are left out of its split too.
    """
    if (folder / "split.json").exists() and config.resume:
        return read_split(folder / "split.json")
    split = read_split(config.split) if config.split else split_cases(cases, config.seed)
    if config.split and left_out:
        split = without_cases(split, left_out)
    write_json(folder / "split.json", split)
    return split


def without_cases(split: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Return a split without some cases, under its own hash; InputError where nothing is left to train on."""
    parts = {part: [case_id for case_id in split[part] if case_id not in left_out] for part in SPLIT_PARTS}
    if empty := [part for part in SPLIT_PARTS if not parts[part]]:
        raise InputError(f"--split: all its {empty[0]} cases are left out of this run; draw a new one.")
    return {**split, **parts, "sha256": split_sha256(parts)}


def hold_out(config: TrainConfig, cases: Sequence[Case], folder: Path) -> tuple[list[Case], list[str]]:
    """Return the cases without the patients of --hold-out-dir, and the lines that say who was left out.

    The list of those left out is in the run's held_out.csv. A resumed run takes it from there.
    """
    table = folder / "held_out.csv"
    if not config.hold_out_dir:
        return list(cases), []
    if not (config.resume and table.exists()):
        open_cache(Path(config.cache_dir))
        modality = fingerprint_modality(config.modalities)
        held = find_cases(
            config.hold_out_dir, (modality,), config.slice_channel, mapping=config.mapping, must_name=False
        )
        found = find_held_out(
            identify_cases(cases, (modality,), config.cache_dir),
            identify_cases(held, (modality,), config.cache_dir),
        )
        write_atomically(table, lambda target: found.to_csv(target, index=False))
    found = pd.read_csv(table, dtype={"case": str, "patient": str})
    left_out = set(found["case"])
    counts = ", ".join(f"{count} by {name}" for name, count in found["evidence"].value_counts().items())
    lines = [
        f"{len(left_out)} cases of {found['patient'].nunique()} patients are in {config.hold_out_dir} and "
        f"left out of the run{f' ({counts})' if counts else ''}; the list is in {table}"
    ]
    lines += [f"  left out: {row.case}, {row.evidence} as {row.known_as}" for row in found.itertuples()]
    return [case for case in cases if case.case_id not in left_out], lines


class Log:
    """Prints lines and keeps them in train.log; keeps the epochs' figures in log.csv."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        self.folder = folder
        self.writes = is_main()
        self.rows: list[dict[str, Any]] = []
        if resumed and (folder / "log.csv").exists():
            self.rows = pd.read_csv(folder / "log.csv").to_dict("records")

    def say(self, line: str) -> None:
        """Print a line and append it to train.log; the main rank alone does, as with `add`."""
        if not self.writes:
            return
        tqdm.write(line)
        with (self.folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def add(self, row: dict[str, Any], title: str) -> None:
        """Append an epoch to log.csv and draw the curves anew."""
        if not self.writes:
            return
        self.rows.append(row)
        table = pd.DataFrame(self.rows)
        write_atomically(self.folder / "log.csv", lambda target: table.to_csv(target, index=False))
        plot_curves(self.folder / "curves.png", table, title)


class Clock:
    """The wall clock of one command: minutes spent, and whether --max-minutes leaves time for more steps.

    With a limit, the main rank's clock is every rank's: all must ask `is_out` and `share` together.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.started = time.monotonic()
        self.max_minutes = max_minutes
        self.reserved_s = 0.0  # kept back for the validation that ends the run: as long as the last one took

    def minutes(self) -> float:
        """Return the minutes since the command started."""
        return (time.monotonic() - self.started) / 60

    def is_out(self) -> bool:
        """Tell whether it is time to validate and end."""
        if self.max_minutes is None:
            return False
        return from_main(self.minutes() + self.reserved_s / 60 >= self.max_minutes)

    def share(self) -> float:
        """Return the share of --max-minutes that is over; 0 without a limit."""
        return from_main(self.minutes() / self.max_minutes) if self.max_minutes else 0.0
