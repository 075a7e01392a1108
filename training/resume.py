"""The settings of a run that goes on: its own, but for what may change."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cohort import folds
from cohort.network import check_network_settings, complete_settings
from runtime import checkpoints, command, files, rates
from runtime.errors import InputError
from training.settings import TrainConfig

# What a resumed run may change: how long it goes on and where. --epochs and --max-minutes also move the drop
# of the learning rate (--drop-by); one that has happened stays.
RESUMABLE = ("epochs", "max_minutes", "early_stop", "workers", "device", "cache_dir", "compile")
RESUMABLE += ("checkpointing", "probe")


def settings_of_resumed(folder: Path, parse: Callable[..., TrainConfig]) -> TrainConfig:
    """Return the settings of a run to go on with; InputError where the command line contradicts them."""
    if folder.name in ("", ".."):  # --resume . has no name
        folder = folder.resolve()
    if folds.is_run_of_folds(folder):
        return settings_of_folds(folder, parse)
    checkpoint, _ = checkpoints.load_last(folder)
    check_network_settings(folder / "last.pt", checkpoint.get("config"))
    saved = command.from_plain(TrainConfig, complete_settings(checkpoint["config"]), folder / "last.pt")
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
    refuse_changes(folder, settings, before, (*RESUMABLE, "resume"))
    return settings


def settings_of_folds(folder: Path, parse: Callable[..., TrainConfig]) -> TrainConfig:
    """Return the settings of a run of folds to go on with; --max-minutes stays that of each fold.

    More --epochs are for all folds: those that are finished go on too.
    """
    own = files.read_json(folder / "config.json", "--resume", "a run")
    saved = command.from_plain(TrainConfig, complete_settings(own))
    place = {"results_dir": str(folder.parent), "run": folder.name, "config": None}
    defaults = dataclasses.replace(saved, resume=str(folder), **place)
    settings = parse(defaults)
    free = {*RESUMABLE, "resume", "fold"} - {"max_minutes"}  # which finished folds have had
    refuse_changes(folder, settings, command.to_plain(defaults), free)
    return settings


def refuse_changes(
    folder: Path, settings: TrainConfig, before: dict[str, Any], free: Collection[str]
) -> None:
    """Raise InputError where settings that are not free are others than those of the run resumed."""
    for name, value in command.to_plain(settings).items():
        if value != before[name] and name not in free:
            flag = command.flag_of(name)
            raise InputError(
                f"{flag} {value}", f"{folder} was trained with {before[name]}", "leave the flag out"
            )


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
