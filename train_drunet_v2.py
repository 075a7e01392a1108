"""Train DRUnet V2.

    python train_drunet_v2.py                                data/BraTS2021; without it the demo on phantoms
    python train_drunet_v2.py --data-dir data/cohort         your own cases
    python train_drunet_v2.py --resume results/RUN           go on where a run stopped
    python train_drunet_v2.py --config results/RUN/config.json    a new run with the settings of another
    python train_drunet_v2.py --init results/RUN/best.pt ...      a new run from the weights of another
    torchrun --nproc-per-node 2 -- train_drunet_v2.py ...    the same on two GPUs, --batch-size on each

A run is a folder in results/ that explains itself; results/README.md says what it holds.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader

import dataset_balance_v2 as dataset
import inference_v2 as inference
import model_drunet_v2 as model
from audit import overlays, pages, plots, postprocess
from cohort import cache, initial, phantom, selection
from cohort.selection import TrainingSource
from cohort.split import SPLIT_PARTS
from runtime import checkpoints, command, cpu_threads, files, machine, probe, ranks, rates
from runtime.command import Count, CountOrZero, Decay, NotNegative, Positive, Seed, Share
from runtime.errors import InputError
from runtime.log import log, log_to_file, progress
from runtime.state import Clock, Recipe, TrainState, start_state
from utils_v2 import THRESHOLDS, HybridFocalDiceLoss, Overlap, overlap_at_thresholds

# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are those of the published method."""

    # the run
    run: str | None = None
    """name of the run folder; default: the data folder's name and the time"""
    results_dir: str = "results"
    """folder that holds the runs"""
    resume: str | None = None
    """run folder to go on with, under its own settings; only --epochs, --max-minutes, --early-stop,
    --workers, --device, --cache-dir, --compile, --checkpointing and --probe may be given with it"""
    config: str | None = None
    """config.json of another run, whose settings are the defaults of this one"""
    init: str | None = None
    """checkpoint whose weights the run starts from; its network and regions are the defaults"""
    seed: Seed = 0
    """seed of weights, split, draws and augmentation"""

    # the cases
    source: tyro.conf.OmitArgPrefixes[TrainingSource] = TrainingSource()

    # the network
    context: CountOrZero = 1
    """neighbouring slices on each side of the one segmented"""
    size: Count = 256
    """height and width of the network's input"""
    widths: tuple[Count, ...] = model.WIDTHS
    """filters per level, the last is the bottleneck"""
    use_se: bool = True
    """squeeze-and-excitation in every residual block"""
    use_attention: bool = True
    """attention gates on the skips"""
    dilated: bool = True
    """dilation in the encoder"""
    residual: bool = True
    """residual connections in the blocks"""

    # how long
    epochs: Count = 100
    """epochs at most"""
    max_minutes: Positive | None = None
    """wall-clock limit; the run still ends with validation and plots"""
    slabs_per_epoch: Count | None = None
    """slabs drawn per epoch; default: as many as there are training slices"""
    early_stop: Count = 15
    """epochs without any rise of validation Dice before the run ends"""

    # the step
    batch_size: Count = 16
    """slabs per step, on each rank under torchrun"""
    accumulate: Count = 1
    """steps whose gradients are added up before the weights move"""
    learning_rate: Positive = 1e-4
    """AdamW learning rate after warm-up; --resume may set it again for a finished run with more --epochs"""
    min_learning_rate: NotNegative = 1e-5
    """the learning rate never drops below this; set again, the run goes on from --learning-rate"""
    rate_since: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0
    """epochs that were finished when the learning rate was last set again"""
    warmup_steps: CountOrZero = 200
    """optimiser steps of linear warm-up, at most one epoch"""
    patience: CountOrZero = 5
    """epochs in a row without a rise of validation Dice above 0.001; the next divides the rate by 10"""
    drop_by: Positive = 0.75
    """share of the epochs or minutes after which the rate is --min-learning-rate; above 1 never"""
    weight_decay: NotNegative = 1e-2
    """AdamW weight decay"""
    clip_norm: Positive = 5.0
    """largest gradient norm"""
    ema: Decay = 0.0
    """decay of the averaged weights that are validated and kept; 0 is off"""

    # the loss and the draws
    focal_weight: NotNegative = 1.0
    """weight of the focal loss"""
    dice_weight: NotNegative = 1.0
    """weight of the Dice loss"""
    tumour_share: Share = 0.5
    """share of draws that show tumour"""
    empty_share: Share = 0.02
    """share of draws that show no brain"""

    # the machine
    device: machine.DeviceName = "auto"
    """where to compute"""
    amp: bool = True
    """mixed precision: bfloat16, or float16 with loss scaling, where the device has it"""
    workers: CountOrZero = 2
    """loader processes; 0 loads in the training process"""
    compile: bool = False
    """compile the network with torch.compile; where that fails, go on without"""
    checkpointing: bool = False
    """compute activations again in the backward pass: less memory, slower"""
    sync_batchnorm: bool = False
    """batch statistics over the slabs of all ranks, under torchrun"""
    probe: bool = True
    """log before the first epoch what memory a step of full size needs"""


