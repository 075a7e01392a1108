"""Learning rates of a run that is resumed: its own, or new ones where it was finished and goes on."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from runtime.command import flag_of
from runtime.errors import InputError

Settings = TypeVar("Settings")  # with epochs, early_stop, rate_since and the RATES
RATES = ("learning_rate", "min_learning_rate")


def settle_rates(
    folder: Path, parse: Callable[..., Settings], defaults: Settings, checkpoint: Mapping[str, Any]
) -> Settings:
    """Return the settings of a run to go on with; where rates are set again, `rate_since` says from when.

    `defaults` are the run's own settings, `checkpoint` its last.pt. A typed --learning-rate counts as new
    even where it is the old one, as the rate has dropped since. InputError where a rate is changed and
    the run is not finished or gets no more epochs.
    """
    settings = parse(defaults)
    # a flag was typed where another default does not change its value
    other = parse(dataclasses.replace(defaults, **{name: getattr(defaults, name) + 1 for name in RATES}))
    typed = [name for name in RATES if getattr(other, name) == getattr(settings, name)]
    changed = [name for name in typed if getattr(settings, name) != getattr(defaults, name)]
    epoch = checkpoint["epoch"] if typed else 0
    is_finished = typed and (
        epoch >= defaults.epochs or epoch - checkpoint["best_epoch"] >= defaults.early_stop
    )
    if is_finished and settings.epochs > epoch and (changed or "learning_rate" in typed):
        return dataclasses.replace(settings, rate_since=epoch)
    if changed:
        name = changed[0]
        raise InputError(
            f"{flag_of(name)} {getattr(settings, name)}",
            f"{folder} was trained with {getattr(defaults, name)} and has finished {epoch} of "
            f"{settings.epochs} epochs",
            "leave the flag out, or set it with more --epochs once the run is finished",
        )
    return settings
