"""The hybrid loss against MONAI, against values worked out by hand, and at the edges of its range."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss, FocalLoss

from utils_v2 import HybridFocalDiceLoss

FOCAL_ONLY = {"focal_weight": 1.0, "dice_weight": 0.0}
DICE_ONLY = {"focal_weight": 0.0, "dice_weight": 1.0}


def draw_logits_and_target(
    seed: int, shape: tuple[int, ...] = (3, 2, 8, 10)
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator)
    target = (torch.rand(shape, generator=generator) < 0.3).float()
    return logits.requires_grad_(), target


def value_and_gradient(
    loss: torch.nn.Module, logits: torch.Tensor, target: torch.Tensor
) -> tuple[float, torch.Tensor]:
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


@pytest.mark.parametrize("seed", range(4))
def test_dice_part_equals_monai_pooled_over_the_batch(seed: int) -> None:
    logits, target = draw_logits_and_target(seed)
    target[:, 1] *= seed % 2  # every other seed leaves the second region empty
    oracle = DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)
    value, gradient = value_and_gradient(HybridFocalDiceLoss(**DICE_ONLY), logits, target)
    expected, expected_gradient = value_and_gradient(oracle, logits, target)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("smooth", [0.1, 5.0])
def test_dice_smoothing_equals_monai(smooth: float) -> None:
    logits, target = draw_logits_and_target(7)
    oracle = DiceLoss(sigmoid=True, batch=True, smooth_nr=smooth, smooth_dr=smooth)
    loss = HybridFocalDiceLoss(**DICE_ONLY, smooth=smooth)
    assert loss(logits, target).item() == pytest.approx(oracle(logits, target).item(), rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_focal_part_at_its_default_alpha_equals_unweighted_monai(gamma: float) -> None:
    logits, target = draw_logits_and_target(1)
    loss = HybridFocalDiceLoss(**FOCAL_ONLY, focal_gamma=gamma)
    value, gradient = value_and_gradient(loss, logits, target)
    expected, expected_gradient = value_and_gradient(FocalLoss(gamma=gamma), logits, target)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5, 0.75])
def test_focal_part_with_alpha_is_twice_monai(alpha: float) -> None:
    logits, target = draw_logits_and_target(2)
    value = HybridFocalDiceLoss(**FOCAL_ONLY, focal_alpha=alpha)(logits, target).item()
    assert value == pytest.approx(2 * FocalLoss(gamma=2, alpha=alpha)(logits, target).item(), rel=1e-5)


def focal_by_softplus(logits: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """The focal term from the logit alone: -log p_t is softplus(-x_t), 1 - p_t is sigmoid(-x_t)."""
    signed = logits * (2 * target - 1)
    alpha_t = 2 * (alpha * target + (1 - alpha) * (1 - target))
    return (alpha_t * torch.sigmoid(-signed).pow(gamma) * F.softplus(-signed)).mean()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 2.0), (0.25, 2.0), (0.5, 1.0), (0.8, 3.5)])
def test_focal_part_equals_the_formula_in_the_logit(alpha: float, gamma: float) -> None:
    logits, target = draw_logits_and_target(9)
    loss = HybridFocalDiceLoss(**FOCAL_ONLY, focal_alpha=alpha, focal_gamma=gamma)
    value, gradient = value_and_gradient(loss, logits, target)
    exact = logits.detach().double().requires_grad_()
    expected = focal_by_softplus(exact, target.double(), alpha, gamma)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focal_part_at_logits_of_100_in_every_type(dtype: torch.dtype) -> None:
    # right by 100: loss and slope 0. Wrong by 100: loss 100 and slope 1, a quarter of the pixels each
    logits = torch.tensor([[[[100.0, -100.0, -100.0, 100.0]]]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[[[1.0, 0.0, 1.0, 0.0]]]])
    loss = HybridFocalDiceLoss(**FOCAL_ONLY)(logits, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * 100 / 4)
    assert logits.grad.dtype == dtype
    assert logits.grad.flatten().tolist() == pytest.approx([0, 0, -0.25, 0.25])


def test_defaults_are_focal_gamma_2_plus_dice_smooth_1() -> None:
    logits, target = draw_logits_and_target(3)
    focal = FocalLoss(gamma=2)(logits, target)
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)(logits, target)
    assert HybridFocalDiceLoss()(logits, target).item() == pytest.approx((focal + dice).item(), rel=1e-5)


def test_undecided_pixels_by_hand() -> None:
    # p = 1/2 at both pixels: focal (1/2)^2 ln 2 each; overlap 1/2, total 2: Dice 1 - (2 * 1/2 + 1) / (2 + 1)
    logits, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    assert HybridFocalDiceLoss(**FOCAL_ONLY)(logits, target).item() == pytest.approx(math.log(2) / 4)
    assert HybridFocalDiceLoss(**DICE_ONLY)(logits, target).item() == pytest.approx(1 / 3)
    assert HybridFocalDiceLoss()(logits, target).item() == pytest.approx(math.log(2) / 4 + 1 / 3)


def test_alpha_and_weights_by_hand() -> None:
    # p = 3/4 at both pixels, one tumour (p_t = 3/4) and one not (p_t = 1/4); overlap 3/4, total 5/2
    logits = torch.full((1, 1, 2, 1), math.log(3))
    target = torch.tensor([[[[1.0], [0.0]]]])
    tumour = 2 * 0.8 * (1 / 4) ** 2 * math.log(4 / 3)
    background = 2 * 0.2 * (3 / 4) ** 2 * math.log(4)
    dice = 1 - (3 / 2 + 1) / (5 / 2 + 1)
    expected = 3 * (tumour + background) / 2 + 0.5 * dice
    loss = HybridFocalDiceLoss(focal_weight=3, dice_weight=0.5, focal_alpha=0.8)
    assert loss(logits, target).item() == pytest.approx(expected)


def test_dice_counts_are_pooled_over_the_batch_not_averaged_per_slab() -> None:
    # Slab 1: four tumour pixels found. Slab 2: no tumour, four false positives. Pooled 2 TP = 8, total = 12.
    target = torch.zeros(2, 1, 2, 4)
    target[0, 0, 0] = 1
    logits = torch.full((2, 1, 2, 4), -60.0)
    logits[0, 0, 0] = 60
    logits[1, 0, 1] = 60
    value = HybridFocalDiceLoss(**DICE_ONLY)(logits, target).item()
    per_slab = (0 + (1 - 1 / 5)) / 2
    assert value == pytest.approx(1 - 9 / 13)
    assert abs(value - per_slab) > 0.05


def test_a_batch_weighs_like_one_tall_slab() -> None:
    logits, target = draw_logits_and_target(4)
    tall = [x.transpose(0, 1).reshape(1, 2, -1, 10) for x in (logits, target)]
    loss = HybridFocalDiceLoss()
    assert loss(logits, target).item() == pytest.approx(loss(*tall).item(), rel=1e-5)


@pytest.mark.parametrize("part", [FOCAL_ONLY, DICE_ONLY])
def test_several_regions_give_the_mean_over_regions(part: dict[str, float]) -> None:
    logits, target = draw_logits_and_target(5, (2, 3, 6, 6))
    target[:, 2] = 0  # the third region is absent from the batch
    loss = HybridFocalDiceLoss(**part)
    single = [loss(logits[:, [r]], target[:, [r]]).item() for r in range(3)]
    assert loss(logits, target).item() == pytest.approx(sum(single) / 3, rel=1e-5)
    assert max(single) - min(single) > 0.01  # or the mean over regions would be no test


@pytest.mark.parametrize("mask", ["empty", "full", "half"])
@pytest.mark.parametrize("magnitude", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("pattern", ["all positive", "all negative", "checkerboard"])
def test_value_and_gradient_stay_finite(mask: str, magnitude: float, pattern: str) -> None:
    target = torch.full((2, 2, 4, 4), 1.0 if mask == "full" else 0.0)
    if mask == "half":
        target[..., :2] = 1
    sign = torch.ones_like(target)
    if pattern == "all negative":
        sign = -sign
    elif pattern == "checkerboard":
        sign[..., ::2, ::2] = -1
    logits = (magnitude * sign).requires_grad_()
    value, gradient = value_and_gradient(HybridFocalDiceLoss(), logits, target)
    assert math.isfinite(value)
    assert value >= 0
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("magnitude", [100.0, 1e4])
def test_a_confidently_wrong_pixel_still_gets_a_gradient(magnitude: float) -> None:
    # clamped probabilities would lose it; far out, the focal term is |logit| and its slope 1
    logits = torch.tensor([[[[-magnitude, magnitude]]]], requires_grad=True)
    target = torch.tensor([[[[1.0, 0.0]]]])
    value, gradient = value_and_gradient(HybridFocalDiceLoss(**FOCAL_ONLY), logits, target)
    assert value == pytest.approx(magnitude)
    assert gradient.flatten().tolist() == pytest.approx([-0.5, 0.5])


def test_float32_arithmetic_under_autocast() -> None:
    logits, target = draw_logits_and_target(6, (2, 1, 32, 32))
    rounded = logits.detach().bfloat16().requires_grad_()
    loss = HybridFocalDiceLoss()
    expected = loss(rounded.detach().float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(rounded, target)
        unrounded = loss(logits, target)
    assert value.dtype == torch.float32
    assert value.item() == expected.item()
    assert unrounded.item() == loss(logits, target).item()
    value.backward()
    assert rounded.grad.dtype == torch.bfloat16
    assert torch.isfinite(rounded.grad).all()


def test_large_pooled_counts_under_autocast_are_not_rounded() -> None:
    # 3 x 301 tumour pixels: bfloat16 holds 8 bits of a count, float16 overflows from 65,520 on
    target = torch.zeros(1, 1, 300, 301, dtype=torch.bool)
    target[..., :3, :] = True
    logits = torch.where(target, 30.0, -30.0).bfloat16()
    logits[..., 0, 0] = -30  # one pixel missed
    with torch.autocast("cpu", torch.bfloat16):
        value = HybridFocalDiceLoss(**DICE_ONLY)(logits, target).item()
    assert value == pytest.approx(1 - (2 * 902 + 1) / (902 + 903 + 1), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16])
def test_target_of_any_number_type(dtype: torch.dtype) -> None:
    logits, target = draw_logits_and_target(8)
    loss = HybridFocalDiceLoss()
    assert loss(logits, target.to(dtype)).item() == loss(logits, target).item()


@pytest.mark.parametrize(
    ("logits_shape", "target_shape"),
    [
        ((2, 1, 4, 4), (1, 1, 4, 4)),  # these three would broadcast in silence
        ((2, 3, 4, 4), (2, 1, 4, 4)),
        ((2, 1, 4, 4), (4, 4)),
        ((2, 1, 4, 4), (2, 1, 4, 5)),
    ],
)
def test_shapes_that_differ_raise(logits_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="differ in shape") as caught:
        HybridFocalDiceLoss()(torch.zeros(logits_shape), torch.zeros(target_shape))
    assert str(logits_shape) in str(caught.value)
    assert str(target_shape) in str(caught.value)


@pytest.mark.parametrize("mask", ["empty", "full", "half"])
def test_perfect_prediction_is_near_0_and_its_opposite_large(mask: str) -> None:
    target = torch.full((2, 1, 16, 16), 1.0 if mask == "full" else 0.0)
    if mask == "half":
        target[..., :8] = 1
    right = 20 * (2 * target - 1)
    loss = HybridFocalDiceLoss()
    assert 0 <= loss(right, target).item() < 1e-5
    # focal: 20 at each pixel; Dice: no overlap, 512 pixels in exactly one of the masks: 1 - 1 / (512 + 1)
    assert loss(-right, target).item() == pytest.approx(21 - 1 / 513, abs=1e-4)


@given(
    seed=st.integers(0, 10_000),
    pixel=st.integers(0, 35),
    step=st.floats(0.1, 3),
)
def test_moving_a_logit_towards_its_reference_lowers_the_loss(seed: int, pixel: int, step: float) -> None:
    logits, target = draw_logits_and_target(seed, (1, 1, 6, 6))
    moved = logits.detach().clone()
    moved.view(-1)[pixel] += step * (2 * target.view(-1)[pixel] - 1)
    loss = HybridFocalDiceLoss()
    assert loss(moved, target).item() <= loss(logits, target).item() + 1e-7


@given(seed=st.integers(0, 10_000), regions=st.integers(1, 3))
def test_loss_is_blind_to_the_order_of_slabs_and_to_mirrors(seed: int, regions: int) -> None:
    logits, target = draw_logits_and_target(seed, (4, regions, 5, 7))
    loss = HybridFocalDiceLoss()
    value = loss(logits, target).item()
    assert value >= 0
    assert loss(logits[[2, 0, 3, 1]], target[[2, 0, 3, 1]]).item() == pytest.approx(value, rel=1e-5)
    assert loss(logits.flip(3), target.flip(3)).item() == pytest.approx(value, rel=1e-5)
