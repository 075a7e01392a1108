"""Leakage: is a case to be tested known from training, by its ids, by a mapping file, or by its content?

Every case gets a fingerprint of a few kilobytes, which is kept in the run. It holds the hash of the decoded
image, the hash of the mask, and a thumbnail of the head that survives what happens to a scan on its way
through other people's tools: another file type, other intensities, a shift, a mirror, a crop to the head.
benchmarks/leakage.py measures what is found and what is found by mistake.
"""

import base64
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from cases_v2 import Case, load_case
from utils_v2 import InputError, bounding_box, write_json

GRID = 24  # cells of a thumbnail along each axis
HIGH_PASS_CELLS = 2.0  # SD of what is taken out: the shape all heads share
SAME_SCAN = 0.88  # cosine from which two thumbnails show one scan; real different heads reach 0.77
MASK_VOXELS = 100  # smaller masks can agree by chance
FINGERPRINT_VERSION = 1  # raise when fingerprints change: stored ones are then made anew
LONGEST_AXIS = 128  # volumes are thinned to it: a cell of the thumbnail still averages over many voxels
HEAD_EDGE = 0.1  # the head begins where a plane holds this share of the fullest plane's voxels
EVIDENCE = ("case id", "patient id", "mapping", "exact image", "near image", "mask")
COLUMNS = ("cohort", "case", "evidence", "training_case", "similarity")


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


def resample_weights(size: int, start: float, stop: float) -> np.ndarray:
    """Return (GRID, size) weights that take an axis from start..stop to GRID cells: means, or linear."""
    edges = np.linspace(start, stop, GRID + 1)
    if stop - start < GRID:
        distance = np.abs((edges[:-1, None] + edges[1:, None]) / 2 - 0.5 - np.arange(size))
        weights = np.clip(1 - distance, 0, None)
    else:
        low = np.maximum(edges[:-1, None], np.arange(size))
        weights = np.clip(np.minimum(edges[1:, None], np.arange(1, size + 1)) - low, 0, None)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def make_thumbnail(intensities: np.ndarray) -> np.ndarray:
    """Return the thumbnail (GRID, GRID, GRID) int8 of a volume (D, H, W); all 0 for a constant volume.

    Ranks of the voxels in the box around the head, averaged on the grid, less what is smooth in them: all
    heads are alike in that.
    """
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


# ------------------------------------------------------------------------------------------------------------
# Who a case is
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """All by which a case can be known again."""

    case_id: str
    patient_id: str
    aliases: tuple[str, ...]  # further ids of this scan or patient, from mapping files
    image_sha256: str
    mask_sha256: str  # empty where there is no mask to speak of
    thumbnail: np.ndarray  # (GRID, GRID, GRID) int8


def make_identity(case: Case, content: Mapping[str, str]) -> Identity:
    """Return the identity of a case with the fingerprint `content`."""
    cells = np.frombuffer(base64.b64decode(content["thumbnail"]), np.int8).reshape((GRID,) * 3)
    aliases = tuple(getattr(case, "aliases", ()))
    return Identity(
        case.case_id, case.patient_id, aliases, content["image_sha256"], content["mask_sha256"], cells
    )


def identity_of_ids(case_id: str, patient_id: str) -> Identity:
    """Return the identity of a case of which nothing but its ids is known."""
    return Identity(case_id, patient_id, (), "", "", np.zeros((GRID,) * 3, np.int8))


def fingerprint_modality(modalities: Sequence[str]) -> str:
    """Return the modality that fingerprints are made of: FLAIR, or the first where there is none."""
    return "flair" if "flair" in modalities else modalities[0]


def _read_fingerprint(case: Case, modality: str, cache_dir: Path) -> dict[str, str]:
    files = [*case.modalities[modality], *case.mask]
    try:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise InputError(f"{error.filename}: not readable ({error.strerror}); fetch it again.") from error
    key = hashlib.sha256(f"{FINGERPRINT_VERSION} {modality} {case!r} {stats}".encode()).hexdigest()[:32]
    path = cache_dir / "fingerprints" / f"{key}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    loaded = load_case(case, (modality,))
    content = fingerprint(loaded.volume[0], loaded.labels)
    write_json(path, content)
    return content


