"""A case in the cache: cropped without loss, memory-mapped, read slab by slab.

What is cropped away is constant, so nothing is lost, and values are float16 as `normalise_volume` rounds
them: pixels are the same with and without the cache. benchmarks/cache_format.py measures both choices.
"""

import json
import os
import platform
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cases_v2 import Case
from utils_v2 import bounding_box, write_json
from volumes_v2 import slab_slices

ARRAYS = ("volume.npy", "reference.npy")
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # (first, last + 1) along D, H, W


# ------------------------------------------------------------------------------------------------------------
# A prepared case
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCase:
    """A case in the cache, on its native grid; it holds paths, not arrays, so loader workers copy nothing."""

    case_id: str
    patient_id: str
    cohort: str
    folder: Path
    spacing_mm: tuple[float, float, float]
    fingerprint: dict[str, str]  # what leakage_v2.py knows the case by
    brain_voxels: tuple[int, ...]  # per slice
    region_voxels: tuple[tuple[int, ...], ...]  # per region, per slice
    shape: tuple[int, int, int]  # (D, H, W) of the native grid
    box: Box  # the part of it that volume.npy holds
    reference_box: Box  # the part of it that reference.npy holds
    background: tuple[float, ...]  # value of each modality outside the box

    @property
    def volume(self) -> np.ndarray:
        """Normalised volume (C, D, H, W) float16, rebuilt in memory; `slab` reads much less."""
        volume = np.empty((len(self.background), *self.shape), np.float16)
        volume[:] = np.reshape(self.background, (-1, 1, 1, 1))
        volume[(slice(None), *_slices(self.box))] = self._stored_volume()
        return volume

    @property
    def reference(self) -> np.ndarray:
        """Region masks (R, D, H, W) bool, rebuilt in memory; `reference_slice` reads much less."""
        reference = np.zeros((len(self.region_voxels), *self.shape), bool)
        reference[(slice(None), *_slices(self.reference_box))] = unpack_regions(
            self._stored_flags(), len(reference)
        )
        return reference

    def slab(self, z: int, context: int) -> np.ndarray:
        """Return `gather_slab(self.volume, z, context)` as float32, reading those slices alone."""
        indices = slab_slices(z, context, self.shape[0])
        first, end = self.box[0]
        _, rows, columns = _slices(self.box)
        slab = np.empty((len(self.background), len(indices), *self.shape[1:]), np.float32)
        slab[:] = np.reshape(self.background, (-1, 1, 1, 1))
        stored, target = torch.from_numpy(self._stored_volume()), torch.from_numpy(slab)
        for position, index in enumerate(indices):
            if first <= index < end:
                # torch converts float16 ten times faster than NumPy
                target[:, position, rows, columns].copy_(stored[:, index - first])
        return slab.reshape(-1, *self.shape[1:])

    def reference_slice(self, z: int) -> np.ndarray:
        """Return `self.reference[:, z]`, bool (R, H, W), reading that slice alone."""
        first, end = self.reference_box[0]
        _, rows, columns = _slices(self.reference_box)
        reference = np.zeros((len(self.region_voxels), *self.shape[1:]), bool)
        if first <= z < end:
            reference[:, rows, columns] = unpack_regions(self._stored_flags()[z - first], len(reference))
        return reference

    def _stored_volume(self) -> np.ndarray:
        shape = (len(self.background), *(end - first for first, end in self.box))
        return _map_array(self.folder / "volume.npy", np.float16, shape)

    def _stored_flags(self) -> np.ndarray:
        shape = tuple(end - first for first, end in self.reference_box)
        return _map_array(self.folder / "reference.npy", np.uint8, shape)


