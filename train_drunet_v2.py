"""Train DRUnet V2.

    python train_drunet_v2.py                                  the demo: phantoms, a narrow network, minutes on a CPU
    python train_drunet_v2.py --data-dir data/BraTS2021        the real thing
    python train_drunet_v2.py --resume results/RUN             go on where a run stopped

A run is a folder in results/ that explains itself; results/README.md says what it holds.
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cases_v2 import Case, find_cases, is_phantom, with_reference
from dataset_balance_v2 import (
    BalancedSampler,
    PreparedCase,
    SlabDataset,
    balance_slices,
    cases_of_split,
    make_train_loader,
    prepare_cases,
    read_split,
    slice_table,
    split_cases,
)
from inference_v2 import TrainedModel, build_network, load_weights, predict_volume
from model_drunet_v2 import WIDTHS, count_parameters
from plots_v2 import plot_curves
from utils_v2 import (
    THRESHOLDS,
    HybridFocalDiceLoss,
    InputError,
    amp_dtype,
    choose_device,
    describe_machine,
    describe_versions,
    dice_from_counts,
    load_checkpoint,
    option,
    overlap_at_thresholds,
    peak_memory_gb,
    run_command,
    save_checkpoint,
    set_seed,
    write_atomically,
    write_json,
)

DEFAULT_DATA = Path("data/BraTS2021")
DEMO_DATA = Path("data/phantom_internal")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are those of the published method."""

    data_dir: str | None = option(
        None, "folder with the cases; default: data/BraTS2021, or the demo without it"
    )
    results_dir: str = option("results", "folder that holds the runs")
    run: str | None = option(None, "name of the run folder; default: the data folder's name and the time")
    resume: str | None = option(
        None, "run folder to go on with, under its own settings; --epochs and the like count"
    )
    split: str | None = option(None, "split.json of another run to use instead of drawing a split")
    cache_dir: str = option("cache", "folder of decoded volumes")
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
    batch_size: int = option(16, "slabs a step")
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
    workers: int = option(2, "loader processes; 0 loads in the training process")
    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "where to compute")
    seed: int = option(0, "seed of weights, split, draws and augmentation")


# What the demo sets, where the command line says nothing else.
DEMO: dict[str, Any] = {
    "size": 128,
    "widths": (16, 32, 64, 128, 256),
    "max_minutes": 4.0,
    "slabs_per_epoch": 1024,
    "learning_rate": 2e-3,
    "min_learning_rate": 2e-4,
    "warmup_steps": 50,
    "ema": 0.98,
}
# What a resumed run may change: how long it goes on and where, never what it computes.
RESUMABLE = ("resume", "epochs", "max_minutes", "early_stop", "workers", "device", "cache_dir")


# ---------------------------------------------------------------------------------------------------------------
# Training state
# ---------------------------------------------------------------------------------------------------------------


class WeightAverage:
    """Exponential moving average of a network's weights and buffers, held in a copy of the network."""

    def __init__(self, network: nn.Module, copy: nn.Module, decay: float) -> None:
        self.network = network
        self.copy = copy
        self.decay = decay
        self.steps = 0
        copy.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network; early on faster, as its start is worth little."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for average, value in zip(
            self.copy.state_dict().values(), self.network.state_dict().values(), strict=True
        ):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)


