"""Training slabs that lose scalp and skull: a row of `compare_networks`, not in training."""

from typing import Any

import albumentations as A
import cv2
import numpy as np

from cohort.augmentation import build_augmentation
from cohort.preprocess import BRAIN_SLICE_VOXELS, QUARTILE_DISTANCE, Z_RANGE
from model_drunet_v2 import HEAD_STEP

STRIP_DEPTH = (0.02, 0.12)  # of the slice's side: how deep the removal of scalp and skull cuts


def build_stripping(share: float) -> A.Compose:
    """Return the training transforms with `StripHead`, of that probability, before the first resampling."""
    transforms = list(build_augmentation().transforms)
    transforms.insert(2, StripHead(STRIP_DEPTH, share))
    return A.Compose(transforms)


class StripHead(A.ImageOnlyTransform):
    """Removes the outside of the head to a random depth, as a skull stripping of unknown exactness does.

    What lies less deep in the head than a share of the slice's side within `depth` becomes air, but for the
    tumour. Each channel is then normalised again by median and interquartile range of what is left, as a
    stripped volume would be (`cohort.preprocess.normalise_volume`). A network that has seen whole heads
    alone meets a stripped brain as another world.
    """

    def __init__(self, depth: tuple[float, float], p: float) -> None:
        super().__init__(p=p)
        self.depth = depth

    @property
    def targets_as_params(self) -> list[str]:
        """Return what is needed beside the image."""
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Return the depth in pixels and the tumour as (H, W) bool."""
        depth = self.random_generator.uniform(*self.depth) * min(params["shape"][:2])
        return {"depth": depth, "tumour": data["mask"].max(axis=2) > 0}

    def apply(self, img: np.ndarray, depth: float, tumour: np.ndarray, **_: Any) -> np.ndarray:
        """Return the image (H, W, C) float32 without what is outside, in 0..1."""
        inside = (depth_in_head(img) > depth) | tumour
        if np.count_nonzero(inside) < BRAIN_SLICE_VOXELS:
            return img
        channels = [
            strip_channel(np.ascontiguousarray(img[..., index]), inside) for index in range(img.shape[2])
        ]
        return np.stack(channels, axis=2)


def depth_in_head(image: np.ndarray) -> np.ndarray:
    """Return how many pixels deep each pixel of (H, W, C) lies in the filled head, (H, W) float32."""
    brightness = image.mean(axis=2)
    low, high = brightness.min(), brightness.max()
    head = (brightness > low + HEAD_STEP * (high - low)).astype(np.uint8)
    outlines, _ = cv2.findContours(head, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(head, outlines, -1, 1, cv2.FILLED)
    return cv2.distanceTransform(np.pad(head, 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[
        1:-1, 1:-1
    ]  # beyond the slice is air


def strip_channel(pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return (H, W) float32 in 0..1 with air outside, and what is inside normalised by itself."""
    zero, unit = -Z_RANGE[0] / (Z_RANGE[1] - Z_RANGE[0]), 1 / (Z_RANGE[1] - Z_RANGE[0])
    low, median, high = np.percentile(pixels[inside], [25, 50, 75])
    scale = unit * QUARTILE_DISTANCE / (high - low) if high > low else 1.0
    stripped = np.where(inside, pixels, pixels.min())
    return np.clip((stripped - median) * scale + zero, 0, 1).astype(np.float32)