def identify_cases(
    cases: Sequence[Case],
    modalities: Sequence[str],
    cache_dir: str | Path,
    prepared: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Identity]:
    """Return the identity of each case, with or without mask, in order, with a progress bar.

    `prepared` holds the fingerprints by case id that were made when cases were prepared; the others are read
    from the files, once. Raises InputError naming the file where one cannot be read.
    """
    known = prepared or {}
    modality = fingerprint_modality(modalities)

    def identify(case: Case) -> Identity:
        content = known.get(case.case_id) or _read_fingerprint(case, modality, Path(cache_dir))
        return make_identity(case, content)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decompression leaves Python's lock
        made = pool.map(identify, cases)
        return list(
            tqdm(made, total=len(cases), desc="fingerprints", unit="case", leave=False, disable=not cases)
        )


def pack_identities(identities: Sequence[Identity]) -> dict[str, Any]:
    """Return identities as a checkpoint holds them: "seen", lists of text, and "seen_thumbnails", int8."""
    rows = [[i.case_id, i.patient_id, i.image_sha256, i.mask_sha256, list(i.aliases)] for i in identities]
    thumbnails = np.array([i.thumbnail for i in identities], np.int8).reshape(-1, GRID, GRID, GRID)
    return {
        "seen": rows,
        "seen_thumbnails": torch.from_numpy(thumbnails),
        "seen_version": FINGERPRINT_VERSION,
    }


def unpack_identities(checkpoint: Mapping[str, Any]) -> list[Identity] | None:
    """Return the identities in a checkpoint; None where it holds none or thumbnails of another kind."""
    thumbnails: Tensor | None = checkpoint.get("seen_thumbnails")
    if thumbnails is None or checkpoint.get("seen_version") != FINGERPRINT_VERSION:
        return None
    return [
        Identity(case_id, patient_id, tuple(aliases), image, mask, cells)
        for (case_id, patient_id, image, mask, aliases), cells in zip(
            checkpoint["seen"], thumbnails.numpy(), strict=True
        )
    ]


# ------------------------------------------------------------------------------------------------------------
# Comparing
# ------------------------------------------------------------------------------------------------------------


