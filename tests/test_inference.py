"""From a network and a volume to probabilities and masks: views, slices without brain, grids, thresholds."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases_v2 import find_cases
from dataset_balance_v2 import split_cases
from inference_v2 import (
    VIEWS,
    InferenceConfig,
    TrainedModel,
    build_network,
    choose_inputs,
    load_model,
    predict_views,
    predict_volume,
    threshold_regions,
)
from utils_v2 import THRESHOLDS, save_checkpoint, write_json

CPU = torch.device("cpu")


class Pointwise(nn.Module):
    """Logits of each region from one channel of the slab, pixel by pixel, plus a fixed (H, W) map."""

    def __init__(self, channels: Sequence[int] = (1,), added: np.ndarray | float = 0.0) -> None:
        super().__init__()
        self.channels = list(channels)
        self.added = torch.as_tensor(added, dtype=torch.float32)
        self.slabs_seen = 0
        self.batch_sizes: list[int] = []

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits and take note of the call."""
        self.slabs_seen += len(slab)
        self.batch_sizes.append(len(slab))
        return slab[:, self.channels] + self.added


def model_of(
    network: nn.Module, size: int, context: int = 1, regions: Sequence[str] = ("WT",)
) -> TrainedModel:
    return TrainedModel(
        network=network,
        modalities=("flair",),
        regions=tuple(regions),
        context=context,
        size=size,
        thresholds=(0.5,) * len(regions),
        device=CPU,
        dtype=None,
        checkpoint={},
    )


def make_volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-3, 3, shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


# ------------------------------------------------------------------------------------------------------------
# Views
# ------------------------------------------------------------------------------------------------------------


def test_every_view_of_a_network_without_place_or_direction_is_the_same():
    volume = make_volume(1, 5, 16, 16)
    views = predict_views(model_of(Pointwise(), 16), volume)
    assert views.shape == (3, 1, 5, 16, 16)
    assert views.dtype == np.float32
    assert (views[1] == views[0]).all()
    assert (views[2] == views[0]).all()
    np.testing.assert_allclose(views[0, 0], sigmoid(volume[0]), atol=1e-6)


def test_views_are_identity_left_right_and_up_down():
    # The network's map marks its own upper left corner; each view shows where that was in the volume.
    added = np.zeros((16, 16))
    added[0, 0] = 100.0
    views = predict_views(model_of(Pointwise(added=added), 16), np.full((1, 1, 16, 16), -50, np.float32))
    marked = {
        view: np.argwhere(probability[0, 0] > 0.5).tolist()
        for view, probability in zip(VIEWS, views, strict=True)
    }
    assert marked == {"identity": [[0, 0]], "horizontal": [[0, 15]], "vertical": [[15, 0]]}


@pytest.mark.parametrize("axis", ["height", "width"])
def test_the_mean_over_views_by_hand_for_a_network_that_knows_its_place(axis):
    # logit = intensity + ramp. Flipped to the network and back, a pixel meets the ramp's mirror image along
    # the flipped axis and the ramp itself along the other.
    ramp = np.linspace(-2, 2, 16)[:, None] if axis == "height" else np.linspace(-2, 2, 16)
    volume = make_volume(1, 4, 16, 16)
    there, mirrored = sigmoid(volume[0] + ramp), sigmoid(volume[0] - ramp)  # the ramp is odd about its middle
    model = model_of(Pointwise(added=ramp), 16)
    np.testing.assert_allclose(predict_volume(model, volume)[0], (2 * there + mirrored) / 3, atol=1e-6)
    np.testing.assert_allclose(predict_volume(model, volume, tta=False)[0], there, atol=1e-6)


def test_the_mean_is_of_probabilities_not_of_logits():
    ramp = np.linspace(-9, 9, 16)
    model = model_of(Pointwise(added=ramp), 16)
    first_column = predict_volume(model, np.zeros((1, 1, 16, 16), np.float32))[0, 0, :, 0]
    np.testing.assert_allclose(
        first_column, (2 * sigmoid(np.array(-9)) + sigmoid(np.array(9))) / 3, atol=1e-6
    )


def test_chosen_views_come_in_the_order_asked_for():
    volume = make_volume(1, 2, 16, 16)
    model = model_of(Pointwise(added=np.arange(256.0).reshape(16, 16) / 64), 16)
    every = predict_views(model, volume)
    assert (predict_views(model, volume, views=("vertical", "identity")) == every[[2, 0]]).all()


