"""Several processes as one run. Each process is a rank; torchrun starts them and numbers them from 0.

    torchrun --nproc-per-node 2 -- train_drunet_v2.py --data-dir data/BraTS2021 --batch-size 8
    torchrun --nproc-per-node 2 -- final_evaluation_v2.py --run results/RUN

A command wraps its main in `end_together` and calls `join_ranks` first. Every function works without
torchrun too: there is one rank then, and nothing to exchange. Rank 0 is the main rank. It alone logs, shows
progress and writes what belongs to the whole run. Small values (settings, clock, scores) travel between CPUs
by gloo, gradients between GPUs by nccl.
"""

import contextlib
import gc
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

# Imported now, before there is a process group: its functions hold the current group as a default argument.
# DistributedDataParallel imports it later, and the group and its threads would then outlive `leave_ranks`.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import signals
from runtime.errors import InputError

Value = TypeVar("Value")
# How long a rank waits for another one, which may be decoding volumes. A dead one is noticed at once.
PATIENCE = timedelta(hours=4)
_store: dist.Store | None = None  # shared by all ranks, between `join_ranks` and `leave_ranks`


def join_ranks() -> None:
    """Join the other processes that torchrun started; nothing to do without torchrun."""
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    with signals.end_at_once():  # else one waits for hours for another that was stopped on its way here
        _store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=_store,
            rank=number,
            world_size=count,
            timeout=PATIENCE,
        )
    if not is_main():
        warnings.simplefilter("ignore")  # the main rank shows the same ones


def rank() -> int:
    """Return the number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the run, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that logs and writes."""
    return rank() == 0


def is_first_here() -> bool:
    """Return whether this process is the one of its machine that fills the cache there."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def local_device(device: torch.device) -> torch.device:
    """Return the device of this rank: on GPUs one of its own, otherwise `device` itself."""
    if world_size() == 1:
        return device
    if device.type == "mps":
        raise InputError(
            "--device mps", "torchrun needs cpu or cuda", "start one process, or pass --device cpu"
        )
    if device.type != "cuda":
        return device
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(
            "--nproc-per-node", f"more ranks than the {gpus} GPU(s) here", "start one rank per GPU"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# ------------------------------------------------------------------------------------------------------------
# Exchanging values
# ------------------------------------------------------------------------------------------------------------


def from_main(value: Value) -> Value:
    """Return on every rank the value of the main rank. It must be picklable."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def share_of(items: Sequence[Value]) -> Sequence[Value]:
    """Return the share of this rank: every world_size-th item, from item number `rank` on."""
    return items[rank() :: world_size()]


def gather_shares(mine: Sequence[Value]) -> list[Value]:
    """Return the items of all ranks, in the order from which `share_of` took them."""
    if world_size() == 1:
        return list(mine)
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, list(mine))
    longest = max(map(len, shares))
    return [share[index] for index in range(longest) for share in shares if index < len(share)]


def wait_for_all() -> None:
    """Return once every rank has called this."""
    gather_shares([None])


def sum_counts(counts: Tensor) -> Tensor:
    """Return a copy of the counts, summed over all ranks, without a gradient."""
    counts = counts.detach().clone()
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts


def agree_to_stop() -> bool:
    """Return whether any rank got a signal to stop; all must ask together.

    One that comes while they ask counts the next time: this rank would stop and the others go on.
    """
    if world_size() == 1:
        return signals.is_stopping()
    number = torch.tensor(signals.number())
    dist.all_reduce(number, dist.ReduceOp.MAX)
    signals.stop_for(int(number))
    return int(number) > 0


# ------------------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks. Every output depends on the input of every rank, so gradients are summed too."""

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

    DistributedDataParallel averages gradients over ranks, so training minimises the mean of their losses.
    A loss that sums its counts by this function is the loss of the whole batch, in value and gradient.
    """
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the equal batches of all ranks, for CPUs: nn.SyncBatchNorm needs CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W), normalised in float32, in the type of x."""
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


def sync_batchnorm(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network with batch norms over the slabs of all ranks; the keys of its state_dict stay."""
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
    """Return the network whose backward averages gradients over ranks.

    Its buffers stay those of each rank; call `average_buffers` before they are used.
    """
    if world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.14 calls broadcast_buffers forward_sync_buffers; older versions know no other name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            network, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def accumulate_gradients(network: nn.Module, defer_sync: bool) -> contextlib.AbstractContextManager[None]:
    """Return the context of a backward pass; with `defer_sync` gradients add up and are not averaged yet."""
    if defer_sync and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """Set the running statistics of batch norm to their mean over ranks, so that all validate the same."""
    if world_size() == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size()


# ------------------------------------------------------------------------------------------------------------
# The end
# ------------------------------------------------------------------------------------------------------------


def end_together(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a command's `main` so that a failure on any rank ends every rank, with a single message.

    The first rank that fails raises its error; the others end without a word. torchrun stops those that still
    run and adds a report with the exit codes. Its `record` decorator is not used, as it adds the traceback of
    a user's bad input to that report.
    """

    def run(config: Any) -> None:
        try:
            main(config)
            leave_ranks()
        except BaseException as error:
            if world_size() == 1:
                raise
            _end_rank(error)

    return run


def leave_ranks() -> None:
    """Wait for all ranks, then leave the group; nothing to do without torchrun."""
    global _store
    if not dist.is_initialized():
        return
    wait_for_all()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _leave_group()
    _store = None


def _leave_group() -> None:
    """End the group's threads: one that still frees a tensor while the interpreter exits aborts the process.

    They end with the last reference to the group, which a reference cycle may hold.
    """
    gc.collect()
    dist.destroy_process_group()


def _end_rank(error: BaseException) -> NoReturn:
    """Raise the error of the first rank that fails; end the others without a word."""
    signals.ignore_signals()  # this rank ends already
    if isinstance(error, signals.Stopped) and error.is_agreed:
        _end_stopped_rank(error)
    is_first = _is_first_to_end()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # another rank may be gone
            _leave_group()
    if not is_first:
        sys.exit(2 if isinstance(error, InputError) else 1)
    if not is_main():
        print(file=sys.stderr)  # the main rank's progress bar may stand on the line
    if not _is_lost_rank(error):
        raise error
    print(
        f"{Path(sys.argv[0]).name}: error: another rank ended without a word, or torchrun was stopped; "
        "start it again (training: with --resume).",
        file=sys.stderr,
    )
    sys.exit(error.exit_code if isinstance(error, signals.Stopped) else 1)


def _end_stopped_rank(stop: signals.Stopped) -> NoReturn:
    """End a rank that stops together with the others; the main one says where."""
    main_rank = is_main()
    with contextlib.suppress(RuntimeError):
        _leave_group()
    if main_rank:
        raise stop
    sys.exit(stop.exit_code)


def _is_first_to_end() -> bool:
    assert _store is not None
    try:
        return _store.add("ranks that ended", 1) == 1
    except RuntimeError:  # the store ended with torchrun; two messages are better than none
        return True


def _is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone; gloo has no exception type of its own."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    # torchrun sends SIGTERM to the ranks that are left
    is_sigterm = isinstance(error, signals.Stopped) and error.number == signal.SIGTERM
    return is_gloo or is_sigterm or isinstance(error, dist.DistError)
