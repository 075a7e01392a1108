"""The cache: each case decoded, oriented, normalised and cropped once, in parallel, within a limit.

An entry is a folder named by what it was made of, the bytes of the case's files and the settings, so a cohort
that was moved, copied or renamed is found again. cache_entry_v2.py says what an entry holds.

    cache/entries/<key>/   volume.npy, reference.npy, facts.json (written last; its time is that of last use)
    cache/stamps/<hash>    the key of files of this path, size and time, so that they need not be read again
    cache/runs/<owner>     the keys a running command needs; nobody removes those
    cache/fingerprints/    what leakage_v2.py knows cases by that have no entry
"""

import atexit
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from cache_entry_v2 import PreparedCase, open_entry, owned_name, read_facts, remove_entry, write_entry
from cases_v2 import Case, load_case, regions_from_labels
from distributed_v2 import share_of, wait_for_all, world_size
from leakage_v2 import FINGERPRINT_VERSION, fingerprint, fingerprint_modality
from utils_v2 import InputError, file_sha256, write_atomically
from volumes_v2 import normalise_volume

CACHE_VERSION = (
    4  # raise when normalisation or the layout of entries changes: old entries are then never read
)
CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Decoded volumes of DRUnet V2; safe to delete.\n"
# What names a case and says nothing of its pixels: a renamed copy shares the entry.
NAMES_OF_CASE = ("case_id", "patient_id", "cohort", "aliases")
FOLDERS = ("entries", "stamps", "runs", "fingerprints")
ABANDONED_S = 7 * 24 * 3600  # after which what another machine left counts as dead
CACHE_GB = 50.0  # default limit; BraTS 2021 takes about 9 a modality
BUILDERS = 8  # processes at most, as each holds a case in memory
POOL_WORTH_S = 20.0  # work left from which processes, slow to start, are worth starting
CASES_TO_ESTIMATE = 8  # sizes known before the whole cohort's is estimated


# ------------------------------------------------------------------------------------------------------------
# One entry: its key, how it is built
# ------------------------------------------------------------------------------------------------------------


def _hash_case(
    case: Case, modalities: Sequence[str], regions: Sequence[str], identify: Callable[[Path], Any]
) -> str:
    """Hash the settings and all of a case that bears on its pixels, each file by `identify`."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    fields = {name: value for name, value in fields.items() if name not in NAMES_OF_CASE}
    fields["modalities"] = [case.modalities[name] for name in modalities]
    settings = [CACHE_VERSION, FINGERPRINT_VERSION, list(modalities), list(regions)]
    try:
        content = json.dumps([settings, fields], default=identify)
    except OSError as error:
        raise InputError(f"{error.filename}: not readable ({error.strerror}); fetch it again.") from error
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _stamp_file(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def find_key(case: Case, modalities: Sequence[str], regions: Sequence[str], cache_dir: Path) -> str:
    """Return the name of a case's entry: a hash of the settings and of its files' bytes.

    The bytes are read once; files whose path, size and time of change have been met before are taken to be
    what they were. So a touched, moved or copied cohort costs a reading, not a decoding, and a file that was
    rewritten within its size and given its old time is not noticed.
    """
    stamp = cache_dir / "stamps" / _hash_case(case, modalities, regions, _stamp_file)
    if stamp.is_file() and len(key := stamp.read_text(encoding="ascii")) == 32:
        return key
    key = _hash_case(case, modalities, regions, file_sha256)
    write_atomically(stamp, lambda temporary: temporary.write_text(key, encoding="ascii"))
    return key


def build_entry(
    case: Case, modalities: Sequence[str], regions: Sequence[str], cache_dir: Path, key: str
) -> dict[str, Any]:
    """Decode, normalise and crop a case with a mask into its entry; return the entry's facts."""
    loaded = load_case(case, modalities)
    assert loaded.labels is not None
    modality = fingerprint_modality(modalities)
    volume, brain_voxels = normalise_volume(loaded.volume)
    reference = regions_from_labels(loaded.labels, case.convention, regions)
    facts = {
        "case_id": case.case_id,
        "spacing_mm": loaded.spacing_mm,
        "fingerprint": fingerprint(loaded.volume[modalities.index(modality)], loaded.labels),
        "brain_voxels": brain_voxels.tolist(),
        "region_voxels": reference.sum((2, 3)).tolist(),
    }
    return write_entry(cache_dir / "entries" / key, volume.astype(np.float16), reference, facts)


