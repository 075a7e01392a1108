"""The metrics against surface-distance and MONAI, naive definitions, invariants and values by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from surface_distance import (
    compute_robust_hausdorff,
    compute_surface_dice_at_tolerance,
    compute_surface_distances,
)
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from utils_v2 import (
    HD95_ONE_EMPTY_MM,
    THRESHOLDS,
    Overlap,
    bounding_box,
    choose_thresholds,
    count_overlap,
    dice_score,
    hd95,
    nearest_distances_mm,
    overlap_at_thresholds,
    surface_distances_mm,
    surface_metrics,
    surfel_area_table,
)

SPACINGS_MM = [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.2, 0.7, 2.5), (0.5, 4.0, 0.9)]
Pair = tuple[np.ndarray, np.ndarray]


def precision(reference: np.ndarray, prediction: np.ndarray) -> float:
    return count_overlap(reference, prediction).precision


def recall(reference: np.ndarray, prediction: np.ndarray) -> float:
    return count_overlap(reference, prediction).recall


def voxels(shape: tuple[int, ...], *places: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


# ------------------------------------------------------------------------------------------------------------
# Overlap
# ------------------------------------------------------------------------------------------------------------


def test_overlap_metrics_by_hand() -> None:
    reference = np.array([[1, 1, 1, 1, 0, 0]], bool)
    prediction = np.array([[0, 1, 1, 1, 1, 1]], bool)
    assert count_overlap(reference, prediction) == (3, 2, 1)
    assert dice_score(reference, prediction) == pytest.approx(2 * 3 / (4 + 5))
    assert precision(reference, prediction) == pytest.approx(3 / 5)
    assert recall(reference, prediction) == pytest.approx(3 / 4)


def test_both_masks_empty() -> None:
    empty = np.zeros((3, 4, 5), bool)
    assert dice_score(empty, empty) == 1
    assert Overlap(0, 0, 0).dice == 1
    assert hd95(empty, empty, (1, 1, 1)) == 0
    assert surface_metrics(empty, empty, (1, 1, 1))[1] == 1
    assert math.isnan(precision(empty, empty))
    assert math.isnan(recall(empty, empty))


def test_exactly_one_mask_empty() -> None:
    empty = np.zeros((3, 4, 5), bool)
    full = ~empty
    one = voxels((3, 4, 5), (1, 2, 3))
    for mask in (full, one):
        assert dice_score(mask, empty) == dice_score(empty, mask) == 0
        assert hd95(mask, empty, (1, 1, 1)) == hd95(empty, mask, (9, 9, 9)) == HD95_ONE_EMPTY_MM == 374
        assert surface_metrics(mask, empty, (1, 1, 1), 1e9)[1] == 0
        assert surface_metrics(empty, mask, (1, 1, 1), 1e9)[1] == 0
        assert math.isnan(precision(mask, empty))
        assert recall(mask, empty) == 0
        assert precision(empty, mask) == 0
        assert math.isnan(recall(empty, mask))


@pytest.mark.parametrize("metric", [dice_score, precision, recall, lambda a, b: hd95(a, b, (1, 1, 1))])
def test_masks_of_another_shape_or_type_raise(metric: Callable[[np.ndarray, np.ndarray], float]) -> None:
    mask = np.ones((2, 3, 4), bool)
    for other in (np.ones((2, 3, 5), bool), np.ones((1, 3, 4), bool), np.ones((3, 4), bool)):
        with pytest.raises(ValueError, match="shape"):
            metric(mask, other)
        with pytest.raises(ValueError, match="shape"):
            metric(other, mask)
    # to arithmetic 0/1 numbers, 0/255 numbers and probabilities are all masks, with other counts
    for dtype in (np.uint8, np.int64, np.float32):
        with pytest.raises(ValueError, match="bool"):
            metric(mask, mask.astype(dtype))
        with pytest.raises(ValueError, match="bool"):
            metric(mask.astype(dtype), mask)


@given(arrays.arrays(bool, st.tuples(st.just(2), *[st.integers(1, 6)] * 3)))
def test_overlap_metrics_are_bounded_and_mirror_each_other(masks: np.ndarray) -> None:
    reference, prediction = masks
    dice = dice_score(reference, prediction)
    assert 0 <= dice <= 1
    assert dice == dice_score(prediction, reference)
    assert (dice == 1) == np.array_equal(reference, prediction)
    assert dice_score(reference, reference) == 1
    found, hit = precision(reference, prediction), recall(reference, prediction)
    assert hit == pytest.approx(precision(prediction, reference), nan_ok=True)
    if reference.any() and prediction.any() and (reference & prediction).any():
        assert dice == pytest.approx(2 / (1 / found + 1 / hit))  # the harmonic mean of the two


# ------------------------------------------------------------------------------------------------------------
# Overlap over thresholds
# ------------------------------------------------------------------------------------------------------------


def naive_counts(probability: np.ndarray, reference: np.ndarray, thresholds: np.ndarray) -> list[tuple]:
    return [count_overlap(reference, probability >= np.float32(threshold)) for threshold in thresholds]


def test_thresholds_swept_are_5_to_95_percent() -> None:
    assert THRESHOLDS.tolist() == [percent / 100 for percent in range(5, 100, 5)]


def test_counts_at_thresholds_by_hand() -> None:
    probability = np.array([0.1, 0.4, 0.5, 0.9], np.float32)
    reference = np.array([True, False, True, True])
    counts = overlap_at_thresholds(probability, reference, np.array([0.0, 0.4, 0.5, 0.95]))
    assert counts.tolist() == [[3, 1, 0], [2, 1, 1], [2, 0, 1], [0, 0, 3]]
    assert counts.dtype == np.int64


def test_probabilities_on_a_threshold_and_beside_it_count_as_comparison_does() -> None:
    on = THRESHOLDS.astype(np.float32)
    zero, one = np.float32(0), np.float32(1)
    probability = np.concatenate([on, np.nextafter(on, zero), np.nextafter(on, one), [zero, one]])
    for reference in (np.arange(len(probability)) % 2 == 0, np.arange(len(probability)) % 3 == 0):
        counts = overlap_at_thresholds(probability, reference, THRESHOLDS)
        assert counts.tolist() == [list(c) for c in naive_counts(probability, reference, THRESHOLDS)]
        # a Python number is what a threshold is after its trip through the checkpoint
        assert counts.tolist() == [
            list(count_overlap(reference, probability >= float(t))) for t in THRESHOLDS.tolist()
        ]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_reference", [True, False])
def test_a_probability_that_is_not_finite_is_no_count(number: float, in_reference: bool) -> None:
    # a histogram leaves NaN out: all of a volume made counts of 0, 0, 0, the Dice of which is 1
    probability = np.array([0.2, 0.8, 0.6], np.float32)
    reference = np.array([in_reference, True, False])
    probability[0] = number
    with pytest.raises(ValueError, match="not finite"):
        overlap_at_thresholds(probability, reference, THRESHOLDS)
    with pytest.raises(ValueError, match="not finite"):
        overlap_at_thresholds(np.full(3, number, np.float32), reference, THRESHOLDS)


def test_thresholds_0_and_1_are_inclusive() -> None:
    probability = np.array([0, 0, 0.5, 1, 1, 1], np.float32)
    reference = np.array([True, False, True, True, True, False])
    counts = overlap_at_thresholds(probability, reference, np.array([0.0, 1.0]))
    assert counts.tolist() == [[4, 2, 0], [2, 1, 2]]


@pytest.mark.parametrize("reference", [np.zeros((2, 3), bool), np.ones((2, 3), bool)])
def test_counts_of_an_empty_and_of_a_full_reference(reference: np.ndarray) -> None:
    probability = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    counts = overlap_at_thresholds(probability, reference, THRESHOLDS)
    assert counts.tolist() == [list(c) for c in naive_counts(probability, reference, THRESHOLDS)]


@given(
    arrays.arrays(np.float32, (3, 5, 4), elements=st.floats(0, 1, width=32)),
    arrays.arrays(bool, (3, 5, 4)),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8, unique=True).map(sorted),
)
def test_counts_equal_the_naive_comparison(
    probability: np.ndarray, reference: np.ndarray, thresholds: list[float]
) -> None:
    counts = overlap_at_thresholds(probability, reference, np.array(thresholds))
    assert counts.tolist() == [list(c) for c in naive_counts(probability, reference, np.array(thresholds))]


# ------------------------------------------------------------------------------------------------------------
# Surface distance
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing_mm", [*SPACINGS_MM, (10.0, 0.01, 3.0), (5.0, 5.0, 5.0)])
def test_area_of_all_256_neighbourhoods_equals_the_published_table(
    spacing_mm: tuple[float, float, float],
) -> None:
    table = surfel_area_table(spacing_mm)
    assert table.shape == (256,)
    np.testing.assert_allclose(table, create_table_neighbour_code_to_surface_area(spacing_mm), rtol=1e-12)


def test_area_of_flat_surfaces_by_hand() -> None:
    # corner (z, y, x) has bit 7 - (4z + 2y + x); half the corners inside means a whole face of the voxel
    table = surfel_area_table((2, 3, 5))
    assert table[0b11110000] == table[0b00001111] == pytest.approx(3 * 5)  # z = 0 or z = 1 inside
    assert table[0b11001100] == table[0b00110011] == pytest.approx(2 * 5)  # y
    assert table[0b10101010] == table[0b01010101] == pytest.approx(2 * 3)  # x
    assert table[0b00000000] == table[0b11111111] == 0
    # one corner: the triangle through the middles of its three edges
    assert table[0b00000001] == pytest.approx(math.sqrt((3 * 5) ** 2 + (2 * 5) ** 2 + (2 * 3) ** 2) / 8)


def draw_noise(rng: np.random.Generator) -> Pair:
    return rng.random((6, 7, 8)) < rng.uniform(0.02, 0.9), rng.random((6, 7, 8)) < rng.uniform(0.02, 0.9)


def draw_blob(rng: np.random.Generator) -> np.ndarray:
    field = ndimage.gaussian_filter(rng.normal(size=(9, 14, 12)), rng.uniform(0.8, 2))
    return field > np.quantile(field, rng.uniform(0.6, 0.99))


def draw_blobs(rng: np.random.Generator) -> Pair:
    return draw_blob(rng), draw_blob(rng)


def draw_single_voxels(rng: np.random.Generator) -> Pair:
    shape = (5, 9, 7)
    return voxels(shape, tuple(rng.integers(0, shape))), voxels(shape, tuple(rng.integers(0, shape)))


def draw_border_touching(rng: np.random.Generator) -> Pair:
    reference, prediction = np.zeros((2, 6, 9, 7), bool)
    reference[:, : rng.integers(1, 9), : rng.integers(1, 7)] = True
    prediction[: rng.integers(1, 6), :, -int(rng.integers(1, 7)) :] = True
    return reference, prediction


def draw_sheets(rng: np.random.Generator) -> Pair:
    masks = np.zeros((2, 8, 9, 10), bool)
    for mask in masks:
        axis = rng.integers(3)
        np.moveaxis(mask, axis, 0)[rng.integers(mask.shape[axis])] = True
        mask &= rng.random(mask.shape) < 0.9  # holes
    return masks[0], masks[1]


def draw_box(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    box = np.zeros(shape, bool)
    box[tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in shape)] = True
    return box


def draw_disjoint(rng: np.random.Generator) -> Pair:
    left, right = draw_box(rng, (6, 8, 6)), draw_box(rng, (6, 8, 6))
    gap = np.zeros((6, 8, int(rng.integers(1, 9))), bool)
    nothing = np.zeros_like(left)
    return np.concatenate([left, gap, nothing], 2), np.concatenate([nothing, gap, right], 2)


def draw_nested(rng: np.random.Generator) -> Pair:
    outer = draw_blob(rng) | draw_box(rng, (9, 14, 12))
    inner = ndimage.binary_erosion(outer, iterations=int(rng.integers(1, 3)))
    return (outer, inner) if inner.any() else (outer, outer)


def draw_identical(rng: np.random.Generator) -> Pair:
    mask = draw_blob(rng)
    return mask, mask.copy()


def draw_fragments(rng: np.random.Generator) -> Pair:
    # a common body, and far crumbs near 5 % of its surface: where the percentile and its weights matter
    reference = np.zeros((8, 16, 24), bool)
    reference[2:6, 4:12, 4:10] = True
    prediction = reference.copy()
    for _ in range(rng.integers(1, 12)):
        prediction[rng.integers(8), rng.integers(16), rng.integers(14, 24)] = True
    return reference, prediction


DRAWS = [
    draw_noise,
    draw_blobs,
    draw_single_voxels,
    draw_border_touching,
    draw_sheets,
    draw_disjoint,
    draw_nested,
    draw_identical,
    draw_fragments,
]


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # the oracle is from SciPy 1.7's time
@pytest.mark.parametrize(
    "draw",
    DRAWS,
)
def test_hd95_equals_the_surface_distance_package(draw: Callable[[np.random.Generator], Pair]) -> None:
    compared = 0
    for seed in range(32):
        rng = np.random.default_rng(seed)
        reference, prediction = draw(rng)
        if not reference.any() or not prediction.any():
            continue
        spacing_mm = SPACINGS_MM[seed % 3] if seed % 4 else tuple(rng.uniform(0.4, 5, 3))
        surfaces = compute_surface_distances(reference, prediction, spacing_mm)
        # where the surface share is 95 % to the last digits, rounding decides which distance the oracle takes
        low, high = (compute_robust_hausdorff(surfaces, 95 + nudge) for nudge in (-1e-8, 1e-8))
        value = hd95(reference, prediction, spacing_mm)
        assert low - 1e-6 <= value <= high + 1e-6, (seed, spacing_mm)
        compared += low == high
    assert compared >= 28  # nearly all are comparisons with one number


@pytest.mark.parametrize(
    "shift", [(0, 0, 3), (0, 3, 0), (3, 0, 0), (0, 0, 1), (2, 1, 0), (1, 2, 3), (-1, 2, -3), (0, 0, 0)]
)
def test_hd95_of_two_single_voxels_is_the_length_of_their_shift(shift: tuple[int, int, int]) -> None:
    # Of a voxel's 8 corners, all of one area, at least one is as far from the other voxel as the shift is
    # long, and it weighs 1/8: more than 5 %.
    spacing_mm = (1, 1, 2)
    here = voxels((9, 9, 9), (4, 4, 4))
    there = voxels((9, 9, 9), tuple(np.add((4, 4, 4), shift)))
    assert hd95(here, there, spacing_mm) == pytest.approx(math.hypot(*np.multiply(shift, spacing_mm)))


@pytest.mark.parametrize(("axis", "expected_mm"), [(0, 5 * 1.5), (1, 5 * 2.0), (2, 5 * 0.25)])
def test_hd95_of_two_parallel_sheets_is_their_distance(axis: int, expected_mm: float) -> None:
    sheets = np.zeros((2, 9, 9, 9), bool)
    for sheet, place in zip(sheets, (1, 6), strict=True):
        np.moveaxis(sheet, axis, 0)[place] = True
    assert hd95(*sheets, (1.5, 2.0, 0.25)) == pytest.approx(expected_mm)


def test_hd95_of_a_full_and_a_smaller_volume_sees_the_outer_border() -> None:
    # the volume's own border is surface too: 2 slices less on one side are 2 slices of distance
    full = np.ones((8, 4, 4), bool)
    part = full.copy()
    part[:2] = False
    assert hd95(full, part, (2.0, 1, 1)) == pytest.approx(4)


def test_hd95_overlooks_less_than_5_percent_of_the_surface_and_sees_more() -> None:
    # The body's surface is about 6 * 14^2 = 1176, a lone voxel's sqrt(3) = 1.7: 5 % are about 36 of them.
    body = np.zeros((16, 16, 140), bool)
    body[1:15, 1:15, 1:15] = True
    few, many = body.copy(), body.copy()
    few[1:16:4, 1:16:4, 100] = True  # 16 voxels
    many[1:16:4, 1:16:4, 100:140:10] = True  # 64 voxels
    for reference, prediction in ((body, few), (few, body)):
        assert hd95(reference, prediction, (1, 1, 1)) == 0
    for reference, prediction in ((body, many), (many, body)):
        assert hd95(reference, prediction, (1, 1, 1)) > 85


@pytest.mark.parametrize(
    "spacing_mm",
    [(1, 1, 1), (3.3, 0.9, 0.9), (0.9, 3.3, 0.9), (0.9, 0.9, 3.3), (0.5, 0.9, 3.3)],  # one way to each plane
)
@pytest.mark.parametrize("apart", [0, 150])  # mingled, and 260 mm or more from each other
def test_nearest_distances_are_those_of_all_pairs(spacing_mm: tuple[float, ...], apart: int) -> None:
    rng = np.random.default_rng(0)
    points, others = rng.integers(-4, 20, (60, 3)), rng.integers(3, 31, (45, 3)) + apart
    offsets = (points[:, None] - others[None]) * np.asarray(spacing_mm)  # (60, 45, 3)
    expected = np.sqrt((offsets**2).sum(2)).min(1)
    np.testing.assert_allclose(nearest_distances_mm(points, others, spacing_mm), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (1, 1, 2), (0.7, 1.3, 2.1)])
@pytest.mark.parametrize(
    "lesion", [[(0, 0, 0)], [(0, 0, 0), (0, 0, 1)], [(0, 0, 0), (0, 0, 1), (0, 1, 0)], [(0, 0, 0), (0, 1, 1)]]
)
def test_hd95_where_exactly_95_percent_of_the_surface_is_matched(
    lesion: list[tuple[int, int, int]], spacing_mm: tuple[float, float, float]
) -> None:
    # 20 equal lesions, one of them missed: 19 / 20 of the surface is at distance 0, so the percentile is 0
    # by definition. The package rounds some of these to the missed lesion's distance, which is let pass; but
    # neither our own rounding nor the direction of the axes may decide.
    reference = np.zeros((4, 16, 80), bool)
    for number in range(20):
        for z, y, x in lesion:
            reference[1 + z, 1 + y + 4 * (number // 10), 1 + x + 8 * (number % 10)] = True
    prediction = reference.copy()
    prediction[:, 4:, 70:] = False
    assert reference.sum() - prediction.sum() == len(lesion)
    official = compute_robust_hausdorff(compute_surface_distances(reference, prediction, spacing_mm), 95)
    mirrors = [(step_y, step_x) for step_y in (1, -1) for step_x in (1, -1)]
    values = {hd95(reference[:, ::y, ::x], prediction[:, ::y, ::x], spacing_mm) for y, x in mirrors}
    assert values in ({0.0}, {float(official)})


def is_tied(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...]) -> bool:
    # 95 % of the surface reached to the last digits: a test of its own, above
    for distance, area in surface_distances_mm(reference, prediction, spacing_mm):
        share = np.cumsum(area[np.argsort(distance)]) / area.sum()
        if np.abs(share - 0.95).min() < 1e-9:
            return True
    return False


@st.composite
def draw_pair_and_spacing(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    masks = draw(arrays.arrays(bool, st.tuples(st.just(2), *[st.integers(1, 5)] * 3)))
    spacing_mm = draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.3, 3.0])] * 3))
    assume(masks[0].any() and masks[1].any())
    assume(not is_tied(masks[0], masks[1], spacing_mm))
    return masks[0], masks[1], spacing_mm


@settings(max_examples=80)
@given(draw_pair_and_spacing(), st.integers(0, 3), st.integers(0, 3), st.floats(0.1, 10))
def test_hd95_follows_the_geometry(
    drawn: tuple[np.ndarray, np.ndarray, tuple[float, ...]], before: int, after: int, scale: float
) -> None:
    reference, prediction, spacing_mm = drawn
    value = hd95(reference, prediction, spacing_mm)
    assert value == hd95(prediction, reference, spacing_mm)
    assert hd95(reference, reference, spacing_mm) == 0
    extent = math.hypot(*np.multiply(reference.shape, spacing_mm))
    assert 0 <= value <= extent

    padding = ((before, after), (after, before), (before, before))
    moved = np.pad(reference, padding), np.pad(prediction, padding)
    assert hd95(*moved, spacing_mm) == pytest.approx(value)

    for axis in range(3):
        assert hd95(np.flip(reference, axis), np.flip(prediction, axis), spacing_mm) == pytest.approx(value)
    turned = tuple(spacing_mm[axis] for axis in (2, 0, 1))
    assert hd95(reference.transpose(2, 0, 1), prediction.transpose(2, 0, 1), turned) == pytest.approx(value)

    scaled = tuple(scale * edge for edge in spacing_mm)
    assert hd95(reference, prediction, scaled) == pytest.approx(scale * value)


def test_hd95_leaves_its_input_as_it_was() -> None:
    rng = np.random.default_rng(0)
    reference, prediction = draw_noise(rng)
    copies = reference.copy(), prediction.copy()
    hd95(reference, prediction, (1, 1, 1))
    assert np.array_equal(reference, copies[0])
    assert np.array_equal(prediction, copies[1])


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@pytest.mark.parametrize("draw", DRAWS)
def test_surface_dice_equals_the_surface_distance_package(
    draw: Callable[[np.random.Generator], Pair],
) -> None:
    compared = 0
    for seed in range(32):
        rng = np.random.default_rng(seed)
        reference, prediction = draw(rng)
        if not reference.any() or not prediction.any():
            continue
        spacing_mm = SPACINGS_MM[seed % 3] if seed % 4 else tuple(rng.uniform(0.4, 5, 3))
        tolerance_mm = (0.0, 1.0, 1.7, 4.1)[seed % 4]
        surfaces = compute_surface_distances(reference, prediction, spacing_mm)
        expected = compute_surface_dice_at_tolerance(surfaces, tolerance_mm)
        value = surface_metrics(reference, prediction, spacing_mm, tolerance_mm)[1]
        assert value == pytest.approx(expected, abs=1e-9), (seed, spacing_mm)
        assert surface_metrics(reference, prediction, spacing_mm, tolerance_mm) == (
            hd95(reference, prediction, spacing_mm),
            value,
        )
        compared += 1
    assert compared >= 28


@pytest.mark.filterwarnings("ignore")  # the oracle announces what it will drop
@pytest.mark.parametrize("draw", [draw_blobs, draw_nested, draw_fragments, draw_disjoint])
def test_surface_dice_equals_that_of_monai(draw: Callable[[np.random.Generator], Pair]) -> None:
    metrics = pytest.importorskip("monai.metrics")
    for seed in range(8):
        rng = np.random.default_rng(seed)
        reference, prediction = draw(rng)
        spacing_mm = SPACINGS_MM[seed % 4]
        as_tensor = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
        expected = metrics.compute_surface_dice(
            *as_tensor, [1.1], include_background=True, spacing=spacing_mm, use_subvoxels=True
        )
        value = surface_metrics(reference, prediction, spacing_mm, 1.1)[1]
        assert value == pytest.approx(float(expected), abs=1e-5), (seed, spacing_mm)


def test_surface_dice_of_parallel_sheets_by_hand() -> None:
    # 5 slices of 0.5 mm apart: the faces that look at each other are 4 of them from the other sheet, the
    # outer ones 5
    sheets = np.zeros((2, 9, 6, 6), bool)
    sheets[0, 1], sheets[1, 6] = True, True
    assert surface_metrics(*sheets, (0.5, 1, 1), 2.49)[1] == pytest.approx(0.5)
    assert surface_metrics(*sheets, (0.5, 1, 1), 2.5)[1] == 1
    assert surface_metrics(*sheets, (0.5, 1, 1), 1.99)[1] == 0


def test_surface_dice_counts_what_lies_on_the_tolerance() -> None:
    # 0.1 + 0.2 is not 0.3 to a computer; three voxels of 0.1 mm are
    masks = np.zeros((2, 3, 3, 9), bool)
    masks[0, 1, 1, 2], masks[1, 1, 1, 5] = True, True
    assert surface_metrics(*masks, (0.1, 0.1, 0.1), 0.3)[1] == 1


@settings(max_examples=40)
@given(draw_pair_and_spacing(), st.floats(0, 3), st.floats(0, 3))
def test_surface_dice_is_bounded_symmetric_and_grows_with_the_tolerance(
    drawn: tuple[np.ndarray, np.ndarray, tuple[float, ...]], tolerance_mm: float, more_mm: float
) -> None:
    reference, prediction, spacing_mm = drawn
    value = surface_metrics(reference, prediction, spacing_mm, tolerance_mm)[1]
    assert 0 <= value <= 1
    assert value == pytest.approx(surface_metrics(prediction, reference, spacing_mm, tolerance_mm)[1])
    assert surface_metrics(reference, reference, spacing_mm, 0)[1] == 1
    assert value <= surface_metrics(reference, prediction, spacing_mm, tolerance_mm + more_mm)[1]


def test_bounding_box_by_hand() -> None:
    mask = voxels((5, 6, 7), (1, 5, 2), (3, 4, 2))
    assert bounding_box(mask) == (slice(1, 4), slice(4, 6), slice(2, 3))
    assert bounding_box(np.ones((2, 3), bool)) == (slice(0, 2), slice(0, 3))


def sweep_of(*cases: dict[float, float]) -> np.ndarray:
    """Dice (cases, 1, T), 0 where none is given."""
    dice = np.zeros((len(cases), 1, len(THRESHOLDS)))
    for case, values in zip(dice, cases, strict=True):
        for threshold, value in values.items():
            case[0, np.flatnonzero(np.isclose(THRESHOLDS, threshold))] = value
    return dice


def test_a_threshold_that_is_better_by_chance_is_not_chosen():
    # 0.1 is ahead of 0.5 by 0.02 on average; differences 0.2, -0.1, -0.04: standard error 0.0917
    assert choose_thresholds(sweep_of({0.1: 0.8, 0.5: 0.6}, {0.1: 0.5, 0.5: 0.6}, {0.1: 0.6, 0.5: 0.64})) == [
        0.5
    ]
    # the same mean, but in each case: standard error 0.0029
    always = ({0.1: 0.62, 0.5: 0.6}, {0.1: 0.625, 0.5: 0.6}, {0.1: 0.655, 0.5: 0.64})
    assert choose_thresholds(sweep_of(*always)) == [0.1]


def test_of_thresholds_that_are_as_good_the_one_next_to_a_half_is_chosen():
    case = {0.1: 0.9, 0.3: 0.9, 0.8: 0.9}
    assert choose_thresholds(sweep_of(case, case)) == [0.3]
    # 0.4 and 0.6 are as near; 0.6 has the higher mean and both are within a standard error
    assert choose_thresholds(sweep_of({0.4: 0.9, 0.6: 0.8}, {0.4: 0.5, 0.6: 0.7})) == [0.6]


def test_one_case_says_nothing_of_the_threshold():
    assert choose_thresholds(sweep_of({0.1: 0.9, 0.5: 0.1})) == [0.5]


def test_each_region_has_its_own_threshold():
    low, high = sweep_of({0.2: 0.9}, {0.2: 0.8}), sweep_of({0.7: 0.9}, {0.7: 0.8})
    assert choose_thresholds(np.concatenate([low, high], axis=1)) == [0.2, 0.7]


@given(arrays.arrays(float, (5, 1, len(THRESHOLDS)), elements=st.floats(0, 1)))
def test_the_threshold_chosen_is_never_further_from_a_half_than_the_best(dice):
    best = THRESHOLDS[dice[:, 0].mean(0).argmax()]
    assert abs(choose_thresholds(dice)[0] - 0.5) <= abs(best - 0.5) + 1e-9
