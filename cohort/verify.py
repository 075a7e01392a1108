"""Is it one scan? Two volumes aligned and correlated, after their thumbnails were found alike.

A thumbnail has 24 cells along an axis, and different heads in one atlas space come close to one another in
it. The volumes tell them apart: the ranks of the voxels in the head, less what is smooth in them, agree in
every fold for one scan, whatever its intensities went through, and hardly for two people.
benchmarks/leakage.py measures both.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy import fft, ndimage

from cohort.fingerprints import find_head, rank_voxels, resample_weights
from utils_v2 import bounding_box

SAME_VOLUME = 0.7  # correlation from which two volumes are one scan; see benchmarks/README.md
LONGEST = 256  # cells along an axis that are compared
HIGH_PASS_CELLS = 1.0  # SD of what is taken out as smooth: the shapes that heads share
EVEN_CELLS = 3.0  # SD of the neighbourhood in which details are made equally strong
LEAST_SD = 0.005  # of ranks: fainter details than this are not made stronger
AIR_SHARE = 0.05  # of the voxels, from which the commonest value is that of the air
SHIFT_SHARE = 0.2  # of the axis: how far the heads are moved over one another
COMMON_SHARE = 0.5  # of the smaller head: what both must show
TURNS = 3  # ways to turn that are looked at closely, the best by their thumbnails first


def thin_volume(volume: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
    """Return a volume (D, H, W) of the means of whole blocks of `factors` voxels."""
    size = [length // factor for length, factor in zip(volume.shape, factors, strict=True)]
    cut = volume[tuple(slice(count * factor) for count, factor in zip(size, factors, strict=True))]
    blocks = [part for pair in zip(size, factors, strict=True) for part in pair]
    return cut.reshape(blocks).mean((1, 3, 5), dtype=np.float32)


def trim_background(volume: np.ndarray, margin: int = 4) -> np.ndarray:
    """Return a volume (D, H, W) without the planes at its ends that hold one value, but for a margin."""
    foreground = volume != volume[0, 0, 0]
    if not foreground.any():
        return volume
    box = bounding_box(foreground)
    return volume[tuple(slice(max(edge.start - margin, 0), edge.stop + margin) for edge in box)]


def find_details(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (details, head), both (D, H, W): high-passed ranks in the head, 0 elsewhere, and where that is.

    Details are divided by their SD nearby: otherwise the edges of skull and ventricles, which all heads
    have, would count for more than the texture, which no two scans share.
    """
    values, counts = np.unique(volume, return_counts=True)
    head = np.full(volume.shape, counts.max() <= AIR_SHARE * volume.size) | (
        volume != values[counts.argmax()]
    )
    details = np.zeros(volume.shape, np.float32)
    if head.any():
        details[head] = rank_voxels(volume[head])
    weight = head.astype(np.float32)

    def blur(values: np.ndarray, cells: float) -> np.ndarray:
        total = ndimage.gaussian_filter(weight, cells, mode="constant", truncate=3)
        blurred = ndimage.gaussian_filter(values * weight, cells, mode="constant", truncate=3)
        return blurred / np.maximum(total, 1e-3)

    details -= blur(details, HIGH_PASS_CELLS)
    details /= np.sqrt(blur(details**2, EVEN_CELLS)) + LEAST_SD
    inside = ndimage.binary_erosion(head)
    return np.where(inside, details, 0).astype(np.float32), inside


