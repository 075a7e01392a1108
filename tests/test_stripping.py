"""Heads that lose scalp and skull in training: how deep, what stays, and how it is normalised."""

import numpy as np
import pytest

from benchmarks.stripping import StripHead, build_stripping, depth_in_head
from cohort.preprocess import QUARTILE_DISTANCE, Z_RANGE

SIDE = 64


def stripped(image: np.ndarray, mask: np.ndarray, depth: float) -> np.ndarray:
    transform = StripHead((depth, depth), p=1)
    return transform(image=image, mask=mask)["image"]


def make_head(side: int = SIDE, margin: int = 8) -> np.ndarray:
    """Return a square head (side, side, 3) of noise in air of 0.1, with a hole of air inside."""
    image = np.full((side, side, 3), 0.1, np.float32)
    inner = side - 2 * margin
    image[margin:-margin, margin:-margin] = np.random.default_rng(0).uniform(0.4, 0.6, (inner, inner, 3))
    image[side // 2 : side // 2 + 3, side // 2 : side // 2 + 3] = 0.1
    return image


def test_depth_in_a_head_is_the_distance_to_air_outside_of_it():
    depth = depth_in_head(make_head())
    assert (depth[:8] == 0).all()
    np.testing.assert_allclose(depth[SIDE // 2, 8:16], np.arange(1, 9), atol=0.1)
    assert depth[33, 33] > 20  # air inside of the head is no outside
    edge = depth_in_head(np.pad(make_head()[8:-8, 8:-8], ((0, 0), (0, 8), (0, 0))))
    assert edge[0].max() == pytest.approx(1, abs=0.1)  # beyond the slice is air


def test_stripping_leaves_what_is_deep_and_the_tumour_and_normalises_it_by_itself():
    image = make_head()
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[10:13, 10:13] = 1
    out = stripped(image, mask, depth=0.1)  # 6.4 pixels
    inside = np.zeros((SIDE, SIDE), bool)
    inside[14:50, 14:50] = True  # pixels at a depth of 7 or more
    inside[10:13, 10:13] = True
    assert out.dtype == np.float32
    for channel in range(3):
        z = out[..., channel] * (Z_RANGE[1] - Z_RANGE[0]) + Z_RANGE[0]
        low, median, high = np.percentile(z[inside], [25, 50, 75])
        assert median == pytest.approx(0, abs=1e-4)
        assert high - low == pytest.approx(QUARTILE_DISTANCE, abs=1e-3)
        assert len(np.unique(z[~inside])) == 1
        order = np.argsort(image[inside][:, channel], kind="stable")
        assert (np.diff(z[inside][order]) >= -1e-5).all()  # an increasing map of what was there
    assert mask.sum() == 9


def test_stripping_leaves_a_slab_without_a_head_and_shares_of_it_are_drawn():
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    flat = np.full((SIDE, SIDE, 3), 0.3, np.float32)
    assert np.array_equal(stripped(flat, mask, 0.1), flat)
    share = [each for each in build_stripping(0.4).transforms if isinstance(each, StripHead)]
    assert [each.p for each in share] == [0.4]