# What the demo sets where the command line says nothing else.
DEMO = TrainConfig(
    size=128,
    widths=(16, 32, 64, 128, 256),
    max_minutes=6.0,
    slabs_per_epoch=1024,
    learning_rate=2e-3,
    min_learning_rate=2e-4,
    warmup_steps=50,
    ema=0.98,
)
# What a resumed run may change: how long it goes on and where. --epochs and --max-minutes also move the drop
# of the learning rate (--drop-by); one that has happened stays.
RESUMABLE = ("epochs", "max_minutes", "early_stop", "workers", "device", "cache_dir", "compile")
RESUMABLE += ("checkpointing", "probe")


def choose_settings(parse: Callable[..., TrainConfig]) -> TrainConfig:
    """Return the typed settings; the others are those of the run resumed, of --config, or of the demo."""
    typed = parse()
    if typed.resume and typed.config:
        raise InputError("--config", "a resumed run has its own settings", "leave --config or --resume out")
    if typed.resume:
        return settings_of_resumed(Path(typed.resume), parse)
    if typed.config:
        settings = command.from_plain(
            TrainConfig, files.read_json(Path(typed.config), "--config", "a run's config.json")
        )
        return parse(dataclasses.replace(settings, run=None, resume=None, rate_since=0))
    is_demo = typed.source.data_dir is None and not phantom.DEFAULT_DATA.is_dir()
    if typed.init:
        own = initial.network_settings(initial.read_initial(typed.init))
        base = command.to_plain(DEMO if is_demo else TrainConfig())
        return parse(command.from_plain(TrainConfig, base | own))
    return parse(DEMO) if is_demo else typed


def settings_of_resumed(folder: Path, parse: Callable[..., TrainConfig]) -> TrainConfig:
    """Return the settings of a run to go on with; InputError where the command line contradicts them."""
    checkpoint = checkpoints.load_checkpoint(folder / "last.pt")
    saved = command.from_plain(TrainConfig, checkpoint["config"])
    defaults = dataclasses.replace(
        saved,
        resume=str(folder),
        config=None,
        results_dir=str(folder.parent),
        run=folder.name,
        max_minutes=None,
    )
    settings = rates.settle_rates(folder, parse, defaults, checkpoint)
    before = command.to_plain(defaults) | {
        name: getattr(settings, name) for name in (*rates.RATES, "rate_since")
    }
    for name, value in command.to_plain(settings).items():
        if value != before[name] and name not in (*RESUMABLE, "resume"):
            flag = command.flag_of(name)
            raise InputError(
                f"{flag} {value}", f"{folder} was trained with {before[name]}", "leave the flag out"
            )
    return settings


def share_batch(config: TrainConfig, before: int, now: int) -> TrainConfig:
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
        "--nproc-per-node",
        f"{now} ranks cannot share the {slabs} slabs after which {config.resume} moves its weights",
        f"resume it on {before} rank(s) or another divisor",
    )


