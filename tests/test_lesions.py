"""The BraTS 2023 lesion-wise rule, by cases worked out by hand; voxels are 1 mm unless said otherwise."""

import numpy as np
import pytest

from audit.lesions import LesionScores, score_lesions
from utils_v2 import dice_score, hd95

SHAPE = (24, 24, 60)
MM = (1.0, 1.0, 1.0)


def boxes(*places: tuple[slice, slice, slice]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for place in places:
        mask[place] = True
    return mask


def cube(x: int, side: int = 4, z: int = 8, y: int = 8) -> tuple[slice, slice, slice]:
    """Place of a cube of side^3 voxels with its first corner at (z, y, x)."""
    return slice(z, z + side), slice(y, y + side), slice(x, x + side)


def test_both_empty_and_one_empty() -> None:
    empty, one, two = boxes(), boxes(cube(5)), boxes(cube(5), cube(40))
    assert score_lesions(empty, empty, MM) == LesionScores(1, 0, 0, 0, 0)
    assert score_lesions(one, empty, MM) == LesionScores(0, 374, 0, 0, 1)
    assert score_lesions(two, empty, MM) == LesionScores(0, 374, 0, 0, 2)
    assert score_lesions(empty, two, MM) == LesionScores(0, 374, 0, 2, 0)


def test_one_lesion_found_scores_as_the_whole_case_does() -> None:
    reference, prediction = boxes(cube(5)), boxes(cube(7))
    found = score_lesions(reference, prediction, MM)
    assert found == LesionScores(
        dice_score(reference, prediction), hd95(reference, prediction, MM), tp=1, fp=0, fn=0
    )
    assert found.dice == 0.5  # 2 of 4 columns shared


def test_found_missed_and_false_lesions_are_averaged() -> None:
    # found exactly (1, 0 mm), missed (0, 374), false (0, 374)
    reference = boxes(cube(2), cube(20))
    prediction = boxes(cube(2), cube(45))
    assert score_lesions(reference, prediction, MM) == LesionScores(1 / 3, 374 * 2 / 3, 1, 1, 1)


@pytest.mark.parametrize(("gap", "lesions"), [(1, 1), (6, 1), (7, 2)])
def test_pieces_of_the_reference_within_twice_3_voxels_are_one_lesion(gap: int, lesions: int) -> None:
    # dilated by 3 each, two cubes `gap` voxels apart touch up to a gap of 6
    reference = boxes(cube(5), cube(9 + gap))
    assert score_lesions(reference, reference, MM) == LesionScores(1, 0, lesions, 0, 0)
    # one of the two found: 2 * 64 / (128 + 64) of one lesion, or one found and one missed
    found = score_lesions(reference, boxes(cube(5)), MM)
    assert found.dice == pytest.approx(2 / 3 if lesions == 1 else 1 / 2)
    assert (found.tp, found.fn) == (1, lesions - 1)


@pytest.mark.parametrize(("gap", "is_false"), [(2, False), (3, True)])
def test_prediction_beside_a_lesion_is_its_own_up_to_3_voxels_away(gap: int, is_false: bool) -> None:
    # the lesion's extent ends 3 voxels behind its last: a crumb with 2 free voxels between lies on it
    reference = boxes(cube(5))
    prediction = reference | boxes(cube(9 + gap, 1))
    found = score_lesions(reference, prediction, MM)
    assert (found.tp, found.fp) == (1, int(is_false))
    assert found.dice == pytest.approx(1 / 2 if is_false else 2 * 64 / (64 + 65))


def test_dilation_is_with_the_18_neighbourhood() -> None:
    # from a corner, one step moves along two axes at most: (3, 3, 0) is reached in 3 steps, (2, 2, 2) in 3,
    # (3, 3, 3) is 9 / 2 steps away and not reached
    reference = boxes(cube(5))  # last voxel (11, 11, 8)
    for offset, is_false in (((3, 3, 0), False), ((2, 2, 2), False), ((3, 3, 3), True), ((0, 0, 4), True)):
        crumb = np.zeros(SHAPE, bool)
        crumb[tuple(np.add((11, 11, 8), offset))] = True
        assert score_lesions(reference, reference | crumb, MM).fp == int(is_false), offset


def test_lesions_of_at_most_50_mm3_are_not_scored_but_protect_what_touches_them() -> None:
    at_limit = (slice(8, 13), slice(8, 13), slice(30, 32))  # 5 * 5 * 2 = 50
    above = (slice(8, 11), slice(8, 11), slice(30, 36))  # 3 * 3 * 6 = 54
    big = boxes(cube(5))
    # missed: only the larger one counts
    assert score_lesions(big | boxes(at_limit), big, MM) == LesionScores(1, 0, 1, 0, 0)
    assert score_lesions(big | boxes(above), big, MM) == LesionScores(0.5, 187, 1, 0, 1)
    # found: neither a score nor a false positive
    assert score_lesions(big | boxes(at_limit), big | boxes(at_limit), MM) == LesionScores(1, 0, 1, 0, 0)
    # alone: nothing to score
    assert score_lesions(boxes(at_limit), boxes(), MM) == LesionScores(1, 0, 0, 0, 0)
    # 50 is in mm3, not in voxels
    assert score_lesions(boxes(at_limit), boxes(), (1.0, 1.0, 1.1)).fn == 1
    assert score_lesions(boxes(above), boxes(), (0.9, 1.0, 1.0)).fn == 0


def test_false_positives_count_however_small() -> None:
    reference = boxes(cube(5))
    prediction = reference | boxes(cube(30, 1), cube(40, 1))
    assert score_lesions(reference, prediction, MM) == LesionScores(1 / 3, 374 * 2 / 3, 1, 2, 0)
    # touching by a corner is one component (26-connectivity)
    corner = boxes(cube(30, 1, 8, 8), cube(31, 1, 9, 9))
    assert score_lesions(reference, reference | corner, MM).fp == 1


def test_a_component_over_two_lesions_is_the_prediction_of_both() -> None:
    reference = boxes(cube(5), cube(25))
    bridge = boxes((slice(8, 12), slice(8, 12), slice(5, 29)))  # 24 * 16 voxels
    found = score_lesions(reference, bridge, MM)
    assert (found.tp, found.fp, found.fn) == (2, 0, 0)
    assert found.dice == pytest.approx(2 * 64 / (64 + 24 * 16))
    assert found.hd95_mm == pytest.approx(hd95(boxes(cube(5)), bridge, MM))


def test_two_components_at_one_lesion_are_taken_together() -> None:
    reference = boxes((slice(8, 12), slice(8, 12), slice(5, 25)))
    prediction = boxes(cube(5), cube(21))
    found = score_lesions(reference, prediction, MM)
    assert (found.tp, found.fp, found.fn) == (1, 0, 0)
    assert found.dice == dice_score(reference, prediction)


def test_score_does_not_depend_on_place_axes_or_empty_space() -> None:
    rng = np.random.default_rng(0)
    reference = boxes(*(cube(int(x), 5, int(z), int(y)) for x, y, z in rng.integers(0, 18, (4, 3))))
    prediction = boxes(*(cube(int(x), 4, int(z), int(y)) for x, y, z in rng.integers(0, 18, (5, 3))))
    found = score_lesions(reference, prediction, MM)
    moved = [np.pad(mask, ((4, 2), (0, 7), (9, 0))) for mask in (reference, prediction)]
    turned = [mask.transpose(2, 0, 1)[::-1] for mask in (reference, prediction)]
    for other in (moved, turned):
        scores = score_lesions(*other, MM)
        assert (scores.tp, scores.fp, scores.fn) == (found.tp, found.fp, found.fn)
        assert (scores.dice, scores.hd95_mm) == pytest.approx((found.dice, found.hd95_mm))


def test_masks_of_another_shape_or_type_raise() -> None:
    with pytest.raises(ValueError, match="shape"):
        score_lesions(boxes(), boxes()[1:], MM)
    with pytest.raises(ValueError, match="bool"):
        score_lesions(boxes(), boxes().astype(np.uint8), MM)
