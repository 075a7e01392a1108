"""What a network costs: parameters, floating-point operations, memory of a training step."""

import torch
from torch import Tensor, nn

from runtime.passes import pause_statistics

Shape = tuple[int, int, int, int]  # N, C, H, W


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_flops(model: nn.Module, shape: Shape) -> int:
    """Return the floating-point operations of a forward pass on `shape`; a multiply-add counts as two.

    torch counts them on the convolutions that run; norms, activations and interpolation are left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(shape))
    return counter.get_total_flops()


def measure_activation_bytes(
    model: nn.Module, shape: Shape, dtype: torch.dtype | None = torch.bfloat16
) -> int:
    """Return the bytes autograd keeps between forward and backward pass of a training step on `shape`.

    Exact for autocast to `dtype` (None is float32): every storage that the saved-tensor hooks see, once, in
    its own type. The 16-bit copies that autocast makes of the weights count, the weights do not. Weights and
    running statistics stay as they are. What checkpointing recomputes later does not count.
    """
    device = next(model.parameters()).device
    saved: dict[int, Tensor] = {}  # by the storage's address; as the tensor lives, no other gets the address

    def remember(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    was_training = model.training
    model.train()
    slab = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
    with (
        pause_statistics(model),
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        model(slab)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    model.train(was_training)
    return sum(saved[address].untyped_storage().nbytes() for address in saved.keys() - own)


def estimate_activation_bytes(
    model: nn.Module, shape: Shape, dtype: torch.dtype | None = torch.bfloat16, side: int = 32
) -> int:
    """Return `measure_activation_bytes` on `shape`, from three small steps of `side` or 2 * `side` pixels.

    Exact, as a convolutional network keeps a fixed amount, an amount per slab and an amount per pixel.
    """
    slabs, channels, height, width = shape
    small, larger, more = (
        measure_activation_bytes(model, (count, channels, length, length), dtype)
        for count, length in ((2, side), (2, 2 * side), (3, side))
    )
    per_pixel = (larger - small) / (2 * 3 * side**2)
    per_slab = more - small - per_pixel * side**2
    fixed = small - 2 * per_slab - 2 * per_pixel * side**2
    return round(fixed + slabs * (per_slab + per_pixel * height * width))
