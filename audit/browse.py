"""The cases that the report shows in its viewer: which, and their volumes, small enough for a page."""

import base64
import gzip
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from audit.overlays import grey_window
from audit.results import CaseVolumes, headline_mode, rank_cases
from cohort.cache import PreparedCase
from cohort.leakage import EVIDENCE

Browse = Literal["chosen", "all"]
PAGE_BYTES = 30_000_000  # a page with its cases; browsers open it at once
PROBABILITY_STEPS = 20  # probabilities are kept in steps of 5 %
FOREGROUND = 12 / 255  # of the grey range: what is darker all around is cropped away
MARGIN = 2  # voxels around it
SPACING_ASSUMED = "spacing is not in the files and assumed"


# ------------------------------------------------------------------------------------------------------------
# Keeping predictions until it is known which cases are shown
# ------------------------------------------------------------------------------------------------------------


class KeptPrediction(NamedTuple):
    """Masks and probabilities of a case, compressed: about a hundredth of their size."""

    shape: tuple[int, ...]  # (R, D, H, W)
    masks: bytes
    probability: bytes


def keep_prediction(masks: np.ndarray, probabilities: np.ndarray) -> KeptPrediction:
    """Return a prediction in a form of which a whole cohort fits in memory; both (R, D, H, W).

    Volume and reference are not kept, as the cache has them.
    """
    steps = np.rint(probabilities * PROBABILITY_STEPS).astype(np.uint8)
    return KeptPrediction(
        masks.shape, zlib.compress(np.packbits(masks).tobytes(), 1), zlib.compress(steps.tobytes(), 1)
    )


def open_cases(
    cohorts: Mapping[str, Sequence[PreparedCase]],
    kept: Mapping[str, Mapping[str, KeptPrediction]],
    modalities: Sequence[str],
) -> Callable[[str, str], CaseVolumes]:
    """Return a function (cohort, case id) that reads a case's volumes again; `kept` is {cohort: {id: }}."""
    cases = {(cohort, case.case_id): case for cohort, members in cohorts.items() for case in members}

    def open_case(cohort: str, case_id: str) -> CaseVolumes:
        case, prediction = cases[cohort, case_id], kept[cohort][case_id]
        bits = np.frombuffer(zlib.decompress(prediction.masks), np.uint8)
        masks = np.unpackbits(bits, count=int(np.prod(prediction.shape))).astype(bool)
        steps = np.frombuffer(zlib.decompress(prediction.probability), np.uint8)
        return CaseVolumes(
            {
                name: image
                for name, image in zip(modalities, case.volume, strict=True)
                if name not in case.missing
            },
            case.reference,
            {"prediction": masks.reshape(prediction.shape)},
            steps.reshape(prediction.shape),
            case.spacing_mm,
        )

    return open_case


# ------------------------------------------------------------------------------------------------------------
# Which cases
# ------------------------------------------------------------------------------------------------------------


def tested_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the test cases in the headline's mode, each case once.

    external_unseen is left out: its cases are in external.
    """
    is_shown = ~rows["cohort"].isin(["validation", "external_unseen"]) & (rows["mode"] == headline_mode(rows))
    return rows[is_shown]


def order_cases(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (cohort, case id) of the test cases, those that a reader wants to see first in front.

    First come best, median and worst of each cohort and region; then, in turns, the lowest Dice and the
    largest volume of wrong voxels.
    """
    tested = tested_rows(rows)
    firsts = [
        (cohort, case)
        for cohort in tested["cohort"].unique()
        for region in tested["region"].unique()
        for case, _ in rank_cases(tested, region, cohort).values()
    ]
    wrong = tested.assign(wrong=tested["fp"] + tested["fn"])
    by_case = wrong.groupby(["cohort", "case"], sort=False).agg({"dice": "min", "wrong": "max"})
    lowest = by_case.sort_values("dice").index
    largest = by_case.sort_values("wrong", ascending=False).index
    turns = [case for pair in zip(lowest, largest, strict=True) for case in pair]
    return list(dict.fromkeys([*firsts, *turns]))


# ------------------------------------------------------------------------------------------------------------
# Small enough for a page
# ------------------------------------------------------------------------------------------------------------


