"""Where in an epoch a run stands. A signal that stops the run has it saved, to go on with the next draw."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.ranks import gather_shares, rank, world_size
from runtime.state import TrainState

COUNTERS = ("seconds", "waited_s", "left_out", "overflowed")  # of Place, as checkpoints name them


@dataclass
class Place:
    """Steps taken in this epoch, and the running totals of its figures on this rank."""

    totals: Tensor  # loss, overlap, predicted + reference voxels, steps; on the device
    steps: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0  # of them for the loader
    left_out: int = 0  # steps whose gradient was not finite
    overflowed: int = 0  # steps whose gradient was beyond float16
    is_over: bool = False  # whether validation is next
    # of several ranks, this one's before they are averaged
    buffers: list[Tensor] = field(default_factory=list)


def list_buffers(state: TrainState) -> list[Tensor]:
    """Return the buffers of the network and of its average; those of batch norm differ between ranks."""
    networks = [state.network] + ([state.average.module] if state.average else [])
    return [buffer for network in networks for buffer in network.buffers()]


def start_epoch(device: torch.device) -> Place:
    """Return the place before an epoch's first step."""
    return Place(torch.zeros(4, device=device))


def note_buffers(place: Place, state: TrainState) -> None:
    """Keep this rank's buffers as they are after the last step, where there are several ranks."""
    if world_size() > 1:
        place.buffers = [buffer.cpu().clone() for buffer in list_buffers(state)]


def to_checkpoint(place: Place, batch_size: int) -> dict[str, Any]:
    """Return the place for last.pt, with the share of every rank; all ranks must call it."""
    own = {"totals": place.totals.cpu(), "buffers": place.buffers}
    own |= {name: getattr(place, name) for name in COUNTERS}
    draws = place.steps * batch_size * world_size()
    return {"draws": draws, "is_over": place.is_over, "ranks": gather_shares([own])}


def restore_place(saved: dict[str, Any] | None, state: TrainState, batch_size: int) -> Place:
    """Return the place of a checkpoint, that of a new epoch where it holds none, and set this rank's buffers.

    Of another number of ranks, the first one takes the totals of all, and buffers are their mean.
    """
    device = next(state.network.parameters()).device
    place = start_epoch(device)
    if not saved:
        return place
    shares = saved["ranks"]
    is_same = len(shares) == world_size()
    own = shares[rank()] if is_same else shares[0]
    if is_same:
        place.totals = own["totals"].to(device)
    elif rank() == 0:
        place.totals = sum(share["totals"] for share in shares).to(device)
    place.steps = saved["draws"] // (batch_size * world_size())
    place.is_over = saved["is_over"]
    for name in COUNTERS:
        setattr(place, name, own[name])
    for index, buffer in enumerate(list_buffers(state) if own["buffers"] else ()):
        values = [share["buffers"][index] for share in shares]
        is_mean = not is_same and buffer.is_floating_point()
        buffer.copy_(torch.stack(values).mean(0) if is_mean else own["buffers"][index])
    return place
