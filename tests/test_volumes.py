"""Normalisation, the way between native grid and network input, slabs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cohort.preprocess import (
    Z_RANGE,
    Frame,
    brain_mask,
    describe_training_spacing,
    fill_air,
    find_doubts,
    find_head_box,
    fit_slices,
    gather_slab,
    level_air,
    normalise_volume,
    pixel_mm,
    place_case,
    place_slices,
    unfit_slices,
)

# ------------------------------------------------------------------------------------------------------------
# Foreground and normalisation
# ------------------------------------------------------------------------------------------------------------


def make_head(seed: int = 0, low: int = 300, high: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return (intensities, brain) (8, 40, 40): integers in low..high inside an ellipsoid, 0 around it."""
    z, y, x = np.ogrid[-3.5:4.5, -19.5:20.5, -19.5:20.5]
    brain = (z / 5) ** 2 + (y / 16) ** 2 + (x / 13) ** 2 < 1
    intensities = np.random.default_rng(seed).integers(low, high, brain.shape).astype(np.float32)
    return np.where(brain, intensities, 0).astype(np.float32), brain


def normalise_one(intensities: np.ndarray) -> np.ndarray:
    return normalise_volume(intensities[None])[0][0]


def test_brain_is_what_lies_above_the_background():
    intensities, brain = make_head()
    mask = brain_mask(intensities)
    assert mask.dtype == np.bool_
    assert (mask == brain).all()


@pytest.mark.parametrize("background", [-4.75, -1000.0, 7.0])
def test_background_need_not_be_zero(background):
    intensities, brain = make_head()
    assert (brain_mask(intensities + np.float32(background)) == brain).all()


def test_noise_of_air_is_no_brain():
    intensities, brain = make_head()
    air = np.random.default_rng(1).integers(0, 21, brain.shape)
    assert (brain_mask(np.where(brain, intensities, air).astype(np.float32)) == brain).all()


def test_a_head_that_touches_the_border_is_still_found():
    intensities, brain = make_head()
    assert (brain_mask(intensities[:, 8:, :]) == brain[:, 8:, :]).all()


def test_a_constant_volume_has_no_brain_and_becomes_zero():
    scores, brain = normalise_volume(np.full((1, 3, 8, 8), 42, np.float32))
    assert not brain_mask(np.full((3, 8, 8), 42, np.float32)).any()
    assert not scores.any()
    assert brain.shape == (3, 8, 8)
    assert not brain.any()


def test_scores_by_hand():
    # Half of the brain is 100, half is 300: median 200, quartiles 100 and 300, so one SD is 200 / 1.349.
    intensities = np.zeros((4, 12, 12), np.float32)
    intensities[:, 2:10, 2:6] = 100
    intensities[:, 2:10, 6:10] = 300
    scores = normalise_one(intensities)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[:, 2:10, 2:6], -0.6745, atol=5e-4)
    np.testing.assert_allclose(scores[:, 2:10, 6:10], 0.6745, atol=5e-4)
    np.testing.assert_allclose(scores[:, 0], -1.349, atol=1e-3)


def test_scores_are_clipped_to_their_range():
    # Median near 1000, SD 20 / 1.349: the background would be -67. One voxel of 2048 lies far above.
    intensities = np.zeros((8, 20, 20), np.float32)
    intensities[:, 2:18, 2:10] = 990
    intensities[:, 2:18, 10:18] = 1010
    intensities[4, 9, 10] = 5000
    scores = normalise_one(intensities)
    assert Z_RANGE == (-4.0, 8.0)
    assert (scores[:, 0] == -4).all()
    assert scores[4, 9, 10] == 8
    np.testing.assert_allclose(scores[0, 2:18, 2:10], -0.6745, atol=5e-4)


def test_a_brain_of_one_value_scores_zero():
    intensities = np.zeros((2, 12, 12), np.float32)
    intensities[:, 3:9, 3:9] = 500
    assert (normalise_one(intensities)[:, 3:9, 3:9] == 0).all()