def embed_cases(
    wanted: Iterable[tuple[str, str]],
    describe: Callable[[str, str], Mapping[str, Any]],
    open_case: Callable[[str, str], CaseVolumes],
    budget: int,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what viewer.js shows of the first cases that fit into `budget` bytes of text, in their order.

    The first modality of every case goes before a second of any: modalities are added where room is left.
    """
    packed: dict[tuple[str, str], dict[str, Any]] = {}
    for key in wanted:
        case = pack_case(open_case(*key), describe(*key), first_only=True)
        if size_of(case) > budget:
            break
        budget -= size_of(case)
        packed[key] = case
    for key, lean in packed.items():
        if lean["more"]:
            whole = pack_case(open_case(*key), describe(*key))
            if (growth := size_of(whole) - size_of(lean)) > budget:
                break
            budget -= growth
            packed[key] = whole
    return packed


def size_of(case: Mapping[str, Any]) -> int:
    """Return about how many bytes a packed case takes in a page."""
    volumes = [case["masks"], case["probability"], *(image["voxels"] for image in case["images"])]
    return sum(map(len, volumes)) + 2000


def pack_case(
    volumes: CaseVolumes, description: Mapping[str, Any], first_only: bool = False
) -> dict[str, Any]:
    """Return a case as viewer.js reads it: facts, and volumes cropped to the head as base64 of gzip.

    `description` has what is said of it: key, name, about, notes, regions. `more` says whether modalities
    were left out.
    """
    names = list(volumes.images)[: 1 if first_only else None]
    images = {name: _to_bytes(volumes.images[name]) for name in names}
    layers = {"reference": volumes.reference, **volumes.predictions}
    box = _crop_box(images[names[0]][0], [masks.any(0) for masks in layers.values()])
    bits = [_region_bits(masks[(slice(None), *box)]) for masks in layers.values()]
    probability = volumes.probability
    return {
        **description,
        "shape": list(bits[0].shape),
        "offset": [side.start for side in box],
        "spacing_mm": [float(edge) for edge in volumes.spacing_mm],
        "start": _start_slice(bits),
        "layers": list(layers),
        "images": [
            {"name": name, "window": window, "voxels": pack_volume(voxels[box])}
            for name, (voxels, window) in images.items()
        ],
        "masks": pack_volume(np.stack(bits)),
        "probability": "" if probability is None else pack_volume(probability[(slice(None), *box)]),
        "steps": PROBABILITY_STEPS,
        "more": first_only and len(volumes.images) > 1,
    }


def _to_bytes(intensities: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Return a volume as uint8, 0 the darkest and 255 its 99.9th percentile, and the usual window in that."""
    intensities = np.asarray(intensities, np.float32)
    low, high = float(intensities.min()), float(np.percentile(intensities, 99.95))
    window = grey_window(intensities)
    high = max(high, window[1])
    scale = 255 / (high - low) if high > low else 0.0
    voxels = np.rint((np.clip(intensities, low, high) - low) * scale).astype(np.uint8)
    return voxels, [round((edge - low) * scale, 1) for edge in window]


def _crop_box(voxels: np.ndarray, masks: Sequence[np.ndarray]) -> tuple[slice, slice, slice]:
    """Return the part of a grid that holds the head and all masks; all of it where there is neither."""
    shown = voxels > 255 * FOREGROUND
    for mask in masks:
        shown |= mask
    box = []
    for axis, length in enumerate(shown.shape):
        filled = np.flatnonzero(shown.any(tuple(other for other in range(3) if other != axis)))
        first, last = (filled[0], filled[-1]) if len(filled) else (0, length - 1)
        box.append(slice(max(0, int(first) - MARGIN), min(length, int(last) + 1 + MARGIN)))
    return tuple(box)


def _region_bits(masks: np.ndarray) -> np.ndarray:
    """Return masks (R, D, H, W) as one volume (D, H, W) uint8, a bit per region."""
    return np.packbits(masks, axis=0, bitorder="little")[0]


def _start_slice(bits: Sequence[np.ndarray]) -> int:
    """Return the slice with most voxels that differ, else with most reference, else the middle."""
    reference, *predictions = bits
    for wrong in (np.any([each != reference for each in predictions], axis=0), reference > 0):
        per_slice = wrong.sum((1, 2))
        if per_slice.any():
            return int(per_slice.argmax())
    return len(reference) // 2


def pack_volume(volume: np.ndarray) -> str:
    """Return the bytes of an array as a page holds them: gzip, then base64."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(volume).tobytes(), 6, mtime=0)).decode()


# ------------------------------------------------------------------------------------------------------------
# A page per case
# ------------------------------------------------------------------------------------------------------------


def clear_case_pages(folder: Path) -> None:
    """Remove the pages that an earlier audit wrote beside its report; they would show its masks."""
    if folder.is_dir() and (folder / ".drunet_written").is_file():
        for page in folder.glob("*.html"):
            if page.stem.isdigit():
                page.unlink()


# ------------------------------------------------------------------------------------------------------------
# What is odd about a case
# ------------------------------------------------------------------------------------------------------------


def list_notes(
    cohorts: Mapping[str, Sequence[PreparedCase]],
    leakage: pd.DataFrame,
    find_doubts: Callable[..., list[str]],
) -> dict[tuple[str, str], list[str]]:
    """Return per (cohort, case id) what a reader must know of a test case; those with nothing are left out.

    `find_doubts` (H and W, frame) is that of the model; `leakage` is what leakage.csv holds.
    """
    notes: dict[tuple[str, str], list[str]] = {}
    for cohort, cases in cohorts.items():
        for case in cases if cohort != "validation" else ():
            odd = [*case.warnings, *find_doubts(case.shape[1:], case.frame)]
            notes[cohort, case.case_id] = odd if case.spacing_known else [SPACING_ASSUMED, *odd]
    for row in leakage.itertuples():
        if (row.cohort, row.case) in notes:
            words = f"{row.evidence}: {EVIDENCE[row.evidence]}, {row.training_case} of training or validation"
            notes[row.cohort, row.case].insert(0, words)
    return {key: odd for key, odd in notes.items() if odd}
