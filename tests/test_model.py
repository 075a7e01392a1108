"""The network's shapes, parts, ablations and cost, at widths a CPU runs in moments."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_drunet_v2 import (
    WIDTHS,
    AttentionGate,
    DecoderLevel,
    DRUNetV2,
    ModelConfig,
    RectifiedConv,
    ResidualBlock,
    SqueezeExcitation,
    build_network,
    compress_bright,
    find_head,
    fold_batch_norm,
    head_mean,
    main,
    prepare_network,
)
from runtime.command import check_settings
from runtime.cost import count_flops, count_parameters, estimate_activation_bytes, measure_activation_bytes
from runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NARROW = (4, 8, 16)
SWITCHES = ("use_se", "use_attention", "dilated", "residual")


def make_network(seed: int = 0, **changes: object) -> DRUNetV2:
    torch.manual_seed(seed)
    return DRUNetV2(**{"widths": NARROW, **changes})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------
# Shapes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_channels", "num_regions", "widths", "height", "width"),
    [
        (3, 1, NARROW, 32, 32),
        (12, 3, NARROW, 32, 48),
        (1, 2, NARROW, 4, 4),  # the bottleneck is a single pixel
        (5, 1, (6, 10), 2, 14),
        (3, 1, (2, 3, 4, 5, 6), 16, 32),
        (3, 3, (16, 8, 4), 8, 8),  # widths may fall
    ],
)
def test_output_shape(
    in_channels: int, num_regions: int, widths: Sequence[int], height: int, width: int
) -> None:
    network = make_network(in_channels=in_channels, num_regions=num_regions, widths=widths).eval()
    with torch.no_grad():
        logits = network(draw(2, in_channels, height, width))
    assert logits.shape == (2, num_regions, height, width)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 34), (2, 32), (30, 30)])
def test_height_or_width_that_does_not_halve_raises(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="multiples of 4") as caught:
        make_network()(torch.zeros(1, 3, height, width))
    assert str((height, width)) in str(caught.value)


def test_default_multiple_is_16() -> None:
    network = make_network(widths=(1, 1, 1, 1, 1)).eval()
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(1, 3, 24, 16))


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 1, 32, 32), (3, 32, 32), (1, 3, 1, 32, 32)])
def test_slabs_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)") as caught:
        make_network()(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("widths", [(), (8,), (8, 0), (8, -4, 16)])
def test_widths_that_make_no_network_raise(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths"):
        DRUNetV2(widths=widths)


# ------------------------------------------------------------------------------------------------------------
# Parameters
# ------------------------------------------------------------------------------------------------------------


def se_parameters(channels: int) -> int:
    hidden = max(4, channels // 16)
    return channels * hidden + hidden + hidden * channels + channels


def gate_parameters(skip: int, below: int) -> int:
    hidden = max(4, skip // 2)
    return 4 * skip * hidden + below * hidden + hidden + hidden + 1


def shortcut_parameters(before: int, width: int) -> int:
    return before * width + 2 * width if before != width else 0


def expected_parameters(in_channels: int, num_regions: int, widths: Sequence[int]) -> dict[str, int]:
    """Return the parameters of each part, written down from the drawing of the network."""
    steps = list(zip((in_channels, *widths[:-1]), widths, strict=True))
    joins = list(zip(widths[1:], widths[:-1], strict=True))  # (below, skip)
    plain = sum(9 * a * b + 9 * b * b + 4 * b for a, b in steps)
    plain += sum(below * c + c * c + 2 * c + 9 * c * c + 2 * c for below, c in joins)
    plain += widths[0] * num_regions + num_regions
    return {
        "plain": plain,
        "use_se": sum(map(se_parameters, [*widths, *widths[:-1]])),
        "use_attention": sum(gate_parameters(c, below) for below, c in joins),
        "dilated": 0,
        "residual": sum(shortcut_parameters(a, b) for a, b in steps),
    }


def test_parameters_of_the_default_network() -> None:
    with torch.device("meta"):  # counted without being drawn
        network = DRUNetV2()
    assert WIDTHS == (64, 128, 256, 512, 1024)
    assert count_parameters(network) == 24_996_157
    assert sum(expected_parameters(3, 1, WIDTHS).values()) == 24_996_157


@pytest.mark.parametrize(
    ("in_channels", "num_regions", "widths"), [(3, 1, NARROW), (12, 3, (80, 96)), (5, 2, (3, 7, 9, 20))]
)
def test_parameters_follow_channels_regions_and_widths(
    in_channels: int, num_regions: int, widths: Sequence[int]
) -> None:
    with torch.device("meta"):
        network = DRUNetV2(in_channels, num_regions, widths)
    assert count_parameters(network) == sum(expected_parameters(in_channels, num_regions, widths).values())


def test_frozen_parameters_are_not_counted() -> None:
    network = make_network()
    network.head.requires_grad_(False)
    assert count_parameters(network) == sum(expected_parameters(3, 1, NARROW).values()) - 5


def test_first_prediction_is_that_tumour_is_rare() -> None:
    network = make_network(num_regions=2).eval()
    with torch.no_grad():
        probability = torch.sigmoid(network(draw(2, 3, 32, 32)))
    assert probability.mean().item() == pytest.approx(0.05, abs=0.02)


def test_convolutions_start_with_he_variance() -> None:
    weight = make_network(widths=(4, 8, 64)).encoder[2].convolutions[0].weight
    assert weight.shape == (64, 8, 3, 3)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)  # over the outputs


# ------------------------------------------------------------------------------------------------------------
# Ablations
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_takes_its_own_parameters_and_no_others(switch: str) -> None:
    whole, ablated = make_network(), make_network(**{switch: False})
    parts = expected_parameters(3, 1, NARROW)
    assert count_parameters(whole) - count_parameters(ablated) == parts[switch]
    place = {"use_se": ".se.", "use_attention": ".gate.", "dilated": "nothing", "residual": ".shortcut."}
    kept = {name: shape for name, shape in shapes_of(whole).items() if place[switch] not in name}
    assert shapes_of(ablated) == kept


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_output_and_the_network_still_trains(switch: str) -> None:
    whole, ablated = make_network(), make_network(**{switch: False})
    ablated.load_state_dict(whole.state_dict(), strict=False)  # all the weights both have
    slab = draw(2, 3, 32, 32)
    with torch.no_grad():
        difference = (whole.eval()(slab) - ablated.eval()(slab)).abs().max().item()
    assert difference > 1e-4
    ablated.train()(slab).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in ablated.parameters())


def test_all_switches_off_leave_a_plain_unet() -> None:
    network = make_network(**dict.fromkeys(SWITCHES, False))
    assert count_parameters(network) == expected_parameters(3, 1, NARROW)["plain"]
    kinds = {type(module) for module in network.modules()}
    assert not kinds & {SqueezeExcitation, AttentionGate}
    assert network(draw(2, 3, 8, 8)).shape == (2, 1, 8, 8)


RUN = {"modalities": ["flair", "t1"], "regions": ["WT", "TC", "ET"], "context": 2, "widths": list(NARROW)}


def test_the_network_of_a_runs_settings() -> None:
    # a run that says nothing of the switches has them all on
    network = build_network(RUN | {"data_dir": "data", "epochs": 3})
    whole = make_network(in_channels=2 * 5, num_regions=3)
    assert shapes_of(network) == shapes_of(whole)
    assert network.in_channels == 10
    assert network.encoder[0].convolutions[3].dilation == (2, 2)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_runs_settings_switch_one_part_off(switch: str) -> None:
    network = build_network(RUN | dict.fromkeys(SWITCHES, True) | {switch: False})
    ablated = make_network(in_channels=10, num_regions=3, **{switch: False})
    assert shapes_of(network) == shapes_of(ablated)
    dilation = 1 if switch == "dilated" else 2
    assert network.encoder[0].convolutions[3].dilation == (dilation, dilation)


@pytest.mark.parametrize("compress", [None, False, True])
def test_a_runs_settings_say_whether_slabs_are_compressed(compress: bool | None) -> None:
    network = build_network(RUN if compress is None else RUN | {"compress": compress})
    assert network.compress is bool(compress)


def test_compressing_by_hand() -> None:
    # above 1 a step of 1 becomes one of 0.35
    slab = torch.tensor([-4.0, 0.0, 1.0, 2.0, 5.0, 8.0])
    torch.testing.assert_close(compress_bright(slab), torch.tensor([-4.0, 0.0, 1.0, 1.35, 2.4, 3.45]))


def test_a_network_that_compresses_is_the_plain_one_on_compressed_slabs() -> None:
    slab = 3 * draw(2, 3, 32, 32)
    with torch.no_grad():
        # over the slab: the head is found before, not after
        compressing = make_network(compress=True, se_form="slab").eval()(slab)
        plain = make_network(se_form="slab").eval()
        torch.testing.assert_close(compressing, plain(compress_bright(slab)))
        assert not torch.allclose(compressing, plain(slab))


def test_compressing_leaves_the_head_where_it_is() -> None:
    slab = 3 * draw(2, 3, 32, 32)
    slab[:, :, :8] = -4
    with torch.no_grad():
        network = make_network(compress=True, se_form="head").eval()
        seen = []
        network.encoder[0].se.register_forward_hook(lambda *hook: seen.append(hook[1][1]))
        network(slab)
    torch.testing.assert_close(seen[0], find_head(slab))


def reach_in_pixels(block: nn.Module, channels: int) -> tuple[list[int], list[int]]:
    """Return the offsets in H and in W of the input pixels that one output pixel's gradient reaches."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)  # positive throughout: no ReLU cuts a path
    slab = torch.ones(1, channels, 31, 31, requires_grad=True)
    block.eval()(slab)[0, :, 15, 15].sum().backward()
    rows, columns = (slab.grad[0].abs().sum(0) > 0).nonzero(as_tuple=True)
    return sorted({int(r) - 15 for r in rows}), sorted({int(c) - 15 for c in columns})


