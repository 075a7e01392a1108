"""From cases to normalised volumes on their native grid, and from those to the network's slabs.

Training, validation, audit and prediction all reach pixels through `normalise_volume`, `gather_slab` and
`fit_slices`, so the network never meets a pixel at test time that was made another way at training time. The
cache keeps each case decoded and normalised, memory-mapped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from tqdm import tqdm

from cases_v2 import Case, load_case, regions_from_labels
from leakage_v2 import fingerprint, fingerprint_modality
from utils_v2 import write_json

Z_RANGE = (-4.0, 8.0)  # normalised intensities are clipped to it; augmentation maps it to 0..1
QUARTILE_DISTANCE = 1.349  # between the quartiles of a normal distribution, in SD
RESIZE_ABOVE = 1.25  # slices up to a quarter larger than the network's input are cropped, larger ones resized
BRAIN_SLICE_VOXELS = 64  # a slice with fewer brain voxels counts as empty
CACHE_VERSION = 2  # raise when normalisation changes: old cache entries are then never read


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
    """Return (z-scores (C, D, H, W) float32 in Z_RANGE, brain voxels (D,) of the first modality).

    The z-score is robust: median and interquartile range / 1.349 of each modality's own foreground stand for
    mean and SD. Outlier voxels move neither, nor does a bright scalp or a large tumour: over the 75 training
    and validation patients of the LGG slices the z of healthy brain had an SD of 0.12 from patient to
    patient, with mean and SD 0.22. Values are rounded to float16, the precision of the cache, so that pixels
    are the same with and without it. A constant modality becomes 0.
    """
    scores = np.zeros_like(volume, dtype=np.float32)
    brain_voxels = np.zeros(volume.shape[1], np.int64)
    for channel, intensities in enumerate(volume):
        mask = brain_mask(intensities)
        if channel == 0:
            brain_voxels = mask.sum((1, 2))
        if not mask.any():
            continue
        inside = intensities[mask]
        low, median, high = (float(value) for value in np.percentile(inside, [25, 50, 75]))
        deviation = (high - low) / QUARTILE_DISTANCE or float(inside.std()) or 1.0
        scores[channel] = np.clip((intensities - median) / deviation, *Z_RANGE).astype(np.float16)
    return scores, brain_voxels


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


def _pad_or_crop(array: np.ndarray, height: int, width: int, mode: Literal["edge", "constant"]) -> np.ndarray:
    """Centre the last two axes of an array in (height, width); padding is undone by cropping back."""
    for axis, target in ((-2, height), (-1, width)):
        excess = array.shape[axis] - target
        if excess > 0:
            array = np.take(array, range(excess // 2, excess // 2 + target), axis)
        elif excess < 0:
            before = -excess // 2
            padding = [(0, 0)] * array.ndim
            padding[axis] = (before, -excess - before)
            array = np.pad(array, padding, mode=mode)
    return array


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
    depth = volume.shape[1]
    if not 0 <= z < depth:
        raise ValueError(f"slice {z} is outside 0..{depth - 1}")
    indices = np.clip(np.arange(z - context, z + context + 1), 0, depth - 1)
    return volume[:, indices].reshape(-1, *volume.shape[2:])


# ------------------------------------------------------------------------------------------------------------
# Prepared cases: decoded and normalised once, memory-mapped from then on
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCase:
    """A case in the cache, on its native grid; it holds paths, not arrays, so loader workers copy nothing."""

    case_id: str
    patient_id: str
    cohort: str
    folder: Path
    spacing_mm: tuple[float, float, float]
    image_sha256: str  # of the normalised first modality: the same for a copy under another name
    brain_voxels: tuple[int, ...]  # per slice
    region_voxels: tuple[tuple[int, ...], ...]  # per region, per slice

    @property
    def volume(self) -> np.ndarray:
        """Normalised volume (C, D, H, W) float16, memory-mapped."""
        return np.load(self.folder / "volume.npy", mmap_mode="r")

    @property
    def reference(self) -> np.ndarray:
        """Region masks (R, D, H, W) bool, memory-mapped."""
        return np.load(self.folder / "reference.npy", mmap_mode="r")

    @property
    def fingerprint(self) -> dict[str, str] | None:
        """What leakage_v2.py knows the case by; None in entries older than fingerprints."""
        return json.loads((self.folder / "facts.json").read_text()).get("fingerprint")


def _cache_key(case: Case, modalities: Sequence[str], regions: Sequence[str]) -> str:
    files = [path for name in modalities for path in case.modalities[name]] + list(case.mask)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps(
        [CACHE_VERSION, list(modalities), list(regions), case.slice_channel, case.convention, stats]
    )
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def prepare_case(
    case: Case, modalities: Sequence[str], regions: Sequence[str], cache_dir: Path
) -> PreparedCase:
    """Decode and normalise one case with a mask into the cache, or find it there."""
    folder = cache_dir / f"{case.case_id}-{_cache_key(case, modalities, regions)}"
    if not folder.is_dir():
        loaded = load_case(case, modalities)
        assert loaded.labels is not None
        volume, brain_voxels = normalise_volume(loaded.volume)
        reference = regions_from_labels(loaded.labels, case.convention, regions)
        facts = {
            "spacing_mm": loaded.spacing_mm,
            "image_sha256": hashlib.sha256(volume[0].tobytes()).hexdigest(),
            "fingerprint": fingerprint(
                loaded.volume[modalities.index(fingerprint_modality(modalities))], loaded.labels
            ),
            "brain_voxels": brain_voxels.tolist(),
            "region_voxels": reference.sum((2, 3)).tolist(),
        }
        _write_cache_entry(folder, volume.astype(np.float16), reference, facts)
    facts = json.loads((folder / "facts.json").read_text())
    return PreparedCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        cohort=case.cohort,
        folder=folder,
        spacing_mm=tuple(facts["spacing_mm"]),
        image_sha256=facts["image_sha256"],
        brain_voxels=tuple(facts["brain_voxels"]),
        region_voxels=tuple(tuple(counts) for counts in facts["region_voxels"]),
    )


def _write_cache_entry(
    folder: Path, volume: np.ndarray, reference: np.ndarray, facts: dict[str, Any]
) -> None:
    """Write an entry under a temporary name and move it into place whole; of two writers the first stays."""
    temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        np.save(temporary / "volume.npy", volume)
        np.save(temporary / "reference.npy", reference)
        write_json(temporary / "facts.json", facts)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_cases(
    cases: Sequence[Case], modalities: Sequence[str], regions: Sequence[str], cache_dir: str | Path
) -> list[PreparedCase]:
    """Prepare every case, with a progress bar."""
    progress = tqdm(cases, desc="preparing cases", unit="case", leave=False)
    return [prepare_case(case, modalities, regions, Path(cache_dir)) for case in progress]
