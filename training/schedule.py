"""The learning rate over a run: along a cosine from step to step, or dropped at the end of an epoch."""

import math

from runtime.state import Clock, TrainState
from training.settings import TrainConfig


def share_done(config: TrainConfig, epochs: float, clock: Clock) -> float:
    """Return the share of a run that is over after so many epochs: of its epochs or minutes, the larger."""
    of_epochs = (epochs - config.rate_since) / (config.epochs - config.rate_since)
    return max(clock.fraction_used(), of_epochs)


def follow_cosine(config: TrainConfig, state: TrainState, clock: Clock, share_of_epoch: float) -> None:
    """Set the rate of the next step, that share (0..1) into an epoch.

    It falls with every step, not with every epoch, so that a run of few epochs ends at the lowest rate too.
    """
    share = min(share_done(config, state.epoch + share_of_epoch, clock) / config.drop_by, 1.0)
    above = (config.learning_rate - config.min_learning_rate) * (1 + math.cos(math.pi * share)) / 2
    for group in state.optimizer.param_groups:
        group["lr"] = config.min_learning_rate + above


def drop_rate_where_due(config: TrainConfig, state: TrainState, clock: Clock, validation_dice: float) -> None:
    """Drop the rate of a plateau schedule where validation Dice stands still, or where it is time anyway."""
    state.scheduler.step(validation_dice)
    if share_done(config, state.epoch, clock) >= config.drop_by:
        for group in state.optimizer.param_groups:
            group["lr"] = min(group["lr"], config.min_learning_rate)
