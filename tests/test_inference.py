"""From a network and a volume to probabilities and masks: views, slices without brain, grids, thresholds."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from audit.inputs import choose_inputs
from audit.postprocess import threshold_regions
from cohort.layouts import CaseSource, find_cases
from cohort.preprocess import Frame
from cohort.split import split_cases
from inference_v2 import (
    VIEWS,
    InferenceConfig,
    OnnxNetwork,
    TrainedModel,
    compile_model,
    load_model,
    predict_views,
    predict_volume,
    segment_cases,
)
from model_drunet_v2 import DRUNetV2, fold_batch_norm, prepare_network
from runtime.checkpoints import save_checkpoint
from runtime.command import check_settings
from runtime.errors import InputError
from runtime.files import write_json
from runtime.threads import read_ahead, write_behind
from utils_v2 import THRESHOLDS

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


def trained_network(seed: int = 0, regions: int = 1, **switches: bool) -> nn.Module:
    """Return a small DRUNetV2 whose probabilities spread over 0..1, unlike those of a fresh one."""
    torch.manual_seed(seed)
    network = DRUNetV2(3, regions, (4, 8), **switches).eval()
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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_views_in_one_forward_pass_equal_views_one_by_one(batch_size):
    volume = make_volume(1, 5, 24, 20)
    model = model_of(trained_network(), 32)
    one_by_one = np.concatenate([predict_views(model, volume, views=(view,)) for view in VIEWS])
    np.testing.assert_allclose(predict_views(model, volume, batch_size=batch_size), one_by_one, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_no_forward_pass_is_larger_than_the_batch_size(batch_size):
    network = Pointwise()
    predict_volume(model_of(network, 16), make_volume(1, 5, 16, 16), batch_size=batch_size)
    assert max(network.batch_sizes) <= batch_size
    assert network.slabs_seen == 15


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("tta", [True, False])
def test_a_compiled_network_sees_one_batch_size_alone(batch_size, tta, monkeypatch, caplog):
    caplog.set_level("INFO", "drunet")
    network = Pointwise((0,), 0.5)
    monkeypatch.setattr(torch, "compile", lambda module, **_: nn.Sequential(module))
    compiled = compile_model(model_of(network, 16), batch_size, tta)
    volume = make_volume(1, 5, 16, 16)
    found = predict_volume(compiled, volume, tta=tta, batch_size=batch_size)
    assert len(set(network.batch_sizes)) == 1
    assert max(network.batch_sizes) <= batch_size
    expected = predict_volume(model_of(network, 16), volume, tta=tta, batch_size=batch_size)
    assert (found == expected).all()
    assert "compiled" in caplog.text


def test_a_network_that_does_not_compile_is_run_as_it_is(monkeypatch, caplog):
    def no_compiler(_: nn.Module, **__: object) -> nn.Module:
        raise RuntimeError("no C++ compiler\nset CXX")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = model_of(Pointwise(), 16)
    assert compile_model(model, 16, tta=True).network is model.network
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "--compile failed (RuntimeError: no C++ compiler); going on without it"


def test_an_onnx_network_is_not_compiled(input_error):
    with input_error("--compile", "ONNX"):
        compile_model(model_of(OnnxNetwork(None), 16), 16, tta=True)


@pytest.mark.parametrize(("batch_size", "context"), [(1, 1), (6, 1), (9, 2), (64, 3)])
def test_the_mean_without_keeping_views_is_the_mean_of_the_views(batch_size, context):
    # Different slices without brain, batches that end anywhere, contexts beyond the batch and the volume.
    brain_voxels = (0, 99, 99, 0, 0, 99, 99, 99, 0, 99)
    volume = make_volume(1, 10, 30, 34)
    ramp = np.arange(1024).reshape(32, 32) / 512 - 1
    model = model_of(Pointwise((0,), ramp), 32, context)
    views = predict_views(model, volume, brain_voxels, batch_size=64)
    found = predict_volume(model, volume, brain_voxels, batch_size=batch_size)
    np.testing.assert_allclose(found, views.mean(0), atol=1e-6)
    # Channel 0 of a slab is its lowest slice, the end repeated; one row of padding above, one column cut.
    below = np.clip(np.arange(10) - context, 0, 9)
    for z in np.flatnonzero(brain_voxels):
        expected = sigmoid(volume[0, below[z], :, 1:33] + ramp[1:31])
        np.testing.assert_allclose(views[0, 0, z, :, 1:33], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Batch norm folded into the convolutions
# ------------------------------------------------------------------------------------------------------------


def network_with_statistics(parts: Sequence[bool], regions: int = 2) -> DRUNetV2:
    """Return a small network whose batch norms differ from 1 and 0 in all four of their numbers."""
    torch.manual_seed(1)
    network = DRUNetV2(3, regions, (4, 8, 16), *parts).train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_()
        for _ in range(10):
            network(2 * torch.randn(4, 3, 32, 32) + 1)
        network.head.weight.mul_(100)
    return network.eval()


PARTS = [(True,) * 4, *[tuple(part != off for part in range(4)) for off in range(4)]]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_folded_network_is_the_same_function(parts):
    network = network_with_statistics(parts)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    slabs = 2 * torch.randn(2, 3, 32, 32) + 1
    with torch.inference_mode():
        expected, found = network(slabs), folded(slabs)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_in_training_is_folded_with_its_running_statistics():
    network = network_with_statistics((True,) * 4)
    slabs = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network(slabs)
        found = fold_batch_norm(network.train())(slabs)
    assert network.training
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_weights_kept_in_bfloat16_are_as_close_to_float32_as_autocast():
    network = network_with_statistics((True,) * 4, regions=1)
    volume = make_volume(1, 4, 30, 30)
    exact = predict_volume(model_of(network, 32), volume)
    mixed = dataclasses.replace(model_of(network, 32), dtype=torch.bfloat16)
    ready = dataclasses.replace(mixed, network=prepare_network(network, CPU, torch.bfloat16))
    assert {parameter.dtype for parameter in ready.network.parameters()} == {torch.bfloat16}
    errors = [np.abs(predict_volume(model, volume) - exact).mean() for model in (mixed, ready)]
    assert 0 < errors[1] < 1.5 * errors[0]
    assert errors[1] < 0.01


# ------------------------------------------------------------------------------------------------------------
# Reading ahead, writing behind
# ------------------------------------------------------------------------------------------------------------


def test_reading_ahead_keeps_the_order_and_reads_no_further_than_asked():
    read: list[int] = []
    started = threading.Event()

    def load(item: int) -> int:
        read.append(item)
        if item == 2:
            started.set()
        return 10 * item

    results = read_ahead(range(6), load, ahead=2)
    assert next(results) == 0
    assert started.wait(10)  # item 2 is read while the caller holds item 0
    assert read == [0, 1, 2]
    assert list(results) == [10, 20, 30, 40, 50]
    assert read == list(range(6))
    assert list(read_ahead([], load)) == []


def test_an_error_of_the_reading_thread_arrives_where_its_item_would_have():
    read: list[int] = []

    def load(item: int) -> int:
        read.append(item)
        if item == 2:
            raise InputError("case 2", "cut short", "download it again")
        return item

    results = read_ahead(range(9), load)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError, match="case 2"):
        next(results)
    assert read == [0, 1, 2]


def test_writing_behind_keeps_the_order_and_holds_no_more_than_asked():
    made: list[int] = []
    go = threading.Event()

    def jobs() -> Iterator[Callable[[], int]]:
        for item in range(5):
            made.append(item)
            if item == 1:
                go.set()  # job 0, still running, ends once the next is being made
            yield lambda item=item: item if go.wait(10) else -1

    results = write_behind(jobs())
    assert next(results) == 0
    assert made == [0, 1]
    assert list(results) == [1, 2, 3, 4]


def test_an_error_of_the_writing_thread_arrives_and_one_of_the_maker_lets_it_finish():
    def fail() -> int:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(write_behind([lambda: 1, fail, lambda: 3]))

    written: list[int] = []

    def jobs() -> Iterator[Callable[[], None]]:
        yield lambda: written.append(1)
        raise InputError("case 2", "cut short")

    with pytest.raises(InputError):
        list(write_behind(jobs()))
    assert written == [1]


def test_cases_are_segmented_in_order_and_a_damaged_one_ends_nothing(phantom_cohort, tmp_path):
    cases = find_cases(CaseSource(phantom_cohort))[:4]
    model = model_of(Pointwise(), 48)
    config = InferenceConfig(output=str(tmp_path / "masks"))
    rows = [row for of_case in segment_cases(config, model, cases) for row in of_case]
    assert [row["case"] for row in rows] == [case.case_id for case in cases]
    assert all(Path(row["mask"]).is_file() for row in rows)
    damaged = tmp_path / "damaged_flair.nii.gz"
    damaged.write_bytes(cases[2].modalities["flair"][0].read_bytes()[:5000])
    broken = dataclasses.replace(cases[2], modalities={"flair": (damaged,)})
    config = InferenceConfig(output=str(tmp_path / "partly"))
    (first,), (second,), (third,), (fourth,) = segment_cases(config, model, [*cases[:2], broken, cases[3]])
    assert third["case"] == broken.case_id
    assert third["error"].startswith(f"{damaged}: truncated")
    assert [row["case"] for row in (first, second, fourth)] == [cases[index].case_id for index in (0, 1, 3)]
    assert not any(row.get("error") for row in (first, second, fourth))
    assert sorted(path.name for path in (tmp_path / "partly").glob("*.nii.gz")) == [
        f"{cases[index].case_id}_seg.nii.gz" for index in (0, 1, 3)
    ]


def test_a_batch_size_below_one_is_named(input_error):
    with input_error("--batch-size"):
        check_settings(InferenceConfig(batch_size=0))


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


def test_a_head_off_centre_is_predicted_whole():
    # 36 rows, of which 32 are kept: a crop about the middle leaves out the first two.
    volume = make_volume(1, 2, 36, 20)
    frame = Frame(((0, 20), (0, 20)))
    for probabilities in (
        predict_volume(model_of(Pointwise(), 32), volume, frame=frame)[0],
        predict_views(model_of(Pointwise(), 32), volume, frame=frame)[0, 0],
    ):
        np.testing.assert_allclose(probabilities[:, :32], sigmoid(volume[0, :, :32]), atol=1e-6)
        assert not probabilities[:, 32:].any()


class SizeAware(nn.Module):
    """Logits that are positive in blobs of one size only: the mean over a disc of 15 pixels."""

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of slabs of blobs at 1 on a ground of 0."""
        y, x = torch.meshgrid(*[torch.arange(15.0) - 7] * 2, indexing="ij")
        disc = ((x**2 + y**2 <= 49) / (x**2 + y**2 <= 49).sum()).float()
        return 40 * (nn.functional.conv2d(slab[:, 1:2], disc[None, None], padding=7) - 0.9)


