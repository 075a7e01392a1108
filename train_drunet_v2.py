"""Train DRUnet V2.

    python train_drunet_v2.py                                the demo: phantoms, minutes on a CPU
    python train_drunet_v2.py --data-dir data/BraTS2021      the real thing
    python train_drunet_v2.py --resume results/RUN           go on where a run stopped
    torchrun --nproc-per-node 2 -- train_drunet_v2.py ...    the same on two GPUs, --batch-size on each

A run is a folder in results/ that explains itself; results/README.md says what it holds.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from backends_v2 import prepare_network
from cache_v2 import PreparedCase, prepare_by_shares
from cases_v2 import Case
from dataset_balance_v2 import (
    BalancedSampler,
    SlabDataset,
    balance_slices,
    cases_of_split,
    make_train_loader,
    slice_table,
    warn_of_crop,
)
from distributed_v2 import (
    average_buffers,
    from_main,
    gather_shares,
    is_main,
    join_ranks,
    keep_gradients,
    local_device,
    rank,
    share_batchnorm,
    share_of,
    sum_counts,
    sum_over_ranks,
    with_one_voice,
    world_size,
    wrap_network,
)
from inference_v2 import (
    TrainedModel,
    build_network,
    load_model,
    load_weights,
    predict_volume,
    threshold_regions,
)
from leakage_v2 import check_parts, identify_cases, pack_identities
from model_drunet_v2 import count_parameters
from postprocess_v2 import choose_postprocessing, crop_case, describe_postprocessing
from probe_v2 import compile_network, probe_memory
from run_v2 import Clock, Log, TrainConfig, choose_data, prepare_config
from utils_v2 import (
    THRESHOLDS,
    HybridFocalDiceLoss,
    InputError,
    amp_dtype,
    choose_device,
    command_line,
    describe_machine,
    describe_versions,
    dice_from_counts,
    load_checkpoint,
    overlap_at_thresholds,
    peak_memory_gb,
    run_command,
    save_checkpoint,
    set_seed,
    write_json,
)

# ------------------------------------------------------------------------------------------------------------
# Training state
# ------------------------------------------------------------------------------------------------------------


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
    forward: nn.Module  # what a training step calls: the network, compiled and shared among ranks if so asked
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
        if checkpoint["scaler"]:  # empty where the run did not need one so far
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("epoch", "step", "minutes", "best_dice", "best_epoch"):
            setattr(self, name, checkpoint[name])


def make_state(config: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> TrainState:
    """Return the state of a run before its first step."""

    def make_network() -> nn.Module:
        network = build_network(len(config.modalities), len(config.regions), config.context, config.widths)
        network.checkpointing = config.checkpointing
        if config.sync_batchnorm:
            network = share_batchnorm(network, device)
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
    return TrainState(network, network, average, optimizer, scheduler, scaler)


def prepare_step(
    config: TrainConfig, network: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, list[str]]:
    """Return what a training step calls, and what the start-up probe and --compile have to say."""
    shape = (config.batch_size, network.in_channels, config.size, config.size)
    forward, lines = network, []
    if config.probe:
        alone = world_size() == 1 or not config.sync_batchnorm
        lines.append(probe_memory(network, shape, device, dtype, config.accumulate, alone))
    if config.compile:
        forward, line = compile_network(network, shape, device, dtype)
        lines.append(line)
    return wrap_network(forward, device), lines


@dataclass(frozen=True)
class Run:
    """A run's fixed facts: settings, folder, split, device, and what its checkpoints say of the data."""

    config: TrainConfig
    folder: Path
    split: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None
    about: dict[str, Any]  # data_kind, split_sha256, and who was seen in training and validation

    @property
    def title(self) -> str:
        """The run's name and what its numbers are of."""
        is_real = self.about["data_kind"] == "real"
        return f"{self.folder.name}: {'real data' if is_real else 'synthetic phantoms, not a BraTS result'}"


# ------------------------------------------------------------------------------------------------------------
# One epoch, one validation
# ------------------------------------------------------------------------------------------------------------