def _map_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Map the array of a .npy file whose type and shape are known: no header is parsed for each slab.

    Copy-on-write, as torch takes no read-only array; nothing reaches the file.
    """
    header_bytes = path.stat().st_size - int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.memmap(path, dtype, "c", header_bytes, shape)


def _slices(box: Box) -> tuple[slice, slice, slice]:
    return tuple(slice(first, end) for first, end in box)


# ------------------------------------------------------------------------------------------------------------
# Cropping without loss
# ------------------------------------------------------------------------------------------------------------


def box_around(mask: np.ndarray) -> Box:
    """Return the smallest box around the True voxels of a mask (D, H, W); one voxel where there is none."""
    if not mask.any():
        return ((0, 1), (0, 1), (0, 1))
    return tuple((edge.start, edge.stop) for edge in bounding_box(mask))


def crop_volume(volume: np.ndarray) -> tuple[np.ndarray, Box, tuple[float, ...]]:
    """Return (cropped (C, d, h, w), box, background (C,)) of a float16 volume (C, D, H, W).

    Outside the box every modality has its background, the value of its first voxel, to the bit.
    """
    bits = volume.view(np.uint16)  # tells -0.0 from 0.0
    box = box_around((bits != bits[:, :1, :1, :1]).any(0))
    return volume[(slice(None), *_slices(box))], box, tuple(volume[:, 0, 0, 0].tolist())


def pack_regions(reference: np.ndarray) -> np.ndarray:
    """Return region masks (R, D, H, W) bool, R up to 8, as (D, H, W) uint8: region r is bit r."""
    assert len(reference) <= 8, f"{len(reference)} regions do not fit the 8 bits of a voxel"
    flags = np.zeros(reference.shape[1:], np.uint8)
    for bit, mask in enumerate(reference):
        flags |= mask.astype(np.uint8) << bit
    return flags


def unpack_regions(flags: np.ndarray, regions: int) -> np.ndarray:
    """Return the bool masks (R, ...) of packed flags (...)."""
    return np.stack([(flags >> bit) & 1 for bit in range(regions)]).astype(bool)


# ------------------------------------------------------------------------------------------------------------
# Entries: write, read, remove
# ------------------------------------------------------------------------------------------------------------


def owned_name() -> str:
    """Return a new file name that tells the machine and the process it belongs to."""
    return f".{platform.node()}~{os.getpid()}~{uuid.uuid4().hex[:8]}"


def write_entry(
    folder: Path, volume: np.ndarray, reference: np.ndarray, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write an entry under a temporary name and move it into place whole; return its facts.

    `volume` (C, D, H, W) float16, `reference` (R, D, H, W) bool. Of two writers the first stays.
    """
    cropped, box, background = crop_volume(volume)
    flags = pack_regions(reference)
    reference_box = box_around(flags > 0)
    facts = {**facts, "shape": volume.shape[1:], "box": box, "reference_box": reference_box}
    temporary = folder.parent / owned_name()
    temporary.mkdir(parents=True)
    try:
        for name, array in zip(ARRAYS, (cropped, flags[_slices(reference_box)]), strict=True):
            np.save(temporary / name, np.ascontiguousarray(array))
        sizes = {name: (temporary / name).stat().st_size for name in ARRAYS}
        write_json(temporary / "facts.json", {**facts, "background": background, "bytes": sizes})
        if (found := read_facts(folder)) is None:
            remove_entry(folder)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not folder.is_dir():
                    raise
        return found or read_facts(folder) or {}
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return an entry's facts; None where it is missing or damaged: no facts, or an array of another size."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        is_whole = all((folder / name).stat().st_size == facts["bytes"][name] for name in ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if is_whole else None


def remove_entry(folder: Path) -> None:
    """Remove an entry, out of sight first: nobody meets half of it."""
    aside = folder.parent / owned_name()
    try:
        os.replace(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def open_entry(case: Case, folder: Path, facts: dict[str, Any]) -> PreparedCase:
    """Return the case of an entry, and note that it was used now."""
    os.utime(folder / "facts.json")
    return PreparedCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        cohort=case.cohort,
        folder=folder,
        spacing_mm=tuple(facts["spacing_mm"]),
        fingerprint=facts["fingerprint"],
        brain_voxels=tuple(facts["brain_voxels"]),
        region_voxels=tuple(tuple(counts) for counts in facts["region_voxels"]),
        shape=tuple(facts["shape"]),
        box=tuple(tuple(edges) for edges in facts["box"]),
        reference_box=tuple(tuple(edges) for edges in facts["reference_box"]),
        background=tuple(facts["background"]),
    )