@pytest.mark.parametrize("spacing_mm", [4.0, 2.0, 1.0])
def test_the_network_sees_heads_at_the_size_it_was_trained_on(spacing_mm):
    # A blob of 40 mm across has 20 pixels at 2 mm, where the disc fits in at its middle, and 10 at 4 mm,
    # where it does not. At 1 mm the network without spacings marks a larger area.
    side = round(160 / spacing_mm)
    y, x = (np.mgrid[:side, :side] + 0.5) * spacing_mm
    volume = ((y - 70) ** 2 + (x - 90) ** 2 < 20**2).astype(np.float32)[None, None]
    same = {"median": 2.0, "low": 2.0, "high": 2.0}
    model = model_of(SizeAware(), 160)
    informed = dataclasses.replace(model, checkpoint={"spacing_mm": {"in_plane": same, "slices": same}})
    frame = Frame(None, (2.0, spacing_mm, spacing_mm))
    blind, seen = (
        (predict_volume(each, volume, frame=frame) > 0.5).sum() * spacing_mm**2 for each in (model, informed)
    )
    expected = {4.0: 0, 2.0: seen}.get(spacing_mm)
    assert blind == expected if expected is not None else blind > 1.5 * seen
    assert 100 < seen < 400  # mm2, at any spacing
    assert bool(informed.find_doubts(volume.shape[2:], frame)) == (spacing_mm != 2)
    assert model.find_doubts(volume.shape[2:], frame) == []