def test_a_normal_brain_has_mean_zero_and_sd_one():
    _, brain = make_head()
    normal = np.random.default_rng(3).normal(600, 50, brain.shape)
    inside = normalise_one(np.where(brain, normal, 0).astype(np.float32))[brain]
    assert abs(inside.mean()) < 0.05
    assert abs(inside.std() - 1) < 0.05


def test_a_bright_scalp_leaves_the_brain_where_it_was():
    intensities, brain = make_head()
    scalp = np.zeros_like(brain)
    scalp[:, 1, 2:38] = True  # 288 voxels, 7 % of the foreground
    dim, bright = (normalise_one(np.where(scalp, value, intensities)) for value in (1000, 2500))
    assert (dim == bright)[brain].all()


def test_a_brain_with_few_grey_values_falls_back_to_the_standard_deviation():
    # Nine tenths are 500, one tenth 600: the quartiles agree, mean 510, SD 30; the median is 500.
    intensities = np.zeros((1, 14, 14), np.float32)
    intensities[0, 2:12, 2:12] = 500
    intensities[0, 2:12, 2] = 600
    scores = normalise_one(intensities)
    assert (scores[0, 2:12, 3:12] == 0).all()
    np.testing.assert_allclose(scores[0, 2:12, 2], 100 / 30, atol=2e-3)


@given(scale=st.floats(0.01, 100), offset=st.floats(-1000, 1000))
def test_scores_do_not_depend_on_the_scale_and_offset_of_the_intensities(scale, offset):
    intensities, _ = make_head()
    changed = (intensities * np.float32(scale) + np.float32(offset)).astype(np.float32)
    # Two float16 values next to each other are up to 2^-8 apart in 4..8.
    np.testing.assert_allclose(normalise_one(changed), normalise_one(intensities), atol=0.005)


@given(seed=st.integers(0, 10_000), outliers=st.integers(1, 8), value=st.sampled_from([32767, -32768]))
def test_a_few_outliers_leave_every_other_voxel_where_it_was(seed, outliers, value):
    intensities, brain = make_head()  # 4,000 brain voxels: 8 are 0.2 %
    changed = intensities.copy()
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(brain), outliers, replace=False)
    changed.flat[chosen] = value
    kept = np.ones(brain.size, bool)
    kept[chosen] = False
    difference = np.abs(normalise_one(changed) - normalise_one(intensities)).ravel()[kept]
    assert difference.max() < 0.02


def test_a_few_hot_voxels_in_the_background_leave_the_brain_where_it_was():
    intensities, brain = make_head()
    changed = intensities.copy()
    changed[0, 0, :4] = 32767
    difference = np.abs(normalise_one(changed) - normalise_one(intensities))[brain]
    assert difference.max() < 0.02


def test_scores_are_exact_in_float16():
    scores = normalise_one(make_head()[0])
    assert len(np.unique(scores)) > 100
    assert (scores.astype(np.float16).astype(np.float32) == scores).all()


def test_each_modality_is_normalised_by_itself_and_the_brain_is_that_of_the_first():
    first, head = make_head(0)
    second, _ = make_head(1, 30, 50)
    second[5:] = 0
    scores, brain = normalise_volume(np.stack([first, second]))
    assert brain.dtype == np.bool_
    assert (brain == head).all()
    assert (scores[0] == normalise_one(first)).all()
    assert (scores[1] == normalise_one(second)).all()


# ------------------------------------------------------------------------------------------------------------
# Air that is not the darkest
# ------------------------------------------------------------------------------------------------------------


def z_score(intensities: np.ndarray, brain: np.ndarray, air: float = 0.0) -> np.ndarray:
    """Return z-scores over the brain with another value in air, as other tools write them."""
    inside = intensities[brain]
    return np.where(brain, (intensities - inside.mean()) / inside.std(), air).astype(np.float32)