@pytest.mark.parametrize(("dilated", "radius"), [(True, 3), (False, 2)])
def test_receptive_field_of_an_encoder_block(dilated: bool, radius: int) -> None:
    # two 3 x 3 convolutions: 1 + 1 pixels to each side, 1 + 2 where the second is dilated; no gaps
    network = make_network(use_se=False, dilated=dilated)
    for level, channels in zip(network.encoder, (3, *NARROW), strict=False):
        rows, columns = reach_in_pixels(level, channels)
        assert rows == columns == list(range(-radius, radius + 1))


@pytest.mark.parametrize("dilated", [True, False])
def test_decoder_is_never_dilated(dilated: bool) -> None:
    network = make_network(use_se=False, dilated=dilated)
    for level, channels in zip(network.decoder, NARROW[-2::-1], strict=True):
        assert reach_in_pixels(level.refine, channels) == ([-1, 0, 1], [-1, 0, 1])


def test_with_global_pooling_in_se_the_field_is_the_whole_slab() -> None:
    rows, columns = reach_in_pixels(make_network(dilated=False).encoder[0], 3)
    assert rows == columns == list(range(-15, 16))


@pytest.mark.parametrize("residual", [True, False])
def test_residual_blocks_pass_their_input_on_where_the_convolutions_are_silent(residual: bool) -> None:
    block = ResidualBlock(6, 6, (1, 2), use_se=True, residual=residual).eval()
    for module in block.convolutions:
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    x = draw(2, 6, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.relu(x) if residual else torch.zeros_like(x))