def test_a_slice_distance_unlike_training_is_said():
    same = {"median": 2.0, "low": 2.0, "high": 2.0}
    model = dataclasses.replace(
        model_of(Pointwise(), 32), checkpoint={"spacing_mm": {"in_plane": same, "slices": same}}
    )
    assert model.find_doubts((32, 32), Frame(None, (2.5, 2.0, 2.0))) == []
    assert model.find_doubts((32, 32), Frame(None, None)) == []
    (doubt,) = model.find_doubts((32, 32), Frame(None, (5.0, 2.0, 2.0)))
    assert "slices 5 mm apart where training had 2 mm" in doubt


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

    def write(network: nn.Module | None = None, **changes: object) -> Path:
        config = {
            "data_dir": "data",
            "modalities": ("flair",),
            "regions": ("WT",),
            "context": 1,
            "size": 32,
            "widths": (4, 8),
            "se_form": "head",
        }
        content = {
            "model": (network or trained_network()).state_dict(),
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


@pytest.mark.parametrize("switch", ["use_se", "use_attention", "dilated", "residual"])
def test_the_checkpoint_of_an_ablation_gives_back_its_own_network(write_checkpoint, switch):
    ablated = trained_network(**{switch: False})
    model = load_model(write_checkpoint(ablated, **{switch: False}), CPU, amp=False)
    volume = make_volume(1, 4, 20, 20)
    expected = predict_volume(model_of(ablated, 32), volume)
    np.testing.assert_allclose(predict_volume(model, volume), expected, atol=1e-6)


@pytest.mark.parametrize("switch", ["use_se", "use_attention", "residual"])
def test_the_weights_of_an_ablation_do_not_fit_the_whole_network(write_checkpoint, input_error, switch):
    path = write_checkpoint(trained_network(**{switch: False}), widths=(4, 8))
    with input_error(path, "do not fit"):
        load_model(path, CPU)


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


def test_without_input_the_held_out_test_cases_are_segmented(phantom_cohort, tmp_path, caplog):
    caplog.set_level("INFO", "drunet")
    split = split_cases(find_cases(CaseSource(phantom_cohort)), 0)
    write_json(tmp_path / "split.json", split)
    checkpoint = {"config": {"data_dir": str(phantom_cohort), "modalities": ["flair"]}}
    model = dataclasses.replace(model_of(Pointwise(), 32), checkpoint=checkpoint)
    chosen = choose_inputs(InferenceConfig(), model, tmp_path / "best.pt")
    assert [case.case_id for case in chosen] == split["test"]
    assert str(phantom_cohort) in caplog.text


def test_two_inputs_of_one_case_id_are_an_error(tmp_path, write_nifti, input_error):
    # Their masks would be written to one file, the second over the first.
    volume = np.zeros((4, 4, 4), np.int16)
    first = write_nifti(tmp_path / "a" / "x_flair.nii.gz", volume)
    second = write_nifti(tmp_path / "b" / "x_flair.nii.gz", volume)
    model = model_of(Pointwise(), 32)
    for inputs in ((first, second), (first.parent, second.parent)):
        with input_error("x"):
            choose_inputs(InferenceConfig(input=tuple(map(str, inputs))), model, Path("best.pt"))