def test_a_volume_without_tta_is_one_pass():
    network = Pointwise()
    volume = make_volume(1, 5, 16, 16)
    plain = predict_volume(model_of(network, 16), volume, tta=False)
    assert network.slabs_seen == 5
    assert (plain == predict_views(model_of(Pointwise(), 16), volume)[0]).all()
    predict_volume(model_of(network, 16), volume)
    assert network.slabs_seen == 5 + 15


# ------------------------------------------------------------------------------------------------------------
# Slabs, slices without brain, batches
# ------------------------------------------------------------------------------------------------------------


def test_regions_and_slab_channels_keep_their_places():
    # 2 modalities, 5 slices each: channel 2 is the middle slice of the first, 8 the one above of the second.
    volume = make_volume(2, 6, 16, 16)
    model = model_of(Pointwise((2, 8)), 16, context=2, regions=("WT", "TC"))
    probabilities = predict_volume(model, volume)
    assert probabilities.shape == (2, 6, 16, 16)
    np.testing.assert_allclose(probabilities[0], sigmoid(volume[0]), atol=1e-6)
    above = volume[1][[1, 2, 3, 4, 5, 5]]
    np.testing.assert_allclose(probabilities[1], sigmoid(above), atol=1e-6)


def test_slices_with_fewer_than_64_brain_voxels_are_not_run_and_get_zero():
    network = Pointwise()
    volume = make_volume(1, 6, 16, 16)
    probabilities = predict_volume(model_of(network, 16), volume, (0, 63, 64, 200, 63, 0), batch_size=7)
    assert network.batch_sizes == [2 * len(VIEWS)]  # empty slices fill no batch; views share one
    assert not probabilities[:, [0, 1, 4, 5]].any()
    # A slice that is run still sees its true neighbours, with brain or not.
    np.testing.assert_allclose(probabilities[0, 2:4], sigmoid(volume[0, 2:4]), atol=1e-6)
    above = predict_volume(model_of(Pointwise((2,)), 16), volume, (0, 63, 64, 200, 63, 0))
    np.testing.assert_allclose(above[0, 3], sigmoid(volume[0, 4]), atol=1e-6)


def test_a_volume_without_brain_is_not_run_at_all():
    network = Pointwise()
    assert not predict_volume(model_of(network, 16), make_volume(1, 3, 16, 16), (0, 0, 0)).any()
    assert network.slabs_seen == 0


def test_without_brain_counts_every_slice_is_run():
    network = Pointwise()
    assert predict_volume(model_of(network, 16), make_volume(1, 3, 16, 16), None, tta=False).all()
    assert network.slabs_seen == 3


def trained_network(seed: int = 0, regions: int = 1) -> nn.Module:
    """Return a small DRUNetV2 whose probabilities spread over 0..1, unlike those of a fresh one."""
    torch.manual_seed(seed)
    network = build_network(1, regions, 1, (4, 8)).eval()
    with torch.no_grad():
        network.head.weight.mul_(100)
        network.head.bias.zero_()
    return network


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_size_does_not_change_the_result(batch_size):
    volume = make_volume(1, 7, 24, 20)
    model = model_of(trained_network(), 32)
    expected = predict_volume(model, volume, batch_size=3)
    assert expected.min() < 0.2
    assert expected.max() > 0.8
    np.testing.assert_allclose(predict_volume(model, volume, batch_size=batch_size), expected, atol=1e-5)


def test_prediction_leaves_the_volume_and_the_network_as_they_were():
    volume = make_volume(1, 3, 20, 20)
    before = volume.copy()
    model = model_of(trained_network(), 32)
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    first = predict_volume(model, volume)
    assert (volume == before).all()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.network.state_dict().items())
    assert (predict_volume(model, volume) == first).all()


def test_half_precision_volumes_of_the_cache_are_taken_as_they_are():
    volume = make_volume(1, 3, 20, 20).astype(np.float16)
    model = model_of(trained_network(), 32)
    assert (predict_volume(model, volume) == predict_volume(model, volume.astype(np.float32))).all()


# ------------------------------------------------------------------------------------------------------------
# Native grid
# ------------------------------------------------------------------------------------------------------------


