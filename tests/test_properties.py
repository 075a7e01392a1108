"""Properties that hold for any input, where no other test file has them already.

HD95 under scale and mirrors, overlap of masks, fit and unfit, regions to labels and splits by patient are in
test_metrics, test_volumes, test_cases and test_split.
"""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cohort.cases import Case, load_case, save_map
from cohort.preprocess import Frame
from cohort.split import SPLIT_PARTS, split_cases, split_sha256
from dataset_balance_v2 import balance_slices, slice_kind, slice_table
from inference_v2 import VIEWS, TrainedModel, predict_views, predict_volume
from runtime.errors import InputError
from utils_v2 import HybridFocalDiceLoss, dice_score, hd95

MASKS = arrays.arrays(bool, st.tuples(st.just(2), *[st.integers(1, 5)] * 3))
# Half of float32's range in its exponent, all of float16's, and the largest that each can hold.
LOGITS = st.one_of(
    st.floats(-60000, 60000, width=32),
    st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 1e30, -1e30, 1e-30, 88.8, -88.8, 104.0, -104.0]),
)


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------


@given(masks=MASKS)
def test_dice_is_symmetric_bounded_and_one_for_equal_masks_alone(masks):
    first, second = masks
    dice = dice_score(first, second)
    assert dice == dice_score(second, first)
    assert 0 <= dice <= 1
    assert (dice == 1) == (first == second).all()
    assert (dice == 0) == (not (first & second).any() and (first | second).any())


