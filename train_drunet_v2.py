"""Train DRUnet V2.

    python train_drunet_v2.py                                data/BraTS2021; without it the demo on phantoms
    python train_drunet_v2.py --data-dir data/cohort         your own cases
    python train_drunet_v2.py --data-dir data/cohort --folds 5    cross-validation, see README
    python train_drunet_v2.py --resume results/RUN           go on where a run stopped
    python train_drunet_v2.py --config results/RUN/config.json    a new run with the settings of another
    python train_drunet_v2.py --init results/RUN/best.pt ...      a new run from the weights of another
    torchrun --nproc-per-node 2 -- train_drunet_v2.py ...    the same on two GPUs, --batch-size on each

A run is a folder in results/ that explains itself; results/README.md says what it holds. The settings and
their defaults, how a run starts, what follows validation, and what --resume may change are in training/.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import dataset_balance_v2 as dataset
import inference_v2 as inference
import model_drunet_v2 as model
from audit import pages, postprocess
from cohort import cache, folds, initial, phantom, selection, several
from cohort.network import check_widths, complete_settings
from runtime import (
    checkpoints,
    command,
    epoch_log,
    files,
    machine,
    ranks,
    signals,
)
from runtime import place as places
from runtime.errors import InputError
from runtime.log import log, progress, start_log
from runtime.place import Place
from runtime.state import Clock, TrainState
from runtime.steps import StepGuard
from runtime.tables import write_table
from training.epoch_end import complete_log, describe_kept, finish_epoch, has_stalled, stop_run
from training.resume import settings_of_resumed, share_batch
from training.run import Run, how_to_resume, remedy_of
from training.schedule import follow_cosine
from training.settings import DEMO, PRESETS, TrainConfig
from training.start import (
    choose_threads,
    draw_first_batch,
    log_start,
    make_state,
    open_run,
    place_run,
    prepare_step,
)
from utils_v2 import AT_HALF, THRESHOLDS, HybridFocalDiceLoss, Overlap, overlap_at_thresholds


def choose_settings(parse: Callable[..., TrainConfig]) -> TrainConfig:
    """Return the typed settings; the others are those of the run resumed, of --config, or of the demo."""
    typed = parse()
    if typed.resume and typed.config:
        raise InputError("--config", "a resumed run has its own settings", "leave --config or --resume out")
    if typed.resume:
        return settings_of_resumed(Path(typed.resume), parse)
    if typed.config and parse(TrainConfig(preset="strong")).preset == typed.preset:
        raise InputError(f"--preset {typed.preset}", "--config has all settings", "leave one of them out")
    if typed.config:
        settings = command.from_plain(
            TrainConfig,
            complete_settings(files.read_json(Path(typed.config), "--config", "a run's config.json")),
            typed.config,
        )
        settings = folds.leave_run(settings)
        return parse(dataclasses.replace(settings, run=None, resume=None, rate_since=0))
    is_demo = typed.source.data_dir is None and not phantom.DEFAULT_DATA.is_dir()
    defaults = dataclasses.replace(DEMO if is_demo else TrainConfig(), **PRESETS[typed.preset])
    if typed.init:
        own = initial.network_settings(initial.read_initial(typed.init))
        return parse(command.from_plain(TrainConfig, command.to_plain(defaults) | own))
    return parse(defaults)


# ------------------------------------------------------------------------------------------------------------
# One epoch, one validation
# ------------------------------------------------------------------------------------------------------------


def train_one_epoch(
    run: Run, state: TrainState, loader: DataLoader, clock: Clock, place: Place
) -> dict[str, float]:
    """Run the epoch's steps, fewer (one at least) where the clock runs out; return its loss, Dice and speed.

    It goes on from `place` and moves it. A signal ends it after an optimiser step, the same one on all ranks.

    The Dice is of the slabs drawn (augmented, balanced), pooled over the epoch, at probability 0.5: a sign of
    progress, not a result. Counts stay on the device and are read every 10 steps. Of several ranks each runs
    its share of every batch; the loss pools its Dice counts over them, so it is that of the whole batch. A
    step whose gradient is not finite is left out (`StepGuard`).
    """
    config, device = run.config, run.device
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)  # what did not fill a step of the last epoch
    pool = ranks.sum_over_ranks if ranks.world_size() > 1 else None
    loss_function = HybridFocalDiceLoss(config.focal_weight, config.dice_weight, pool=pool)
    warmup_steps = min(config.warmup_steps, len(loader) // config.accumulate)
    totals, waited_s = place.totals, place.waited_s
    name_cases = functools.partial(dataset.name_cases, loader)
    guard = StepGuard(state, place, name_cases, remedy_of(run, state))
    start = time.perf_counter() - place.seconds
    loader.sampler.epoch, loader.sampler.drawn = state.epoch, place.steps * config.batch_size
    left = () if place.is_over else loader
    title = f"epoch {state.epoch + 1}/{config.epochs}"
    steps = progress(left, title, "step", 0 if place.is_over else len(loader) - place.steps)
    is_update_step = True
    asked = time.perf_counter()
    for index, (slab, target) in enumerate(steps, place.steps):
        waited_s += time.perf_counter() - asked
        slab = slab.to(device, non_blocking=True, memory_format=torch.channels_last)  # (N, C*K, S, S)
        target = target.to(device, non_blocking=True)  # (N, R, S, S)
        is_update_step = (index + 1) % config.accumulate == 0
        with ranks.accumulate_gradients(state.forward, defer_sync=not is_update_step):
            with torch.autocast(device.type, run.dtype, enabled=run.dtype is not None):
                logits = state.forward(slab)  # (N, R, S, S)
            loss = loss_function(logits, target)
            state.scaler.scale(loss / config.accumulate).backward()
        totals = totals + count_step(loss, logits, target)
        if is_update_step:
            if config.schedule == "cosine":
                follow_cosine(config, state, clock, index / len(loader))
            totals = guard.judge(update_weights(config, state, warmup_steps), totals, index)
        place.steps = index + 1
        is_last = clock.is_out()
        if index % 10 == 0 or index + 1 == len(loader) or is_last:
            figures = running_figures(totals)
            rate = state.optimizer.param_groups[0]["lr"]
            steps.note(f"loss {figures['train_loss']:.3f} Dice {figures['train_dice']:.3f} lr {rate:.1e}")
        if is_last or (is_update_step and ranks.agree_to_stop()):
            place.is_over = is_last or place.steps == len(loader)
            break
        asked = time.perf_counter()
    else:
        place.is_over = True
    place.seconds, place.waited_s = time.perf_counter() - start, waited_s
    if not is_update_step and not ranks.sum_counts(totals).isfinite().all():
        totals = guard.leave_out(index)  # batches that fill no step: none has looked at their gradient
    figures = running_figures(ranks.sum_counts(totals))
    if not math.isfinite(figures["train_loss"]):
        raise InputError("the loss", f"was finite in no step of epoch {state.epoch + 1}", guard.remedy)
    place.totals = totals
    places.note_buffers(place, state)
    speed = place.steps * config.batch_size * ranks.world_size() / place.seconds
    figures |= {"slabs_per_second": speed, "waiting_share": waited_s / place.seconds}
    return figures | {"steps_left_out": place.left_out, "steps_overflowed": place.overflowed}


def update_weights(config: TrainConfig, state: TrainState, warmup_steps: int) -> bool:
    """Move the weights by the gradients added up since the last time, and their average after them.

    Returns whether the norm of these gradients is finite; where it is not, nothing moves. To know it the host
    waits for the card once per step, for which the card waits no longer than the next kernel takes to launch.
    """
    if state.step < warmup_steps:
        state.optimizer.param_groups[0]["lr"] = config.learning_rate * (state.step + 1) / warmup_steps
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.clip_norm)
    is_finite = bool(norm.isfinite())
    if is_finite or state.scaler.is_enabled():  # a scaler steps over what is not finite and lowers its scale
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if is_finite:
        state.step += 1
        if state.average:
            state.average.update_parameters(state.network)
    return is_finite


@torch.no_grad()
def count_step(loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (loss, overlap, predicted + reference voxels, 1) of a step, (4,), on the device."""
    predicted = logits > 0
    overlap = (predicted & (target > 0)).sum()
    return torch.stack((loss.detach(), overlap, predicted.sum() + target.sum(), torch.ones_like(loss)))


