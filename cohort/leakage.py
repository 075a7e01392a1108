"""Leakage: is a case to be tested known from training, by its ids, by a mapping file, or by its content?

Every case gets a fingerprint of a few kilobytes, which is kept in the run. It holds the hash of the decoded
image, the hash of the mask, and a thumbnail of the head that survives what happens to a scan on its way
through other people's tools: another file type, other intensities, a shift, a mirror, a crop to the head.
The thumbnail only screens: two heads in one atlas space can have thumbnails as alike as two copies of a scan.
Candidates are verified on the volumes, and what is not verified is reported and never counts as seen.
benchmarks/leakage.py measures what is found and what is found by mistake.
"""

import base64
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cohort.cache import PreparedCase
from cohort.fingerprints import FINGERPRINT_VERSION, GRID
from cohort.patients import names_one_patient
from cohort.verify import SAME_VOLUME, TURNS, compare_volumes
from runtime.errors import InputError
from runtime.log import log
from runtime.tables import parse_csv

ALIKE = 0.85  # cosine from which two thumbnails are compared by their volumes; see benchmarks/README.md
MOST_CANDIDATES = 5  # per case, the most alike first
# The kinds of evidence, the first that agrees is given, each with its grade.
EVIDENCE = {
    "case id": "same patient",
    "patient id": "same patient",
    "mapping": "same patient",
    "exact image": "same file",
    "near image": "same scan, verified",
    "mask": "same mask",
    "alike image": "alike, not verified",
    "same id": "same id, content not alike",
}
NOTES = ("alike image", "same id")  # evidence that is reported and never counts as seen
COLUMNS = ("cohort", "case", "evidence", "training_case", "similarity", "correlation", "grade")
Pairs = frozenset[frozenset[str]]  # of case ids


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
    # reads what the thumbnail is of, (D, H, W), as normalised; None where the volume is not at hand
    read_volume: Callable[[], np.ndarray] | None = field(default=None, compare=False, repr=False)


def identify_case(case: PreparedCase, channel: int = 0) -> Identity:
    """Return the identity of a case by its ids, the fingerprint its cache entry holds, and its volume.

    `channel` is that of the modality the fingerprint is of.
    """
    cells = np.frombuffer(base64.b64decode(case.fingerprint["thumbnail"]), np.int8).reshape((GRID,) * 3)
    image, mask = case.fingerprint["image_sha256"], case.fingerprint["mask_sha256"]
    names = (case.case_id, case.patient_id, case.aliases)
    return Identity(*names, image, mask, cells, lambda: case.volume[channel])


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


class Candidate(NamedTuple):
    """A known case whose thumbnail is like that of a tested one."""

    index: int  # among the known
    similarity: float


def find_candidates(tested: Sequence[Identity], known: Sequence[Identity]) -> list[list[Candidate]]:
    """Return for each tested case the known ones whose thumbnails are alike, the most alike first."""
    stack = np.array([one.thumbnail for one in known])
    candidates: list[list[Candidate]] = []
    for start in range(0, len(tested), 64):
        chunk = np.array([one.thumbnail for one in tested[start : start + 64]])
        for row in compare_thumbnails(chunk, stack):
            likely = np.argsort(-row, kind="stable")[:MOST_CANDIDATES]
            alike = [Candidate(int(index), float(row[index])) for index in likely if row[index] >= ALIKE]
            candidates.append(alike)
    return candidates


