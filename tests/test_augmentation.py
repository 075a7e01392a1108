"""Augmentation: what each transform of ours may change, and what it must leave."""

import numpy as np
import pytest
from scipy import ndimage

from augmentation_v2 import BIAS_GRID, BiasField, build_augmentation

SIDE = 64


def under_field(image: np.ndarray, seed: int, strength: float = 0.35) -> np.ndarray:
    transform = BiasField(strength, p=1)
    transform.set_random_seed(seed)
    return transform(image=image)["image"]


@pytest.mark.parametrize("background", [0.0, 0.2])
def test_a_bias_field_multiplies_what_is_above_background_alike_in_all_slices(background):
    above = np.zeros((SIDE, SIDE, 3), np.float32)
    above[8:56, 8:56] = (0.1, 0.2, 0.05)
    for seed in range(10):
        out = under_field(above + np.float32(background), seed)
        assert out.dtype == np.float32
        assert out[:8] == pytest.approx(background, abs=1e-6)
        field = (out - background)[8:56, 8:56] / above[8:56, 8:56]
        assert (field > 0).all()
        np.testing.assert_allclose(field[..., 1:], np.repeat(field[..., :1], 2, axis=2), rtol=1e-3)


def test_a_bias_field_is_smooth_and_as_strong_as_asked_for():
    image = np.full((SIDE, SIDE, 1), 0.05, np.float32)
    image[0, 0] = 0
    logarithms = np.stack([np.log(under_field(image, seed)[1:, 1:, 0] / 0.05) for seed in range(200)])
    # A cubic step between neighbouring values, of which the largest of 16 are 5 SD apart at the very most.
    steepest = 2 * 5 * 0.35 / (SIDE / BIAS_GRID)
    assert np.abs(np.diff(logarithms, axis=1)).max() < steepest
    assert np.abs(np.diff(logarithms, axis=2)).max() < steepest
    # At the centres of the grid, where nothing is interpolated, the SD is that of a normal value times a
    # uniform one: strength / sqrt(3).
    centres = logarithms[:, 7::16, 7::16]
    assert centres.std() == pytest.approx(0.35 / np.sqrt(3), rel=0.15)
    assert centres.mean() == pytest.approx(0, abs=0.03)
    assert (logarithms.std((1, 2)) > 0.02).mean() > 0.8  # a field, not one factor


def test_a_bias_field_stays_in_range_and_leaves_a_constant_slab():
    bright = np.ones((SIDE, SIDE, 2), np.float32)
    bright[:4] = 0
    assert max(under_field(bright, seed).max() for seed in range(20)) == 1
    constant = np.full((SIDE, SIDE, 2), 0.4, np.float32)
    assert (under_field(constant, 3) == constant).all()


def test_the_mask_is_not_resampled_by_what_changes_intensities():
    generator = np.random.default_rng(0)
    image = ndimage.gaussian_filter(generator.random((SIDE, SIDE, 3)), (3, 3, 0)).astype(np.float32)
    mask = (generator.random((SIDE, SIDE, 1)) < 0.3).astype(np.uint8)
    compose = build_augmentation()
    changed = 0
    for transform in compose.transforms[3:]:
        transform.p = 1
        transform.set_random_seed(1)
        out = transform(image=image, mask=mask)
        assert (out["mask"] == mask).all()
        assert out["image"].dtype == np.float32
        assert out["image"].shape == image.shape
        changed += bool((out["image"] != image).any())
    assert changed == len(compose.transforms[3:])