# ------------------------------------------------------------------------------------------------------------
# Who uses what, and how much room it takes
# ------------------------------------------------------------------------------------------------------------


def _is_abandoned(path: Path) -> bool:
    """Tell whether the process that a name of `owned_name` names is gone; elsewhere, after a week."""
    host, process, _ = path.name.removeprefix(".").split("~")
    try:
        if host == platform.node() and os.name == "posix":  # elsewhere signal 0 would end the process
            os.kill(int(process), 0)
            return False
        return time.time() - path.stat().st_mtime > ABANDONED_S
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        pass  # another user's, alive
    return False


def open_cache(cache_dir: Path) -> None:
    """Make the cache's folders and its tag where missing, and remove what killed processes left."""
    for name in FOLDERS:
        (cache_dir / name).mkdir(parents=True, exist_ok=True)
    tag = cache_dir / "CACHEDIR.TAG"  # by which backup programs know a cache, and `clear_cache` ours
    if not tag.is_file():
        write_atomically(tag, lambda temporary: temporary.write_text(CACHE_TAG, encoding="ascii"))
    for path in itertools.chain((cache_dir / "entries").glob(".*~*~*"), (cache_dir / "runs").glob(".*~*~*")):
        if _is_abandoned(path):
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


_RUNS: dict[Path, Path] = {}  # the list of keys this process holds in each cache


def hold_keys(cache_dir: Path, keys: Iterable[str]) -> None:
    """Tell all other runs, until this process ends, that it needs these entries."""
    place = cache_dir.resolve() / "runs"
    path = _RUNS.get(place)
    if path is None or f"~{os.getpid()}~" not in path.name:  # a forked process holds its own
        path = _RUNS[place] = place / owned_name()
        atexit.register(_release, path)
    with path.open("a", encoding="ascii") as file:
        file.writelines(f"{key}\n" for key in keys)


def _release(path: Path) -> None:
    if f"~{os.getpid()}~" in path.name:
        path.unlink(missing_ok=True)