@dataclass(frozen=True)
class Run:
    """A run's fixed facts: settings, folder, device, and what its checkpoints say of the data."""

    config: TrainConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None is float32
    facts: dict[
        str, Any
    ]  # data_kind, held_out, skipped, split_sha256, spacing_mm, and the identities of the cases seen

    @property
    def title(self) -> str:
        """The run's name and what its numbers are of."""
        is_real = self.facts["data_kind"] == "real"
        return f"{self.folder.name}: {'real data' if is_real else phantom.PHANTOM_NOTE}"


# ------------------------------------------------------------------------------------------------------------
# One epoch, one validation
# ------------------------------------------------------------------------------------------------------------


def train_one_epoch(run: Run, state: TrainState, loader: DataLoader, clock: Clock) -> dict[str, float]:
    """Run the epoch's steps, fewer (one at least) where the clock runs out; return its loss, Dice and speed.

    The Dice is of the slabs drawn (augmented, balanced), pooled over the epoch, at probability 0.5: a sign of
    progress, not a result. Counts stay on the device and are read every 10 steps. Of several ranks each runs
    its share of every batch; the loss pools its Dice counts over them, so it is that of the whole batch.
    """
    config, device = run.config, run.device
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)  # what did not fill a step of the last epoch
    pool = ranks.sum_over_ranks if ranks.world_size() > 1 else None
    loss_function = HybridFocalDiceLoss(config.focal_weight, config.dice_weight, pool=pool)
    warmup_steps = min(config.warmup_steps, len(loader) // config.accumulate)
    totals = torch.zeros(4, device=device)  # loss, overlap, predicted + reference voxels, steps
    start, waited_s, slabs = time.perf_counter(), 0.0, 0
    steps = progress(loader, f"epoch {state.epoch + 1}/{config.epochs}", "step")
    asked = time.perf_counter()
    for index, (slab, target) in enumerate(steps):
        waited_s += time.perf_counter() - asked
        slab = slab.to(device, non_blocking=True, memory_format=torch.channels_last)  # (N, C*K, S, S)
        target = target.to(device, non_blocking=True)  # (N, R, S, S)
        is_update_step = (index + 1) % config.accumulate == 0
        with ranks.accumulate_gradients(state.forward, defer_sync=not is_update_step):
            with torch.autocast(device.type, run.dtype, enabled=run.dtype is not None):
                logits = state.forward(slab)  # (N, R, S, S)
            loss = loss_function(logits, target)
            state.scaler.scale(loss / config.accumulate).backward()
        if is_update_step:
            update_weights(config, state, warmup_steps)
        totals += count_step(loss, logits, target)
        slabs += len(slab)
        is_last = clock.is_out()
        if index % 10 == 0 or index + 1 == len(loader) or is_last:
            figures = running_figures(totals)
            rate = state.optimizer.param_groups[0]["lr"]
            steps.note(f"loss {figures['train_loss']:.3f} Dice {figures['train_dice']:.3f} lr {rate:.1e}")
        if is_last:
            break
        asked = time.perf_counter()
    seconds = time.perf_counter() - start
    if ranks.world_size() > 1:
        figures = running_figures(ranks.sum_counts(totals))
    speed = slabs * ranks.world_size() / seconds
    return figures | {"slabs_per_second": speed, "waiting_share": waited_s / seconds}


def update_weights(config: TrainConfig, state: TrainState, warmup_steps: int) -> None:
    """Move the weights by the gradients added up since the last time, and their average after them."""
    if state.step < warmup_steps:
        state.optimizer.param_groups[0]["lr"] = config.learning_rate * (state.step + 1) / warmup_steps
    state.scaler.unscale_(state.optimizer)
    nn.utils.clip_grad_norm_(state.network.parameters(), config.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.average:
        state.average.update_parameters(state.network)


@torch.no_grad()
def count_step(loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (loss, overlap, predicted + reference voxels, 1) of a step, (4,), on the device."""
    predicted = logits > 0
    overlap = (predicted & (target > 0)).sum()
    return torch.stack((loss.detach(), overlap, predicted.sum() + target.sum(), torch.ones_like(loss)))


def running_figures(totals: torch.Tensor) -> dict[str, float]:
    """Return mean loss and pooled Dice of the totals of `count_step`."""
    loss, overlap, both, steps = totals.tolist()
    if not math.isfinite(loss):
        raise InputError("the loss", "is no longer finite", "take a lower --learning-rate or --no-amp")
    return {"train_loss": loss / steps, "train_dice": 2 * overlap / both if both else 1.0}


def validate(
    trained: inference.TrainedModel, cases: Sequence[cache.PreparedCase], batch_size: int
) -> np.ndarray:
    """Return Dice (cases, R, len(THRESHOLDS)) per case, region and threshold: whole volumes, no TTA.

    Ranks share the cases; each gets the Dice of all.
    """
    mine = ranks.share_of(cases)
    dice = np.zeros((len(mine), len(trained.regions), len(THRESHOLDS)))
    for index, case in enumerate(progress(mine, "validating", "case")):
        probabilities = inference.predict_volume(
            trained, case.volume, case.brain_voxels, tta=False, batch_size=batch_size, frame=case.frame
        )
        for region, (probability, reference) in enumerate(zip(probabilities, case.reference, strict=True)):
            counts = overlap_at_thresholds(probability, reference, THRESHOLDS)
            dice[index, region] = [Overlap(*row).dice for row in counts.tolist()]
    return np.stack(ranks.gather_shares(list(dice)))


# ------------------------------------------------------------------------------------------------------------
# The end of an epoch, the end of a run
# ------------------------------------------------------------------------------------------------------------


def as_trained_model(run: Run, state: TrainState) -> inference.TrainedModel:
    """Return the weights to be validated as a model ready to predict."""
    config = run.config
    return inference.TrainedModel(
        network=model.prepare_network(state.evaluated, run.device, run.dtype),
        modalities=config.source.modalities,
        regions=config.source.regions,
        context=config.context,
        size=config.size,
        thresholds=(0.5,) * len(config.source.regions),
        device=run.device,
        dtype=run.dtype,
        checkpoint={"spacing_mm": run.facts.get("spacing_mm")},
    )


def finish_epoch(
    run: Run, state: TrainState, clock: Clock, figures: dict[str, float], dice: np.ndarray
) -> None:
    """Log an epoch, keep its weights, as the best where they are, and set the next learning rate."""
    config = run.config
    at_half = dice[:, :, np.argmin(abs(THRESHOLDS - 0.5))].mean(0)  # (R,)
    rate = state.optimizer.param_groups[0]["lr"]  # of the epoch that ends
    is_better = float(at_half.mean()) > state.best_dice
    if is_better:
        state.best_dice, state.best_epoch = float(at_half.mean()), state.epoch
    drop_rate_where_due(config, state, clock, float(at_half.mean()))
    peak_gb = machine.peak_memory_gb(run.device)
    if ranks.is_main():
        row = {"epoch": state.epoch, "minutes": round(state.minutes, 2), "learning_rate": rate, **figures}
        row |= {
            f"validation_dice_{name}": float(v)
            for name, v in zip(config.source.regions, at_half, strict=True)
        }
        write_log(run, row | {"peak_memory_gb": peak_gb})
        if is_better:
            write_best(run, state, dice)
        settings = {"config": command.to_plain(config), "ranks": ranks.world_size()}
        checkpoints.save_checkpoint(run.folder / "last.pt", state.to_checkpoint() | settings | run.facts)
    scores = " ".join(
        f"{region} {value:.4f}" for region, value in zip(config.source.regions, at_half, strict=True)
    )
    log.info(
        f"epoch {state.epoch:>3}  {state.minutes:6.1f} min  loss {figures['train_loss']:.4f}  validation "
        f"Dice per case {scores}{' *' if is_better else '  '}  lr {rate:.1e}  "
        f"{figures['slabs_per_second']:.1f} slabs/s  waiting {figures['waiting_share']:.1%}  "
        f"peak {peak_gb:.2f} GiB"
    )


def drop_rate_where_due(config: TrainConfig, state: TrainState, clock: Clock, validation_dice: float) -> None:
    """Drop the learning rate where validation Dice stands still, or where it is time in any case."""
    state.scheduler.step(validation_dice)
    done = (state.epoch - config.rate_since) / (config.epochs - config.rate_since)
    if max(clock.fraction_used(), done) >= config.drop_by:
        for group in state.optimizer.param_groups:
            group["lr"] = min(group["lr"], config.min_learning_rate)


def write_log(run: Run, row: dict[str, Any]) -> None:
    """Add an epoch to log.csv, in place of what an earlier attempt left, and draw the curves."""
    path = run.folder / "log.csv"
    table = pd.DataFrame([row]).astype(str)  # as text, so that no earlier figure is rounded again
    if path.exists():
        before = pd.read_csv(path, dtype=str)
        table = pd.concat([before[before["epoch"].astype(int) < row["epoch"]], table], ignore_index=True)
    files.write_atomically(path, lambda target: table.to_csv(target, index=False))
    plots.plot_curves(run.folder / "curves.png", table.apply(pd.to_numeric), run.title)


def write_best(run: Run, state: TrainState, dice: np.ndarray) -> None:
    """Write best.pt: weights, settings, and per region the threshold with the highest validation Dice."""
    sweep = dice.mean(0)  # (R, T)
    content = {
        "model": state.evaluated.state_dict(),
        "config": command.to_plain(run.config),
        "thresholds": [float(THRESHOLDS[highest]) for highest in sweep.argmax(1)],
        "threshold_sweep": {"thresholds": THRESHOLDS.tolist(), "validation_dice": sweep.tolist()},
        "epoch": state.epoch,
        "validation_dice": state.best_dice,
    }
    checkpoints.save_checkpoint(run.folder / "best.pt", content | run.facts)


def add_postprocessing(run: Run, cases: Sequence[cache.PreparedCase]) -> None:
    """Choose post-processing on the validation cases for the weights kept, and add it to best.pt.

    One more pass over validation, without TTA, at the thresholds of best.pt.
    """
    path = run.folder / "best.pt"
    best = inference.load_model(path, run.device, run.config.amp)
    cropped = []
    for case in progress(cases, "choosing post-processing", "case"):
        probabilities = inference.predict_volume(
            best,
            case.volume,
            case.brain_voxels,
            tta=False,
            batch_size=run.config.batch_size,
            frame=case.frame,
        )
        region_masks = postprocess.threshold_regions(probabilities, best.thresholds, best.regions)
        cropped.append(postprocess.crop_case(region_masks, case.reference, case.spacing_mm))
    choice = postprocess.choose_postprocessing(cropped, best.regions)
    checkpoints.save_checkpoint(path, best.checkpoint | {"postprocessing": choice})
    before, after = (
        np.mean(list(choice[f"validation_dice_{when}"].values())) for when in ("before", "after")
    )
    chosen = postprocess.describe_postprocessing(choice["settings"])
    log.info(
        f"post-processing chosen on validation: {chosen}; Dice "
        f"{before:.4f} without, {after:.4f} with, mean over regions and {len(cases)} cases, no TTA"
    )


# ------------------------------------------------------------------------------------------------------------
# The start of a run
# ------------------------------------------------------------------------------------------------------------


def place_run(config: TrainConfig) -> TrainConfig:
    """Return the settings with data folder and run name; the demo's phantoms are made where missing."""
    if config.resume:
        return config
    data_dir = phantom.choose_data_dir(config.source.data_dir)
    name = config.run or f"{Path(data_dir).resolve().name}_{datetime.now():%Y%m%d_%H%M%S}"
    if (Path(config.results_dir) / name / "last.pt").exists():
        raise InputError(f"--run {name}", "this run exists", "choose another name or --resume it")
    source = dataclasses.replace(config.source, data_dir=data_dir)
    return dataclasses.replace(config, source=source, run=name)


def make_state(
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    weights: initial.InitialWeights | None = None,
) -> TrainState:
    """Return the state of a run before its first step, with the weights of --init where there are."""
    try:
        network = model.build_network(command.to_plain(config))
    except ValueError as error:
        raise InputError("--widths", str(error)) from error
    if config.size % network.multiple:
        raise InputError(
            f"--size {config.size}",
            f"must be a multiple of {network.multiple} for {len(config.widths)} widths",
        )
    if weights:
        initial.start_from(network, command.to_plain(config), weights)
    network.checkpointing = config.checkpointing
    if config.sync_batchnorm:
        network = ranks.sync_batchnorm(network, device)
    network = network.to(device, memory_format=torch.channels_last)
    recipe = Recipe(
        config.learning_rate,
        config.min_learning_rate,
        config.patience,
        config.weight_decay,
        config.ema,
        dtype,
    )
    return start_state(network, recipe)


def prepare_step(run: Run, network: nn.Module) -> nn.Module:
    """Return what a training step calls: the network, compiled and shared among ranks where asked for."""
    config, forward = run.config, network
    shape = (config.batch_size, network.in_channels, config.size, config.size)
    batch = probe.Batch(shape, run.device, run.dtype)
    if config.probe:
        count = functools.partial(
            model.estimate_activation_bytes, network, shape, run.dtype, side=2 * network.multiple
        )
        alone = ranks.world_size() == 1 or not config.sync_batchnorm
        probe.probe_memory(network, batch, count, config.accumulate, try_smaller=alone)
    if config.compile:
        forward = probe.compile_network(network, lambda compiled: probe.try_step(compiled, network, batch))
    return ranks.wrap_network(forward, run.device)


def make_loader(run: Run, cases: Sequence[cache.PreparedCase]) -> DataLoader:
    """Return the loader of this rank's share of the balanced training slabs."""
    config = run.config
    table = dataset.slice_table(cases, config.source.regions)
    draws = config.slabs_per_epoch or len(table)
    if draws < config.batch_size * config.accumulate * ranks.world_size():
        raise InputError(
            "--slabs-per-epoch", f"{draws} slabs do not fill one step", "lower --batch-size or --accumulate"
        )
    weights = dataset.balance_slices(table, config.tumour_share, config.empty_share)
    if ranks.is_main():
        files.write_atomically(run.folder / "balance.csv", dataset.balance_shares(table, weights).to_csv)
    sampler = dataset.BalancedSampler(weights, draws, config.seed, ranks.rank(), ranks.world_size())
    slabs = dataset.SlabDataset(cases, table, config.context, config.size)
    return dataset.make_train_loader(slabs, sampler, config.batch_size, config.workers)


def open_run(
    config: TrainConfig, device: torch.device, dtype: torch.dtype | None
) -> tuple[Run, selection.Selection]:
    """Make the run's folder, choose its cases, and write config.json."""
    folder = Path(config.results_dir) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    log_to_file(folder / "train.log")
    chosen = None
    if ranks.is_main():
        chosen = selection.select_cases(config.source, config.seed, folder, resumed=bool(config.resume))
    chosen = ranks.from_main(chosen)
    if ranks.is_main():
        made = {"command": command.command_line(), "ranks": ranks.world_size()}
        made |= {"split_patients": chosen.count_patients()}
        made |= {"hardware": machine.describe_machine(device), "versions": machine.describe_versions()}
        files.write_json(folder / "config.json", {**command.to_plain(config), **chosen.facts, **made})
    return Run(config, folder, device, dtype, chosen.facts), chosen


def choose_threads(run: Run, network: nn.Module) -> None:
    """Compute with the number of threads that is fastest now, where a CPU computes."""
    if run.device.type == "cpu":
        shape = (min(run.config.batch_size, 4), network.in_channels, run.config.size, run.config.size)
        batch = probe.Batch(shape, run.device, run.dtype)
        cpu_threads.choose_threads(lambda: probe.try_step(network, network, batch))


def draw_first_batch(run: Run, loader: DataLoader) -> None:
    """Draw the first training batch, as the network sees it, into batch.png."""
    keys = itertools.islice(loader.sampler, run.config.batch_size)
    slabs, targets = zip(*(loader.dataset[key] for key in keys), strict=True)
    overlays.plot_batch(
        run.folder / "batch.png", torch.stack(slabs), torch.stack(targets), run.config.context, run.title
    )


def log_start(run: Run, chosen: selection.Selection, network: nn.Module, loader: DataLoader) -> None:
    """Log what is trained on what."""
    counts = " / ".join(str(len(chosen.split[name])) for name in SPLIT_PARTS)
    number_format = str(run.dtype or torch.float32).removeprefix("torch.")
    log.info(
        f"{run.title}; {len(chosen.cases)} cases, split {counts} by patient, {len(loader.dataset)} training "
        f"slices, {model.count_parameters(network) / 1e6:.2f} M parameters, {run.device.type}, "
        f"{number_format}" + (f", {ranks.world_size()} ranks" if ranks.world_size() > 1 else "")
    )


def main(config: TrainConfig) -> None:
    """Train, validating each epoch, until the epochs, the clock or the patience runs out."""
    clock = Clock(config.max_minutes)
    ranks.join_ranks()
    config = ranks.from_main(place_run(config) if ranks.is_main() else config)
    last = Path(config.results_dir) / config.run / "last.pt"
    checkpoint = checkpoints.load_checkpoint(last) if config.resume else None
    if checkpoint:
        config = share_batch(config, checkpoint.get("ranks", 1), ranks.world_size())
    device = ranks.local_device(machine.choose_device(config.device))
    dtype = machine.amp_dtype(device, config.amp)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    machine.set_seed(config.seed)
    weights = initial.read_initial(config.init) if config.init and not checkpoint else None
    state = make_state(config, device, dtype, weights)
    run, chosen = open_run(config, device, dtype)
    if checkpoint:
        state.restore(checkpoint, last)
        if config.rate_since != checkpoint["config"].get("rate_since", 0):
            state.restart_rate(config.learning_rate, config.min_learning_rate)
    cases = selection.prepare_parts(chosen, config.source)
    run.facts.update(initial.find_facts(config.init, weights, checkpoint, cases))
    run.facts["spacing_mm"] = dataset.training_spacing(cases["train"], config.size)
    run.facts["reference_ml"] = dataset.reference_range(cases["train"], config.source.regions)
    loader = make_loader(run, cases["train"])
    log_start(run, chosen, state.network, loader)
    dataset.warn_of_crop([*cases["train"], *cases["validation"]], config.size, state.network.multiple)
    state.forward = prepare_step(run, state.network)
    if ranks.is_main() and not checkpoint:
        draw_first_batch(run, loader)

    minutes_before, first_epoch = state.minutes, state.epoch
    while state.epoch < config.epochs and (state.epoch == first_epoch or not clock.is_out()):
        choose_threads(run, state.network)
        loader.sampler.epoch = state.epoch
        figures = train_one_epoch(run, state, loader, clock)
        begun = time.monotonic()
        ranks.average_buffers(state.network)
        if state.average:
            ranks.average_buffers(state.average.module)
        dice = validate(as_trained_model(run, state), cases["validation"], config.batch_size)
        clock.reserved_s = 2 * (time.monotonic() - begun)  # the last validation, and one for post-processing
        state.epoch += 1
        state.minutes = minutes_before + clock.minutes()
        finish_epoch(run, state, clock, figures, dice)
        if state.epoch - max(state.best_epoch, config.rate_since) >= config.early_stop:
            log.info(f"no better validation Dice for {config.early_stop} epochs: stopping early")
            break
    log.info(
        f"kept epoch {state.best_epoch}: validation Dice {state.best_dice:.4f}, mean over "
        f"{len(cases['validation'])} cases, threshold 0.5, no TTA"
    )
    if ranks.is_main():
        add_postprocessing(run, cases["validation"])
        pages.write_run_pages(run.folder)
    log.info(f"audit it: python final_evaluation_v2.py --run {run.folder}")


if __name__ == "__main__":
    command.run_command(
        ranks.end_together(main),
        TrainConfig,
        "Train DRUnet V2. Without data it runs the demo on synthetic phantoms.",
        choose_settings,
    )