def train_one_epoch(run: Run, state: TrainState, loader: DataLoader, clock: Clock) -> dict[str, float]:
    """Run the epoch's steps, fewer (one at least) where the clock runs out; return its loss, Dice and speed.

    The Dice is of the slabs drawn (augmented, balanced), pooled over the epoch, at probability 0.5: a sign of
    progress, not a result. Counts stay on the device and are read every 10 steps. Of several ranks each runs
    its share of every batch; the loss pools its Dice counts over them, so it is that of the whole batch.
    """
    config, device, dtype = run.config, run.device, run.dtype
    network, optimizer = state.network.train(), state.optimizer
    pool = sum_over_ranks if world_size() > 1 else None
    optimizer.zero_grad(set_to_none=True)  # what did not fill a step of the last epoch
    loss_function = HybridFocalDiceLoss(config.focal_weight, config.dice_weight, pool=pool)
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
        moves = (index + 1) % config.accumulate == 0
        with keep_gradients(state.forward, keep=not moves):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = state.forward(slab)
            loss = loss_function(logits, target)
            state.scaler.scale(loss / config.accumulate).backward()
        if moves:
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
        stop = clock.is_out()
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
    if world_size() > 1:
        figures = _running_figures(sum_counts(totals))
    speed = slabs * world_size() / seconds
    return figures | {"slabs_per_second": speed, "waiting_share": waited_s / seconds}


def _running_figures(totals: torch.Tensor) -> dict[str, float]:
    loss, overlap, both, steps = totals.tolist()
    if not math.isfinite(loss):
        raise InputError("the loss is no longer finite; take a lower --learning-rate or --no-amp.")
    return {"train_loss": loss / steps, "train_dice": 2 * overlap / both if both else 1.0}


def validate(model: TrainedModel, cases: Sequence[PreparedCase], batch_size: int) -> np.ndarray:
    """Return Dice (cases, R, len(THRESHOLDS)) per case, region and threshold: whole volumes, no TTA.

    Ranks share the cases; each gets the Dice of all.
    """
    mine = share_of(cases)
    dice = np.zeros((len(mine), len(model.regions), len(THRESHOLDS)))
    for index, case in enumerate(tqdm(mine, desc="validating", unit="case", leave=False)):
        probabilities = predict_volume(
            model, case.volume, case.brain_voxels, tta=False, batch_size=batch_size
        )
        for region, (probability, reference) in enumerate(zip(probabilities, case.reference, strict=True)):
            counts = overlap_at_thresholds(probability, reference, THRESHOLDS)
            dice[index, region] = [dice_from_counts(*row) for row in counts.tolist()]
    return np.stack(gather_shares(list(dice)))


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def as_trained_model(run: Run, state: TrainState) -> TrainedModel:
    """Return the weights to be validated as a model ready to predict."""
    config = run.config
    return TrainedModel(
        network=prepare_network(state.evaluated, run.device, run.dtype),
        modalities=config.modalities,
        regions=config.regions,
        context=config.context,
        size=config.size,
        thresholds=(0.5,) * len(config.regions),
        device=run.device,
        dtype=run.dtype,
        checkpoint={},
    )


def write_best(run: Run, state: TrainState, dice: np.ndarray) -> None:
    """Write best.pt: weights, settings, and per region the threshold with the highest validation Dice."""
    sweep = dice.mean(0)  # (R, T)
    content = {
        "model": state.evaluated.state_dict(),
        "config": dataclasses.asdict(run.config),
        "thresholds": [float(THRESHOLDS[highest]) for highest in sweep.argmax(1)],
        "threshold_sweep": {"thresholds": THRESHOLDS.tolist(), "validation_dice": sweep.tolist()},
        "epoch": state.epoch,
        "validation_dice": state.best_dice,
    }
    save_checkpoint(run.folder / "best.pt", content | run.about)