def likely_turns(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Return which turns of the second thumbnail fit the first best, the best first."""
    row = _unit_rows(one[None])[0]
    fits = np.full(16, -1.0)
    for step in (0, -1, 1):
        for turn, turned in enumerate(turned_thumbnails(shift_cells(other[None], step))):
            fits[turn] = max(fits[turn], float(_unit_rows(turned)[0] @ row))
    return [int(turn) for turn in np.argsort(-fits, kind="stable")[:TURNS]]


def verify_pair(one: Identity, other: Identity) -> float:
    """Return the correlation of two cases' volumes, see `compare_volumes`; NaN where one is not at hand."""
    if one.read_volume is None or other.read_volume is None:
        return np.nan
    turns = likely_turns(one.thumbnail, other.thumbnail)
    return compare_volumes(one.read_volume(), other.read_volume(), turns)


class KnownCases:
    """The known cases by their names and hashes, for `find_leakage`."""

    def __init__(self, known: Sequence[Identity]) -> None:
        """Index the cases."""
        self.by_case = {one.case_id: one for one in known}
        self.by_patient = {one.patient_id: one for one in known}
        self.by_name = {name: one for one in known for name in one.aliases}
        self.by_image = {one.image_sha256: one for one in known if one.image_sha256}
        self.by_mask = {one.mask_sha256: one for one in known if one.mask_sha256}

    def find_by_ids(self, case: Identity, trusted: Callable[[str], bool]) -> tuple[str, Identity] | None:
        """Return (evidence, known case) of the first id in common that is `trusted`."""
        ids = (case.case_id, case.patient_id)
        tables = (
            ("case id", self.by_case, ids[:1]),
            ("patient id", self.by_patient, ids[1:]),
            ("mapping", self.by_name, (*ids, *case.aliases)),
            ("mapping", self.by_case | self.by_patient if case.aliases else {}, case.aliases),
        )
        for evidence, table, names in tables:
            for name in names:
                if name in table and trusted(name):
                    return evidence, table[name]
        return None


def find_leakage(
    cohort: str,
    tested: Sequence[Identity],
    known: Sequence[Identity],
    one_cohort: bool = False,
    different: Pairs = frozenset(),
) -> pd.DataFrame:
    """Return a row, of COLUMNS, for each tested case that is, or may be, among the known.

    Evidence is the first in EVIDENCE that agrees; that in NOTES is no proof. Ids of no known kind are proof
    only where both are of `one_cohort`. Pairs of case ids in `different` were looked at by a person: alike
    or not, they are two. The column `similarity` is that of the thumbnails where the evidence is the image, 1
    for an exact one, and NaN elsewhere; `correlation` is that of the volumes, NaN where one is not at hand.
    """
    index = KnownCases(known)
    rows = []
    for case, candidates in zip(tested, find_candidates(tested, known), strict=True):
        others = [
            (known[one.index], one.similarity)
            for one in candidates
            if frozenset((case.case_id, known[one.index].case_id)) not in different
        ]
        if found := find_evidence(case, index, others, one_cohort, different):
            evidence, other, *figures = found
            rows.append((cohort, case.case_id, evidence, other.case_id, *figures, EVIDENCE[evidence]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def find_evidence(
    case: Identity,
    index: KnownCases,
    alike: Sequence[tuple[Identity, float]],
    one_cohort: bool,
    different: Pairs,
) -> tuple[str, Identity, float, float] | None:
    """Return (evidence, known case, similarity, correlation) by which a case is known; None where it is not.

    `alike` holds known cases with the similarity of their thumbnails, the most alike first.
    """

    def is_declared(other: Identity) -> bool:
        return frozenset((case.case_id, other.case_id)) in different

    if by_ids := index.find_by_ids(case, lambda name: one_cohort or names_one_patient(name)):
        return *by_ids, np.nan, np.nan
    if case.image_sha256 and (same := index.by_image.get(case.image_sha256)):
        return "exact image", same, 1.0, np.nan
    compared = []
    for other, similarity in alike:
        correlation = verify_pair(case, other)
        compared.append((other, round(similarity, 4), round(correlation, 4)))
        if correlation >= SAME_VOLUME:
            return "near image", *compared[-1]
    if (same := index.by_mask.get(case.mask_sha256)) and not is_declared(same):
        return "mask", same, np.nan, np.nan
    if compared:
        return "alike image", *compared[0]
    by_ids = index.find_by_ids(case, lambda _: True)
    if by_ids and not is_declared(by_ids[1]):
        return "same id", by_ids[1], np.nan, np.nan
    return None


def select_proven(leakage: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `find_leakage` that count as seen."""
    return leakage[~leakage["evidence"].isin(NOTES)].reset_index(drop=True)


def log_notes(leakage: pd.DataFrame, known_from: str, shown: int = 10) -> None:
    """Warn of the rows of `find_leakage` that prove nothing: the case, the other, and what settles it."""
    notes = leakage[leakage["evidence"].isin(NOTES)]
    for evidence, rows in notes.groupby("evidence", sort=False):
        pairs = [describe_row(row) for row in rows.head(shown).itertuples()]
        log.warning(
            "%d case(s) %s, which is no proof that they are of one patient: %s%s",
            len(rows),
            f"look like one {known_from}, not verified"
            if evidence == "alike image"
            else f"have an id that {known_from} has too, and content that is not alike",
            "; ".join(pairs),
            "; ..." if len(rows) > shown else "",
        )
    if len(notes):
        log.warning(
            "look at these pairs: --mapping joins those of one patient, --different pairs.csv (two columns "
            "of case ids) notes those of two"
        )


def describe_row(row: Any) -> str:
    """Return a row of `find_leakage` in words: both cases and the figures there are."""
    figures = [
        f"{name} {value:.3f}"
        for name, value in (("similarity", row.similarity), ("correlation", row.correlation))
        if not np.isnan(value)
    ]
    return f"{row.case} and {row.training_case}" + (f" ({', '.join(figures)})" if figures else "")


def read_different(path: str | Path | None) -> Pairs:
    """Return the pairs of case ids that a person declared different, from a CSV file of two columns.

    A first row that begins with "case" is its header. Raises InputError where the file is missing or a row
    does not hold two ids.
    """
    if not path:
        return frozenset()
    place = f"--different {path}"
    try:
        rows = parse_csv(Path(path).read_bytes(), place)
    except OSError as error:
        raise InputError(place, "not a readable file", "give a CSV file with two case ids a row") from error
    pairs = []
    for number, row in enumerate(rows, 1):
        if not any(row) or (number == 1 and row[0].lower().startswith("case")):
            continue
        if len(row) != 2 or not all(row) or row[0] == row[1]:
            raise InputError(place, f"row {number} does not hold two case ids", "write one pair a row: a,b")
        pairs.append(frozenset(row))
    return frozenset(pairs)


def list_pairs(different: Pairs) -> list[list[str]]:
    """Return pairs as plain values, sorted."""
    return sorted(sorted(pair) for pair in different)


def find_seen(
    cohort: str,
    tested: Sequence[Identity],
    known: Sequence[Identity],
    one_cohort: bool = False,
    different: Pairs = frozenset(),
) -> pd.DataFrame:
    """Return the rows of `find_leakage`, and of further tested cases of the patients found.

    A patient one of whose scans is known by its content alone is known with all scans.
    """
    found = find_leakage(cohort, tested, known, one_cohort, different)
    siblings = find_siblings(found, tested)
    if siblings.empty:
        return found
    training_case = dict(zip(found["case"], found["training_case"], strict=True))
    siblings["training_case"] = siblings["training_case"].map(training_case)
    others = found[~found["case"].isin(siblings["case"])]
    return pd.concat([others, siblings], ignore_index=True)


def check_parts(parts: Mapping[str, Sequence[Identity]], different: Pairs = frozenset()) -> None:
    """Raise InputError where a case of one part of a split is known from an earlier part.

    Pairs that are alike and not verified are warned of.
    """
    for earlier, later in itertools.combinations(parts, 2):
        leakage = find_leakage(later, parts[later], parts[earlier], one_cohort=True, different=different)
        log_notes(leakage, f"of {earlier}")
        proven = select_proven(leakage)
        if len(proven):
            first = next(proven.itertuples())
            figures = describe_row(first).removeprefix(f"{first.case} and {first.training_case}")
            remedy = "give them the same patient id through --mapping, or take one of them out"
            if first.evidence in ("near image", "mask"):
                remedy += "; where you looked and they are two people, name the pair in --different"
            raise InputError(
                f"{first.case} ({later})",
                f"is one patient with {first.training_case} ({earlier}) by {first.evidence}{figures}, "
                f"one of {len(proven)} pair(s) in both parts of the split",
                remedy,
            )


def find_held_out(
    own: Sequence[Identity], held: Sequence[Identity], different: Pairs = frozenset()
) -> pd.DataFrame:
    """Return a row for each own case whose patient is in the cohort held out: case, patient, evidence, ...

    All cases of such a patient are in it, those by evidence "patient id" that only share the patient. What
    is no proof is warned of.
    """
    found = find_leakage("held out", own, held, different=different)
    log_notes(found, "held out")
    found = select_proven(found)
    siblings = find_siblings(found, own)
    table = pd.concat([found, siblings], ignore_index=True) if len(siblings) else found
    table = table.rename(columns={"training_case": "known_as"}).drop(columns="cohort")
    patient_of = {one.case_id: one.patient_id for one in own}
    table.insert(1, "patient", table["case"].map(patient_of))
    return table.sort_values("case", ignore_index=True)


def find_siblings(found: pd.DataFrame, tested: Sequence[Identity]) -> pd.DataFrame:
    """Return the rows of further tested cases that share a patient or an alias with one that is proven.

    Their training_case is the tested case they share it with.
    """
    direct = set(select_proven(found)["case"])
    ids = [
        replace(identity_of_ids(one.case_id, one.patient_id), aliases=one.aliases)
        for one in tested
        if one.case_id in direct
    ]
    others = [
        replace(identity_of_ids(one.case_id, one.patient_id), aliases=one.aliases)
        for one in tested
        if one.case_id not in direct
    ]
    return find_leakage(found["cohort"].iloc[0], others, ids, one_cohort=True) if ids else found.iloc[:0]