def turn_volumes(*volumes: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield the volumes in the 16 ways of `leakage.turned_thumbnails`, in its order."""
    for is_swapped in (False, True):
        turned = [volume.swapaxes(1, 2) if is_swapped else volume for volume in volumes]
        for steps in itertools.product((1, -1), repeat=3):
            yield [volume[:: steps[0], :: steps[1], :: steps[2]] for volume in turned]


def centre_head(details: np.ndarray, head: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return both volumes in a larger `shape`, rolled so that the middle of the head is in its middle."""
    centre = [round(float(places.mean())) for places in np.nonzero(head)]
    moved = tuple(size // 2 - place for size, place in zip(shape, centre, strict=True))
    placed = []
    for volume in (details, head):
        ends = [(0, size - length) for size, length in zip(shape, volume.shape, strict=True)]
        placed.append(np.roll(np.pad(volume, ends), moved, (0, 1, 2)))
    return placed


def correlate_at(one: list[np.ndarray], other: list[np.ndarray], moved: tuple[int, ...]) -> float:
    """Return Pearson's correlation of details where both heads are, the other rolled by `moved` cells."""
    details, head = (np.roll(volume, moved, (0, 1, 2)) for volume in other)
    common = one[1] & head
    if common.sum() < max(COMMON_SHARE * min(one[1].sum(), head.sum()), 2):
        return 0.0
    a, b = one[0][common], details[common]
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt(float((a * a).sum()) * float((b * b).sum())), 1e-9))


def align_and_correlate(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], turns: list[int]
) -> float:
    """Return the highest correlation of two (details, head) of one cell size over turns and shifts."""
    longest = [max(one[0].shape[0], other[0].shape[0])]
    longest += [max(*one[0].shape[1:], *other[0].shape[1:])] * 2
    reach = [max(2, round(SHIFT_SHARE * size)) for size in longest]
    shape = tuple(
        fft.next_fast_len(size + step, real=True) for size, step in zip(longest, reach, strict=True)
    )
    if not (one[1].any() and other[1].any()):
        return 0.0
    fixed = centre_head(*one, shape)
    spectrum = fft.rfftn(fixed[0])
    window = np.ix_(*(np.r_[0 : step + 1, -step:0] for step in reach))
    highest = 0.0
    ways = list(turn_volumes(*other))
    for turn in turns:
        moving = centre_head(*ways[turn], shape)
        match = fft.irfftn(spectrum * np.conj(fft.rfftn(moving[0])), shape)[window]
        best = np.unravel_index(match.argmax(), match.shape)
        moved = tuple(int(axis.ravel()[index]) for axis, index in zip(window, best, strict=True))
        highest = max(highest, correlate_at(fixed, moving, moved))
        if highest >= SAME_VOLUME:
            break
    return highest


def resample_head(volume: np.ndarray, cells: tuple[int, ...]) -> np.ndarray:
    """Return the box around the head of a volume, resampled to `cells` along D, H and W, edges included."""
    box = find_head(rank_voxels(volume))
    for axis, (start, stop) in enumerate(box):
        weights = resample_weights(volume.shape[axis], start, stop, cells[axis])
        volume = np.moveaxis(np.tensordot(weights, volume, axes=(1, axis)), 0, axis)
    return volume


def compare_volumes(one: np.ndarray, other: np.ndarray, turns: list[int] | None = None) -> float:
    """Return how alike two volumes (D, H, W) are, 0 to 1: the correlation of `align_and_correlate`.

    It is the higher one of two assumptions: that both have voxels of one size, whatever was cut off or
    padded, and that the heads are as large, whatever the voxels. `turns` are ways of `turn_volumes` to turn
    the other, likely ones first; default all.
    """
    is_one_grid = one.shape == other.shape
    one, other = (trim_background(np.asarray(volume, np.float32)) for volume in (one, other))
    turns = list(range(16)) if turns is None else turns
    plane = max(*one.shape[1:], *other.shape[1:])
    factors = (-(-max(one.shape[0], other.shape[0]) // LONGEST), *[-(-plane // LONGEST)] * 2)
    pair = [find_details(thin_volume(volume, factors)) for volume in (one, other)]
    highest = align_and_correlate(*pair, turns)
    if highest >= SAME_VOLUME or is_one_grid:
        return highest
    sizes = [
        min(one.shape[0], other.shape[0], LONGEST),
        *[min(*one.shape[1:], *other.shape[1:], LONGEST)] * 2,
    ]
    pair = [find_details(np.pad(resample_head(volume, tuple(sizes)), 2)) for volume in (one, other)]
    return max(highest, align_and_correlate(*pair, turns))
