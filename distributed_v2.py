"""Several processes, one run: what a script needs to say when torchrun started it, and nothing without it.

    torchrun --nproc-per-node 2 -- train_drunet_v2.py --data-dir data/BraTS2021 --batch-size 8
    torchrun --nproc-per-node 2 -- final_evaluation_v2.py --run results/RUN

Every function works in a lone process too, where it does nothing or gives its argument back. Rank 0 is the
main rank: it alone prints, and writes what is not of one case. Small facts (settings, clock, scores) travel
between processors by gloo, gradients between graphics cards by nccl, so no fact makes a card wait.
"""

import atexit
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils_v2 import InputError

Value = TypeVar("Value")
# A rank may wait so long for another that decodes volumes or draws; a dead one ends the run at once.
PATIENCE = timedelta(hours=4)


class _ToldToStop(Exception):  # noqa: N818
    """torchrun ends the ranks that are left, as one has ended or as it was told to."""


def _stop(_signal: int, _frame: object) -> None:
    raise _ToldToStop


def join_ranks() -> None:
    """Join the other processes torchrun started, and silence all but the main one; nothing without it.

    What a silenced rank says on stdout and stderr is the same as the main one's, or its progress bar.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=PATIENCE)
    signal.signal(signal.SIGTERM, _stop)
    if not is_main():
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def rank() -> int:
    """Return this process's number, 0 in a lone one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the run, 1 in a lone one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """Return the device of this rank: a graphics card of its own, or `device` as it is."""
    if world_size() == 1:
        return device
    if device.type == "mps":
        raise InputError("--device mps: torchrun needs cpu or cuda; start one process, or pass --device cpu.")
    if device.type != "cuda":
        return device
    number, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= cards:
        raise InputError(f"--nproc-per-node: more ranks than the {cards} GPU(s) here; start one rank a GPU.")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# ------------------------------------------------------------------------------------------------------------
# Facts
# ------------------------------------------------------------------------------------------------------------


def from_main(value: Value) -> Value:
    """Return the main rank's value, a plain Python one, on every rank; a lone process's own."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def share_of(items: Sequence[Value]) -> Sequence[Value]:
    """Return this rank's share: every world_size-th item, from its own number on."""
    return items[rank() :: world_size()]


def gather_shares(mine: Sequence[Value]) -> list[Value]:
    """Return the items of all ranks in the order `share_of` took them from."""
    if world_size() == 1:
        return list(mine)
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, list(mine))
    longest = max(map(len, shares))
    return [share[index] for index in range(longest) for share in shares if index < len(share)]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    from_main(None)
    gather_shares([None])


def sum_counts(counts: Tensor) -> Tensor:
    """Return counts summed over all ranks; no gradient."""
    counts = counts.detach().clone()
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts


# ------------------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks. Each rank's output depends on every rank's input, so gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return a tensor summed over all ranks, with its gradient.

    DistributedDataParallel averages the ranks' gradients, so what is minimised is the mean of the ranks'
    losses: a loss that pools its counts by this function is that of the whole batch, value and gradient.
    """
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the slabs of all ranks, each with equally many; nn.SyncBatchNorm is for CUDA alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) normalised in float32, in its own type."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.float()
        mean = sum_over_ranks(wide.mean((0, 2, 3))) / world_size()  # (C,)
        centred = wide - mean[:, None, None]  # (N, C, H, W)
        variance = sum_over_ranks(centred.square().mean((0, 2, 3))) / world_size()  # (C,)
        if self.track_running_stats:
            with torch.no_grad():
                values = world_size() * x.numel() / x.shape[1]
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (values / (values - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)  # (C,)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batchnorm(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network with batch norms that see the slabs of all ranks, under their old names."""
    if world_size() == 1:
        return network
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
                shared.load_state_dict(child.state_dict())
                module.add_module(name, shared)
    return network


def wrap_network(network: nn.Module, device: torch.device) -> nn.Module:
    """Return what a training step calls: the network, on several ranks with their gradients averaged.

    Batch statistics stay each rank's own during the epoch; `average_buffers` joins them.
    """
    if world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # newer versions of torch have another name for broadcast_buffers, older ones this alone
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            network, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def keep_gradients(network: nn.Module, keep: bool) -> contextlib.AbstractContextManager[None]:
    """Context of a step whose gradients are added up and not yet exchanged, where `keep` says so."""
    if keep and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """Set the running statistics of batch norm to their mean over ranks, so that all ranks validate alike."""
    if world_size() == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size()


# ------------------------------------------------------------------------------------------------------------
# The end
# ------------------------------------------------------------------------------------------------------------


def with_one_voice(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a command's `main` such that, whatever ends it, one rank says so and all ranks end.

    The rank that ends first speaks; torchrun then stops the others, and adds a report of its own.
    """

    def run(config: Any) -> None:
        try:
            main(config)
        except SystemExit:
            raise
        except BaseException as error:
            if world_size() == 1:
                raise
            end_rank(error)
        if dist.is_initialized():
            wait_for_all()
            dist.destroy_process_group()
            leave()

    return run


def leave() -> NoReturn:
    """End this process with exit code 0 once its work is done and its exit handlers have run.

    The interpreter's own teardown is left out: with the threads of a finished group it aborts now and then.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_rank(error: BaseException) -> NoReturn:
    """Raise the error where this rank is the first to end, else exit without a word."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends already
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    if not _is_first_to_end():
        sys.exit(1)
    if not is_main():
        print(file=sys.stderr)  # the main rank's progress bar may stand on the line
    if not _is_lost_peer(error):
        raise error
    name = Path(sys.argv[0]).name
    print(
        f"{name}: error: another rank ended without a word, or torchrun was stopped; start it again "
        "(training: with --resume).",
        file=sys.stderr,
    )
    sys.exit(1)


def _is_first_to_end() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add("ranks that ended", 1) == 1
    except RuntimeError:  # the store went with torchrun; better twice than not at all
        return True


def _is_lost_peer(error: BaseException) -> bool:
    """Tell whether an exception says that another process is gone; gloo has no type of its own for it."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_gloo or isinstance(error, (_ToldToStop, dist.DistError))