@given(masks=MASKS, scale=st.floats(0.1, 10), axis=st.integers(0, 2))
def test_hd95_is_symmetric_grows_with_the_spacing_and_is_blind_to_mirrors(masks, scale, axis):
    first, second = masks
    spacing = np.array([2.5, 1.0, 0.7])
    distance = hd95(first, second, spacing)
    assert hd95(second, first, spacing) == pytest.approx(distance, rel=1e-9)
    mirrored = hd95(np.flip(first, axis), np.flip(second, axis), spacing)
    assert mirrored == pytest.approx(distance, rel=1e-9)
    scaled = hd95(first, second, spacing * scale)
    one_is_empty = first.any() != second.any()  # then the distance is a convention and not measured
    assert scaled == pytest.approx(distance if one_is_empty else distance * scale, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


@given(
    logits=arrays.arrays(np.float32, (2, 2, 3, 4), elements=LOGITS),
    target=arrays.arrays(bool, (2, 2, 3, 4)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_loss_and_its_gradients_are_finite_for_any_finite_logits(logits, target, dtype):
    values = torch.from_numpy(logits).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    values.requires_grad_()
    loss = HybridFocalDiceLoss(1.0, 1.0)(values, torch.from_numpy(target).float())
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert loss >= 0
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------------------------
# Test-time augmentation
# ------------------------------------------------------------------------------------------------------------


class Pixelwise(torch.nn.Module):
    """A network that sees one pixel at a time: it knows no left and no right."""

    def forward(self, slab: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 2, S, S) of slabs (N, 3, S, S)."""
        return torch.stack([slab[:, 1] * 3 - 1, slab.sum(1)], 1)


@settings(max_examples=20)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), depth=st.integers(1, 4), seed=st.integers(0, 10_000)
)
def test_every_view_comes_back_where_it_was(height, width, depth, seed):
    cpu = torch.device("cpu")
    model = TrainedModel(Pixelwise(), ("flair",), ("WT", "TC"), 1, 32, (0.5, 0.5), cpu, None, {})
    volume = np.random.default_rng(seed).normal(size=(1, depth, height, width)).astype(np.float32)
    views = predict_views(model, volume)
    assert views.shape == (len(VIEWS), 2, depth, height, width)
    for view in views[1:]:
        np.testing.assert_allclose(view, views[0], atol=1e-6)
    np.testing.assert_allclose(predict_volume(model, volume), views.mean(0), atol=1e-6)
    for axes in VIEWS.values():  # a flip is its own inverse
        flipped = torch.from_numpy(volume).flip(axes)
        assert (flipped.flip(axes).numpy() == volume).all()


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    values=arrays.arrays(
        np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(-1000, 1000, width=32)
    ),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([1.0, -1.0])] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_what_is_written_as_nifti_is_read_again_whatever_the_orientation(
    tmp_path_factory, values, axes, signs, suffix
):
    assume(values.min() < values.max())  # a constant image is refused
    folder = tmp_path_factory.mktemp("nifti")
    affine = np.zeros((4, 4))
    affine[list(axes), range(3)] = np.array([2.0, 1.0, 0.5]) * signs
    affine[:, 3] = (5, -7, 11, 1)
    paths = [folder / f"x_flair{suffix}", folder / f"y_flair{suffix}"]
    nib.save(nib.Nifti1Image(values, affine), paths[0])
    cases = [Case("x", "x", "x", "brats2021", "brats", {"flair": (path,)}, ()) for path in paths]
    read = load_case(cases[0])
    save_map(read.volume[0], cases[0], paths[1])  # in the orientation of the first
    assert (nib.load(paths[1]).get_fdata() == nib.load(paths[0]).get_fdata()).all()
    again = load_case(cases[1])
    assert (again.volume == read.volume).all()
    np.testing.assert_allclose(again.affine, read.affine, atol=1e-6)
    assert again.spacing_mm == pytest.approx(read.spacing_mm)
    assert math.prod(read.spacing_mm) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------------
# Splits and draws
# ------------------------------------------------------------------------------------------------------------


@given(
    patients=st.lists(st.text("abc019_- \xe4", min_size=1, max_size=6), min_size=3, max_size=40, unique=True),
    scans=st.lists(st.integers(1, 4), min_size=40, max_size=40),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_cohort_splits_by_patient_completely_and_by_its_seed(make_cases, patients, scans, seed):
    ids = [
        (f"{patient}/{scan}", patient)
        for patient, count in zip(patients, scans, strict=False)
        for scan in range(count)
    ]
    split = split_cases(make_cases(ids), seed)
    patients_of = {part: {dict(ids)[case] for case in split[part]} for part in SPLIT_PARTS}
    assert sorted(case for part in SPLIT_PARTS for case in split[part]) == sorted(case for case, _ in ids)
    assert sum(map(len, patients_of.values())) == len(patients)  # none in two parts
    assert all(patients_of.values())
    assert split == split_cases(make_cases(ids[::-1]), seed)
    assert split["sha256"] == split_sha256(split)


class Slices:
    """As much of a prepared case as `slice_table` looks at."""

    def __init__(self, brain: list[int], tumour: list[int]) -> None:
        self.case_id, self.brain_voxels, self.region_voxels = "x", brain, (tumour,)
        self.frame, self.shape = Frame(), (len(brain), 8, 8)


@given(
    slices=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3)), min_size=1, max_size=60),
    tumour_share=st.floats(0, 1),
    empty_share=st.floats(0, 1),
)
def test_weights_of_slices_are_not_negative_and_sum_to_one(slices, tumour_share, empty_share):
    if tumour_share + empty_share > 1:
        tumour_share, empty_share = tumour_share / 2, empty_share / 2
    brain, tumour = (list(column) for column in zip(*slices, strict=True))
    table = slice_table([Slices(brain, tumour)], ("WT",))
    share_of = {"tumour": tumour_share, "empty": empty_share, "brain": 1 - tumour_share - empty_share}
    drawn = {kind: share_of[kind] for kind in set(slice_kind(table))}
    if max(drawn.values()) < 1e-300:
        with pytest.raises(InputError, match="--tumour-share"):
            balance_slices(table, tumour_share, empty_share)
        return
    weights = balance_slices(table, tumour_share, empty_share)
    assert weights.shape == (len(slices),)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    if 0 < tumour_share < 1 and empty_share > 0 and tumour_share + empty_share < 1:
        assert (weights > 0).all()
