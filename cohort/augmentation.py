"""Training transforms, made with albumentations: geometry for slab and mask alike, intensities for the slab.

Slabs are float32 (H, W, C*K) in 0..1, masks uint8 (H, W, R). A transform of ours stands where albumentations
has none or is several times slower; `benchmarks/feeding.py` times each.
"""

import os
import random
from typing import Any

import albumentations as A
import cv2
import numpy as np
from albumentations.core.type_definitions import Targets

# albumentations asks a server for its newest version at import otherwise
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# Elastic deformation: displacement in pixels (SD), the distance over which it is smooth (SD of the blur), and
# the distance of the points at which it is drawn.
ELASTIC_SHIFT, ELASTIC_SMOOTH, ELASTIC_STEP = 0.42, 9.0, 4
TUMOUR_EDGE = 2  # pixels (SD) over which a change of a tumour's contrast fades out
BIAS_GRID = 4  # random values across a slice from which a bias field is interpolated


class Warp(A.DualTransform):
    """Affine and mild elastic deformation in one interpolation, the mask by nearest neighbour.

    The affine part is drawn with probability `affine`, the elastic one with `elastic`. Beyond the edge both
    repeat it. They are drawn as A.Affine and A.ElasticTransform (alpha 60, sigma 9 at 256 x 256) draw them,
    but the displacement is drawn on a coarse grid, as it is smooth.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    def __init__(self, affine: float, elastic: float) -> None:
        super().__init__(p=1.0)
        self.affine = affine
        self.elastic = elastic

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the source column and row of every pixel, (H, W) float32 each; None for no deformation."""
        generator = self.random_generator
        is_affine, is_elastic = generator.random(2) < (self.affine, self.elastic)
        if not (is_affine or is_elastic):
            return {"source": None}
        height, width = params["shape"][:2]
        x = np.arange(width, dtype=np.float32)[None]
        y = np.arange(height, dtype=np.float32)[:, None]
        if is_elastic:
            dx, dy = draw_displacement(height, width, generator)
            x, y = x + dx, y + dy
        matrix = draw_affine(height, width, generator) if is_affine else np.eye(2, 3, dtype=np.float32)
        (a, b, c), (d, e, f) = matrix.tolist()
        columns, rows = x * a + (y * b + c), x * d + (y * e + f)
        shape = (height, width)
        return {
            "source": tuple(np.ascontiguousarray(np.broadcast_to(map_, shape)) for map_ in (columns, rows))
        }

    def apply(self, img: np.ndarray, source: tuple[np.ndarray, np.ndarray] | None, **_: Any) -> np.ndarray:
        """Return the image (H, W, C) float32 deformed, by linear interpolation."""
        return img if source is None else warp_channels(img, source, cv2.INTER_LINEAR)

    def apply_to_mask(
        self, mask: np.ndarray, source: tuple[np.ndarray, np.ndarray] | None, **_: Any
    ) -> np.ndarray:
        """Return the mask (H, W, R) uint8 deformed, by nearest neighbour."""
        return mask if source is None else warp_channels(mask, source, cv2.INTER_NEAREST)


def draw_displacement(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Return a smooth random displacement in pixels, (2, height, width) float32: columns, then rows."""
    coarse = (2, -(-height // ELASTIC_STEP), -(-width // ELASTIC_STEP))
    noise = generator.standard_normal(coarse, dtype=np.float32)
    sigma = ELASTIC_SMOOTH / ELASTIC_STEP
    noise *= ELASTIC_SHIFT * 2 * np.sqrt(np.pi) * sigma  # by which blurring divides the SD of white noise
    smooth = (cv2.GaussianBlur(axis, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) for axis in noise)
    return np.stack([cv2.resize(axis, (width, height), interpolation=cv2.INTER_LINEAR) for axis in smooth])


def draw_affine(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Return the (2, 3) matrix from a pixel (column, row, 1) to its source, about the slice's centre.

    Scale within 15 % and shear within 5 degrees for each axis, rotation within 20 degrees, shift within 6 %.
    """
    scale = np.diag(generator.uniform(0.85, 1.15, 2))
    angle, *shears = np.deg2rad(generator.uniform((-20, -5, -5), (20, 5, 5)))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, np.tan(shears[0])], [np.tan(shears[1]), 1]])
    inverse = np.linalg.inv(shear @ rotation @ scale)
    centre = np.array([width - 1, height - 1]) / 2
    shift = generator.uniform(-0.06, 0.06, 2) * (width, height)
    return np.column_stack([inverse, centre - inverse @ (centre + shift)]).astype(np.float32)


def warp_channels(image: np.ndarray, source: tuple[np.ndarray, np.ndarray], interpolation: int) -> np.ndarray:
    """Return (H, W, C) resampled at the source columns and rows, the edge repeated beyond it."""
    groups = [  # OpenCV takes at most four channels
        cv2.remap(image[..., first : first + 4], *source, interpolation, borderMode=cv2.BORDER_REPLICATE)
        for first in range(0, image.shape[2], 4)
    ]
    return np.concatenate([group.reshape(*group.shape[:2], -1) for group in groups], axis=2)