def make_deep_head() -> tuple[np.ndarray, np.ndarray]:
    """Return (intensities, brain) of a head whose darkest tissue is little above air."""
    return make_head(low=1, high=1000)


DISGUISES = {
    "z over the brain": lambda raw, brain: z_score(raw, brain),
    "z over the brain, median at 0.8": lambda raw, brain: z_score(raw, brain) + np.float32(0.8) * brain,
    "z of the whole": lambda raw, _: (raw - raw.mean()) / raw.std(),
    "-1 to 1": lambda raw, _: 2 * raw / raw.max() - 1,
    "air below the brain": lambda raw, brain: z_score(raw, brain, z_score(raw, brain).min() - 0.01),
    "NaN in air": lambda raw, brain: fill_air(np.where(brain, raw, np.nan)),
    "z, infinite in air": lambda raw, brain: fill_air(z_score(raw, brain, np.inf)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_normalisation_done_before_changes_no_score(disguise):
    raw, brain = make_deep_head()
    changed = DISGUISES[disguise](raw, brain).astype(np.float32)
    scores, mask = normalise_volume(changed[None])
    expected, expected_mask = normalise_volume(raw[None])
    assert (mask ^ expected_mask).sum() <= 0.005 * brain.sum()  # what lies at the edge of 10 %
    np.testing.assert_allclose(scores, expected, atol=0.02)
    assert find_doubts(changed) == []


def test_tissue_that_happens_to_have_the_value_of_air_stays():
    # z-scores stored as bytes: every 60th voxel of the brain has the byte of air.
    raw, brain = make_deep_head()
    stored = np.where(brain, np.rint(z_score(raw, brain) * 20 + 128), 128).astype(np.float32)
    assert (stored[brain] == 128).sum() > 20
    # one byte is 0.05 of an SD, half of that either way, and quartiles are rounded alike
    inner = ndimage.binary_erosion(brain)  # of the voxels beside air some are lost to it
    assert np.abs(normalise_one(stored) - normalise_one(raw))[inner].max() < 0.1


def test_traces_of_resampling_in_air_are_air():
    raw, brain = make_deep_head()
    traces = np.random.default_rng(2).choice([0, 0, 1e-4, -1e-4], raw.shape)
    stored = np.where(brain, z_score(raw, brain), traces).astype(np.float32)
    unlike = np.abs(normalise_one(stored) - normalise_one(raw)) > 0.02
    assert not unlike[~brain].any()
    assert unlike.sum() <= 0.005 * brain.sum()  # tissue beside air that is as good as equal to it


@pytest.mark.parametrize("kind", ["stripped", "with noise in air", "at 32767 in spots", "negative in spots"])
def test_raw_intensities_are_taken_as_they_are(kind):
    raw, brain = make_head()
    generator = np.random.default_rng(1)
    if kind == "with noise in air":  # Rayleigh: 4 voxels of 10 are below the commonest value
        raw = np.where(brain, raw, np.rint(generator.rayleigh(12, raw.shape))).astype(np.float32)
    elif kind != "stripped":
        raw[0, 0, :4] = 32767 if "32767" in kind else -300
    assert level_air(raw) is raw
    assert find_doubts(raw) == []


def test_nan_in_the_head_is_left_and_nan_around_it_is_background():
    raw, brain = make_head()
    volume = np.where(brain, raw, np.nan).astype(np.float32)
    assert np.isfinite(fill_air(volume)).all()
    assert (brain_mask(fill_air(volume)) == brain_mask(np.where(brain, raw, raw[brain].min()))).all()
    volume[4, 20, 20] = np.nan
    assert np.argwhere(~np.isfinite(fill_air(volume))).tolist() == [[4, 20, 20]]
    assert not np.isfinite(fill_air(np.full((2, 4, 4), np.nan))).any()


def test_nan_beside_air_takes_the_value_of_that_air():
    raw, _ = make_head()
    volume = raw + np.float32(7)
    volume[:, :, :2] = np.nan  # two columns of air beyond the field of view
    assert (fill_air(volume) == raw + 7).all()


def test_blank_and_inverted_volumes_are_doubted():
    raw, _ = make_head()
    assert find_doubts(np.zeros((2, 4, 4), np.float32)) == ["is blank, 0 everywhere"]
    (doubt,) = find_doubts(raw.max() - raw)
    assert "inverted" in doubt
    assert not brain_mask(raw.max() - raw).any()


# ------------------------------------------------------------------------------------------------------------
# Native grid and network input
# ------------------------------------------------------------------------------------------------------------

SIDES = st.integers(1, 70)
SIZES = st.sampled_from([16, 32, 48])


def test_padding_by_hand():
    slices = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    placement = place_slices(2, 3, 4)
    # One row above and one below; of the one column, the odd one goes to the right.
    expected = [[1, 2, 3, 3], [1, 2, 3, 3], [4, 5, 6, 6], [4, 5, 6, 6]]
    assert fit_slices(slices, placement).tolist() == expected
    mask = fit_slices(slices > 0, placement, is_mask=True)
    assert mask.tolist() == [[False] * 4, [True] * 3 + [False], [True] * 3 + [False], [False] * 4]
    assert unfit_slices(fit_slices(slices, placement), placement).tolist() == slices.tolist()


def test_cropping_by_hand():
    slices = np.arange(25, dtype=np.float32).reshape(5, 5)
    placement = place_slices(5, 5, 4)  # 5 is not above 1.25 x 4: cropped, not resized
    fitted = fit_slices(slices, placement)
    assert fitted.tolist() == slices[:4, :4].tolist()
    restored = unfit_slices(fitted, placement)
    assert restored[:4, :4].tolist() == slices[:4, :4].tolist()
    assert not restored[4].any()
    assert not restored[:, 4].any()


def test_slices_are_cropped_up_to_a_quarter_above_the_size_and_resized_beyond():
    assert place_slices(40, 30, 32).inner == (40, 30)
    assert place_slices(41, 30, 32).inner == (32, 23)  # 30 * 32 / 41 = 23.4
    assert place_slices(30, 320, 256).inner == (30, 320)
    assert place_slices(1, 321, 256).inner == (1, 256)  # a row remains


def test_brats_slices_are_padded_by_8_on_every_side():
    slices = np.zeros((240, 240), np.float32)
    slices[0, 0] = slices[-1, -1] = 1
    mask = fit_slices(slices > 0, place_slices(240, 240, 256), is_mask=True)
    assert np.argwhere(mask).tolist() == [[8, 8], [247, 247]]


@given(height=SIDES, width=SIDES, size=SIZES, seed=st.integers(0, 1000))
def test_fitting_and_unfitting_keep_every_cell_that_was_not_cropped(height, width, size, seed):
    placement = place_slices(height, width, size)
    slices = np.random.default_rng(seed).uniform(0.1, 1, (2, 3, height, width)).astype(np.float32)
    fitted = fit_slices(slices, placement)
    restored = unfit_slices(fitted, placement)
    assert fitted.shape == (2, 3, size, size)
    assert restored.shape == slices.shape
    assert placement.native == (height, width)
    assert (placement.inner != placement.native) == (max(height, width) > 1.25 * size)
    if placement.inner != placement.native:
        assert max(placement.inner) == size
        return
    cut = restored == 0
    assert (restored[~cut] == slices[~cut]).all()
    rows, columns = ~cut[0, 0].all(1), ~cut[0, 0].all(0)
    for kept, side in ((rows, height), (columns, width)):
        lost = max(0, side - size)
        edges = np.flatnonzero(kept)[[0, -1]]
        assert kept.sum() == side - lost == edges[1] - edges[0] + 1
        assert (edges[0], side - 1 - edges[1]) == (lost // 2, lost - lost // 2)  # cut alike on both sides


def test_a_crop_is_centred_on_the_head_by_hand():
    # Of 40 rows 32 are kept. The head is rows 2 to 12: its middle is 7, so the crop would begin at -9, and
    # begins at 0. Columns 9 to 37: the middle is 23, so it begins at 7.
    placement = place_slices(40, 40, 32, ((2, 12), (9, 37)))
    assert placement.inner == (40, 40)
    assert placement.kept == ((0, 32), (7, 39))
    slices = np.arange(1600, dtype=np.float32).reshape(40, 40) + 1
    fitted = fit_slices(slices, placement)
    assert (fitted == slices[0:32, 7:39]).all()
    restored = unfit_slices(fitted, placement)
    assert (restored[0:32, 7:39] == slices[0:32, 7:39]).all()
    assert np.count_nonzero(restored) == 32 * 32


@given(height=SIDES, width=SIDES, size=SIZES, ends=st.tuples(*[st.floats(0, 1)] * 4), is_mask=st.booleans())
def test_nothing_of_the_head_is_ever_outside(height, width, size, ends, is_mask):
    spans = []
    for length, pair in ((height, ends[:2]), (width, ends[2:])):
        first, last = sorted(round(end * (length - 1)) for end in pair)
        spans.append((first, last + 1))
    placement = place_slices(height, width, size, tuple(spans))
    head = np.zeros((height, width), bool)
    head[spans[0][0] : spans[0][1], spans[1][0] : spans[1][1]] = True
    fitted = fit_slices(head if is_mask else head.astype(np.float32), placement, is_mask)
    assert fitted.shape == (size, size)
    fits = all(last - first <= size for first, last in spans)
    is_resized = placement.inner != placement.native
    assert is_resized == (max(height, width) > 1.25 * size or (max(height, width) > size and not fits))
    if is_resized:
        assert max(placement.inner) == size
        assert placement.kept == ((0, placement.inner[0]), (0, placement.inner[1]))
    elif is_mask:
        assert fitted.sum() == head.sum()
        assert (unfit_slices(fitted, placement) == head).all()
    if max(height, width) <= size:
        assert placement == place_slices(height, width, size)


def test_specks_beside_the_head_do_not_widen_it():
    brain = np.zeros((3, 50, 60), bool)
    brain[1, 10:30, 20:45] = True
    brain[2, 12:33, 20:40] = True
    brain[0, 0, 0] = brain[1, 49, 5:9] = True
    assert find_head_box(brain) == ((10, 33), (20, 45))
    assert find_head_box(np.zeros_like(brain)) is None


@given(height=SIDES, width=SIZES, size=SIZES, seed=st.integers(0, 1000))
def test_masks_are_never_blended_nor_extended(height, width, size, seed):
    placement = place_slices(height, width, size)
    masks = np.random.default_rng(seed).random((2, height, width)) < 0.5
    fitted = fit_slices(masks, placement, is_mask=True)
    assert fitted.dtype == np.bool_
    assert fitted.shape == (2, size, size)
    as_numbers = fit_slices(masks.astype(np.uint8) * 4, placement, is_mask=True)
    assert set(np.unique(as_numbers)) <= {0, 4}
    assert (fitted == (as_numbers > 0)).all()
    if max(height, width) <= size:
        assert fitted.sum() == masks.sum()


def test_image_and_mask_of_a_slice_are_padded_and_cropped_alike():
    pattern = np.random.default_rng(0).random((50, 30)) < 0.5
    placement = place_slices(50, 30, 40)
    image = fit_slices(pattern.astype(np.float32), placement)
    mask = fit_slices(pattern, placement, is_mask=True)
    assert (mask[:, 5:35] == (image[:, 5:35] > 0.5)).all()
    assert not mask[:, :5].any()
    assert not mask[:, 35:].any()


def test_large_slices_are_resized_as_a_whole_with_their_proportions():
    placement = place_slices(96, 48, 32)
    assert placement.inner == (32, 16)
    ramp = np.broadcast_to(np.arange(96, dtype=np.float32)[:, None], (96, 48))
    fitted = fit_slices(ramp, placement)
    # Area resizing by 3: each output pixel is the mean of three, 1, 4, 7, ...
    np.testing.assert_allclose(fitted[:, 16], np.arange(32) * 3 + 1, atol=1e-4)
    np.testing.assert_allclose(fitted, np.broadcast_to(fitted[:, :1], (32, 32)), atol=1e-4)


@pytest.mark.parametrize(("native", "size"), [((48, 48), 16), ((90, 60), 32), ((50, 75), 32)])
def test_a_resized_blob_comes_back_where_it_was(native, size):
    y, x = np.mgrid[: native[0], : native[1]]
    centre = (native[0] * 0.4, native[1] * 0.55)
    radius = min(native) / 6
    blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * radius**2)).astype(np.float32)
    placement = place_slices(*native, size)
    restored = unfit_slices(fit_slices(blob, placement), placement)
    assert restored.shape == native
    assert restored.min() >= 0
    assert np.abs(restored - blob).max() < 0.08
    np.testing.assert_allclose(ndimage.center_of_mass(restored), ndimage.center_of_mass(blob), atol=0.2)


@pytest.mark.parametrize(("side", "size"), [(48, 16), (50, 32), (49, 16)])
def test_a_resized_mask_is_not_shifted(side, size):
    # Taking the upper left pixel of each block would move the target by up to half a block against the
    # image. A mask resized without a shift is its mirror image where its input is.
    noise = np.random.default_rng(0).normal(size=(side, side))
    mask = ndimage.gaussian_filter(noise, side / 16) > 0
    placement = place_slices(side, side, size)
    fitted = fit_slices(mask, placement, is_mask=True)
    assert (fit_slices(mask[::-1], placement, is_mask=True) == fitted[::-1]).all()
    assert (fit_slices(mask[:, ::-1], placement, is_mask=True) == fitted[:, ::-1]).all()


# ------------------------------------------------------------------------------------------------------------
# Spacing unlike training
# ------------------------------------------------------------------------------------------------------------


def trained_at(low: float, high: float) -> dict[str, dict[str, float]]:
    in_plane = {"median": (low + high) / 2, "low": low, "high": high}
    return {"in_plane": in_plane, "slices": {"median": 4.0, "low": 4.0, "high": 4.0}}


@pytest.mark.parametrize(
    ("spacing_mm", "trained", "inner"),
    [
        ((4, 2, 2), (2, 2), (60, 50)),  # as in training
        ((4, 2.5, 2.5), (2, 2), (60, 50)),  # a quarter more is no more than a quarter
        ((4, 2.6, 2.6), (2, 2), (78, 65)),
        ((4, 1.6, 1.6), (2, 2), (60, 50)),
        ((4, 1.5, 1.5), (2, 2), (45, 38)),  # 37.5 is rounded to even
        ((4, 4, 4), (2, 2), (120, 100)),
        ((4, 1, 2), (2, 2), (30, 50)),  # each axis by itself
        ((4, 4, 4), (1, 4), (60, 50)),  # several sizes: inside of the range
        ((4, 6, 6), (1, 4), (90, 75)),  # to the end of the range, not to its middle
        (None, (2, 2), (60, 50)),
        ((4, 4, 4), None, (60, 50)),
    ],
)
def test_slices_are_resampled_to_the_spacing_of_training(spacing_mm, trained, inner):
    placement = place_case((60, 50), 128, Frame(None, spacing_mm), trained and trained_at(*trained))
    assert placement.inner == inner
    if inner == (60, 50):
        assert placement == place_slices(60, 50, 128)


def test_what_fitting_the_input_does_to_pixels_counts():
    # 512 pixels of 0.5 mm are resized to 256 of 1 mm, which is what training had.
    frame = Frame(((100, 400), (80, 420)), (1.0, 0.5, 0.5))
    usual = place_slices(512, 512, 256, frame.head)
    assert pixel_mm(frame.spacing_mm, usual) == (1.0, 1.0)
    assert place_case((512, 512), 256, frame, trained_at(1, 1)) == usual
    assert describe_training_spacing([(frame, usual)])["in_plane"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_a_resampled_head_that_does_not_fit_is_made_to():
    # At training's 2 mm the head of 40 pixels of 8 mm would have 160: the 128 of the input are to hold it.
    placement = place_case((60, 60), 128, Frame(((10, 50), (15, 50)), (4, 8, 8)), trained_at(2, 2))
    head = np.zeros((60, 60), np.float32)
    head[10:50, 15:50] = 1
    fitted = fit_slices(head, placement)
    # one pixel is 60 / 189 of the file's; all of the head is there, and it fills the input
    assert placement.inner == (189, 189)
    np.testing.assert_allclose(fitted.sum() * (60 / 189) ** 2, 40 * 35, rtol=0.01)
    restored = unfit_slices(fitted, placement)
    assert ((restored > 0.5) == (head > 0)).all()


@pytest.mark.parametrize("spacing_mm", [4.0, 1.0])
def test_a_resampled_mask_comes_back_where_it_was(spacing_mm):
    side = round(240 / spacing_mm)
    y, x = np.mgrid[:side, :side] * spacing_mm
    blob = ((y - 100) ** 2 + (x - 130) ** 2 < 40**2).astype(np.float32)
    placement = place_case((side, side), 256, Frame(None, (4, spacing_mm, spacing_mm)), trained_at(2, 2))
    assert placement.inner == (120, 120)
    restored = unfit_slices(fit_slices(blob, placement), placement) >= 0.5
    dice = 2 * (restored & (blob > 0)).sum() / (restored.sum() + blob.sum())
    assert dice > 0.98
    np.testing.assert_allclose(ndimage.center_of_mass(restored), ndimage.center_of_mass(blob), atol=0.1)


def test_spacings_of_training_by_hand():
    plain = place_slices(100, 100, 128)
    cases = [(Frame(None, (mm, 1.0, 2.0)), plain) for mm in (3.0, 5.0)] + [(Frame(None, None), plain)]
    table = describe_training_spacing(cases)
    assert table["in_plane"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert table["slices"] == pytest.approx({"median": 4.0, "low": 3.1, "high": 4.9})
    assert describe_training_spacing(cases[2:]) is None


# ------------------------------------------------------------------------------------------------------------
# Slabs
# ------------------------------------------------------------------------------------------------------------


def numbered_volume(modalities: int, depth: int) -> np.ndarray:
    """Return a volume (C, D, 2, 2) whose voxels are 100 * modality + slice."""
    values = 100 * np.arange(modalities)[:, None] + np.arange(depth)
    return np.broadcast_to(values[..., None, None], (modalities, depth, 2, 2)).astype(np.float32)


@pytest.mark.parametrize(
    ("z", "context", "expected"),
    [
        (2, 1, [1, 2, 3, 101, 102, 103]),
        (0, 1, [0, 0, 1, 100, 100, 101]),
        (4, 1, [3, 4, 4, 103, 104, 104]),
        (2, 0, [2, 102]),
        (4, 2, [2, 3, 4, 4, 4, 102, 103, 104, 104, 104]),
        (1, 2, [0, 0, 1, 2, 3, 100, 100, 101, 102, 103]),
    ],
)
def test_a_slab_holds_the_slices_of_each_modality_in_turn(z, context, expected):
    slab = gather_slab(numbered_volume(2, 5), z, context)
    assert slab.shape == (len(expected), 2, 2)
    assert slab[:, 1, 1].tolist() == expected


def test_a_single_slice_is_its_own_neighbour():
    assert gather_slab(numbered_volume(1, 1), 0, 1)[:, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("z", [-1, 5, 100])
def test_a_slice_outside_the_volume_is_an_error(z):
    with pytest.raises(ValueError, match=str(z)):
        gather_slab(numbered_volume(2, 5), z, 1)
