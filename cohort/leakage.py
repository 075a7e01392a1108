"""Leakage: is a case to be tested known from training, by its ids, by a mapping file, or by its content?

Every case gets a fingerprint of a few kilobytes, which is kept in the run. It holds the hash of the decoded
image, the hash of the mask, and a thumbnail of the head that survives what happens to a scan on its way
through other people's tools: another file type, other intensities, a shift, a mirror, a crop to the head.
benchmarks/leakage.py measures what is found and what is found by mistake.
"""

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cohort.cache import PreparedCase
from cohort.fingerprints import FINGERPRINT_VERSION, GRID
from runtime.errors import InputError

SAME_SCAN = 0.88  # cosine from which two thumbnails show one scan; real different heads reach 0.77
EVIDENCE = ("case id", "patient id", "mapping", "exact image", "near image", "mask")
COLUMNS = ("cohort", "case", "evidence", "training_case", "similarity")


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


def identify_case(case: PreparedCase) -> Identity:
    """Return the identity of a case by its ids and the fingerprint its cache entry holds."""
    cells = np.frombuffer(base64.b64decode(case.fingerprint["thumbnail"]), np.int8).reshape((GRID,) * 3)
    image, mask = case.fingerprint["image_sha256"], case.fingerprint["mask_sha256"]
    return Identity(case.case_id, case.patient_id, case.aliases, image, mask, cells)


def identity_of_ids(case_id: str, patient_id: str) -> Identity:
    """Return the identity of a case of which nothing but its ids is known."""
    return Identity(case_id, patient_id, (), "", "", np.zeros((GRID,) * 3, np.int8))


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
                f"{first['case']} ({later})",
                f"is one patient with {first['training_case']} ({earlier}) by {first['evidence']}{cosine}, "
                f"one of {len(leakage)} pair(s) in both parts of the split",
                "give them the same patient id through --mapping, or take one of them out",
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
