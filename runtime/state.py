"""What a training run carries from epoch to epoch: weights, optimiser, schedule, averaged weights, clock."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from runtime.checkpoints import load_weights
from runtime.ranks import from_main

COUNTERS = ("epoch", "step", "minutes", "best_dice", "best_epoch")  # of TrainState, as checkpoints name them


class Clock:
    """The wall clock of one command: minutes spent, and whether a limit leaves time for more steps.

    With a limit, the main rank's clock is every rank's: all must ask `is_out` and `fraction_used` together.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.started = time.monotonic()
        self.max_minutes = max_minutes
        self.reserved_s = (
            0.0  # kept for what follows the last step: validation and the choice of post-processing
        )

    def minutes(self) -> float:
        """Return the minutes since the command started."""
        return (time.monotonic() - self.started) / 60

    def is_out(self) -> bool:
        """Return whether it is time to validate and end."""
        if self.max_minutes is None:
            return False
        return from_main(self.minutes() + self.reserved_s / 60 >= self.max_minutes)

    def fraction_used(self) -> float:
        """Return the fraction of the limit that is over; 0 without a limit."""
        return from_main(self.minutes() / self.max_minutes) if self.max_minutes else 0.0


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network's weights and buffers; `update_parameters` moves it.

    Early on it moves faster, min(decay, (1 + n) / (10 + n)) after n updates, as its start is worth little.
    """

    def move(averages: Sequence[Tensor], values: Sequence[Tensor], _: Tensor) -> None:
        updates = int(
            averaged.n_averaged
        )  # not the third argument, a copy on the card that int() would wait for
        weight = 1 - min(decay, (1 + updates) / (10 + updates))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:  # batch norm's counter
                average.copy_(value)

    averaged = AveragedModel(network, multi_avg_fn=move, use_buffers=True)
    averaged.update_parameters(network)  # the first update copies, and is not counted in checkpoints
    return averaged


@dataclass(frozen=True)
class Recipe:
    """How the weights move."""

    learning_rate: float
    min_learning_rate: float
    patience: int  # epochs without a better score before the learning rate drops
    weight_decay: float
    ema: float  # decay of the averaged weights; 0 is off
    dtype: torch.dtype | None  # of autocast; float16 needs loss scaling


@dataclass
class TrainState:
    """What a run carries from epoch to epoch; all of it is in last.pt."""

    network: nn.Module
    forward: nn.Module  # what a step calls: the network, compiled and shared among ranks where asked for
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps taken
    minutes: float = 0.0  # spent so far, over all resumes
    best_dice: float = -1.0
    best_epoch: int = 0
    log: list[dict[str, str]] = field(default_factory=list)  # a row per epoch, see runtime.epoch_log
    left_out_in_a_row: int = 0  # steps whose gradient was not finite, see runtime.steps; not in last.pt

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and kept: the average where there is one."""
        return self.average.module if self.average else self.network

    def to_checkpoint(self) -> dict[str, Any]:
        """Return everything but the settings, as tensors and plain values."""
        return {
            "model": self.evaluated.state_dict(),
            "network": self.network.state_dict(),
            "average_steps": int(self.average.n_averaged) - 1 if self.average else 0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "log": self.log,
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Take the state of last.pt."""
        load_weights(self.evaluated, checkpoint, path)
        self.network.load_state_dict(checkpoint["network"])
        if self.average:
            self.average.n_averaged.fill_(checkpoint["average_steps"] + 1)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["scaler"]:  # empty where the run has needed none so far
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in COUNTERS:
            setattr(self, name, checkpoint[name])

    def restart_rate(self, learning_rate: float, min_learning_rate: float) -> None:
        """Set the learning rate, without warm-up, and let its patience and lowest value begin again."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scheduler.min_lrs = [min_learning_rate] * len(self.optimizer.param_groups)
        self.scheduler.num_bad_epochs = 0


def start_state(network: nn.Module, recipe: Recipe) -> TrainState:
    """Return the state of a run before its first step; the network is on its device already."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=device.type != "mps",
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=0.1,
        patience=recipe.patience,
        threshold=1e-3,
        threshold_mode="abs",
        min_lr=recipe.min_learning_rate,
    )
    average = average_weights(network, recipe.ema) if recipe.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.dtype == torch.float16)
    return TrainState(network, network, average, optimizer, scheduler, scaler)