class BiasField(A.ImageOnlyTransform):
    """Multiplies the intensities above background by a smooth random field, as a receive coil does.

    The field's logarithm is a cubic interpolation of BIAS_GRID x BIAS_GRID normal values whose SD is drawn up
    to `strength`; all slices get the same. Each channel's background is its least value.
    """

    def __init__(self, strength: float, p: float) -> None:
        super().__init__(p=p)
        self.strength = strength

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the field (H, W) float32."""
        generator = self.random_generator
        coarse = generator.standard_normal((BIAS_GRID, BIAS_GRID), dtype=np.float32)
        coarse *= np.float32(generator.uniform(0, self.strength))
        height, width = params["shape"][:2]
        return {"field": np.exp(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))}

    def apply(self, img: np.ndarray, field: np.ndarray, **_: Any) -> np.ndarray:
        """Return the image (H, W, C) float32 under the field, clipped to 0..1."""
        channels = cv2.split(img)  # numpy is several times slower on interleaved channels
        for channel in channels:
            background = channel.min()
            channel -= background
            channel *= field
            channel += background
            np.clip(channel, 0, 1, out=channel)
        return cv2.merge(channels).reshape(img.shape)


class TumourContrast(A.ImageOnlyTransform):
    """Scales a tumour's contrast to what surrounds it by a factor within `limits`; below 0 it is inverted.

    The contrast of a channel is the mean inside the mask (all regions) minus the mean of the rim around it;
    texture stays. In half of the draws the tumour's border keeps its contrast, as in gliomas whose FLAIR is
    suppressed but for a bright rim (T2-FLAIR mismatch: Patel et al. 2017, doi 10.1158/1078-0432.CCR-17-0560).
    A network that has seen few tumours as bright as the brain, or darker, misses them; one that has seen none
    brighter than scalp does so on a scanner where they are. A slab without tumour stays as it is.
    """

    def __init__(self, limits: tuple[float, float], p: float) -> None:
        super().__init__(p=p)
        self.limits = limits

    @property
    def targets_as_params(self) -> list[str]:
        """Return what is needed beside the image."""
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the factor, whether the border stays, and the tumour as (H, W) uint8."""
        return {
            "factor": self.random_generator.uniform(*self.limits),
            "keep_border": self.random_generator.random() < 0.5,
            "tumour": np.ascontiguousarray(data["mask"].max(axis=2)),
        }

    def apply(
        self, img: np.ndarray, factor: float, keep_border: bool, tumour: np.ndarray, **_: Any
    ) -> np.ndarray:
        """Return the image (H, W, C) float32 with the tumour's contrast changed, clipped to 0..1."""
        left, top, width, height = cv2.boundingRect(tumour)
        margin = 4 * TUMOUR_EDGE
        window = (
            slice(max(0, top - margin), top + height + margin),
            slice(max(0, left - margin), left + width + margin),
        )
        near = tumour[window]
        share = fade_out(near)
        inside, rim = near > 0, (near == 0) & (share > 0.02)
        if not (inside.any() and rim.any()):
            return img
        if keep_border:
            share = fade_out(cv2.erode(near, np.ones((3, 3), np.uint8), iterations=2 * TUMOUR_EDGE))
        out = img.copy()
        for channel in range(img.shape[2]):
            pixels = out[..., channel][window]
            contrast = pixels[inside].mean() - pixels[rim].mean()
            np.clip(pixels + (factor - 1) * contrast * share, 0, 1, out=pixels)
        return out


def fade_out(mask: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) uint8 as float32 shares, 0..1, whose border is smooth."""
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), TUMOUR_EDGE)


def seed_transforms(transforms: A.Compose, seed: int) -> None:
    """Seed transforms so that they draw one after another from one generator.

    `Compose.set_random_seed` gives each of them a generator of its own with one and the same seed: all would
    draw the same number to decide whether they act, so that no flip came without the other.
    """
    transforms.set_random_state(np.random.default_rng(seed), random.Random(seed))


def build_augmentation() -> A.Compose:
    """Return the training transforms, for float32 slabs (H, W, C*K) in 0..1 and uint8 masks (H, W, R).

    All slices of a slab get the same geometry and the same contrast; only noise differs from slice to slice.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            Warp(affine=0.6, elastic=0.15),
            TumourContrast(limits=(-0.3, 1.2), p=0.35),
            TumourContrast(limits=(1.2, 3.0), p=0.2),
            BiasField(strength=0.35, p=0.4),
            A.RandomBrightnessContrast(brightness_limit=0.08, contrast_limit=0.25, p=0.5),
            A.RandomGamma(gamma_limit=(70, 150), p=0.3),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.4, 1.2), p=0.15),
            A.GaussNoise(std_range=(0.005, 0.03), p=0.2),
        ]
    )