def running_figures(totals: torch.Tensor) -> dict[str, float]:
    """Return mean loss (NaN over no step) and pooled Dice of the totals of `count_step`."""
    loss, overlap, both, steps = totals.tolist()
    mean = loss / steps if steps else math.nan
    return {"train_loss": mean, "train_dice": 2 * overlap / both if both else 1.0}


def validate(
    trained: inference.TrainedModel, cases: Sequence[cache.PreparedCase], batch_size: int
) -> np.ndarray:
    """Return Dice (cases, R, len(THRESHOLDS)) per case, region and threshold: whole volumes, no TTA.

    Ranks share the cases; each gets the Dice of all. After a signal the last ones are missing (0).
    """
    mine = ranks.share_of(cases)
    dice = np.zeros((len(mine), len(trained.regions), len(THRESHOLDS)))
    for index, case in enumerate(progress(mine, "validating", "case")):
        if signals.is_stopping():
            break
        probabilities = inference.predict_volume(
            trained, case.volume, case.brain_voxels, tta=False, batch_size=batch_size, frame=case.frame
        )
        for region, (probability, reference) in enumerate(zip(probabilities, case.reference, strict=True)):
            counts = overlap_at_thresholds(probability, reference, THRESHOLDS)
            dice[index, region] = [Overlap(*row).dice for row in counts.tolist()]
    return np.stack(ranks.gather_shares(list(dice)))


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


