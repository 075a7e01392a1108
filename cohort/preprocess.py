"""From cases to normalised volumes on their native grid, and from those to the network's slabs.

Training, validation, audit and prediction all reach pixels through `normalise_volume`, `gather_slab` and
`fit_slices`, so the network never meets a pixel at test time that was made another way at training time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
from scipy import ndimage

Z_RANGE = (-4.0, 8.0)  # normalised intensities are clipped to it; augmentation maps it to 0..1
QUARTILE_DISTANCE = 1.349  # between the quartiles of a normal distribution, in SD
MISSING = Z_RANGE[0]  # every voxel of a modality that a case lacks: as dark as air can be
RESIZE_ABOVE = 1.25  # slices up to a quarter larger than the network's input are cropped, larger ones resized
SPACING_SHARE = 0.25  # beyond training's range by more, slices are resampled to it, slice distances warned of
HEAD_SPECK_SHARE = 0.01  # of the head's shadow; smaller specks beside it are none of it
BRAIN_SLICE_VOXELS = 64  # a slice with fewer brain voxels counts as empty
NO_SLICE_TO_RUN = f"no slice has {BRAIN_SLICE_VOXELS} voxels of brain, the fewest that the network is run on"
FOREGROUND_STEP = 0.1  # of the way from air to the brightest: what is nearer to air counts as air
BELOW_AIR_SHARE = (
    0.05  # of the voxels unlike air; where more are darker than air, air is no longer the darkest
)
AIR_BORDER_SHARE = 0.1  # of the slices' borders; a value that holds less is not known to be air
AIR_TOLERANCE = 1e-3  # of the range: what is as good as equal to air, where
AIR_TRACES_SHARE = 0.01  # of the border or more is so without being equal
LARGEST_INTENSITY = 1e18  # of a scan: its square still fits float32
HOLE_VOXELS = 8  # smaller groups at the value of air are tissue, in integers; smaller groups of NaN no air


# ------------------------------------------------------------------------------------------------------------
# Normalisation and geometry
# ------------------------------------------------------------------------------------------------------------


def border_of(array: np.ndarray) -> np.ndarray:
    """Return the voxels on the borders of the slices of a volume (D, H, W), flat."""
    return np.concatenate([array[:, (0, -1), :].ravel(), array[:, :, (0, -1)].ravel()])


def commonest_on_border(intensities: np.ndarray) -> tuple[float, float]:
    """Return (commonest finite value on the slices' borders, its share of the finite ones there)."""
    border = border_of(intensities)
    values, counts = np.unique(border[np.isfinite(border)], return_counts=True)
    if counts.size == 0:
        return float("nan"), 0.0
    return values[counts.argmax()], counts.max() / counts.sum()


def fill_air(intensities: np.ndarray) -> np.ndarray:
    """Return a volume (D, H, W) whose NaN and infinite voxels outside of the head became background.

    Outside is what reaches the border of a slice through such voxels, at least 8 of them. They get the
    commonest value of the border where that is half of what is finite there, and the volume's smallest
    elsewhere. Other such voxels stay. A finite volume comes back as it is.
    """
    finite = np.isfinite(intensities)
    if finite.all() or not finite.any():
        return intensities
    parts, _ = ndimage.label(~finite)
    is_outside = np.zeros(parts.max() + 1, bool)
    is_outside[border_of(parts)] = True
    is_outside &= np.bincount(parts.ravel()) >= HOLE_VOXELS  # a single one is no air
    is_outside[0] = False
    outside = is_outside[parts]
    value, share = commonest_on_border(intensities)
    return np.where(outside, value if share >= 0.5 else intensities[finite].min(), intensities)


def compare_with_air(intensities: np.ndarray) -> tuple[float, float, float]:
    """Return (value of air, value air must have to be the darkest, share of the tissue that is darker).

    Air is the commonest value on the slices' borders, tissue what differs from it by a tenth of the range or
    more: the noise of air is on both sides of its commonest value. The second is the volume's minimum, or one
    range below the range where an outlier is lower. Range is from the 0.5th to the 99.5th percentile of what
    is unlike air. The share is 0 where few voxels are below air, whatever the distance, and where too little
    of the border is air.
    """
    air, border_share = commonest_on_border(intensities)
    if border_share < AIR_BORDER_SHARE:
        return air, air, 0.0
    below, above = np.count_nonzero(intensities < air), np.count_nonzero(intensities > air)
    if below <= BELOW_AIR_SHARE * (below + above):
        return air, air, 0.0
    low, high = np.percentile(intensities[intensities != air], [0.5, 99.5])
    step = FOREGROUND_STEP * (max(high, air) - min(low, air))
    darker = np.count_nonzero(intensities < air - step)
    brighter = np.count_nonzero(intensities > air + step)
    if darker <= BELOW_AIR_SHARE * (below + above):
        return air, air, 0.0
    return air, max(intensities.min(), low - (high - low)), darker / (darker + brighter)


def level_air(intensities: np.ndarray) -> np.ndarray:
    """Return a volume (D, H, W) with air as its darkest value.

    Files whose brain was z-scored with air left at 0 have half of the brain below air; there, air is set to
    the minimum. All others come back as they are: raw ones, any increasing affine change of them, and those
    where air is the brightest (`find_doubts`).
    """
    air, darkest, share = compare_with_air(intensities)
    if not 0 < share < 1 - BELOW_AIR_SHARE:
        return intensities
    distance = np.abs(intensities - air)
    near = distance <= AIR_TOLERANCE * np.percentile(distance[distance > 0], 99.5)
    # resampling leaves traces all over air; elsewhere what is merely near its value is tissue
    is_traced = np.mean(border_of(near) & (border_of(distance) > 0)) > AIR_TRACES_SHARE
    parts, _ = ndimage.label(near if is_traced else distance == 0)
    is_air = np.zeros(parts.max() + 1, bool)
    is_air[border_of(parts)] = True
    are_integers = (intensities == np.rint(intensities)).all()
    if are_integers:
        is_air |= np.bincount(parts.ravel()) >= HOLE_VOXELS
    is_air[0] = False
    air_voxels = is_air[parts] if are_integers else is_air[parts] | (distance == 0)
    return np.where(air_voxels, intensities.dtype.type(darkest), intensities)


def find_fault(intensities: np.ndarray) -> str | None:
    """Return what makes a modality (D, H, W), after `fill_air`, unusable as float32, else None."""
    if intensities.size == 0:
        return "is empty"
    low, high = intensities.min(), intensities.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return "holds NaN or infinite values in the head, or by themselves"
    if max(abs(float(low)), abs(float(high))) > LARGEST_INTENSITY:
        return f"holds values from {low:.3g} to {high:.3g}, beyond what float32 computes with"
    return None


def find_no_brain(intensities: np.ndarray, has_brain: bool) -> str | None:
    """Return why there is nothing to segment in a modality (D, H, W), None where its mask holds a brain."""
    low, high = intensities.min(), intensities.max()
    if np.float32(low) == np.float32(high):
        return f"is constant, {low:g} everywhere"
    if has_brain:
        return None
    doubts = find_doubts(intensities)
    return doubts[0] if doubts else "shows no brain: nothing in it is brighter than its border"


def find_doubts(intensities: np.ndarray) -> list[str]:
    """Return what is odd about the intensities of a modality (D, H, W): blank, or inverted contrast."""
    if intensities.size == 0 or intensities.min() == intensities.max():
        return [f"is blank, {intensities.flat[0]:g} everywhere" if intensities.size else "is empty"]
    if compare_with_air(intensities)[2] >= 1 - BELOW_AIR_SHARE:
        return ["is brightest in air: its grey values are inverted, and no tumour will be found"]
    return []


def brain_mask(intensities: np.ndarray) -> np.ndarray:
    """Return the bool foreground (D, H, W) of one modality: the brain, or the head where it has its skull.

    Background is the commonest value on the slices' borders, after `level_air`. Foreground is what lies above
    it by a tenth of the way to the 99.5th percentile of the brighter voxels, which leaves out the noise of
    air. All False for a constant volume.
    """
    intensities = level_air(intensities)
    background, _ = commonest_on_border(intensities)
    brighter = intensities[intensities > background]
    if brighter.size == 0:
        return np.zeros(intensities.shape, bool)
    return intensities > background + FOREGROUND_STEP * (np.percentile(brighter, 99.5) - background)


def normalise_volume(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (z-scores (C, D, H, W) float32 in Z_RANGE, `brain_mask` (D, H, W) bool of the first modality).

    The z-score is robust: median and interquartile range / 1.349 of each modality's own foreground stand for
    mean and SD. Outlier voxels move neither, nor does a bright scalp or a large tumour: over the 75 training
    and validation patients of the LGG slices the z of healthy brain had an SD of 0.12 from patient to
    patient, with mean and SD 0.22. Values are rounded to float16, the precision of the cache, so that pixels
    are the same with and without it. A constant modality becomes 0.
    """
    scores = np.zeros_like(volume, dtype=np.float32)
    volume = [level_air(intensities) for intensities in volume]
    masks = [brain_mask(intensities) for intensities in volume]
    for channel, (intensities, mask) in enumerate(zip(volume, masks, strict=True)):
        if not mask.any():
            continue
        inside = intensities[mask]
        low, median, high = (float(value) for value in np.percentile(inside, [25, 50, 75]))
        deviation = (high - low) / QUARTILE_DISTANCE or float(inside.std()) or 1.0
        scores[channel] = np.clip((intensities - median) / deviation, *Z_RANGE).astype(np.float16)
    return scores, masks[0]


def place_modalities(volume: np.ndarray, present: Sequence[str], modalities: Sequence[str]) -> np.ndarray:
    """Return the normalised volume (P, D, H, W) of the modalities present as (C, D, H, W), others MISSING.

    What air is normalised to differs from case to case, and nobody knows it of a modality that is missing.
    The least of all values is the same for every case, and training with --modality-dropout fills with it.
    """
    if tuple(present) == tuple(modalities):
        return volume
    whole = np.full((len(modalities), *volume.shape[1:]), MISSING, volume.dtype)
    whole[[list(modalities).index(name) for name in present]] = volume
    return whole


Span = tuple[int, int]  # (first, last + 1) along an axis


class Frame(NamedTuple):
    """What of a case decides how its slices lie in the network's input, one frame for all of its slices."""

    head: tuple[Span, Span] | None = None  # rows and columns of the head; None where there is none
    spacing_mm: tuple[float, float, float] | None = None  # (D, H, W); None where it is unknown


def find_head_box(brain: np.ndarray) -> tuple[Span, Span] | None:
    """Return the rows and columns (first, last + 1) of the head in all slices of a `brain_mask` (D, H, W).

    Specks beside the head, smaller than a hundredth of its shadow, do not widen it. None where the mask is
    empty.
    """
    parts, count = ndimage.label(brain.any(0), np.ones((3, 3)))
    if count == 0:
        return None
    pixels = np.bincount(parts.ravel())[1:]
    is_head = np.concatenate([[False], pixels >= HEAD_SPECK_SHARE * pixels.max()])
    rows, columns = (np.flatnonzero(is_head[parts].any(axis)) for axis in (1, 0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


@dataclass(frozen=True)
class Placement:
    """How native slices lie in the network's input: resized to `inner`, then padded or cropped to `size`."""

    native: tuple[int, int]  # (H, W) on the native grid
    inner: tuple[int, int]  # (H, W) after resizing; equal to native where nothing was resized
    size: int  # side of the network's input
    first: tuple[int, int]  # where the input begins on the inner grid; negative where it is padded

    @property
    def kept(self) -> tuple[Span, Span]:
        """Rows and columns of the inner grid that lie in the input."""
        return tuple(
            (max(0, first), min(length, first + self.size))
            for first, length in zip(self.first, self.inner, strict=True)
        )


def place_slices(
    height: int,
    width: int,
    size: int,
    head: tuple[Span, Span] | None = None,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> Placement:
    """Return the placement of (height, width) slices in a size x size input.

    Slices that fit are padded alike on both sides. Where they are up to a quarter larger and the head fits,
    they are cropped around the head, or around their middle where there is no head. All others are resized as
    a whole. So nothing of the head is ever outside. `zoom` resizes rows and columns beforehand, for
    heads at another scale than the network knows; then a head that fits is cropped to from any slice.
    """
    native, longest = (height, width), max(height, width)
    if zoom != (1.0, 1.0):
        return _place_zoomed(native, size, head, zoom)
    if longest <= RESIZE_ABOVE * size and _fits(head, size):
        return Placement(native, native, size, _begin(native, size, head))
    scale = size / longest
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    return Placement(native, inner, size, _begin(inner, size, None))


def _place_zoomed(
    native: tuple[int, int], size: int, head: tuple[Span, Span] | None, zoom: tuple[float, float]
) -> Placement:
    head = head or ((0, native[0]), (0, native[1]))
    longest = max((last - first) * factor for (first, last), factor in zip(head, zoom, strict=True))
    shrink = min(1.0, (size - 2) / longest)  # 2: the ends of the resized head are rounded outwards
    inner = tuple(
        max(1, round(length * factor * shrink)) for length, factor in zip(native, zoom, strict=True)
    )
    resized = tuple(
        (int(first * now / before), int(np.ceil(last * now / before)))
        for (first, last), now, before in zip(head, inner, native, strict=True)
    )
    return Placement(native, inner, size, _begin(inner, size, resized))


def describe_training_spacing(seen: Sequence[tuple[Frame, Placement]]) -> dict[str, dict[str, float]] | None:
    """Return median and range of the spacings in mm of training cases, in plane as the network saw them.

    {"in_plane": {"median", "low", "high"}, "slices": the same}; the range is from the 5th to the 95th
    percentile. Where slices were resized to fit the input, their pixels grew. Cases of unknown spacing are
    left out; None where no other is there.
    """
    known = [(frame.spacing_mm, placement) for frame, placement in seen if frame.spacing_mm]
    if not known:
        return None
    values = {
        "in_plane": [each for spacing_mm, placement in known for each in pixel_mm(spacing_mm, placement)],
        "slices": [spacing_mm[0] for spacing_mm, _ in known],
    }
    table = {}
    for name, spacings in values.items():
        low, median, high = np.percentile(spacings, [5, 50, 95])
        table[name] = {"median": float(median), "low": float(low), "high": float(high)}
    return table


def pixel_mm(spacing_mm: Sequence[float], placement: Placement) -> tuple[float, float]:
    """Return height and width in mm of a pixel of the network's input."""
    height, width = (
        mm * before / now
        for mm, before, now in zip(spacing_mm[1:], placement.native, placement.inner, strict=True)
    )
    return height, width


def find_unlike_spacing(value_mm: float, trained: Mapping[str, float]) -> float | None:
    """Return the end of training's range that a spacing is beyond by more than SPACING_SHARE, else None."""
    if value_mm > trained["high"] * (1 + SPACING_SHARE):
        return trained["high"]
    if value_mm * (1 + SPACING_SHARE) < trained["low"]:
        return trained["low"]
    return None


def place_case(
    shape: Sequence[int], size: int, frame: Frame, trained: Mapping[str, Mapping[str, float]] | None = None
) -> Placement:
    """Return the placement of a case's slices (H, W) for a network trained at the spacings `trained`.

    `trained` is of `describe_training_spacing`. Where the network would see pixels beyond the range of its
    training by more than SPACING_SHARE, the slices are resampled in plane to that range. Nothing is where
    either spacing is unknown.
    """
    height, width = shape
    placement = place_slices(height, width, size, frame.head)
    if not trained or not frame.spacing_mm:
        return placement
    in_plane = trained["in_plane"]
    if all(find_unlike_spacing(mm, in_plane) is None for mm in pixel_mm(frame.spacing_mm, placement)):
        return placement
    zoom = [mm / min(max(mm, in_plane["low"]), in_plane["high"]) for mm in frame.spacing_mm[1:]]
    return place_slices(height, width, size, frame.head, (zoom[0], zoom[1]))


def _fits(head: tuple[Span, Span] | None, size: int) -> bool:
    return head is None or all(last - first <= size for first, last in head)


def _begin(inner: tuple[int, int], size: int, head: tuple[Span, Span] | None) -> tuple[int, int]:
    """Return where an input of `size` begins on the inner grid, around a head given on the same grid."""
    begin = []
    for axis, length in enumerate(inner):
        if length <= size or head is None:
            begin.append(-((size - length) // 2) if length <= size else (length - size) // 2)
        else:
            centred = (sum(head[axis]) - size) // 2
            begin.append(min(max(centred, 0), length - size))
    return begin[0], begin[1]


def _pad(slices: np.ndarray, placement: Placement, mode: Literal["edge", "constant"]) -> np.ndarray:
    """Pad the part (..., h, w) of slices that lies in the input to (..., size, size)."""
    padding = [(0, 0)] * (slices.ndim - 2)
    for (first, last), begin in zip(placement.kept, placement.first, strict=True):
        padding.append((first - begin, placement.size - (last - begin)))
    return np.pad(slices, padding, mode=mode) if any(map(any, padding)) else slices


def fit_slices(slices: np.ndarray, placement: Placement, is_mask: bool = False) -> np.ndarray:
    """Bring slices (..., H, W) from the native grid to (..., size, size).

    Intensities are padded with their edge values and resized by area, or by cubic splines within their range
    where they grow; masks are padded with 0 and resized by nearest neighbour. With padding alone,
    `unfit_slices` gives the input back exactly.
    """
    if placement.inner != placement.native:
        shrinks = placement.inner[0] <= placement.native[0] and placement.inner[1] <= placement.native[1]
        # cubic, as linear blurs: heads at 4 mm for a network of 2 mm had Dice 0.61 with it, 0.50 with linear
        smooth = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        resized = _resize(slices, placement.inner, cv2.INTER_NEAREST_EXACT if is_mask else smooth)
        slices = resized if shrinks or is_mask else np.clip(resized, slices.min(), slices.max())
    (top, bottom), (left, right) = placement.kept
    return _pad(slices[..., top:bottom, left:right], placement, "constant" if is_mask else "edge")


def unfit_slices(slices: np.ndarray, placement: Placement) -> np.ndarray:
    """Bring probabilities (..., size, size) back to the native grid (..., H, W); 0 where a crop cut air."""
    (top, bottom), (left, right) = placement.kept
    above, before = (first - begin for (first, _), begin in zip(placement.kept, placement.first, strict=True))
    slices = slices[..., above : above + bottom - top, before : before + right - left]
    if slices.shape[-2:] != placement.inner:
        height, width = placement.inner
        padding = [(0, 0)] * (slices.ndim - 2) + [(top, height - bottom), (left, width - right)]
        slices = np.pad(slices, padding)
    if placement.inner != placement.native:
        shrinks = placement.native[0] <= placement.inner[0] and placement.native[1] <= placement.inner[1]
        slices = _resize(slices, placement.native, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
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
