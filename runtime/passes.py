"""Passes over activation maps (N, C, H, W): the numbers of torch's own in less time, or in less memory.

On a CPU what lies between the convolutions takes half of a training step, most of it in the backward pass.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint


class _ChannelMean(torch.autograd.Function):
    """Mean over H and W, keeping them as 1; `sum` is several times as fast as `mean` on a CPU.

    The gradient has the map's own memory layout. Autograd's own would be channels first, and adding that to
    a gradient that is channels last takes 15 times as long.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.layout = layout_of(x)
        if x.dtype == torch.float16:  # a sum could exceed its largest number, 65504
            return x.mean((2, 3), keepdim=True)
        mean = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        return mean.to(x.dtype)  # autocast on CUDA sums to float32; the map's gradient would be float32 too

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        share = gradient / (ctx.shape[2] * ctx.shape[3])
        return share.expand(ctx.shape).contiguous(memory_format=ctx.layout)


def channel_mean(x: Tensor) -> Tensor:
    """Return the mean of a map over H and W, (N, C, 1, 1)."""
    return _ChannelMean.apply(x)


class _Fork(torch.autograd.Function):
    """A map for several readers, whose gradients are summed into a new map.

    Autograd sums in place, which in 16 bits on a CPU takes two to four times as long.
    """

    @staticmethod
    def forward(_: FunctionCtx, x: Tensor, readers: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(readers))

    @staticmethod
    @once_differentiable
    def backward(_: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0]
        for gradient in gradients[1:]:
            total = total + gradient
        return total, None


def fork(x: Tensor, readers: int) -> tuple[Tensor, ...]:
    """Return x once for each of its readers."""
    return _Fork.apply(x, readers) if x.requires_grad else (x,) * readers


class _AddWeighted(torch.autograd.Function):
    """base + x * weight, the weight per channel (N, C, 1, 1) or per pixel (N, 1, H, W).

    Its gradients take one pass fewer than those of `addcmul`, which multiplies x by 1 first.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, base: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addcmul(base, x, spread_weight(weight, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient, gradient * spread_weight(weight, x), (gradient * x).sum_to_size(weight.shape)


def add_weighted(base: Tensor | None, x: Tensor, weight: Tensor | None) -> Tensor:
    """Return base + weight * x, without a map of weight * x; None stands for a base of 0 or a weight of 1."""
    if base is None:
        return x if weight is None else x * weight
    return base + x if weight is None else _AddWeighted.apply(base, x, weight)


def spread_weight(weight: Tensor, x: Tensor) -> Tensor:
    """Return a weight that broadcasts to x fast: on a CPU, for few channels, one that is as large as x.

    There a weight per pixel would start a loop for each pixel, one that is shorter than a vector register.
    """
    if x.device.type == "cpu" and weight.shape[1] == 1 and x.shape[1] < 32:
        return weight.expand(x.shape).contiguous(memory_format=layout_of(x))
    return weight


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a map (N, C, H, W), channels last where both fit."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def run_checkpointed(level: nn.Module, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return run(*inputs) and keep the inputs alone for the backward pass; `run` calls `level`."""
    return checkpoint(
        run,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # a level draws no random numbers
        context_fn=lambda: (contextlib.nullcontext(), pause_statistics(level)),
    )


@contextlib.contextmanager
def pause_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norm update copies of its running statistics: this forward pass repeats an earlier one."""
    buffers = [(owner, *named) for owner in module.modules() for named in owner.named_buffers(recurse=False)]
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)