def validate_epoch(run: Run, state: TrainState, cases: Sequence[cache.PreparedCase]) -> np.ndarray:
    """Return what `validate` does of the weights as they are now; its error says where the run stands."""
    try:
        return validate(as_trained_model(run, state), cases, run.config.batch_size)
    except inference.NotFiniteError as error:
        raise InputError(error.place, error.problem, remedy_of(run, state)) from error


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


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
        f"{before:.4f} without, {after:.4f} with, mean over regions and {len(cases)} cases, threshold "
        f"{', '.join(f'{value:.2f}' for value in best.thresholds)}, no TTA"
    )


def make_loader(
    run: Run, cases: Sequence[cache.PreparedCase], phantoms: Sequence[cache.PreparedCase]
) -> DataLoader:
    """Return the loader of this rank's share of the balanced training slabs."""
    config = run.config
    everyone = [*cases, *phantoms]
    table = dataset.slice_table(everyone, config.source.regions)
    real = table[table["case"] < len(cases)]
    draws = config.slabs_per_epoch or len(real)
    if draws < config.batch_size * config.accumulate * ranks.world_size():
        raise InputError(
            "--slabs-per-epoch", f"{draws} slabs do not fill one step", "lower --batch-size or --accumulate"
        )
    shares = (config.tumour_share, config.empty_share)
    weights = dataset.balance_cohorts(real, cases, config.source.weight_of_cohort, *shares)
    if phantoms:
        weights = dataset.balance_phantoms(table, weights, config.phantom_share, *shares)
    if ranks.is_main():
        write_table(run.folder / "balance.csv", dataset.balance_shares(table, weights).reset_index())
    sampler = dataset.BalancedSampler(weights, draws, config.seed, ranks.rank(), ranks.world_size())
    slabs = dataset.SlabDataset(
        everyone, table, config.context, config.size, modality_dropout=config.modality_dropout
    )
    return dataset.make_train_loader(slabs, sampler, config.batch_size, config.workers)


def train_epochs(
    run: Run,
    state: TrainState,
    loader: DataLoader,
    validation: Sequence[cache.PreparedCase],
    clock: Clock,
    place: Place,
) -> None:
    """Train and validate from `place` on, until epochs, clock or patience run out or a signal comes."""
    config = run.config
    minutes_before, first_epoch = state.minutes, state.epoch
    while state.epoch < config.epochs and not has_stalled(config, state):
        if state.epoch > first_epoch and clock.is_out():
            break
        choose_threads(run, state.network)
        figures = train_one_epoch(run, state, loader, clock, place)
        if clock.is_out() and place.steps < len(loader):
            log.info(f"--max-minutes is over: this epoch ends after step {place.steps} of {len(loader)}")
        if not ranks.agree_to_stop():
            begun = time.monotonic()
            ranks.average_buffers(state.network)
            if state.average:
                ranks.average_buffers(state.average.module)
            dice = validate_epoch(run, state, validation)
            figures |= several.score_cohorts(validation, dice[:, :, AT_HALF], config.source.regions)
            # the last validation, and one for post-processing
            clock.reserved_s = 2 * (time.monotonic() - begun)
        state.minutes = minutes_before + clock.minutes()
        if ranks.agree_to_stop():
            stop_run(run, state, place, len(loader))
        state.epoch += 1
        finish_epoch(run, state, clock, figures, dice)
        place = places.start_epoch(run.device)
        signals.hint(how_to_resume(run))
        if ranks.agree_to_stop():
            raise signals.Stopped(is_agreed=True)
    if has_stalled(config, state):
        log.info(f"no better validation Dice for {config.early_stop} epochs: stopping early")


