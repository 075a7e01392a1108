"""Before the first epoch: does a step of full size fit in memory, and does torch.compile work here.

Each tries the network on zeros and leaves no trace: weights, batch norm statistics and random numbers stay.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.log import log


@dataclass(frozen=True)
class Batch:
    """The slabs of one step or pass, and how they are computed."""

    shape: tuple[int, int, int, int]  # N, C*K, H, W
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None is float32

    def zeros(self) -> Tensor:
        """Return slabs of zeros, channels last."""
        return torch.zeros(self.shape, device=self.device).contiguous(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


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


def try_step(forward: Callable[[Tensor], Tensor], network: nn.Module, batch: Batch) -> None:
    """Run the forward and backward pass of a training step on zeros; `forward` calls `network` in some way.

    Two values per weight are set aside meanwhile, as AdamW will hold them.
    """
    with leave_no_trace(network, batch.device):
        network.train()
        moments = [torch.empty_like(weight) for weight in network.parameters() for _ in range(2)]
        with batch.autocast():
            logits = forward(batch.zeros())
        logits.float().square().mean().backward()
        del moments


@torch.inference_mode()
def try_pass(forward: Callable[[Tensor], Tensor], batch: Batch) -> None:
    """Run a forward pass of inference on zeros."""
    with batch.autocast():
        forward(batch.zeros())


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


def probe_memory(
    network: nn.Module,
    batch: Batch,
    count_saved_bytes: Callable[[], int],
    accumulate: int = 1,
    try_smaller: bool = True,
) -> None:
    """Log what memory a training step needs: measured on CUDA, elsewhere counted.

    `count_saved_bytes` returns the bytes of activations that a step keeps for its backward pass. It is not
    called on CUDA. Raises InputError where the step does not fit on the card; its remedy is a --batch-size
    and an --accumulate that do. Set `try_smaller` to False where batch norm waits for other ranks: smaller
    batches are then named without being tried.
    """
    slabs = batch.shape[0]
    if batch.device.type != "cuda":
        weights = sum(weight.numel() * weight.element_size() for weight in network.parameters())
        log.info(
            "start-up probe: a step of %d slabs keeps %.2f GiB of activations beside %.2f GiB of weights, "
            "gradients and optimiser (counted, not run: no GPU)",
            slabs,
            count_saved_bytes() / 2**30,
            4 * weights / 2**30,
        )
        return
    total_gb = torch.cuda.get_device_properties(batch.device).total_memory / 2**30

    def fits(batch_size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(batch.device)
        try:
            try_step(network, network, Batch((batch_size, *batch.shape[1:]), batch.device, batch.dtype))
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    if not fits(slabs):
        raise_too_large(slabs, accumulate, total_gb, fits if try_smaller else None)
    peak_gb = torch.cuda.max_memory_allocated(batch.device) / 2**30
    torch.cuda.empty_cache()
    log.info("start-up probe: a step of %d slabs peaks at %.2f of %.1f GiB", slabs, peak_gb, total_gb)


def raise_too_large(
    batch_size: int, accumulate: int, total_gb: float, fits: Callable[[int], bool] | None
) -> None:
    """Raise the InputError of a batch that does not fit, naming the largest of its divisors that does."""
    flag, problem = f"--batch-size {batch_size}", f"does not fit in the {total_gb:.1f} GiB of this GPU"
    for smaller in range(batch_size // 2, 0, -1):
        if batch_size % smaller:
            continue
        if fits is None or fits(smaller):
            word = "fits" if fits else "may fit"
            steps = accumulate * (batch_size // smaller)
            raise InputError(flag, problem, f"--batch-size {smaller} --accumulate {steps} {word}")
    raise InputError(
        flag, f"{problem}, nor does any part of it", "pass --checkpointing or smaller --widths or --size"
    )


# ------------------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------------------


def compile_network(
    network: nn.Module, first_pass: Callable[[nn.Module], None], freeze: bool = False
) -> nn.Module:
    """Return the network compiled, or the network itself where that fails; log which.

    torch compiles in the first pass, so `first_pass` runs one (`try_step`, `try_pass`) with the compiled
    network. That shares its weights with `network`; with `freeze`, for inference alone, they are built into
    the code.
    """
    try:
        compiled = torch.compile(network, options={"freezing": True} if freeze else None)
        first_pass(compiled)
    except Exception as error:
        # no compiler, an operator or a Python version it lacks, no memory: each has a type of its own
        first_line = str(error).strip().split("\n")[0]
        log.warning("--compile failed (%s: %s); going on without it", type(error).__name__, first_line)
        return network
    log.info("the network is compiled")
    return compiled


class FixedBatch(nn.Module):
    """A network that always sees one batch size, filled up with zeros: torch compiles again for another."""

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.network = network
        self.batch_size = batch_size

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of at most `batch_size` slabs."""
        free = self.batch_size - len(slab)
        if free:
            slab = torch.cat([slab, slab.new_zeros(free, *slab.shape[1:])])
            slab = slab.contiguous(memory_format=torch.channels_last)
        return self.network(slab)[: self.batch_size - free]