def turned_thumbnails(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Yield thumbnails (n, GRID, GRID, GRID) in all 16 ways to mirror axes and to swap H with W.

    Mirrors come from lost or wrong orientations, the swap from pictures written in NIfTI's axis order.
    """
    for turned in (cells, cells.swapaxes(2, 3)):
        for steps in itertools.product((1, -1), repeat=3):
            yield turned[:, :: steps[0], :: steps[1], :: steps[2]]


def shift_cells(cells: np.ndarray, step: int) -> np.ndarray:
    """Return thumbnails (n, GRID, GRID, GRID) moved by `step` cells along D, 0 where nothing was.

    Thick slices need it: one slice more or less at an end of the head moves the others by a cell.
    """
    moved = np.zeros_like(cells)
    moved[:, max(step, 0) : GRID + min(step, 0)] = cells[:, max(-step, 0) : GRID - max(step, 0)]
    return moved


def _unit_rows(cells: np.ndarray) -> np.ndarray:
    rows = cells.reshape(len(cells), -1).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def compare_thumbnails(tested: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the cosine similarity (n, m) of thumbnails (n, ...) to (m, ...), the highest of all poses.

    The poses are the 16 turns, each as it is and moved by a cell up and down. A thumbnail of a constant
    volume is like nothing: 0 or less.
    """
    highest = np.full((len(tested), len(known)), -1.0, np.float32)
    if not len(tested) or not len(known):
        return highest
    columns = _unit_rows(known).T
    for step in (0, -1, 1):
        for turned in turned_thumbnails(shift_cells(tested, step)):
            np.maximum(highest, _unit_rows(turned) @ columns, out=highest)
    return highest


def most_similar(tested: Sequence[Identity], known: Sequence[Identity]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each tested case (index into `known`, similarity) of the thumbnail most like its own."""
    stack = np.array([one.thumbnail for one in known])
    index, similarity = np.zeros(len(tested), int), np.full(len(tested), -1.0)
    if known:
        for start in range(0, len(tested), 64):
            chunk = np.array([one.thumbnail for one in tested[start : start + 64]])
            compared = compare_thumbnails(chunk, stack)
            index[start : start + 64] = compared.argmax(1)
            similarity[start : start + 64] = compared.max(1)
    return index, similarity


def find_leakage(cohort: str, tested: Sequence[Identity], known: Sequence[Identity]) -> pd.DataFrame:
    """Return a row for each tested case that is among the known: cohort, case, evidence, training_case.

    Evidence is the first in EVIDENCE that agrees. The column `similarity` is that of the thumbnails where the
    evidence is the image, 1 for an exact one, and NaN elsewhere.
    """
    by_case = {one.case_id: one for one in known}
    by_patient = {one.patient_id: one for one in known}
    by_name = {name: one for one in known for name in one.aliases}
    by_image = {one.image_sha256: one for one in known}
    by_mask = {one.mask_sha256: one for one in known if one.mask_sha256}
    nearest, similarity = most_similar(tested, known)
    rows = []
    for case, index, cosine in zip(tested, nearest, similarity, strict=True):
        ids = (case.case_id, case.patient_id)
        tables = ((by_name, (*ids, *case.aliases)), (by_case | by_patient, case.aliases))
        found = (
            by_case.get(case.case_id),
            by_patient.get(case.patient_id),
            next((table[name] for table, names in tables for name in names if name in table), None),
            by_image.get(case.image_sha256),
            known[index] if cosine >= SAME_SCAN else None,
            by_mask.get(case.mask_sha256),
        )
        for evidence, other in zip(EVIDENCE, found, strict=True):
            if other is not None:
                shown = {"exact image": 1.0, "near image": round(float(cosine), 4)}.get(evidence, np.nan)
                rows.append((cohort, case.case_id, evidence, other.case_id, shown))
                break
    return pd.DataFrame(rows, columns=list(COLUMNS))


def find_seen(cohort: str, tested: Sequence[Identity], known: Sequence[Identity]) -> pd.DataFrame:
    """Return the rows of `find_leakage`, and of further tested cases of the patients found.

    A patient one of whose scans is known by its content alone is known with all scans.
    """
    found = find_leakage(cohort, tested, known)
    siblings = find_siblings(found, tested)
    if siblings.empty:
        return found
    training_case = dict(zip(found["case"], found["training_case"], strict=True))
    siblings["training_case"] = siblings["training_case"].map(training_case)
    return pd.concat([found, siblings], ignore_index=True)


def check_parts(parts: Mapping[str, Sequence[Identity]]) -> None:
    """Raise InputError where a case of one part of a split is known from an earlier part."""
    for earlier, later in itertools.combinations(parts, 2):
        leakage = find_leakage(later, parts[later], parts[earlier])
        if len(leakage):
            first = leakage.iloc[0]
            cosine = "" if np.isnan(first["similarity"]) else f", similarity {first['similarity']:.3f}"
            raise InputError(
                f"{first['case']} ({later}) and {first['training_case']} ({earlier}) are one patient by "
                f"{first['evidence']}{cosine}, one of {len(leakage)} pair(s) in both parts of the split; "
                f"give them the same patient id through --mapping, or take one of them out."
            )


def find_held_out(own: Sequence[Identity], held: Sequence[Identity]) -> pd.DataFrame:
    """Return a row for each own case whose patient is in the cohort held out: case, patient, evidence, ...

    All cases of such a patient are in it, those by evidence "patient id" that only share the patient.
    """
    found = find_leakage("held out", own, held)
    siblings = find_siblings(found, own)
    table = pd.concat([found, siblings], ignore_index=True) if len(siblings) else found
    table = table.rename(columns={"training_case": "known_as"}).drop(columns="cohort")
    patient_of = {one.case_id: one.patient_id for one in own}
    table.insert(1, "patient", table["case"].map(patient_of))
    return table.sort_values("case", ignore_index=True)


def find_siblings(found: pd.DataFrame, tested: Sequence[Identity]) -> pd.DataFrame:
    """Return the rows of further tested cases that share a patient or an alias with one `find_leakage` found.

    Their training_case is the tested case they share it with.
    """
    direct = set(found["case"])
    ids = [
        replace(identity_of_ids(one.case_id, one.patient_id), aliases=one.aliases)
        for one in tested
        if one.case_id in direct
    ]
    others = [one for one in tested if one.case_id not in direct]
    return find_leakage(found["cohort"].iloc[0], others, ids) if ids else found.iloc[:0]
