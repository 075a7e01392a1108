"""Passes over activation maps: the numbers and gradients of the plain formulas, laid out as the maps are."""

import pytest
import torch
from torch import Tensor

from runtime.passes import add_weighted, channel_mean, fork


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [1, 3, 40])  # one, fewer and more than a vector register holds
def test_means_and_weighted_sums_have_the_gradients_of_the_plain_formulas(
    channels: int, layout: torch.memory_format
) -> None:
    x, base = (
        draw(2, channels, 4, 6, seed=seed).double().contiguous(memory_format=layout) for seed in (0, 1)
    )
    per_channel, per_pixel = draw(2, channels, 1, 1, seed=2).double(), draw(2, 1, 4, 6, seed=3).double()
    inputs = [tensor.requires_grad_() for tensor in (x, base, per_channel, per_pixel)]
    assert torch.autograd.gradcheck(channel_mean, x)
    torch.testing.assert_close(channel_mean(x), x.mean((2, 3), keepdim=True))
    for weight in (per_channel, per_pixel):
        assert torch.autograd.gradcheck(add_weighted, (base, x, weight))
        torch.testing.assert_close(add_weighted(base, x, weight), base + x * weight)
    (found,) = torch.autograd.grad(channel_mean(x).sum(), inputs[0])
    assert found.is_contiguous(memory_format=layout)


def test_the_gradients_of_a_forked_map_are_summed_into_a_new_one() -> None:
    x = draw(2, 3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fork(x, 3), x)
    one, other, third = fork(x, 3)
    gradients = [draw(2, 3, 4, 4, seed=seed).double() for seed in (1, 2, 3)]
    before = [gradient.clone() for gradient in gradients]
    torch.autograd.backward((one, other, third), gradients)
    torch.testing.assert_close(x.grad, sum(before))
    assert all(torch.equal(gradient, was) for gradient, was in zip(gradients, before, strict=True))


def test_a_map_without_a_gradient_is_not_forked() -> None:
    x = draw(1, 2, 2, 2)
    assert all(each is x for each in fork(x, 2))


def test_a_mean_of_float16_does_not_pass_its_largest_number() -> None:
    x = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16)
    assert channel_mean(x).item() == 100


def test_a_mean_under_autocast_on_a_card_keeps_the_type_of_the_map() -> None:
    # no card is needed: fake tensors have types and no values
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch._subclasses.fake_tensor.FakeTensorMode():
            x = torch.empty(1, 2, 4, 4, device="cuda", dtype=torch.bfloat16)
            assert x.sum((2, 3)).dtype == torch.float32
            assert channel_mean(x).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", False)