def held_keys(cache_dir: Path, by_others: bool = False) -> set[str]:
    """Return the keys that running commands need, those of this process left out where `by_others`."""
    keys: set[str] = set()
    own = _RUNS.get(cache_dir.resolve() / "runs")
    for path in (cache_dir / "runs").glob(".*~*~*"):
        if _is_abandoned(path) or (by_others and own and path.name == own.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # its process ended meanwhile
            keys.update(path.read_text(encoding="ascii").split())
    return keys


def list_entries(cache_dir: Path) -> dict[str, tuple[int, float]]:
    """Return (bytes, time of last use) of each entry by its key; damaged ones as never used."""
    entries = {}
    for folder in (cache_dir / "entries").glob("[!.]*"):
        try:
            size = sum(path.stat().st_size for path in folder.iterdir())
        except FileNotFoundError:  # removed by another run meanwhile
            continue
        facts = folder / "facts.json"
        entries[folder.name] = (size, facts.stat().st_mtime if facts.is_file() else 0.0)
    return entries


def make_room(cache_dir: Path, limit_bytes: float) -> int:
    """Remove entries no running command needs, least recently used first, down to a limit; return the bytes.

    Stamps of entries that are gone go with them.
    """
    entries = list_entries(cache_dir)
    total = sum(size for size, _ in entries.values())
    if total <= limit_bytes:
        return total
    needed = held_keys(cache_dir)
    for key in sorted(entries.keys() - needed, key=lambda key: entries[key][1]):
        if total <= limit_bytes:
            break
        if key in held_keys(cache_dir):  # by a run that has started since
            continue
        remove_entry(cache_dir / "entries" / key)
        total -= entries.pop(key)[0]
    for stamp in (cache_dir / "stamps").glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            if stamp.read_text(encoding="ascii") not in entries.keys() | needed:
                stamp.unlink()
    return total


def clear_cache(cache_dir: str | Path) -> int:
    """Remove a cache and return the bytes it took; InputError where it is none of ours, or in use."""
    cache_dir = Path(cache_dir)
    tag = cache_dir / "CACHEDIR.TAG"
    if not cache_dir.exists():
        return 0
    if not tag.is_file() or tag.read_text(encoding="ascii", errors="replace") != CACHE_TAG:
        raise InputError(f"--cache-dir {cache_dir}: holds no cache of this program; remove it by hand.")
    if held_keys(cache_dir, by_others=True):
        raise InputError(f"--cache-dir {cache_dir}: a running command uses this cache; wait until it ends.")
    size = sum(size for size, _ in list_entries(cache_dir).values())
    size += sum(path.stat().st_size for path in (cache_dir / "fingerprints").glob("*.json"))
    for name in FOLDERS:
        shutil.rmtree(cache_dir / name, ignore_errors=True)
    tag.unlink(missing_ok=True)
    if not any(cache_dir.iterdir()):
        cache_dir.rmdir()
    return size


# ------------------------------------------------------------------------------------------------------------
# Preparing cases
# ------------------------------------------------------------------------------------------------------------


def prepare_case(
    case: Case, modalities: Sequence[str], regions: Sequence[str], cache_dir: Path
) -> PreparedCase:
    """Decode and normalise one case with a mask into the cache, or find it there."""
    key = find_key(case, modalities, regions, cache_dir)
    folder = cache_dir / "entries" / key
    facts = read_facts(folder) or build_entry(case, modalities, regions, cache_dir, key)
    return open_entry(case, folder, facts)


def prepare_cases(
    cases: Sequence[Case],
    modalities: Sequence[str],
    regions: Sequence[str],
    cache_dir: str | Path,
    workers: int | None = None,
    cache_gb: float = CACHE_GB,
) -> list[PreparedCase]:
    """Prepare every case, in `workers` processes (see `build_missing`), and print what the cache holds.

    The entries stay until this process ends, whatever other runs need. Raises InputError where a case cannot
    be used, or where the cases do not fit `cache_gb` or the disk, as soon as that can be told.
    """
    cache_dir = Path(cache_dir)
    open_cache(cache_dir)
    lookup = tqdm(cases, desc="looking up cases", unit="case", leave=False)
    keys = [find_key(case, modalities, regions, cache_dir) for case in lookup]
    hold_keys(cache_dir, keys)
    facts = {key: read_facts(cache_dir / "entries" / key) for key in keys}
    missing = {key: case for key, case in zip(keys, cases, strict=True) if facts[key] is None}
    others = room_of_others(cache_dir, facts.keys())
    check_room(cache_dir, facts, cache_gb, *others)
    total = make_room(cache_dir, cache_gb * 1e9)
    with contextlib.closing(build_missing(missing, modalities, regions, cache_dir, workers)) as building:
        for key, built in building:
            facts[key] = built
            total += sum(built["bytes"].values())
            check_room(cache_dir, facts, cache_gb, *others)
            if total > cache_gb * 1e9:
                total = make_room(cache_dir, cache_gb * 1e9)
    own_gb = sum(sum(found["bytes"].values()) for found in facts.values()) / 1e9
    print(
        f"cache: {len(facts)} cases, {own_gb:.3g} GB, {len(missing)} made now; {cache_dir} holds "
        f"{total / 1e9:.3g} of {cache_gb:g} GB"
    )
    return [
        open_entry(case, cache_dir / "entries" / key, facts[key])
        for key, case in zip(keys, cases, strict=True)
    ]


def prepare_by_shares(
    cases: Sequence[Case],
    modalities: Sequence[str],
    regions: Sequence[str],
    cache_dir: str | Path,
    cache_gb: float = CACHE_GB,
) -> list[PreparedCase]:
    """Return every case prepared, on every rank; each rank decodes its share, then all read the cache."""
    settings = (modalities, regions, cache_dir)
    if world_size() > 1:
        prepare_cases(share_of(cases), *settings, cache_gb=cache_gb)
        wait_for_all()
    return prepare_cases(cases, *settings, cache_gb=cache_gb)


def room_of_others(cache_dir: Path, keys: Iterable[str]) -> tuple[int, int]:
    """Return the bytes of entries, other than these, that running commands need, and of those none needs."""
    keys, held = set(keys), held_keys(cache_dir)
    others = {key: size for key, (size, _) in list_entries(cache_dir).items() if key not in keys}
    needed = sum(size for key, size in others.items() if key in held)
    return needed, sum(others.values()) - needed


def check_room(
    cache_dir: Path,
    facts: Mapping[str, dict[str, Any] | None],
    cache_gb: float,
    needed_by_others: int,
    removable: int,
) -> None:
    """Raise InputError where cases, extrapolated from those prepared, do not fit the limit or the disk.

    `facts` by key, None for what is not prepared yet; the others' room in bytes, see `room_of_others`.
    """
    known = [sum(found["bytes"].values()) for found in facts.values() if found]
    limit = cache_gb * 1e9 - needed_by_others
    if not known or (len(known) < min(CASES_TO_ESTIMATE, len(facts)) and sum(known) <= limit):
        return
    needed = sum(known) / len(known) * len(facts)
    if needed > limit:
        taken = f", {needed_by_others / 1e9:.3g} of it taken by running commands" if needed_by_others else ""
        raise InputError(
            f"--cache-gb {cache_gb:g}{taken}: the {len(facts)} cases take about {needed / 1e9:.3g} GB in the "
            f"cache; raise the limit or take fewer modalities."
        )
    free = shutil.disk_usage(cache_dir).free + removable
    if needed - sum(known) > free:
        raise InputError(
            f"--cache-dir {cache_dir}: the {len(facts)} cases take about {needed / 1e9:.3g} GB and its disk "
            f"has {free / 1e9:.3g} GB to spare; free some or choose another folder."
        )


def start_builder() -> None:
    """Keep a building process to one thread, and leave Ctrl-C to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def build_missing(
    missing: Mapping[str, Case],
    modalities: Sequence[str],
    regions: Sequence[str],
    cache_dir: Path,
    workers: int | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Build the entries of cases by key, with progress; yield (key, facts) as each is done.

    `workers` None starts in this process and goes on in one process a core where enough work is left to be
    worth their start; 0 and 1 stay here. The processes do not inherit this one's threads or devices.
    """
    waiting = list(missing.items())
    settings = (modalities, regions, cache_dir)
    started = time.monotonic()
    with tqdm(total=len(missing), desc="preparing cases", unit="case", leave=False) as progress:
        while waiting:
            count = min(choose_builders(workers), len(waiting))
            spent, done = time.monotonic() - started, len(missing) - len(waiting)
            is_long = workers is not None or (done and spent / done * len(waiting) > POOL_WORTH_S)
            if count > 1 and is_long:
                break
            key, case = waiting.pop(0)
            yield key, build_entry(case, *settings, key)
            progress.update()
        if waiting:
            for key, facts in build_in_processes(waiting, settings, count):
                yield key, facts
                progress.update()


def choose_builders(workers: int | None) -> int:
    """Return the number of building processes: as many as asked for, or one a core up to BUILDERS."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, BUILDERS)


def build_in_processes(
    waiting: Sequence[tuple[str, Case]], settings: tuple[Sequence[str], Sequence[str], Path], count: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Build entries in `count` processes; the first error ends them all and is raised here."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=start_builder) as pool:
        futures = {pool.submit(build_entry, case, *settings, key): key for key, case in waiting}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process that prepared cases was killed, most likely for want of memory; close other "
                "programs and run again, finished cases are kept."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
