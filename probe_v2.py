"""Before the first epoch: does a step of full size fit in memory, and does torch.compile work here.

Each tries the step on zeros and leaves no trace: weights, batch norm statistics and random numbers stay.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from backends_v2 import warn_of_compiling
from model_drunet_v2 import estimate_activation_bytes
from utils_v2 import InputError

Shape = tuple[int, int, int, int]


@contextlib.contextmanager
def leave_no_trace(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers, mode and random numbers back, and drop the gradients, when the block ends."""
    buffers = [buffer.clone() for buffer in network.buffers()]
    was_training = network.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        network.zero_grad(set_to_none=True)
        network.train(was_training)
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)


def try_step(
    forward: Callable[[torch.Tensor], torch.Tensor],
    network: nn.Module,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Run the forward and backward pass of a training step on zeros; `forward` calls `network` in some way.

    Two values per weight are set aside meanwhile, as AdamW will hold them.
    """
    with leave_no_trace(network, device):
        network.train()
        moments = [torch.empty_like(weight) for weight in network.parameters() for _ in range(2)]
        slab = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = forward(slab)
        logits.float().square().mean().backward()
        del moments


def probe_memory(
    network: nn.Module,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype | None,
    accumulate: int = 1,
    alone: bool = True,
) -> str:
    """Return a sentence on what a step needs: measured on CUDA, elsewhere estimated from small steps.

    InputError where it does not fit on the card, with the --batch-size and --accumulate that do. `alone` is
    False where batch norm waits for other ranks: then smaller batches are not tried.
    """
    if device.type != "cuda":
        weights = sum(weight.numel() * weight.element_size() for weight in network.parameters())
        kept = estimate_activation_bytes(network, shape, dtype, side=2 * network.multiple)
        return (
            f"start-up probe: a step of {shape[0]} slabs keeps {kept / 2**30:.2f} GiB of activations beside "
            f"{4 * weights / 2**30:.2f} GiB of weights, gradients and optimiser (counted, not run: no GPU)"
        )
    total_gb = torch.cuda.get_device_properties(device).total_memory / 2**30

    def fits(batch_size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            try_step(network, network, (batch_size, *shape[1:]), device, dtype)
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    if not fits(shape[0]):
        raise_too_large(shape[0], accumulate, total_gb, fits if alone else None)
    peak_gb = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.empty_cache()
    return f"start-up probe: a step of {shape[0]} slabs peaks at {peak_gb:.2f} of {total_gb:.1f} GiB"


def raise_too_large(
    batch_size: int, accumulate: int, total_gb: float, fits: Callable[[int], bool] | None
) -> None:
    """Raise the InputError of a batch that does not fit, naming the largest of its divisors that does."""
    problem = f"--batch-size {batch_size} does not fit in the {total_gb:.1f} GiB of this GPU"
    for smaller in range(batch_size // 2, 0, -1):
        if batch_size % smaller:
            continue
        if fits is None or fits(smaller):
            word = "fits" if fits else "may fit"
            steps = accumulate * (batch_size // smaller)
            raise InputError(f"{problem}; --batch-size {smaller} --accumulate {steps} {word}.")
    raise InputError(
        f"{problem}, nor does any part of it; pass --checkpointing or smaller --widths or --size."
    )


def compile_network(
    network: nn.Module, shape: Shape, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, str]:
    """Return the network compiled, or as it is where that fails, and a sentence on which it is.

    torch compiles at the first step, so one is tried here. The weights stay shared with `network`.
    """
    try:
        compiled = torch.compile(network)
        try_step(compiled, network, shape, device, dtype)
    except Exception as error:
        # no compiler, an operator or a Python version it lacks, no memory: each has a type of its own
        return network, warn_of_compiling(error)
    return compiled, "the network is compiled"
