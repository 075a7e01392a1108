"""Augmentation: what each transform of ours may change, and what it must leave."""

import numpy as np
import pytest
from scipy import ndimage

from cohort.augmentation import BIAS_GRID, BiasField, TumourContrast, build_augmentation, seed_transforms

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


def test_brightness_and_contrast_are_a_factor_and_an_offset_within_their_limits_clipped_to_0_1():
    (transform,) = (each for each in build_augmentation().transforms if "Brightness" in type(each).__name__)
    assert transform.p == 0.5
    transform.p = 1
    transform.set_random_seed(0)
    image = np.full((SIDE, SIDE, 3), 0.5, np.float32)
    image[:8], image[8:16], image[16:24] = 0.4, 0, 1
    factors, offsets = [], []
    for _ in range(300):
        out = transform(image=image)["image"]
        assert out.dtype == np.float32
        factor = (out[40, 0, 0] - out[0, 0, 0]) / 0.1
        offset = out[40, 0, 0] - factor * 0.5
        expected = np.clip(image * factor + offset, 0, 1)
        np.testing.assert_allclose(out, expected, atol=1e-5)  # the same in all slices of the slab
        factors.append(factor)
        offsets.append(offset)
    assert (min(factors), max(factors)) == pytest.approx((0.75, 1.25), abs=0.01)
    assert (min(offsets), max(offsets)) == pytest.approx((-0.08, 0.08), abs=0.004)


def with_contrast(
    image: np.ndarray, mask: np.ndarray, factor: float, keep_border: bool = False
) -> np.ndarray:
    transform = TumourContrast((factor, factor), p=1)
    params = transform.get_params_dependent_on_data({}, {"mask": mask})
    assert params["factor"] == factor
    return transform.apply(image, **(params | {"keep_border": keep_border}))


def test_a_tumours_contrast_to_its_rim_is_scaled_in_each_channel_apart():
    mask = np.zeros((SIDE, SIDE, 2), np.uint8)
    mask[20:44, 20:44, 0] = 1
    mask[24:40, 24:40, 1] = 1  # of several regions the tumour is what any of them holds
    image = np.full((SIDE, SIDE, 2), (0.3, 0.5), np.float32)
    image[20:44, 20:44] = (0.7, 0.4)  # contrast 0.4, and -0.1 where tumour is dark
    image[30, 30] += 0.05  # texture
    for factor, inside in ((0.5, (0.5, 0.45)), (1.2, (0.78, 0.38)), (1.0, (0.7, 0.4)), (-0.5, (0.1, 0.55))):
        for keep_border in (False, True):
            out = with_contrast(image, mask, factor, keep_border)
            assert out.dtype == np.float32
            np.testing.assert_allclose(out[32, 33], inside, atol=1e-3)
            np.testing.assert_allclose(out[30, 30] - out[30, 33], 0.05, atol=1e-3)
            assert (out[:10] == image[:10]).all()
            assert (out[:, 54:] == image[:, 54:]).all()
            if factor != 1:
                at_border = (out - image)[20, 32, 0] / ((factor - 1) * 0.4)
                # a step blurred by an SD of two pixels: half a pixel inside of it, and 3.5 outside
                assert at_border == pytest.approx(0.040 if keep_border else 0.599, abs=0.01)
    assert image[32, 33] == pytest.approx((0.7, 0.4))  # the input stays as it was


def test_a_tumours_contrast_is_found_at_the_edge_of_a_slab_and_nowhere_without_tumour():
    image = np.full((SIDE, SIDE, 1), 0.2, np.float32)
    image[:30, :30] = 0.9
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    assert (with_contrast(image, mask, 0.3) == image).all()
    mask[:30, :30] = 1
    assert with_contrast(image, mask, 0)[5, 5] == pytest.approx(0.2, abs=1e-3)
    assert with_contrast(image, mask, 3).max() == 1  # clipped
    assert (with_contrast(image, np.ones_like(mask), 0.3) == image).all()  # no rim to compare with
    mask[:] = 0
    mask[40:43, 40:43] = 1  # all border
    assert (with_contrast(image, mask, 0, keep_border=True) == image).all()


def test_a_tumours_contrast_is_drawn_within_its_limits_with_and_without_border():
    transform = TumourContrast((-0.3, 1.2), p=1)
    transform.set_random_seed(0)
    drawn = [transform.get_params_dependent_on_data({}, {"mask": np.ones((4, 4, 1))}) for _ in range(300)]
    factors = np.array([params["factor"] for params in drawn])
    assert factors.min() == pytest.approx(-0.3, abs=0.05)
    assert factors.max() == pytest.approx(1.2, abs=0.05)
    assert np.mean([params["keep_border"] for params in drawn]) == pytest.approx(0.5, abs=0.1)


def test_tumours_become_fainter_and_up_to_three_times_as_bright():
    changes = [each for each in build_augmentation().transforms if isinstance(each, TumourContrast)]
    image = np.full((SIDE, SIDE, 1), 0.2, np.float32)
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[10:30, 10:30] = 1
    image[mask > 0] = 0.4
    factors = []
    for seed, change in enumerate(changes):
        change.set_random_seed(seed)
        centres = np.array([change(image=image, mask=mask)["image"][20, 20, 0] for _ in range(1000)])
        factors.append((centres - 0.2) / 0.2)
    fainter, brighter = factors
    assert np.mean(abs(fainter - 1) > 1e-3) == pytest.approx(0.35, abs=0.04)
    assert (fainter.min(), fainter.max()) == pytest.approx((-0.3, 1.2), abs=0.05)
    assert np.mean(abs(brighter - 1) > 1e-3) == pytest.approx(0.2, abs=0.04)
    assert (brighter.min(), brighter.max()) == pytest.approx((1, 3), abs=0.05)


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


def test_whether_a_transform_acts_says_nothing_of_the_others():
    transforms = build_augmentation()
    transforms.save_applied_params = True  # lists what has acted
    image, mask = np.full((SIDE, SIDE, 3), 0.4, np.float32), np.zeros((SIDE, SIDE, 1), np.uint8)
    image[8:56, 8:56] += 0.2
    mask[20:40, 20:40] = 1
    names = ["HorizontalFlip", "VerticalFlip", "BiasField", "RandomBrightnessContrast", "GaussNoise"]
    acted = np.zeros((600, len(names)), bool)
    for seed in range(len(acted)):
        seed_transforms(transforms, seed)
        applied = {name for name, _ in transforms(image=image, mask=mask)["applied_transforms"]}
        acted[seed] = [name in applied for name in names]
    assert acted.mean(0) == pytest.approx([0.5, 0.5, 0.4, 0.5, 0.2], abs=0.07)
    together = np.corrcoef(acted.T) - np.eye(len(names))
    assert np.abs(together).max() < 0.16  # four standard errors of a correlation that is 0
