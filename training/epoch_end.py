"""What follows validation: the log, the weights kept, and whether the run goes on."""

from typing import NoReturn

import numpy as np

from audit import plots
from cohort import several
from runtime import checkpoints, command, epoch_log, files, machine, ranks, signals
from runtime import place as places
from runtime.log import log
from runtime.place import Place
from runtime.state import Clock, TrainState
from training.run import Run, how_to_resume
from training.schedule import drop_rate_where_due
from training.settings import TrainConfig
from utils_v2 import AT_HALF, THRESHOLDS, choose_thresholds


def finish_epoch(
    run: Run, state: TrainState, clock: Clock, figures: dict[str, float], dice: np.ndarray
) -> None:
    """Log an epoch, keep its weights, as the best where they are, and set the next learning rate."""
    config = run.config
    at_half = dice[:, :, AT_HALF].mean(0)  # (R,)
    rate = state.optimizer.param_groups[0]["lr"]  # of the epoch that ends
    is_best_gone = ranks.from_main(state.best_epoch > 0 and not (run.folder / "best.pt").exists())
    is_better = config.keep == "last" or float(at_half.mean()) > state.best_dice or is_best_gone
    if is_better:
        state.best_dice, state.best_epoch = float(at_half.mean()), state.epoch
    if config.schedule == "plateau":
        drop_rate_where_due(config, state, clock, float(at_half.mean()))
    peak_gb = machine.peak_memory_gb(run.device)
    if ranks.is_main():
        row = {"epoch": state.epoch, "minutes": round(state.minutes, 2), "learning_rate": rate, **figures}
        row |= {
            f"validation_dice_{name}": float(v)
            for name, v in zip(config.source.regions, at_half, strict=True)
        }
        row |= {"peak_memory_gb": peak_gb}
        state.log = [*state.log, {name: str(value) for name, value in row.items()}]
        files.restore_files(run.folder, run.records)
        if is_best_gone:
            log.warning("%s is gone: this epoch is kept in its place", run.folder / "best.pt")
        if is_better:
            write_best(run, state, dice)
        settings = {"config": command.to_plain(config), "ranks": ranks.world_size()}
        checkpoints.save_checkpoint(run.folder / "last.pt", state.to_checkpoint() | settings | run.facts)
    scores = " ".join(
        f"{region} {value:.4f}" for region, value in zip(config.source.regions, at_half, strict=True)
    )
    log.info(
        f"epoch {state.epoch:>3}  {state.minutes:6.1f} min  loss {figures['train_loss']:.4f}  validation "
        f"Dice per case {scores}{several.show_scores(figures)}{' *' if is_better else '  '}  lr {rate:.1e}  "
        f"{figures['slabs_per_second']:.1f} slabs/s  waiting {figures['waiting_share']:.1%}  "
        f"peak {peak_gb:.2f} GiB"
    )
    if ranks.is_main():  # after the checkpoint, from which what fails here can be made again
        write_log(run, state)


def write_log(run: Run, state: TrainState) -> None:
    """Write log.csv, and draw its curves."""
    table = epoch_log.write_rows(run.folder / "log.csv", state.log)
    path = run.folder / "curves.png"
    plots.try_to_draw(path, lambda: plots.plot_curves(path, table, run.title))


def complete_log(run: Run, state: TrainState) -> None:
    """Write the log of a run that has ended once more, where a kill came between its last.pt and log.csv."""
    if epoch_log.read_rows(run.folder / "log.csv") != state.log:
        write_log(run, state)


def write_best(run: Run, state: TrainState, dice: np.ndarray) -> None:
    """Write best.pt: weights, settings, and per region the threshold that validation chooses."""
    content = {
        "model": state.evaluated.state_dict(),
        "config": command.to_plain(run.config),
        "thresholds": choose_thresholds(dice),
        "threshold_sweep": {"thresholds": THRESHOLDS.tolist(), "validation_dice": dice.tolist()},
        "epoch": state.epoch,
        "validation_dice": state.best_dice,
    }
    checkpoints.save_checkpoint(run.folder / "best.pt", content | run.facts)


def has_stalled(config: TrainConfig, state: TrainState) -> bool:
    """Return whether validation Dice has not risen for --early-stop epochs."""
    return state.epoch - max(state.best_epoch, config.rate_since) >= config.early_stop


def describe_kept(run: Run, state: TrainState, cases: int) -> str:
    """Return which epoch is kept, with its validation Dice, and the highest one where that is another."""
    text = (
        f"kept epoch {state.best_epoch}: validation Dice {state.best_dice:.4f}, mean over regions and "
        f"{cases} cases, threshold 0.5, no TTA"
    )
    names = [f"validation_dice_{region}" for region in run.config.source.regions]
    scores = {int(row["epoch"]): float(np.mean([float(row[name]) for name in names])) for row in state.log}
    highest = max(scores, key=scores.__getitem__)
    if scores[highest] > state.best_dice:
        text += f"; epoch {highest} had {scores[highest]:.4f}"
    return text


def stop_run(run: Run, state: TrainState, place: Place, steps: int) -> NoReturn:
    """Save last.pt amid an epoch of so many steps and stop, saying how to go on."""
    last = run.folder / "last.pt"
    saved = {"place": places.to_checkpoint(place, run.config.batch_size)}
    saved |= {"config": command.to_plain(run.config), "ranks": ranks.world_size()}
    if ranks.is_main():
        checkpoints.save_checkpoint(last, state.to_checkpoint() | saved | run.facts)
    log.info(f"stopped in epoch {state.epoch + 1} after step {place.steps} of {steps}; saved in {last}")
    raise signals.Stopped(f"saved after step {place.steps} of {steps}, {how_to_resume(run)}", is_agreed=True)
