"""From cases to normalised volumes on their native grid, and from those to the network's slabs.

Training, validation, audit and prediction all reach pixels through `normalise_volume`, `gather_slab` and
`fit_slices`, so the network never meets a pixel at test time that was made another way at training time.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

Z_RANGE = (-4.0, 8.0)  # normalised intensities are clipped to it; augmentation maps it to 0..1
QUARTILE_DISTANCE = 1.349  # between the quartiles of a normal distribution, in SD
RESIZE_ABOVE = 1.25  # slices up to a quarter larger than the network's input are cropped, larger ones resized
BRAIN_SLICE_VOXELS = 64  # a slice with fewer brain voxels counts as empty


# ------------------------------------------------------------------------------------------------------------
# Normalisation and geometry
# ------------------------------------------------------------------------------------------------------------


def brain_mask(intensities: np.ndarray) -> np.ndarray:
    """Return the bool foreground (D, H, W) of one modality: the brain, or the head where it has its skull.

    Background is the commonest value on the slices' borders. Foreground is what lies above it by a tenth of
    the way to the 99.5th percentile of the brighter voxels, which leaves out the noise of air. All False for
    a constant volume.
    """
    border = np.concatenate([intensities[:, (0, -1), :].ravel(), intensities[:, :, (0, -1)].ravel()])
    values, counts = np.unique(border, return_counts=True)
    background = values[counts.argmax()]
    brighter = intensities[intensities > background]
    if brighter.size == 0:
        return np.zeros(intensities.shape, bool)
    return intensities > background + 0.1 * (np.percentile(brighter, 99.5) - background)


def normalise_volume(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (z-scores (C, D, H, W) float32 in Z_RANGE, `brain_mask` (D, H, W) bool of the first modality).

    The z-score is robust: median and interquartile range / 1.349 of each modality's own foreground stand for
    mean and SD. Outlier voxels move neither, nor does a bright scalp or a large tumour: over the 75 training
    and validation patients of the LGG slices the z of healthy brain had an SD of 0.12 from patient to
    patient, with mean and SD 0.22. Values are rounded to float16, the precision of the cache, so that pixels
    are the same with and without it. A constant modality becomes 0.
    """
    scores = np.zeros_like(volume, dtype=np.float32)
    masks = [brain_mask(intensities) for intensities in volume]
    for channel, (intensities, mask) in enumerate(zip(volume, masks, strict=True)):
        if not mask.any():
            continue
        inside = intensities[mask]
        low, median, high = (float(value) for value in np.percentile(inside, [25, 50, 75]))
        deviation = (high - low) / QUARTILE_DISTANCE or float(inside.std()) or 1.0
        scores[channel] = np.clip((intensities - median) / deviation, *Z_RANGE).astype(np.float16)
    return scores, masks[0]


@dataclass(frozen=True)
class Placement:
    """How native slices lie in the network's input: resized to `inner`, then padded or cropped to `size`."""

    native: tuple[int, int]  # (H, W) on the native grid
    inner: tuple[int, int]  # (H, W) after resizing; equal to native where nothing was resized
    size: int  # side of the network's input


def place_slices(height: int, width: int, size: int) -> Placement:
    """Return the placement of (height, width) slices in a size x size input."""
    longest = max(height, width)
    if longest <= RESIZE_ABOVE * size:
        return Placement((height, width), (height, width), size)
    scale = size / longest
    return Placement((height, width), (max(1, round(height * scale)), max(1, round(width * scale))), size)


def kept_range(length: int, size: int) -> tuple[int, int]:
    """Return (first, last + 1) of the pixels along an axis that a centred crop to `size` keeps."""
    first = max(0, length - size) // 2
    return first, first + min(length, size)


def _pad_or_crop(array: np.ndarray, height: int, width: int, mode: Literal["edge", "constant"]) -> np.ndarray:
    """Centre the last two axes of an array in (height, width); padding is undone by cropping back."""
    padding = [(0, 0)] * array.ndim
    for axis, target in ((-2, height), (-1, width)):
        excess = array.shape[axis] - target
        if excess > 0:
            kept = slice(*kept_range(array.shape[axis], target))
            array = array[..., kept, :] if axis == -2 else array[..., kept]
        elif excess < 0:
            padding[axis] = (-excess // 2, -excess - (-excess // 2))
    return np.pad(array, padding, mode=mode) if any(map(any, padding)) else array


def fit_slices(slices: np.ndarray, placement: Placement, is_mask: bool = False) -> np.ndarray:
    """Bring slices (..., H, W) from the native grid to (..., size, size).

    Intensities are padded with their edge values and resized by area; masks are padded with 0 and resized by
    nearest neighbour. With padding alone, `unfit_slices` gives the input back exactly.
    """
    if placement.inner != placement.native:
        interpolation = cv2.INTER_NEAREST_EXACT if is_mask else cv2.INTER_AREA
        slices = _resize(slices, placement.inner, interpolation)
    return _pad_or_crop(slices, placement.size, placement.size, "constant" if is_mask else "edge")


def unfit_slices(slices: np.ndarray, placement: Placement) -> np.ndarray:
    """Bring probabilities (..., size, size) back to the native grid (..., H, W); 0 where a crop cut."""
    slices = _pad_or_crop(slices, *placement.inner, "constant")
    if placement.inner != placement.native:
        slices = _resize(slices, placement.native, cv2.INTER_LINEAR)
    return slices


def _resize(slices: np.ndarray, shape: tuple[int, int], interpolation: int) -> np.ndarray:
    flat = slices.reshape(-1, *slices.shape[-2:])
    kind = np.uint8 if flat.dtype == np.bool_ else np.float32
    resized = np.stack([cv2.resize(s.astype(kind), shape[::-1], interpolation=interpolation) for s in flat])
    return resized.astype(slices.dtype).reshape(*slices.shape[:-2], *shape)


def gather_slab(volume: np.ndarray, z: int, context: int) -> np.ndarray:
    """Return slices z - context .. z + context of a volume (C, D, H, W) as one slab (C*K, H, W).

    Channel order: all slices of the first modality, then of the next. Slices beyond the ends repeat the end
    slice.
    """
    return volume[:, slab_slices(z, context, volume.shape[1])].reshape(-1, *volume.shape[2:])


def slab_slices(z: int, context: int, depth: int) -> list[int]:
    """Return the slices of the slab around z: z - context .. z + context, those beyond the ends repeated."""
    if not 0 <= z < depth:
        raise ValueError(f"slice {z} is outside 0..{depth - 1}")
    return [min(max(index, 0), depth - 1) for index in range(z - context, z + context + 1)]