def test_residual_block_leaves_its_input_as_it_was() -> None:
    # its last ReLU works in place, and the input is also a skip
    x = draw(2, 6, 5, 5)
    before = x.clone()
    ResidualBlock(6, 6, (1,), use_se=False, residual=True)(x)
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------------------
# Squeeze-and-excitation, attention gates
# ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.1, 1.0, 30.0]))
def test_se_scales_each_channel_by_one_weight_in_0_to_1(channels: int, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    x = size * (draw(2, channels, 4, 6, seed=seed).abs() + 0.1)
    with torch.no_grad():
        ratio = SqueezeExcitation(channels)(x)
    assert (ratio >= 0).all()
    assert (ratio <= 1).all()
    assert ratio.shape == (2, channels, 1, 1)


def test_se_by_hand() -> None:
    # means (1, 3); squeeze adds them: 4; excite: weight sigmoid(-4 + 4) = 1/2 and sigmoid(4 - 2)
    se = SqueezeExcitation(2)
    for parameter in se.parameters():
        nn.init.zeros_(parameter)
    se.squeeze.weight.data[0] = 1
    se.excite.weight.data[:, 0, 0, 0] = torch.tensor([-1.0, 1.0])
    se.excite.bias.data = torch.tensor([4.0, -2.0])
    x = torch.tensor([[[[0.0, 2.0]], [[2.0, 4.0]]]])
    second = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(se(x), torch.tensor([[[[0.5]], [[second]]]]))


def test_the_head_is_what_is_brighter_than_air_by_a_tenth_of_the_range() -> None:
    slab = torch.full((2, 2, 4, 4), -3.0)
    slab[0, :, 1:3, 1:3] = 1.0  # brightest
    slab[0, :, 0, 0] = -2.7  # 0.3 of 4 above air: noise
    slab[0, :, 0, 1] = -2.5  # 0.5 of 4 above air
    expected = torch.zeros(2, 1, 4, 4)  # the second slab is constant
    expected[0, 0, 1:3, 1:3] = 1
    expected[0, 0, 0, 1] = 1
    torch.testing.assert_close(find_head(slab), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_mean_over_the_head_is_a_weighted_mean(layout: torch.memory_format) -> None:
    x = draw(3, 5, 4, 6).to(memory_format=layout)
    head = torch.rand(3, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    head[2] = 0
    by_hand = np.zeros((3, 5, 1, 1))
    for slab, channel in np.ndindex(2, 5):
        by_hand[slab, channel] = np.average(x[slab, channel], weights=head[slab, 0])
    np.testing.assert_allclose(head_mean(x, head).numpy(), by_hand, atol=1e-6)


def test_se_over_the_head_does_not_see_how_much_air_there_is() -> None:
    slab = torch.full((1, 3, 32, 32), -3.0)
    slab[:, :, 8:24, 8:24] = draw(1, 3, 16, 16) + 1
    wide = torch.nn.functional.pad(slab, (32, 32, 32, 32), value=-3.0)
    changes = {}
    for form in ("slab", "head"):
        network = make_network(se_form=form)
        for module in network.modules():
            if isinstance(module, SqueezeExcitation):
                nn.init.constant_(module.squeeze.bias, 1.0)  # so that no unit is dead
        weights: dict[str, list[Tensor]] = {"narrow": [], "wide": []}
        first = network.eval().encoder[0].se
        with torch.no_grad():
            for name, each in (("narrow", slab), ("wide", wide)):
                first.register_forward_hook(lambda *hook, to=weights[name]: to.append(hook[2]))
                network(each)
                first._forward_hooks.clear()
        changes[form] = float((weights["wide"][0] - weights["narrow"][0]).abs().max())
    assert changes["head"] < 1e-6 < 1e-3 < changes["slab"]


def test_se_over_the_head_trains_the_same_with_checkpointing_and_on_constant_slabs() -> None:
    slab = draw(2, 3, 32, 32)
    slab[1] = 0.5
    gradients = []
    for checkpointing in (False, True):
        network = make_network(se_form="head")
        network.checkpointing = checkpointing
        network(slab).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        assert all(torch.isfinite(gradient).all() for gradient in gradients[-1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000), st.sampled_from([0.1, 1.0, 30.0]))
def test_gate_weighs_each_pixel_by_0_to_1(channels: int, below_channels: int, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    skip = size * (draw(2, channels, 8, 6, seed=seed).abs() + 0.1)
    below = size * draw(2, below_channels, 4, 3, seed=seed + 1)
    with torch.no_grad():
        weight = AttentionGate(channels, below_channels)(skip, below)
    assert weight.shape == (2, 1, 8, 6)
    assert (weight >= 0).all()
    assert (weight <= 1).all()


def test_gate_judges_by_skip_and_by_below() -> None:
    torch.manual_seed(0)
    gate = AttentionGate(4, 8)
    skip, below = draw(1, 4, 8, 8), draw(1, 8, 4, 4)
    other_skip, other_below = skip.clone(), below.clone()
    other_skip[:, :, 0, 0] += 3
    other_below[:, :, 3, 3] += 3
    with torch.no_grad():
        gated = gate(skip, below)
        # each is told from elsewhere than the changed pixel itself: through the weight
        assert not torch.equal(gate(other_skip, below)[..., 1, 1], gated[..., 1, 1])
        assert not torch.equal(gate(skip, other_below)[..., 7, 7], gated[..., 7, 7])
        # and the judgement is local
        assert torch.equal(gate(other_skip, below)[..., 7, 7], gated[..., 7, 7])


def test_gate_without_opinion_says_one_half() -> None:
    gate = AttentionGate(4, 8)
    nn.init.zeros_(gate.judge.weight)
    nn.init.zeros_(gate.judge.bias)
    skip = draw(1, 4, 8, 8)
    torch.testing.assert_close(gate(skip, draw(1, 8, 4, 4)), torch.full((1, 1, 8, 8), 0.5))


@pytest.mark.parametrize("use_attention", [True, False])
def test_decoder_join_is_the_convolution_of_the_concatenated_maps(use_attention: bool) -> None:
    torch.manual_seed(0)
    level = DecoderLevel(8, 4, use_attention, use_se=True, residual=True).eval()
    below, skip = draw(2, 8, 6, 5), draw(2, 4, 12, 10)
    with torch.no_grad():
        gated = skip * level.gate(skip, below) if use_attention else skip
        up = nn.functional.interpolate(below, scale_factor=2.0, mode="bilinear")
        weight = torch.cat((level.from_below.weight, level.from_skip.weight), 1)
        joined = nn.functional.conv2d(torch.cat((up, gated), 1), weight)
        torch.testing.assert_close(level(below, skip), level.refine(torch.relu(level.norm(joined))))


# ------------------------------------------------------------------------------------------------------------
# Forward and backward
# ------------------------------------------------------------------------------------------------------------


def test_a_slab_is_judged_alone_in_eval_mode() -> None:
    network = make_network()
    with torch.no_grad():
        network(draw(4, 3, 32, 32, seed=9))  # running statistics other than 0 and 1
        network.eval()
        slabs = 3 * draw(5, 3, 32, 32)
        together = network(slabs)
        for index in range(5):
            torch.testing.assert_close(network(slabs[[index]])[0], together[index], rtol=1e-4, atol=1e-5)
        assert (together[0] - together[1]).abs().max() > 1e-3  # slabs that all look alike would prove nothing


def test_forward_leaves_the_slab_as_it_was() -> None:
    slab = draw(2, 3, 16, 16)
    before = slab.clone()
    make_network()(slab)
    assert torch.equal(slab, before)


@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_gradient_reaches_every_parameter_and_every_input_channel(switch: str | None) -> None:
    network = make_network(num_regions=2, **({switch: False} if switch else {})).train()
    slab = draw(4, 3, 32, 32).requires_grad_()
    network(slab).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert slab.grad.abs().sum((0, 2, 3)).min() > 0


def test_gradient_reaches_the_encoder_through_the_skips() -> None:
    network = make_network(use_attention=False)
    nn.init.zeros_(network.decoder[-1].from_below.weight)  # nothing comes up from below
    network(draw(2, 3, 16, 16)).square().mean().backward()
    assert network.encoder[0].convolutions[0].weight.grad.any()
    assert not network.encoder[1].convolutions[0].weight.grad.any()


def test_regions_have_maps_of_their_own() -> None:
    network = make_network(num_regions=3).eval()
    with torch.no_grad():
        logits = network(draw(1, 3, 32, 32))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (logits[:, first] - logits[:, second]).abs().max() > 1e-4


def test_a_network_that_is_ready_rectifies_within_its_convolutions_and_gives_the_same_numbers() -> None:
    network = make_network()
    network(draw(2, 3, 32, 32))  # so that batch norm is not the identity
    slab = draw(2, 3, 32, 32, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        ready = prepare_network(network, torch.device("cpu"), dtype)
        # the first convolution of each encoder block; a decoder block has one, whose ReLU follows the sum
        assert sum(isinstance(module, RectifiedConv) for module in ready.modules()) == len(NARROW)
        folded = fold_batch_norm(network).to(dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            one, other = (each(slab.to(dtype)) for each in (ready, folded))
        torch.testing.assert_close(one, other)
    assert not any(isinstance(module, RectifiedConv) for module in fold_batch_norm(network).modules())


def test_a_training_step_compiles_without_a_break() -> None:
    network, slab = make_network(widths=(4, 8)), draw(2, 3, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (network, compiled):
        forward(slab).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        network.zero_grad()
    for plain, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("widths", [NARROW, (32, 48)])
def test_every_gradient_of_a_map_is_channels_last(widths: Sequence[int]) -> None:
    # one that is not makes the sums it goes into many times slower
    network = make_network(widths=widths).to(memory_format=torch.channels_last).train()
    slab = draw(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    found = []

    def watch(function: torch.autograd.graph.Node) -> None:
        for node, _ in function.next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                node.register_hook(lambda made, _: found.extend(g for g in made if g is not None))
                watch(node)

    nodes: set[torch.autograd.graph.Node] = set()
    loss = network(slab).square().mean()
    watch(loss.grad_fn)
    loss.backward()
    maps = [g for g in found if g.ndim == 4 and min(g.shape) > 1]
    assert len(maps) > 30
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in maps)


def test_channels_last_and_bfloat16_autocast_give_the_same_logits() -> None:
    network, slab = make_network().eval(), draw(2, 3, 32, 32)
    with torch.no_grad():
        logits = network(slab)
        last = network.to(memory_format=torch.channels_last)(slab.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(slab)
    torch.testing.assert_close(rounded.float(), logits, rtol=0.05, atol=0.05)


def test_network_learns_to_mark_bright_squares() -> None:
    network = make_network(in_channels=1).train()
    slab = 0.1 * draw(4, 1, 16, 16)
    target = torch.zeros(4, 1, 16, 16)
    for index in range(4):
        target[index, 0, 2 + index : 8 + index, 3 : 9 + index] = 1
    slab = slab + target
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(30):
        loss = nn.functional.binary_cross_entropy_with_logits(network(slab), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1  # 0.45 is what guessing the share of tumour would reach


# ------------------------------------------------------------------------------------------------------------
# Checkpointing
# ------------------------------------------------------------------------------------------------------------


def test_checkpointing_changes_memory_alone() -> None:
    slab = draw(3, 3, 32, 32)
    results = []
    for checkpointing in (False, True):
        network = make_network().train()
        network.checkpointing = checkpointing
        for _ in range(2):  # twice: statistics counted twice would show in the second step
            logits = network(slab)
            logits.square().mean().backward()
        results.append((logits, [p.grad for p in network.parameters()], network.state_dict()))
    (plain, plain_gradients, plain_state), (logits, gradients, state) = results
    assert torch.equal(logits, plain)
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, expected)
    assert int(state["encoder.0.convolutions.1.num_batches_tracked"]) == 2
    assert all(torch.equal(value, plain_state[name]) for name, value in state.items())


def test_checkpointing_keeps_the_levels_outputs_alone() -> None:
    network = make_network(se_form="slab")  # which keeps no shares of the head
    plain = measure_activation_bytes(network, (2, 3, 64, 64))
    network.checkpointing = True
    # the slab in float32; each level's output in 16 bits, the first of 4 channels in full size, and the last
    # again, as the head's input; then weights: the head's
    maps = 2 * (4 * 64 * 64 + 8 * 32 * 32 + 16 * 16 * 16 + 8 * 32 * 32 + 4 * 64 * 64)
    assert measure_activation_bytes(network, (2, 3, 64, 64)) == 2 * maps + 4 * 2 * 3 * 64 * 64 + 2 * 4
    assert measure_activation_bytes(network, (2, 3, 64, 64)) < plain / 3


# ------------------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------------------


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "model_drunet_v2.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_command_prints_size_and_cost() -> None:
    done = run_script("--widths", "4", "8", "16", "--size", "32", "--num-regions", "2", "--no-use-se")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    network = make_network(num_regions=2, use_se=False)
    assert "widths 4-8-16" in done.stdout.splitlines()[0]
    assert lines["parameters"] == f"{count_parameters(network) / 1e6:.2f} million"
    assert "(N, 2, 32, 32)" in lines["output"]


def test_command_ends_a_bad_size_with_one_sentence() -> None:
    done = run_script("--widths", "4", "8", "16", "--size", "33")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "--size" in line
    assert "(33, 33)" in line


def show(config: ModelConfig) -> None:
    """Do what the command does with its settings."""
    check_settings(config)
    main(config)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "bad",
    [
        {"size": 34},
        {"size": 0},
        {"size": -32},
        {"in_channels": 0},
        {"in_channels": -1},
        {"num_regions": 0},
        {"num_regions": -1},
        {"widths": (4,)},
        {"widths": (4, 0)},
    ],
)
def test_settings_that_make_no_network_are_input_errors(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        show(ModelConfig(**{"widths": NARROW, "size": 32, **bad}))


def test_report_scales_flops_and_activations(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "drunet")
    main(ModelConfig(widths=(8, 16), size=64))
    lines = dict(line.split(maxsplit=1) for line in caplog.messages[1:])
    network = make_network(widths=(8, 16))
    flops = count_flops(network, (1, 3, 64, 64))
    gib = estimate_activation_bytes(network, (16, 3, 64, 64)) / 2**30
    assert lines["forward"] == f"pass         {flops / 1e9:.1f} GFLOP per slab (a multiply-add is 2)"
    assert lines["saved"].startswith(f"activations    {gib:.2f} GiB")