@given(height=st.integers(1, 32), width=st.integers(1, 32))
def test_padding_is_undone_exactly(height, width):
    volume = make_volume(1, 2, height, width)
    probabilities = predict_volume(model_of(Pointwise(), 32), volume)
    assert probabilities.shape == volume.shape
    np.testing.assert_allclose(probabilities[0], sigmoid(volume[0]), atol=1e-6)


def test_a_ramp_is_met_where_padding_puts_the_slice():
    # 10 columns in 16: three before, three behind.
    ramp = np.linspace(-2, 2, 16)
    volume = make_volume(1, 2, 16, 10)
    plain = predict_volume(model_of(Pointwise(added=ramp), 16), volume, tta=False)
    np.testing.assert_allclose(plain[0], sigmoid(volume[0] + ramp[3:13]), atol=1e-6)


def test_what_a_crop_cuts_off_has_probability_zero():
    volume = make_volume(1, 2, 36, 20)
    probabilities = predict_volume(model_of(Pointwise(), 32), volume)[0]
    assert not probabilities[:, :2].any()
    assert not probabilities[:, 34:].any()
    np.testing.assert_allclose(probabilities[:, 2:34], sigmoid(volume[0, :, 2:34]), atol=1e-6)


@pytest.mark.parametrize("shape", [(80, 60), (50, 90)])
def test_large_slices_come_back_on_their_own_grid(shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = (3 * np.sin(y / 9) * np.cos(x / 11)).astype(np.float32)
    volume = np.stack([smooth, -smooth])[None]
    probabilities = predict_volume(model_of(Pointwise(), 32), volume)
    assert probabilities.shape == (1, 2, *shape)
    assert np.abs(probabilities[0] - sigmoid(volume[0])).mean() < 0.02
    assert ((probabilities[0] > 0.5) == (volume[0] > 0)).mean() > 0.97


# ------------------------------------------------------------------------------------------------------------
# Thresholds
# ------------------------------------------------------------------------------------------------------------


def test_thresholds_and_nesting_by_hand():
    probabilities = np.array(
        [
            [0.9, 0.9, 0.9, 0.1, 0.4],  # WT
            [0.9, 0.1, 0.9, 0.9, 0.9],  # TC
            [0.9, 0.9, 0.1, 0.9, 0.9],  # ET
        ],
        np.float32,
    ).reshape(3, 1, 1, 5)
    masks = threshold_regions(probabilities, (0.5, 0.5, 0.5), ("WT", "TC", "ET"))
    assert masks.dtype == np.bool_
    assert masks[:, 0, 0].tolist() == [
        [True, True, True, False, False],
        [True, False, True, False, False],
        [True, False, False, False, False],  # the second: outside TC, so no ET though 0.9
    ]
    lower = threshold_regions(probabilities, (0.3, 0.5, 0.95), ("WT", "TC", "ET"))
    assert lower[:, 0, 0, 4].tolist() == [True, True, False]


@given(
    seed=st.integers(0, 1000),
    regions=st.lists(st.sampled_from(["WT", "TC", "ET"]), min_size=1, max_size=3, unique=True),
)
def test_masks_are_nested_in_any_order_of_the_regions(seed, regions):
    probabilities = np.random.default_rng(seed).random((len(regions), 2, 3, 3), np.float32)
    thresholds = np.random.default_rng(seed + 1).uniform(0.2, 0.8, len(regions))
    masks = dict(zip(regions, threshold_regions(probabilities, thresholds, regions), strict=True))
    above = {name: probabilities[i] >= thresholds[i] for i, name in enumerate(regions)}
    for name, around in (("WT", ()), ("TC", ("WT",)), ("ET", ("WT", "TC"))):
        if name in regions:
            expected = np.logical_and.reduce(
                [above[name], *(above[other] for other in around if other in regions)]
            )
            assert (masks[name] == expected).all()


@pytest.mark.parametrize("threshold", THRESHOLDS.tolist())
def test_a_probability_equal_to_the_threshold_is_tumour(threshold):
    # Probabilities are float32; the sweep on validation compares in float32, and so must the use.
    at = np.full((1, 1, 1, 1), threshold, np.float32)
    assert threshold_regions(at, [threshold], ("WT",)).all()
    assert not threshold_regions(np.nextafter(at, np.float32(0)), [threshold], ("WT",)).any()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_checkpoint(tmp_path) -> Callable[..., Path]:
    """Function that writes the checkpoint of a small trained network, its config altered by keywords."""

    def write(**changes: object) -> Path:
        config = {
            "data_dir": "data",
            "modalities": ("flair",),
            "regions": ("WT",),
            "context": 1,
            "size": 32,
            "widths": (4, 8),
        }
        content = {
            "model": trained_network().state_dict(),
            "config": config | changes,
            "thresholds": [0.35],
            "data_kind": "phantom",
        }
        save_checkpoint(tmp_path / "run" / "best.pt", content)
        return tmp_path / "run" / "best.pt"

    return write


def test_a_checkpoint_gives_back_the_network_and_its_settings(write_checkpoint):
    model = load_model(write_checkpoint(), CPU, amp=False)
    assert (model.modalities, model.regions, model.context, model.size) == (("flair",), ("WT",), 1, 32)
    assert model.thresholds == (0.35,)
    assert (model.device, model.dtype) == (CPU, None)
    assert not model.network.training
    volume = make_volume(1, 4, 20, 20)
    expected = predict_volume(model_of(trained_network(), 32), volume)
    np.testing.assert_allclose(predict_volume(model, volume), expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{"widths": (4, 16)}, {"widths": (4, 8, 16)}, {"context": 2}])