def main(config: TrainConfig) -> None:
    """Train a run, or the folds of one after another."""
    ranks.join_ranks()
    plan = folds.plan_runs(config, place_run, share_batch) if ranks.is_main() else None
    whole, runs = ranks.from_main(plan)
    for settings in runs:
        if len(runs) > 1:
            settings = ranks.from_main(folds.begin_fold(settings) if ranks.is_main() else None)
        if settings is not None:
            start_log()  # each fold has a train.log of its own
            train_run(settings)
    if whole and ranks.is_main():
        start_log()
        folds.log_next(whole)


def train_run(config: TrainConfig) -> None:
    """Train, validating each epoch, until the epochs, the clock or the patience runs out."""
    clock = Clock(config.max_minutes)
    config = ranks.from_main(place_run(config) if ranks.is_main() else config)
    last = Path(config.results_dir) / config.run / "last.pt"
    checkpoint, damage = checkpoints.load_last(last.parent) if config.resume else (None, None)
    if checkpoint:
        check_widths(last, checkpoint)
        config = share_batch(config, checkpoint.get("ranks", 1), ranks.world_size())
    device = ranks.local_device(machine.choose_device(config.device))
    dtype = machine.amp_dtype(device, config.amp)
    torch.backends.cudnn.benchmark = not config.deterministic  # every step has the same shapes
    if config.deterministic:
        machine.be_deterministic()
    machine.set_seed(config.seed)
    weights = initial.read_initial(config.init) if config.init and not checkpoint else None
    state = make_state(config, device, dtype, weights)
    run, chosen = open_run(config, device, dtype)
    again = how_to_resume(run) if config.source.folds else "start it again"
    signals.hint(how_to_resume(run) if checkpoint else f"nothing was trained yet, {again}")
    if checkpoint:
        state.log = epoch_log.resume_rows(run.folder / "log.csv", checkpoint)
        state.restore(checkpoint, last)
        if config.rate_since != checkpoint["config"].get("rate_since", 0):
            state.restart_rate(config.learning_rate, config.min_learning_rate)
    if damage:
        ranks.wait_for_all()  # until each rank has read it
        if ranks.is_main():
            checkpoints.fall_back(run.folder, damage)
    cases = selection.prepare_parts(chosen, config.source)
    run.facts.update(initial.find_facts(config.init, weights, checkpoint, cases))
    run.facts["spacing_mm"] = dataset.training_spacing(cases["train"], config.size)
    run.facts["reference_ml"] = dataset.reference_range(cases["train"], config.source.regions)
    phantoms: list[cache.PreparedCase] = []
    if config.phantom_share:
        if chosen.data_kind == "phantom":
            raise InputError("--phantom-share", "the cases are phantoms themselves", "leave it out")
        pixel_mm = dataset.median_pixel_mm(cases["train"], config.size)
        phantoms = selection.prepare_phantoms(config.source, pixel_mm)
    loader = make_loader(run, cases["train"], phantoms)
    log_start(run, chosen, state.network, loader, len(phantoms))
    dataset.warn_of_crop([*cases["train"], *cases["validation"]], config.size, state.network.multiple)
    state.forward = prepare_step(run, state.network)
    if ranks.is_main() and not checkpoint:
        draw_first_batch(run, loader)

    place = places.restore_place((checkpoint or {}).get("place"), state, config.batch_size)
    with dataset.workers_of(loader), signals.finish_first():
        train_epochs(run, state, loader, cases["validation"], clock, place)
    if ranks.is_main():
        complete_log(run, state)
        log.info(describe_kept(run, state, len(cases["validation"])))
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
