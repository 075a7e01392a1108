"""Post-processing by hand, and the choice on validation against trying every setting the plain way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from audit.postprocess import (
    candidate_settings,
    choose_postprocessing,
    clean_region,
    crop_case,
    describe_postprocessing,
    postprocess,
    settings_of,
)
from utils_v2 import dice_score

MM = (1.0, 1.0, 1.0)
OFF = {"min_component_mm3": 0.0, "fill_holes": False, "min_total_mm3": 0.0}
Place = tuple[slice, slice, slice]


def boxes(*places: Place) -> np.ndarray:
    mask = np.zeros((12, 12, 30), bool)
    for place in places:
        mask[place] = True
    return mask


def cube(x: int, side: int, z: int = 3, y: int = 3) -> Place:
    return slice(z, z + side), slice(y, y + side), slice(x, x + side)


def test_small_components_go_and_the_limit_itself_stays() -> None:
    large, small = boxes(cube(2, 4)), boxes(cube(15, 2))
    for minimum, expected in ((8.0, large | small), (8.1, large)):
        cleaned = clean_region(large | small, MM, OFF | {"min_component_mm3": minimum}, None)
        assert np.array_equal(cleaned, expected)
    # 8 voxels of 2 mm3
    setting = OFF | {"min_component_mm3": 16.0}
    assert np.array_equal(clean_region(large | small, (2.0, 1.0, 1.0), setting, None), large | small)


def test_the_largest_component_stays_however_small() -> None:
    mask = boxes(cube(2, 2), cube(15, 1))
    assert np.array_equal(clean_region(mask, MM, OFF | {"min_component_mm3": 1e6}, None), boxes(cube(2, 2)))


def test_components_that_touch_by_a_corner_are_one() -> None:
    mask = boxes(cube(2, 3), cube(5, 1, 6, 6))  # 27 voxels, and one at their corner
    assert np.array_equal(clean_region(mask, MM, OFF | {"min_component_mm3": 28.0}, None), mask)


def test_holes_are_filled_and_open_ones_are_not() -> None:
    shell = boxes(cube(2, 5)) & ~boxes(cube(4, 1, 5, 5))
    assert np.array_equal(clean_region(shell, MM, OFF | {"fill_holes": True}, None), boxes(cube(2, 5)))
    channel = boxes(cube(2, 5)) & ~boxes((slice(5, 6), slice(5, 6), slice(0, 5)))
    assert np.array_equal(clean_region(channel, MM, OFF | {"fill_holes": True}, None), channel)
    # a cavity that is closed by the volume's border alone is open
    border = np.ones((5, 5, 5), bool)
    border[2, 2, :3] = False
    assert np.array_equal(clean_region(border, MM, OFF | {"fill_holes": True}, None), border)


def test_less_than_the_smallest_total_is_emptied() -> None:
    mask = boxes(cube(2, 2), cube(15, 2))
    assert clean_region(mask, MM, OFF | {"min_total_mm3": 16.0}, None).sum() == 16
    assert not clean_region(mask, MM, OFF | {"min_total_mm3": 16.1}, None).any()
    # what is dropped as a component does not count
    both = OFF | {"min_component_mm3": 9.0, "min_total_mm3": 16.0}
    assert not clean_region(boxes(cube(2, 2), cube(15, 1)), MM, both, None).any()


def test_regions_stay_nested_and_inner_ones_follow_a_dropped_outer_one() -> None:
    whole = boxes(cube(2, 4), cube(15, 2))
    core = boxes(cube(2, 2), cube(15, 2))
    masks = np.stack([core, whole])  # the order of the regions does not matter
    cleaned = postprocess(masks, ("TC", "WT"), MM, {"WT": OFF | {"min_component_mm3": 9.0}})
    assert np.array_equal(cleaned[1], boxes(cube(2, 4)))
    assert np.array_equal(cleaned[0], boxes(cube(2, 2)))
    # a hole of the core that lies outside of the whole tumour is not filled
    hole = boxes(cube(4, 1, 5, 5))
    ring = boxes(cube(2, 5)) & ~hole
    masks = np.stack([ring, ring])
    cleaned = postprocess(masks, ("WT", "TC"), MM, {"TC": OFF | {"fill_holes": True}})
    assert np.array_equal(cleaned[1], ring)
    assert np.array_equal(masks, np.stack([ring, ring]))  # the input is as it was


def test_without_settings_masks_come_back_as_they_are() -> None:
    masks = np.stack([boxes(cube(2, 2)), boxes(cube(20, 3))])
    for nothing in (None, {}, settings_of({}), settings_of({"postprocessing": None})):
        assert postprocess(masks, ("WT", "ET"), MM, nothing) is masks
    empty = np.zeros_like(masks)
    everything = {region: OFF | {"fill_holes": True, "min_component_mm3": 5.0} for region in ("WT", "ET")}
    assert not postprocess(empty, ("WT", "ET"), MM, everything).any()


def test_false_crumbs_on_validation_are_learnt_and_good_masks_left_alone() -> None:
    tumour, crumb = boxes(cube(2, 5)), boxes(cube(20, 2))
    clean = crop_case(tumour[None], tumour[None], MM)
    spoilt = crop_case((tumour | crumb)[None], tumour[None], MM)
    chosen = choose_postprocessing([clean, spoilt], ("WT",))
    assert chosen["settings"]["WT"]["min_component_mm3"] == 10  # the smallest candidate above 8 mm3
    assert chosen["validation_dice_before"]["WT"] == pytest.approx((1 + 250 / 258) / 2)
    assert chosen["validation_dice_after"]["WT"] == 1
    untouched = choose_postprocessing([clean, clean], ("WT",))
    assert untouched["settings"] == {}
    assert untouched["validation_dice_after"] == {"WT": 1}


def test_enhancing_tumour_where_there_is_none_is_emptied_and_whole_tumour_never() -> None:
    speck, nothing = boxes(cube(2, 3)), boxes()
    large = boxes(cube(2, 6))
    cases = [crop_case(speck[None], nothing[None], MM), crop_case(large[None], large[None], MM)]
    assert choose_postprocessing(cases, ("ET",))["settings"]["ET"]["min_total_mm3"] == 50
    assert choose_postprocessing(cases, ("WT",))["settings"] == {}


def test_reference_outside_of_the_prediction_counts_as_missed() -> None:
    prediction, reference = boxes(cube(2, 2)), boxes(cube(2, 2), cube(20, 2))
    chosen = choose_postprocessing([crop_case(prediction[None], reference[None], MM)], ("WT",))
    assert chosen["validation_dice_before"]["WT"] == dice_score(reference, prediction)
    empty = crop_case(boxes()[None], reference[None], MM)
    assert choose_postprocessing([empty], ("WT",))["validation_dice_before"]["WT"] == 0


@settings(max_examples=8)
@given(arrays.arrays(bool, (3, 2, 4, 5, 9)), arrays.arrays(bool, (3, 2, 4, 5, 9)), st.booleans())
def test_the_choice_is_the_one_that_trying_all_finds(
    predicted: np.ndarray, reference: np.ndarray, drop_outside: bool
) -> None:
    regions, spacing_mm = ("WT", "ET"), (5.0, 2.0, 1.0)
    predicted[:, 1] &= predicted[:, 0]
    if drop_outside:
        predicted[..., 6:] = False
    pairs = list(zip(predicted, reference, strict=True))
    chosen = choose_postprocessing([crop_case(m, r, spacing_mm) for m, r in pairs], regions)

    def mean_dice(index: int, setting: dict) -> float:
        return float(
            np.mean(
                [dice_score(r[index], postprocess(m, regions, spacing_mm, setting)[index]) for m, r in pairs]
            )
        )

    for index, region in enumerate(regions):
        assert chosen["validation_dice_before"][region] == pytest.approx(mean_dice(index, {}))
        assert chosen["validation_dice_after"][region] == pytest.approx(mean_dice(index, chosen["settings"]))
    tried = [mean_dice(0, {"WT": setting}) for setting in candidate_settings("WT")]
    before, after = (sum(chosen[f"validation_dice_{when}"].values()) for when in ("before", "after"))
    assert after >= before
    if chosen["settings"]:
        assert max(tried) <= chosen["validation_dice_after"]["WT"] + 1e-4 + 1e-12


def test_settings_in_words() -> None:
    assert describe_postprocessing({}) == describe_postprocessing(None) == "none"
    text = describe_postprocessing(
        {"ET": {"min_component_mm3": 10.0, "fill_holes": True, "min_total_mm3": 50.0}}
    )
    assert text == (
        "ET: holes filled, components below 10 mm3 dropped, but for the largest, emptied below 50 mm3 in all"
    )