def finish_epoch(
    run: Run, state: TrainState, log: Log, clock: Clock, figures: dict[str, float], dice: np.ndarray
) -> None:
    """Log an epoch, keep its weights where they are better, drop the learning rate where it is time."""
    config, optimizer = run.config, state.optimizer
    at_half = dice[:, :, np.argmin(abs(THRESHOLDS - 0.5))].mean(0)  # (R,)
    mean, rate = float(at_half.mean()), optimizer.param_groups[0]["lr"]
    is_better = mean > state.best_dice
    if is_better:
        state.best_dice, state.best_epoch = mean, state.epoch
        if is_main():
            write_best(run, state, dice)
    state.scheduler.step(mean)
    if max(clock.share(), state.epoch / config.epochs) >= config.drop_by:
        optimizer.param_groups[0]["lr"] = min(optimizer.param_groups[0]["lr"], config.min_learning_rate)
    peak_gb = peak_memory_gb(run.device)
    row = {"epoch": state.epoch, "minutes": round(state.minutes, 2), "learning_rate": rate, **figures}
    row |= {f"validation_dice_{region}": float(v) for region, v in zip(config.regions, at_half, strict=True)}
    log.add(row | {"peak_memory_gb": peak_gb}, run.title)
    if is_main():
        settings = {"config": dataclasses.asdict(config), "ranks": world_size()}
        save_checkpoint(run.folder / "last.pt", state.to_checkpoint() | settings | run.about)
    scores = " ".join(f"{region} {value:.4f}" for region, value in zip(config.regions, at_half, strict=True))
    log.say(
        f"epoch {state.epoch:>3}  {state.minutes:6.1f} min  loss {figures['train_loss']:.4f}  validation "
        f"Dice per case {scores}{' *' if is_better else '  '}  lr {rate:.1e}  "
        f"{figures['slabs_per_second']:.1f} slabs/s  waiting {figures['waiting_share']:.1%}  "
        f"peak {peak_gb:.2f} GiB"
    )


def note_seen(
    run: Run, cases: Sequence[Case], chosen: dict[str, list[Case]], prepared: Sequence[PreparedCase]
) -> None:
    """Note in `run.about` the identity of every case seen; raises InputError where parts share a patient.

    Test cases are told by their fingerprints too, and for nothing else.
    """
    test_ids = set(run.split["test"])
    parts = chosen | {"test": [case for case in cases if case.case_id in test_ids]}
    prints = {case.case_id: case.fingerprint for case in prepared}
    identities = {
        part: identify_cases(members, run.config.modalities, run.config.cache_dir, prints)
        for part, members in parts.items()
    }
    check_parts(identities)
    run.about.update(pack_identities([*identities["train"], *identities["validation"]]))


def add_postprocessing(run: Run, cases: Sequence[PreparedCase]) -> str:
    """Choose post-processing on the validation cases for the weights kept, add it to best.pt, and say what.

    One more pass over validation, without TTA, at the thresholds of best.pt.
    """
    path = run.folder / "best.pt"
    model = load_model(path, run.device, run.config.amp)
    cropped = []
    for case in tqdm(cases, desc="choosing post-processing", unit="case", leave=False):
        probabilities = predict_volume(
            model, case.volume, case.brain_voxels, tta=False, batch_size=run.config.batch_size
        )
        masks = threshold_regions(probabilities, model.thresholds, model.regions)
        cropped.append(crop_case(masks, case.reference, case.spacing_mm))
    chosen = choose_postprocessing(cropped, model.regions)
    save_checkpoint(path, model.checkpoint | {"postprocessing": chosen})
    before, after = (np.mean(list(chosen[f"validation_dice_{w}"].values())) for w in ("before", "after"))
    return (
        f"post-processing chosen on validation: {describe_postprocessing(chosen['settings'])}; Dice "
        f"{before:.4f} without, {after:.4f} with, mean over regions and {len(cases)} cases, no TTA"
    )


