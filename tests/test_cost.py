"""What a network costs: operations and memory, by hand."""

import pytest
import torch
from torch import Tensor, nn

from model_drunet_v2 import DRUNetV2
from runtime.cost import count_flops, estimate_activation_bytes, measure_activation_bytes


def test_flops_of_one_convolution_by_hand() -> None:
    # per output value 3 * 3 * 3 multiply-adds of 2 operations
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(convolution, (2, 3, 10, 12)) == 2 * (2 * 8 * 10 * 12) * 27
    assert count_flops(nn.Conv2d(5, 7, 2, stride=2), (1, 5, 8, 8)) == 2 * (7 * 4 * 4) * 20


def test_flops_of_the_network_are_those_of_its_convolutions() -> None:
    network = DRUNetV2(6, 3, (4, 8, 16), se_form="slab")  # a mean over the head is a product of matrices
    multiply_adds = 0

    def count(module: nn.Conv2d, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal multiply_adds
        multiply_adds += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(torch.zeros(2, 6, 16, 24))
    for hook in hooks:
        hook.remove()
    assert count_flops(network, (2, 6, 16, 24)) == 2 * multiply_adds
    assert count_flops(network, (1, 6, 16, 24)) == multiply_adds


def test_activation_bytes_by_hand() -> None:
    # a convolution keeps its input, in 16 bits with a 16-bit copy of its weights; the ReLU its output
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    values, weights = 2 * 3 * 16 * 16, 3 * 8 * 9
    assert measure_activation_bytes(convolution, (2, 3, 16, 16)) == 2 * (values + weights)
    assert measure_activation_bytes(convolution, (2, 3, 16, 16), None) == 4 * values
    both = nn.Sequential(convolution, nn.ReLU())
    assert measure_activation_bytes(both, (2, 3, 16, 16)) == 2 * (values + weights + 2 * 8 * 16 * 16)


def test_activation_bytes_leave_weights_out_and_count_a_storage_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    assert measure_activation_bytes(Twice(), (1, 16, 2, 2), None) == 16 * 2 * 2 * 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_activation_bytes_are_told_from_small_steps(checkpointing: bool, dtype: torch.dtype | None) -> None:
    network = DRUNetV2(widths=(4, 8, 16))
    network.checkpointing = checkpointing
    before = {name: value.clone() for name, value in network.state_dict().items()}
    told = estimate_activation_bytes(network, (5, 3, 48, 80), dtype, side=8)
    assert told == measure_activation_bytes(network, (5, 3, 48, 80), dtype)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
