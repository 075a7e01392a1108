"""Cases decoded once: normalised, cropped without loss, memory-mapped, found again by their files' content.

What is cropped away is constant, and values are float16 as `normalise_volume` rounds them, so pixels are the
same with and without the cache. benchmarks/cache_format.py measures both choices.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cohort.cases import Case, load_case, log_warnings, normalise_case, warn_of_missing
from cohort.fingerprints import FINGERPRINT_VERSION, fingerprint, fingerprint_modality
from cohort.labels import regions_from_labels
from cohort.phantom import is_phantom
from cohort.preprocess import (
    BRAIN_SLICE_VOXELS,
    NO_SLICE_TO_RUN,
    Frame,
    find_doubts,
    find_head_box,
    place_modalities,
    slab_slices,
)
from runtime.errors import InputError
from runtime.files import describe_error, file_sha256, write_atomically, write_json
from runtime.log import log, progress
from runtime.processes import map_in_processes
from runtime.ranks import is_first_here, wait_for_all
from utils_v2 import bounding_box

CACHE_VERSION = 7  # raise when normalisation or the layout of entries changes: older entries are never read
CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Decoded volumes of DRUnet V2; safe to delete.\n"
ARRAYS = ("volume.npy", "masks.npy")  # of an entry
_verified: set[tuple[str, int, int]] = (
    set()
)  # (path, time of change, CRC-32) of arrays that this process has read
FOLDERS = ("entries", "stamps", "phantoms", "runs", "fingerprints")  # the last two only in older versions
# What names a case and says nothing of its pixels: a renamed copy shares the entry.
NAMES_OF_CASE = ("case_id", "patient_id", "cohort", "aliases")
KEY = re.compile(r"[0-9a-f]{32}")  # of an entry
ABANDONED_S = 24 * 3600  # after which what is still under a temporary name was left by a killed process
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
    aliases: tuple[str, ...]  # further ids of this scan or patient, from mapping sheets
    folder: Path
    spacing_mm: tuple[float, float, float]
    fingerprint: Mapping[str, str]  # see cohort/fingerprints.py
    brain_voxels: tuple[int, ...]  # per slice
    region_voxels: tuple[tuple[int, ...], ...]  # per region, per slice
    shape: tuple[int, int, int]  # (D, H, W) of the native grid
    box: Box  # the part of it that is stored
    reference_box: Box  # around all regions; of one voxel where there is no tumour
    background: tuple[float, ...]  # value of each modality outside the box
    warnings: tuple[str, ...] = ()  # what is odd about its files and intensities, one sentence each
    head_box: tuple[tuple[int, int], tuple[int, int]] | None = None  # see `find_head_box`
    spacing_known: bool = True  # PNG and TIF slices carry none
    missing: tuple[str, ...] = ()  # modalities that the case lacks, see `place_modalities`
    is_phantom: bool = False

    @property
    def frame(self) -> Frame:
        """What of the case decides how its slices lie in the network's input."""
        return Frame(self.head_box, self.spacing_mm if self.spacing_known else None)

    @property
    def volume(self) -> np.ndarray:
        """Normalised volume (C, D, H, W) float16, rebuilt in memory; `slab` reads much less."""
        volume = np.empty((len(self.background), *self.shape), np.float16)
        volume[:] = np.reshape(self.background, (-1, 1, 1, 1))
        volume[(slice(None), *_slices(self.box))] = self._stored_volume()
        return volume

    @property
    def brain(self) -> np.ndarray:
        """Mask of the brain (D, H, W) bool that the first modality was normalised by, rebuilt in memory."""
        return self._rebuild(self._stored_masks()[:1])[0]

    @property
    def reference(self) -> np.ndarray:
        """Region masks (R, D, H, W) bool, rebuilt in memory; `reference_slice` reads much less."""
        return self._rebuild(self._stored_masks()[1:])

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
        first, end = self.box[0]
        _, rows, columns = _slices(self.box)
        reference = np.zeros((len(self.region_voxels), *self.shape[1:]), bool)
        if first <= z < end:
            reference[:, rows, columns] = self._unpack(self._stored_masks()[1:, z - first])
        return reference

    def _rebuild(self, packed: np.ndarray) -> np.ndarray:
        masks = np.zeros((len(packed), *self.shape), bool)
        masks[(slice(None), *_slices(self.box))] = self._unpack(packed)
        return masks

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        first, end = self.box[2]
        return np.unpackbits(packed, axis=-1, count=end - first).view(bool)

    def _stored_volume(self) -> np.ndarray:
        shape = (len(self.background), *(end - first for first, end in self.box))
        return _map_array(self.folder / "volume.npy", np.float16, shape)

    def _stored_masks(self) -> np.ndarray:
        depth, height, width = (end - first for first, end in self.box)
        shape = (1 + len(self.region_voxels), depth, height, -(-width // 8))  # 8 voxels in a byte
        return _map_array(self.folder / "masks.npy", np.uint8, shape)


def _map_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Map the array of a .npy file whose type and shape are known: no header is parsed for each slab.

    Copy-on-write, as torch takes no read-only array; nothing reaches the file.
    """
    try:
        header_bytes = path.stat().st_size - int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.memmap(path, dtype, "c", header_bytes, shape)
    except (OSError, ValueError) as error:  # a ValueError is of a file cut short
        raise InputError(
            path,
            f"this part of the cache is gone or damaged ({describe_error(error)})",
            "run the command again, a training with --resume: it is made again",
        ) from error


def _slices(box: Box) -> tuple[slice, slice, slice]:
    return tuple(slice(first, end) for first, end in box)


# ------------------------------------------------------------------------------------------------------------
# An entry: cropped, packed, written, read, named
# ------------------------------------------------------------------------------------------------------------


def box_around(mask: np.ndarray) -> Box:
    """Return the smallest box around the True voxels of a mask (D, H, W); one voxel where there is none."""
    if not mask.any():
        return ((0, 1), (0, 1), (0, 1))
    return tuple((edge.start, edge.stop) for edge in bounding_box(mask))


def find_box(volume: np.ndarray, masks: np.ndarray) -> Box:
    """Return the smallest box outside of which each modality is constant and each mask empty.

    `volume` (C, D, H, W) float16, compared to its first voxel bit by bit; `masks` (M, D, H, W) bool.
    """
    bits = volume.view(np.uint16)  # distinguishes -0.0 from 0.0
    return box_around((bits != bits[:, :1, :1, :1]).any(0) | masks.any(0))


def write_entry(
    folder: Path,
    volume: np.ndarray,
    masks: np.ndarray,
    spacing_mm: Sequence[float],
    content: Mapping[str, str],
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an entry under a temporary name, move it into place whole, and return its facts.

    `volume` (C, D, H, W) float16; `masks` (1 + R, D, H, W) bool, the brain first; `content` the fingerprint;
    `notes` the case's `spacing_known` and `warnings`.
    """
    box = find_box(volume, masks)
    inside = (slice(None), *_slices(box))
    arrays = {"volume.npy": volume[inside], "masks.npy": np.packbits(masks[inside], axis=-1)}
    brain_voxels, *region_voxels = masks.sum((2, 3)).tolist()
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(temporary / name, np.ascontiguousarray(array))
        facts = {
            "spacing_mm": list(spacing_mm),
            "fingerprint": dict(content),
            "brain_voxels": brain_voxels,
            "region_voxels": region_voxels,
            "shape": volume.shape[1:],
            "box": box,
            "reference_box": box_around(masks[1:].any(0)),
            "background": volume[:, 0, 0, 0].tolist(),
            "head_box": find_head_box(masks[0]),
            **(notes or {}),
            "bytes": {name: (temporary / name).stat().st_size for name in arrays},
            "crc32": {name: file_crc32(temporary / name) for name in arrays},
        }
        facts["crc32"]["facts"] = facts_crc32(facts)
        write_json(temporary / "facts.json", facts)
        _move_into_place(temporary, folder)
    except OSError as error:  # NumPy says of a full disk how much it wrote, and no error number
        raise InputError(
            f"--cache-dir {folder.parents[1]}",
            f"an entry could not be written ({describe_error(error)})",
            "free space on its disk or choose another folder",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename a whole entry to its name; of two writers the first stays, a damaged entry gives way."""
    if folder.exists() and read_facts(folder) is None:
        damaged = folder.with_name(f".{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return an entry's facts; None where it is missing or damaged: another size or checksum of any part.

    The arrays are read through on the first use in a process, and again where their time of change differs.
    """
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        is_whole = facts["crc32"]["facts"] == facts_crc32(facts)
        for name in ARRAYS:
            state = (folder / name).stat()
            is_whole = is_whole and state.st_size == facts["bytes"][name]
            stamp = (str(folder / name), state.st_mtime_ns, facts["crc32"][name])
            if is_whole and stamp not in _verified:
                is_whole = file_crc32(folder / name) == facts["crc32"][name]
                _verified.update([stamp] if is_whole else [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return facts if is_whole else None


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file's bytes: it finds what disks and copies do, at twice SHA-256's speed."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def facts_crc32(facts: Mapping[str, Any]) -> int:
    """Return the CRC-32 of an entry's facts without this number itself."""
    sums = {name: value for name, value in facts["crc32"].items() if name != "facts"}
    return zlib.crc32(json.dumps({**facts, "crc32": sums}, sort_keys=True).encode())


def open_entry(case: Case, folder: Path, facts: Mapping[str, Any]) -> PreparedCase:
    """Return the prepared case of an entry, under the names of `case`."""
    names = {name: getattr(case, name) for name in NAMES_OF_CASE}
    stored = {name: _with_tuples(value) for name, value in facts.items() if name not in ("bytes", "crc32")}
    return PreparedCase(**names, folder=folder, is_phantom=is_phantom(case), **stored)


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _hash_case(
    case: Case, modalities: Sequence[str], regions: Sequence[str], identify_file: Callable[[Path], Any]
) -> str:
    """Hash the settings and all of a case that bears on its pixels, each file by `identify_file`."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    fields = {name: value for name, value in fields.items() if name not in NAMES_OF_CASE}
    fields["modalities"] = [case.modalities.get(name) for name in modalities]
    settings = [CACHE_VERSION, FINGERPRINT_VERSION, list(modalities), list(regions)]
    try:
        content = json.dumps([settings, fields], default=identify_file)
    except OSError as error:
        raise InputError(error.filename, f"not readable ({error.strerror})", "fetch it again") from error
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _stamp_file(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def find_key(case: Case, modalities: Sequence[str], regions: Sequence[str], cache_dir: Path) -> str:
    """Return the name of a case's entry: a hash of the settings and of its files' bytes.

    The bytes are read once. Afterwards files are recognised by path, size and time of change. So a touched,
    moved or copied cohort is read again, but not decoded again, and a file that was rewritten within its size
    and given its old time is not noticed.
    """
    stamp = cache_dir / "stamps" / _hash_case(case, modalities, regions, _stamp_file)
    with _explain_errors(cache_dir):
        if stamp.is_file() and KEY.fullmatch(key := stamp.read_text(encoding="ascii", errors="replace")):
            return key
    key = _hash_case(case, modalities, regions, file_sha256)
    with _explain_errors(cache_dir):
        write_atomically(stamp, lambda temporary: temporary.write_text(key, encoding="ascii"))
    return key


# ------------------------------------------------------------------------------------------------------------
# Preparing cases
# ------------------------------------------------------------------------------------------------------------


def prepare_cases(
    cases: Sequence[Case], modalities: Sequence[str], regions: Sequence[str], cache_dir: str | Path
) -> list[PreparedCase]:
    """Return every case prepared: found in the cache, or decoded, normalised and cropped into it.

    Cases need a mask where there are regions. Raises InputError where a case cannot be used, or where the
    disk lacks room.
    """
    cache_dir = Path(cache_dir)
    open_cache(cache_dir)
    folders = [
        cache_dir / "entries" / find_key(case, modalities, regions, cache_dir)
        for case in progress(cases, "looking up cases", "case")
    ]
    entries = dict(zip(folders, cases, strict=True))  # cases of one content share an entry
    facts = {folder: read_facts(folder) for folder in progress(list(entries), "verifying the cache", "case")}
    missing = [(folder, case) for folder, case in entries.items() if facts[folder] is None]
    for folder, case in missing:
        if folder.exists():
            log.warning("the cache's entry of %s, %s, is damaged and made again", case.case_id, folder)
    build = partial(build_entry, modalities, regions)
    built = list(map(build, missing[:1]))
    if len(missing) > 1:
        check_room(cache_dir, sum(built[0]["bytes"].values()), len(missing) - 1)
        built += map_in_processes(build, missing[1:], "preparing cases", "case")
    facts.update(zip((folder for folder, _ in missing), built, strict=True))
    size = sum(sum(entry["bytes"].values()) for entry in facts.values())
    log.info("cache: %d cases, %.3g GB in %s, %d made now", len(facts), size / 1e9, cache_dir, len(missing))
    prepared = [open_entry(case, folder, facts[folder]) for case, folder in zip(cases, folders, strict=True)]
    log_warnings([(case.case_id, case.warnings) for case in prepared])
    blind = [case.case_id for case in prepared if max(case.brain_voxels) < BRAIN_SLICE_VOXELS]
    if blind:  # by itself: among other warnings it might not be shown
        log.warning("%d of %d cases: %s; first %s", len(blind), len(prepared), NO_SLICE_TO_RUN, blind[0])
    return prepared


def prepare_for_all_ranks(
    cases: Sequence[Case], modalities: Sequence[str], regions: Sequence[str], cache_dir: str | Path
) -> list[PreparedCase]:
    """Return every case prepared, on every rank: the first rank of each machine decodes, the others read."""
    prepared = prepare_cases(cases, modalities, regions, cache_dir) if is_first_here() else []
    wait_for_all()
    return prepared if is_first_here() else prepare_cases(cases, modalities, regions, cache_dir)


def build_entry(
    modalities: Sequence[str], regions: Sequence[str], missing: tuple[Path, Case]
) -> dict[str, Any]:
    """Decode and normalise a case into its (folder, case) entry; return the entry's facts."""
    folder, case = missing
    present = [name for name in modalities if name in case.modalities]
    loaded = load_case(case, present)
    volume, brain = normalise_case(case, loaded, present)
    volume = place_modalities(volume, present, modalities)
    masks = brain[None]
    if regions:
        assert loaded.labels is not None, f"{case.case_id} has no mask"
        masks = np.concatenate([masks, regions_from_labels(loaded.labels, case.convention, regions)])
    first = loaded.volume[present.index(fingerprint_modality(present))]
    content = fingerprint(first, loaded.labels)
    doubts = [
        f"{name} {doubt}"
        for name, intensities in zip(present, loaded.volume, strict=True)
        for doubt in find_doubts(intensities)
    ]
    lacking = [name for name in modalities if name not in present]
    notes = {
        "spacing_known": case.layout != "slices",
        "warnings": [*loaded.warnings, *doubts, *warn_of_missing(lacking)],
        **({"missing": lacking} if lacking else {}),
    }
    return write_entry(folder, volume.astype(np.float16), masks, loaded.spacing_mm, content, notes)


@contextlib.contextmanager
def _explain_errors(cache_dir: Path) -> Iterator[None]:
    """Turn an error of the file system into one that names --cache-dir."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--cache-dir {cache_dir}",
            f"cannot be used as a cache ({describe_error(error)}: {error.filename})",
            "free space on its disk or choose another folder",
        ) from error


def open_cache(cache_dir: Path) -> None:
    """Make the cache's folders and its tag where missing, and remove what killed processes left.

    Raises InputError where the folder cannot be used, as where it is a file.
    """
    tag = cache_dir / "CACHEDIR.TAG"  # by which backup programs know a cache, and `clear_cache` ours
    with _explain_errors(cache_dir):
        for name in ("entries", "stamps"):
            (cache_dir / name).mkdir(parents=True, exist_ok=True)
        if not tag.is_file():
            write_atomically(tag, lambda temporary: temporary.write_text(CACHE_TAG, encoding="ascii"))
    for path in (cache_dir / "entries").glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile by the process that writes it
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def check_room(cache_dir: Path, case_bytes: int, count: int) -> None:
    """Raise InputError where `count` further cases, each of about `case_bytes`, do not fit the disk."""
    needed, free = case_bytes * count, shutil.disk_usage(cache_dir).free
    if needed > free:
        raise InputError(
            f"--cache-dir {cache_dir}",
            f"{count} more cases need about {needed / 1e9:.3g} GB, its disk has {free / 1e9:.3g} GB free",
            "run dataset_balance_v2.py --clear-cache, or choose another folder",
        )


def clear_cache(cache_dir: str | Path) -> int:
    """Remove a cache and return the bytes it took; InputError where the folder is no cache of ours."""
    cache_dir = Path(cache_dir)
    tag = cache_dir / "CACHEDIR.TAG"
    if not cache_dir.exists():
        return 0
    if not tag.is_file() or tag.read_text(encoding="ascii", errors="replace") != CACHE_TAG:
        raise InputError(f"--cache-dir {cache_dir}", "holds no cache of this program", "remove it by hand")
    files = [path for name in FOLDERS for path in (cache_dir / name).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    for name in FOLDERS:
        shutil.rmtree(cache_dir / name, ignore_errors=True)
    tag.unlink()
    if not any(cache_dir.iterdir()):
        cache_dir.rmdir()
    return size