def prepare_training(run: Run, cases: Sequence[Case]) -> tuple[DataLoader, list[PreparedCase]]:
    """Return the training loader and the validation cases, and note in `run.about` who was seen."""
    config = run.config
    chosen = {
        part: cases_of_split(cases, run.split, part, config.data_dir) for part in ("train", "validation")
    }
    both = [*chosen["train"], *chosen["validation"]]
    prepared = prepare_by_shares(both, config.modalities, config.regions, config.cache_dir, config.cache_gb)
    train_cases, validation_cases = prepared[: len(chosen["train"])], prepared[len(chosen["train"]) :]
    note_seen(run, cases, chosen, prepared)
    table = slice_table(train_cases, config.regions)
    draws = config.slabs_per_epoch or len(table)
    if draws < config.batch_size * config.accumulate * world_size():
        raise InputError(f"{draws} slabs an epoch do not fill one step; lower --batch-size or --accumulate.")
    weights = balance_slices(table, config.tumour_share, config.empty_share)
    sampler = BalancedSampler(weights, draws, config.seed, rank(), world_size())
    dataset = SlabDataset(train_cases, table, config.context, config.size)
    return make_train_loader(dataset, sampler, config.batch_size, config.workers), validation_cases


def main(config: TrainConfig) -> None:
    """Train, validating each epoch, until the epochs, the clock or the patience runs out."""
    clock = Clock(config.max_minutes)
    join_ranks()
    config = from_main(prepare_config(config) if is_main() else config)
    clock.max_minutes = config.max_minutes
    set_seed(config.seed)
    device = local_device(choose_device(config.device))
    dtype = amp_dtype(device, config.amp)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    state = make_state(config, device, dtype)
    state.forward, lines = prepare_step(config, state.network, device, dtype)
    folder = Path(config.results_dir) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    data = from_main(choose_data(config, folder) if is_main() else None)
    about = {**data.facts, "split_sha256": data.split["sha256"]}
    run = Run(config, folder, data.split, device, dtype, about)
    log = Log(folder, resumed=bool(config.resume))
    if config.resume:
        state.restore(load_checkpoint(folder / "last.pt"), folder / "last.pt")
        log.rows = log.rows[: state.epoch]
    made = {"command": command_line(), "hardware": describe_machine(device), "versions": describe_versions()}
    made |= {"ranks": world_size()}
    if is_main():
        write_json(folder / "config.json", {**dataclasses.asdict(config), **data.facts, **made})

    for line in data.lines:
        log.say(line)
    loader, validation_cases = prepare_training(run, data.cases)
    minutes_before = state.minutes
    log.say(
        f"{run.title}; {len(data.cases)} cases, split {len(data.split['train'])} / "
        f"{len(data.split['validation'])} / {len(data.split['test'])} by patient, "
        f"{len(loader.dataset)} training slices, {count_parameters(state.network) / 1e6:.2f} M parameters, "
        f"{device.type}, {str(dtype or torch.float32).removeprefix('torch.')}"
        + (f", {world_size()} ranks" if world_size() > 1 else "")
    )
    seen = [*loader.dataset.cases, *validation_cases]
    if warning := warn_of_crop(seen, config.size, state.network.multiple):
        log.say(warning)
    for line in lines:
        log.say(line)
    started_epoch = state.epoch
    while state.epoch < config.epochs and (state.epoch == started_epoch or not clock.is_out()):
        loader.sampler.epoch = state.epoch
        figures = train_one_epoch(run, state, loader, clock)
        begun = time.monotonic()
        average_buffers(state.network)
        if state.average:
            average_buffers(state.average.copy)
        dice = validate(as_trained_model(run, state), validation_cases, config.batch_size)
        clock.reserved_s = 2 * (time.monotonic() - begun)  # the last validation, and one for post-processing
        state.epoch += 1
        state.minutes = minutes_before + clock.minutes()
        finish_epoch(run, state, log, clock, figures, dice)
        if state.epoch - state.best_epoch >= config.early_stop:
            log.say(f"no better validation Dice for {config.early_stop} epochs: stopping early")
            break
    log.say(
        f"kept epoch {state.best_epoch}: validation Dice {state.best_dice:.4f}, mean over "
        f"{len(validation_cases)} cases, threshold 0.5, no TTA"
    )
    if is_main():
        log.say(add_postprocessing(run, validation_cases))
    log.say(f"audit it: python final_evaluation_v2.py --run {folder}")


if __name__ == "__main__":
    run_command(
        with_one_voice(main),
        TrainConfig,
        "Train DRUnet V2. Without data it runs the demo on synthetic phantoms.",
    )