def test_weights_that_do_not_fit_the_settings_are_an_input_error(write_checkpoint, input_error, changes):
    path = write_checkpoint(**changes)
    with input_error(path, "-".join(map(str, changes.get("widths", (4, 8))))):
        load_model(path, CPU)


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path, input_error):
    with input_error(tmp_path / "best.pt"):
        load_model(tmp_path / "best.pt", CPU)


def test_a_bfloat16_run_is_close_to_float32(write_checkpoint):
    full = load_model(write_checkpoint(), CPU, amp=False)
    half = dataclasses.replace(full, dtype=torch.bfloat16)
    volume = make_volume(1, 4, 30, 30)
    expected, found = predict_volume(full, volume), predict_volume(half, volume)
    assert found.dtype == np.float32
    difference = np.abs(found - expected)
    assert 0 < difference.max() < 0.05
    assert difference.mean() < 0.005


# ------------------------------------------------------------------------------------------------------------
# What the command segments
# ------------------------------------------------------------------------------------------------------------


def test_inputs_may_be_a_cohort_a_case_or_a_file(phantom_cohort):
    model = model_of(Pointwise(), 32)
    folder = phantom_cohort / "BraTS2021_90003"
    file = phantom_cohort / "BraTS2021_90005" / "BraTS2021_90005_flair.nii.gz"
    config = InferenceConfig(input=(str(folder), str(file)))
    chosen = choose_inputs(config, model, Path("best.pt"))
    assert [case.case_id for case in chosen] == ["BraTS2021_90003", "BraTS2021_90005"]
    cohort = choose_inputs(InferenceConfig(input=(str(phantom_cohort),)), model, Path("best.pt"))
    assert [case.case_id for case in cohort] == [f"BraTS2021_{90000 + number}" for number in range(8)]


def test_without_input_the_held_out_test_cases_are_segmented(phantom_cohort, tmp_path, capsys):
    split = split_cases(find_cases(phantom_cohort), 0)
    write_json(tmp_path / "split.json", split)
    checkpoint = {"config": {"data_dir": str(phantom_cohort)}}
    model = dataclasses.replace(model_of(Pointwise(), 32), checkpoint=checkpoint)
    chosen = choose_inputs(InferenceConfig(), model, tmp_path / "best.pt")
    assert [case.case_id for case in chosen] == split["test"]
    assert str(phantom_cohort) in capsys.readouterr().out


def test_two_inputs_of_one_case_id_are_an_error(tmp_path, write_nifti, input_error):
    # Their masks would be written to one file, the second over the first.
    volume = np.zeros((4, 4, 4), np.int16)
    first = write_nifti(tmp_path / "a" / "x_flair.nii.gz", volume)
    second = write_nifti(tmp_path / "b" / "x_flair.nii.gz", volume)
    model = model_of(Pointwise(), 32)
    for inputs in ((first, second), (first.parent, second.parent)):
        with input_error("x"):
            choose_inputs(InferenceConfig(input=tuple(map(str, inputs))), model, Path("best.pt"))
