"""Fingerprints: a few kilobytes by which a scan is known again, whatever its file has been through."""

import base64
import hashlib
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from cohort.preprocess import level_air
from utils_v2 import bounding_box

GRID = 24  # cells of a thumbnail along each axis
HIGH_PASS_CELLS = 2.0  # SD of what is taken out: the shape all heads share
MASK_VOXELS = 100  # smaller masks can agree by chance
FINGERPRINT_VERSION = 1  # raise when fingerprints change: stored ones are then made again
LONGEST_AXIS = 128  # volumes are thinned to it: a cell of the thumbnail still averages over many voxels
HEAD_EDGE = 0.1  # the head begins where a plane holds this share of the fullest plane's voxels


# ------------------------------------------------------------------------------------------------------------
# Fingerprints
# ------------------------------------------------------------------------------------------------------------


def rank_voxels(volume: np.ndarray) -> np.ndarray:
    """Return each voxel's rank among all, ties at their middle, as a share in 0..1, float32.

    No increasing change of intensities (linear, gamma, histogram equalisation, z-score) alters it.
    """
    _, place, counts = np.unique(volume, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2) / volume.size
    return ranks.astype(np.float32)[place].reshape(volume.shape)


def split_in_two(values: np.ndarray) -> float:
    """Return the threshold that best parts values in 0..1 into two groups (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    centres = (edges[1:] + edges[:-1]) / 2
    below, sums = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    between = (sums * below[-1] - sums[-1] * below) ** 2 / np.maximum(below * above, 1)
    return float(centres[between.argmax()])


def find_head(ranks: np.ndarray) -> list[tuple[float, float]]:
    """Return where the head begins and ends along D, H and W, in voxels and fractions of them.

    The head is what is bright after smoothing, so the noise of air and single bright voxels do not widen it.
    """
    odd = [
        2 * (size // 48) + 1 for size in ranks.shape
    ]  # an even filter would move the box of a mirror image
    smooth = ndimage.uniform_filter(ranks, odd, mode="nearest")
    head = smooth > split_in_two(smooth)
    box = []
    for axis in range(3):
        profile = head.sum(tuple(other for other in range(3) if other != axis)).astype(float)
        level = HEAD_EDGE * profile.max()
        inside = np.flatnonzero(profile > level)
        if len(inside) == 0:
            box.append((0.0, float(len(profile))))
            continue
        padded = np.concatenate([[0.0], profile, [0.0]])  # padded[i + 1] is plane i
        first, last = inside[0] + 1, inside[-1] + 1
        start = first - 0.5 - (padded[first] - level) / (padded[first] - padded[first - 1])
        stop = last - 0.5 + (padded[last] - level) / (padded[last] - padded[last + 1])
        box.append((max(start, 0.0), min(stop, float(len(profile)))))
    return box


def resample_weights(size: int, start: float, stop: float, cells: int = GRID) -> np.ndarray:
    """Return (cells, size) weights that take an axis from start..stop to `cells` cells: means, or linear."""
    edges = np.linspace(start, stop, cells + 1)
    if stop - start < cells:
        distance = np.abs((edges[:-1, None] + edges[1:, None]) / 2 - 0.5 - np.arange(size))
        weights = np.clip(1 - distance, 0, None)
    else:
        low = np.maximum(edges[:-1, None], np.arange(size))
        weights = np.clip(np.minimum(edges[1:, None], np.arange(1, size + 1)) - low, 0, None)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def make_thumbnail(intensities: np.ndarray) -> np.ndarray:
    """Return the thumbnail (GRID, GRID, GRID) int8 of a volume (D, H, W); all 0 for a constant volume.

    Ranks of the voxels in the box around the head, averaged on the grid, less what is smooth in them: all
    heads are alike in that. Air is the darkest, whatever a normalisation left it at (`level_air`).
    """
    intensities = level_air(intensities)
    thin = intensities[tuple(slice(None, None, -(-size // LONGEST_AXIS)) for size in intensities.shape)]
    if thin.size == 0 or thin.min() == thin.max():
        return np.zeros((GRID,) * 3, np.int8)
    box = find_head(rank_voxels(thin))
    whole = [(int(start), int(np.ceil(stop))) for start, stop in box]
    cells = rank_voxels(thin[tuple(slice(*ends) for ends in whole)])
    for axis, ((start, stop), (first, _)) in enumerate(zip(box, whole, strict=True)):
        weights = resample_weights(cells.shape[axis], start - first, stop - first)
        cells = np.moveaxis(np.tensordot(weights, cells, axes=(1, axis)), 0, axis)
    cells = cells - ndimage.gaussian_filter(cells, HIGH_PASS_CELLS, mode="nearest")
    cells -= cells.mean()
    return np.rint(cells * (127 / max(np.abs(cells).max(), 1e-3))).astype(np.int8)


def hash_image(intensities: np.ndarray) -> str:
    """Return the SHA-256 of a volume's shape and float32 values, whatever type the file stores them in."""
    values = np.ascontiguousarray(intensities, dtype="<f4") + np.float32(0)  # -0 becomes 0
    return hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()


def hash_mask(labels: np.ndarray | None) -> str:
    """Return the SHA-256 of where labels (D, H, W) are not 0, inside their bounding box.

    Label values and padding do not matter. Empty text where there is no mask or one below MASK_VOXELS.
    """
    if labels is None or np.count_nonzero(labels) < MASK_VOXELS:
        return ""
    mask = labels > 0
    inside = mask[bounding_box(mask)]
    return hashlib.sha256(str(inside.shape).encode() + np.packbits(inside).tobytes()).hexdigest()


def fingerprint(intensities: np.ndarray, labels: np.ndarray | None) -> dict[str, str]:
    """Return a case's fingerprint as plain values, from file intensities and labels (D, H, W) as decoded."""
    return {
        "image_sha256": hash_image(intensities),
        "mask_sha256": hash_mask(labels),
        "thumbnail": base64.b64encode(make_thumbnail(intensities).tobytes()).decode(),
    }


def fingerprint_modality(modalities: Sequence[str]) -> str:
    """Return the modality that fingerprints are made of: FLAIR, or the first where there is none."""
    return "flair" if "flair" in modalities else modalities[0]