@dataclass
class TrainState:
    """What a run carries from epoch to epoch; all of it is in last.pt."""

    network: nn.Module
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps taken
    minutes: float = 0.0  # spent so far, over all resumes
    best_dice: float = -1.0
    best_epoch: int = 0

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and kept: the average where there is one."""
        return self.average.copy if self.average else self.network

    def to_checkpoint(self) -> dict[str, Any]:
        """Return everything but the settings, as tensors and plain values."""
        return {
            "model": self.evaluated.state_dict(),
            "network": self.network.state_dict(),
            "average_steps": self.average.steps if self.average else 0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in ("epoch", "step", "minutes", "best_dice", "best_epoch")},
        }

    def restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Take the state of last.pt."""
        load_weights(self.evaluated, checkpoint, path)
        self.network.load_state_dict(checkpoint["network"])
        if self.average:
            self.average.steps = checkpoint["average_steps"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("epoch", "step", "minutes", "best_dice", "best_epoch"):
            setattr(self, name, checkpoint[name])


def make_state(config: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> TrainState:
    """Return the state of a run before its first step."""

    def make_network() -> nn.Module:
        network = build_network(len(config.modalities), len(config.regions), config.context, config.widths)
        return network.to(device, memory_format=torch.channels_last)

    try:
        network = make_network()
    except ValueError as error:
        raise InputError(f"--widths: {error}.") from error
    if config.size % network.multiple:
        raise InputError(
            f"--size {config.size} must be a multiple of {network.multiple} for {len(config.widths)} widths."
        )
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=device.type != "mps",
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=0.1,
        patience=config.patience,
        threshold=1e-3,
        threshold_mode="abs",
        min_lr=config.min_learning_rate,
    )
    average = WeightAverage(network, make_network(), config.ema) if config.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return TrainState(network, average, optimizer, scheduler, scaler)


# ---------------------------------------------------------------------------------------------------------------
# One epoch, one validation
# ---------------------------------------------------------------------------------------------------------------


def train_one_epoch(
    state: TrainState,
    loader: DataLoader,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    out_of_time: Callable[[], bool],
) -> dict[str, float]:
    """Run the epoch's steps, fewer where the clock runs out; return its loss, Dice, speed and waiting time.

    The Dice is of the slabs drawn (augmented, balanced), pooled over the epoch, at probability 0.5: a sign of
    progress, not a result. Counts stay on the device and are read every 10 steps.
    """
    network, optimizer = state.network.train(), state.optimizer
    loss_function = HybridFocalDiceLoss(config.focal_weight, config.dice_weight)
    warmup_steps = min(config.warmup_steps, len(loader) // config.accumulate)
    totals = torch.zeros(4, device=device)  # loss, overlap, predicted + reference voxels, steps
    figures = {"train_loss": math.nan, "train_dice": math.nan}
    start, waited_s, slabs = time.perf_counter(), 0.0, 0
    progress = tqdm(loader, desc=f"epoch {state.epoch + 1}/{config.epochs}", unit="step", leave=False)
    asked = time.perf_counter()
    for index, (slab, target) in enumerate(progress):
        waited_s += time.perf_counter() - asked
        slab = slab.to(device, non_blocking=True, memory_format=torch.channels_last)
        target = target.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = network(slab)
        loss = loss_function(logits, target)
        state.scaler.scale(loss / config.accumulate).backward()
        if (index + 1) % config.accumulate == 0:
            if state.step < warmup_steps:
                optimizer.param_groups[0]["lr"] = config.learning_rate * (state.step + 1) / warmup_steps
            state.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
            state.scaler.step(optimizer)
            state.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            if state.average:
                state.average.update()
        with torch.no_grad():
            predicted = logits > 0
            totals += torch.stack(
                (
                    loss,
                    (predicted & (target > 0)).sum(),
                    predicted.sum() + target.sum(),
                    torch.ones_like(loss),
                )
            ).detach()
        slabs += len(slab)
        stop = out_of_time()
        if index % 10 == 0 or index + 1 == len(loader) or stop:
            figures = _running_figures(totals)
            rate = optimizer.param_groups[0]["lr"]
            progress.set_postfix_str(
                f"loss {figures['train_loss']:.3f} Dice {figures['train_dice']:.3f} lr {rate:.1e}"
            )
        if stop:
            break
        asked = time.perf_counter()
    progress.close()
    seconds = time.perf_counter() - start
    return figures | {"slabs_per_second": slabs / seconds, "waiting_share": waited_s / seconds}


def _running_figures(totals: torch.Tensor) -> dict[str, float]:
    loss, overlap, both, steps = totals.tolist()
    if not math.isfinite(loss):
        raise InputError("the loss is no longer finite; take a lower --learning-rate or --no-amp.")
    return {"train_loss": loss / steps, "train_dice": 2 * overlap / both if both else 1.0}


def validate(model: TrainedModel, cases: Sequence[PreparedCase], batch_size: int) -> np.ndarray:
    """Return Dice per case, region and threshold, shape (cases, R, len(THRESHOLDS)), on whole volumes without TTA."""
    dice = np.zeros((len(cases), len(model.regions), len(THRESHOLDS)))
    for index, case in enumerate(tqdm(cases, desc="validating", unit="case", leave=False)):
        probabilities = predict_volume(
            model, case.volume, case.brain_voxels, tta=False, batch_size=batch_size
        )
        for region, (probability, reference) in enumerate(zip(probabilities, case.reference, strict=True)):
            counts = overlap_at_thresholds(probability, reference, THRESHOLDS)
            dice[index, region] = [dice_from_counts(*row) for row in counts.tolist()]
    return dice


def learning_rate_is_due(config: TrainConfig, state: TrainState, minutes: float) -> bool:
    """Tell whether the share of the run after which the learning rate drops in any case is over."""
    by_clock = minutes / config.max_minutes if config.max_minutes else 0.0
    return max(by_clock, state.epoch / config.epochs) >= config.drop_by


# ---------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------


def prepare_config(config: TrainConfig) -> TrainConfig:
    """Return the settings the run will use: those of the run resumed, of the demo, or as given."""
    if config.resume:
        return resume_config(config)
    if config.data_dir is None and DEFAULT_DATA.is_dir():
        config = dataclasses.replace(config, data_dir=str(DEFAULT_DATA))
    if config.data_dir is None:
        print(
            f"No --data-dir and no {DEFAULT_DATA}: running the demo on synthetic phantoms, not a BraTS result."
        )
        make_demo_data()
        untouched = {
            name: value for name, value in DEMO.items() if getattr(config, name) == getattr(TrainConfig, name)
        }
        config = dataclasses.replace(config, data_dir=str(DEMO_DATA), **untouched)
    if config.run is None:
        name = f"{Path(config.data_dir).resolve().name}_{datetime.now():%Y%m%d_%H%M%S}"
        config = dataclasses.replace(config, run=name)
    if (Path(config.results_dir) / config.run / "last.pt").exists():
        raise InputError(f"--run {config.run}: this run exists; choose another name or --resume it.")
    return config


def resume_config(config: TrainConfig) -> TrainConfig:
    """Return the settings of the run in --resume; raises InputError where the command line contradicts them."""
    folder = Path(config.resume)
    saved = load_checkpoint(folder / "last.pt")["config"]
    saved = TrainConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
    for field in dataclasses.fields(TrainConfig):
        asked = getattr(config, field.name)
        if field.name not in RESUMABLE and asked not in (field.default, getattr(saved, field.name)):
            flag = "--" + field.name.replace("_", "-")
            raise InputError(
                f"{flag} {asked}: {folder} was trained with {getattr(saved, field.name)}; leave the flag out."
            )
    kept = {
        name: getattr(config, name)
        for name in RESUMABLE
        if getattr(config, name) != getattr(TrainConfig, name)
    }
    place = {"results_dir": str(folder.parent), "run": folder.name}
    return dataclasses.replace(saved, **{"max_minutes": config.max_minutes, **kept, **place})


def make_demo_data() -> None:
    """Write the phantom cohorts of the demo, unless they are there."""
    for style, folder, cases in (
        ("internal", DEMO_DATA, 40),
        ("external", DEMO_DATA.with_name("phantom_external"), 10),
    ):
        if folder.is_dir() and len(list(folder.glob("*/*_seg.nii.gz"))) == cases:
            continue
        script = Path(__file__).with_name("make_phantom_v2.py")
        command = [
            sys.executable,
            str(script),
            "--output",
            str(folder),
            "--cases",
            str(cases),
            "--style",
            style,
        ]
        subprocess.run(command, check=True)


def choose_split(config: TrainConfig, cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    """Return the run's split, from the run itself, from --split or drawn anew, and freeze it in split.json."""
    if (folder / "split.json").exists() and config.resume:
        return read_split(folder / "split.json")
    split = read_split(config.split) if config.split else split_cases(cases, config.seed)
    write_json(folder / "split.json", split)
    return split


class Log:
    """Prints lines and keeps them in train.log; keeps the epochs' figures in log.csv."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        if resumed and (folder / "log.csv").exists():
            self.rows = pd.read_csv(folder / "log.csv").to_dict("records")

    def say(self, line: str) -> None:
        """Print a line and append it to train.log."""
        tqdm.write(line)
        with (self.folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def add(self, row: dict[str, Any], title: str) -> None:
        """Append an epoch to log.csv and draw the curves anew."""
        self.rows.append(row)
        table = pd.DataFrame(self.rows)
        write_atomically(self.folder / "log.csv", lambda target: table.to_csv(target, index=False))
        plot_curves(self.folder / "curves.png", table, title)


def main(config: TrainConfig) -> None:
    """Train, validating each epoch, until the epochs, the clock or the patience runs out."""
    started = time.monotonic()
    config = prepare_config(config)
    set_seed(config.seed)
    device = choose_device(config.device)
    dtype = amp_dtype(device, config.amp)
    state = make_state(config, device, dtype)
    cases = find_cases(config.data_dir, config.modalities, config.slice_channel)
    labelled = with_reference(cases, config.data_dir)
    folder = Path(config.results_dir) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    split = choose_split(config, labelled, folder)
    log = Log(folder, resumed=bool(config.resume))
    if config.resume:
        state.restore(load_checkpoint(folder / "last.pt"), folder / "last.pt")
        log.rows = log.rows[: state.epoch]
    settings = dataclasses.asdict(config)
    data_kind = "phantom" if is_phantom(labelled[0]) else "real"
    about = {
        "command": " ".join(sys.argv),
        "hardware": describe_machine(device),
        "versions": describe_versions(),
    }
    write_json(folder / "config.json", {**settings, "data_kind": data_kind, **about})

    train_cases, validation_cases = (
        prepare_cases(
            cases_of_split(labelled, split, part, config.data_dir),
            config.modalities,
            config.regions,
            config.cache_dir,
        )
        for part in ("train", "validation")
    )
    about_run = {
        "data_kind": data_kind,
        "split_sha256": split["sha256"],
        "seen": [
            [case.case_id, case.patient_id, case.image_sha256] for case in (*train_cases, *validation_cases)
        ],
    }
    table = slice_table(train_cases, config.regions)
    draws = config.slabs_per_epoch or len(table)
    if draws < config.batch_size * config.accumulate:
        raise InputError(
            f"{draws} slabs an epoch do not fill one step; take a smaller --batch-size or --accumulate."
        )
    sampler = BalancedSampler(
        balance_slices(table, config.tumour_share, config.empty_share), draws, config.seed
    )
    dataset = SlabDataset(train_cases, table, config.context, config.size)
    loader = make_train_loader(dataset, sampler, config.batch_size, config.workers)
    title = (
        f"{config.run}: {'synthetic phantoms, not a BraTS result' if data_kind == 'phantom' else 'real data'}"
    )
    log.say(
        f"{title}; {len(cases)} cases ({len(cases) - len(labelled)} without mask left out), split "
        f"{len(split['train'])} / {len(split['validation'])} / {len(split['test'])} by patient, {len(table)} training "
        f"slices, {count_parameters(state.network) / 1e6:.2f} M parameters, {device.type}, {dtype or 'float32'}"
    )

    elapsed = {"before": state.minutes, "validation_s": 0.0}

    def minutes() -> float:
        return elapsed["before"] + (time.monotonic() - started) / 60

    def out_of_time() -> bool:
        spent = (time.monotonic() - started) + elapsed["validation_s"]
        return config.max_minutes is not None and spent >= 60 * config.max_minutes

    while state.epoch < config.epochs and not out_of_time():
        sampler.epoch = state.epoch
        figures = train_one_epoch(state, loader, config, device, dtype, out_of_time)
        begun = time.monotonic()
        model = as_trained_model(state, config, device, dtype)
        dice = validate(model, validation_cases, config.batch_size)
        elapsed["validation_s"] = time.monotonic() - begun
        state.epoch += 1
        state.minutes = minutes()
        at_half = dice[:, :, np.argmin(abs(THRESHOLDS - 0.5))].mean(0)  # (R,)
        rate = state.optimizer.param_groups[0]["lr"]
        if at_half.mean() > state.best_dice:
            state.best_dice, state.best_epoch = float(at_half.mean()), state.epoch
            write_best(folder, state, config, about_run, dice)
        state.scheduler.step(float(at_half.mean()))
        if learning_rate_is_due(config, state, minutes()):
            state.optimizer.param_groups[0]["lr"] = min(rate, config.min_learning_rate)
        row = {"epoch": state.epoch, "minutes": round(state.minutes, 2), "learning_rate": rate, **figures}
        row |= {
            f"validation_dice_{region}": float(v) for region, v in zip(config.regions, at_half, strict=True)
        }
        row |= {"peak_memory_gb": peak_memory_gb(device)}
        log.add(row, title)
        save_checkpoint(folder / "last.pt", state.to_checkpoint() | {"config": settings} | about_run)
        log.say(
            f"epoch {state.epoch:>3}  {state.minutes:6.1f} min  loss {figures['train_loss']:.4f}  "
            f"validation Dice per case {' '.join(f'{r} {v:.4f}' for r, v in zip(config.regions, at_half, strict=True))}"
            f"{' *' if state.best_epoch == state.epoch else '  '}  lr {rate:.1e}  "
            f"{figures['slabs_per_second']:.1f} slabs/s  waiting {figures['waiting_share']:.1%}  "
            f"peak {row['peak_memory_gb']:.2f} GiB"
        )
        if state.epoch - state.best_epoch >= config.early_stop:
            log.say(f"no better validation Dice for {config.early_stop} epochs: stopping early")
            break
    log.say(
        f"kept epoch {state.best_epoch}: validation Dice {state.best_dice:.4f}, mean over {len(validation_cases)} cases, "
        f"threshold 0.5, no TTA. Audit it: python final_evaluation_v2.py --run {folder}"
    )


def as_trained_model(
    state: TrainState, config: TrainConfig, device: torch.device, dtype: torch.dtype | None
) -> TrainedModel:
    """Return the weights to be validated as a model ready to predict."""
    return TrainedModel(
        network=state.evaluated.eval(),
        modalities=config.modalities,
        regions=config.regions,
        context=config.context,
        size=config.size,
        thresholds=(0.5,) * len(config.regions),
        device=device,
        dtype=dtype,
        checkpoint={},
    )


def write_best(
    folder: Path, state: TrainState, config: TrainConfig, about: dict[str, Any], dice: np.ndarray
) -> None:
    """Write best.pt: the weights, the settings, and per region the threshold with the best mean validation Dice."""
    sweep = dice.mean(0)  # (R, T)
    save_checkpoint(
        folder / "best.pt",
        {
            "model": state.evaluated.state_dict(),
            "config": dataclasses.asdict(config),
            "thresholds": [float(THRESHOLDS[best]) for best in sweep.argmax(1)],
            "threshold_sweep": {"thresholds": THRESHOLDS.tolist(), "validation_dice": sweep.tolist()},
            "epoch": state.epoch,
            "validation_dice": state.best_dice,
            **about,
        },
    )


if __name__ == "__main__":
    run_command(main, TrainConfig, "Train DRUnet V2. Without data it runs the demo on synthetic phantoms.")
