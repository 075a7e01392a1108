"""What the segmentation command writes: masks, maps, overlays, and the table of volumes.

A line per finished case goes to `.drunet_cases` in the output folder: its rows of `volumes.csv`, and what
they were made from and by. With it a batch that was stopped can go on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pandas as pd

from audit.kinds import TRAINED_ON_PHANTOMS
from audit.overlays import plot_overlay
from cohort.cases import Case, is_stack_case, label_paths, save_labels, save_map
from cohort.labels import labels_from_regions
from cohort.preprocess import Frame, find_doubts
from runtime import tables
from runtime.files import (
    append_line,
    check_output,
    check_plain_name,
    is_written_by_us,
    refuse_input,
    refuse_link,
    write_output,
)
from runtime.log import log
from runtime.plain import parse_json

FINISHED = ".drunet_cases"
COLUMNS = ("case", "region", "volume_ml", "slices", "spacing", "mask", "mean_spread", "warnings", "error")
FAR_ABOVE, FAR_BELOW = 1.5, 0.5  # times training's largest and smallest tumour; beyond is worth a look

Row = dict[str, Any]


class FinishedCase(TypedDict):
    """A line of the list of finished cases."""

    case: str
    inputs: str
    made_by: str
    rows: list[Row]
    sha256: str  # of the rest


class ReadCase(NamedTuple):
    """A case as the network and the overlay need it."""

    case: Case
    volume: np.ndarray  # (C, D, H, W) normalised
    brain_voxels: np.ndarray  # (D,)
    intensities: np.ndarray  # (D, H, W) of the first modality, as in the file
    spacing_mm: tuple[float, float, float]
    frame: Frame = Frame()  # how its slices lie in the network's input
    warnings: tuple[str, ...] = ()  # what is odd about its files, intensities and spacing


class Prediction(NamedTuple):
    """What the network says of a case."""

    masks: np.ndarray  # (R, D, H, W) bool
    probabilities: np.ndarray | None = None  # (R, D, H, W), where they are to be written
    spread: np.ndarray | None = None  # (R, D, H, W), their standard deviation over the views


@dataclass(frozen=True)
class Output:
    """The folder to write to, and what is written there."""

    folder: Path
    regions: tuple[str, ...]
    overwrite: bool = False
    made_by: str = ""  # digest of the network and the settings that change its masks
    maps: tuple[str, ...] = ()  # of "probability" and "spread"
    usual_ml: dict[str, Sequence[float]] | None = None  # per region, smallest and largest of training

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write a file, unless there is one that is not ours, or its own folder is a link."""
        if path.parent != self.folder:
            refuse_link(path.parent)
        write_output(path, write, self.overwrite)

    def overlay_path(self, case: Case) -> Path:
        """Return where a case's picture goes."""
        return self.folder / f"{case.case_id}_overlay.png"

    def map_path(self, case: Case, region: str, kind: str) -> Path:
        """Return where a region's probabilities, or their spread, go."""
        return self.folder / f"{case.case_id}_{region}_{kind}.nii.gz"

    def paths_of(self, case: Case) -> list[Path]:
        """Return all files that a case becomes."""
        maps = [self.map_path(case, region, kind) for region in self.regions for kind in self.maps]
        return [*label_paths(case, self.folder), self.overlay_path(case), *maps]


def check_outputs(output: Output, cases: Sequence[Case]) -> None:
    """Raise InputError where a file of the cases, or the table, would replace what is not ours.

    And where a case's id cannot be part of a file's name.
    """
    for case in cases:
        check_plain_name(case.case_id, "the case")
    for path in (*(path for case in cases for path in output.paths_of(case)), output.folder / "volumes.csv"):
        check_output(path, output.overwrite)
        if path.parent != output.folder:
            refuse_link(path.parent)


# ------------------------------------------------------------------------------------------------------------
# One case
# ------------------------------------------------------------------------------------------------------------


def write_case(read: ReadCase, prediction: Prediction, output: Output) -> list[Row]:
    """Write a case's labels, overlay and maps; return its rows of volumes.csv, one per region."""
    case, masks = read.case, prediction.masks
    before = describe_inputs(case)
    labels = labels_from_regions(masks, output.regions, case.convention)
    written = save_labels(labels, case, output.folder, output.write)
    output.write(
        output.overlay_path(case),
        lambda target: plot_overlay(
            target, case.case_id, read.intensities, masks, output.regions, read.spacing_mm
        ),
    )
    for kind, values in (("probability", prediction.probabilities), ("spread", prediction.spread)):
        if values is not None:
            for region, value in zip(output.regions, values, strict=True):
                save_map(value, case, output.map_path(case, region, kind), output.write)
    voxel_ml = float(np.prod(read.spacing_mm)) / 1000
    spacing = "1 mm assumed, unknown" if case.layout == "slices" else "from the file"
    rows = []
    for index, (region, mask) in enumerate(zip(output.regions, masks, strict=True)):
        volume_ml = float(mask.sum() * voxel_ml)
        row: Row = {"case": case.case_id, "region": region, "volume_ml": round(volume_ml, 3)}
        row |= {"slices": int(mask.any((1, 2)).sum()), "spacing": spacing, "mask": str(written)}
        if prediction.spread is not None and mask.any():
            row["mean_spread"] = round(float(prediction.spread[index][mask].mean()), 4)
        row["warnings"] = "; ".join([*read.warnings, *warn_of_volume(output, region, volume_ml)])
        rows.append(row)
    note_finished(output, case, before, rows)
    return rows


def warn_of_intensities(volume: np.ndarray, modalities: Sequence[str]) -> list[str]:
    """Return what is odd about intensities (C, D, H, W)."""
    return [
        f"{name} {doubt}"
        for name, values in zip(modalities, volume, strict=True)
        for doubt in find_doubts(values)
    ]


def warn_of_volume(output: Output, region: str, volume_ml: float) -> list[str]:
    """Return what is out of the ordinary with a region's volume."""
    if volume_ml == 0:
        return [f"no {region} found"]
    if not output.usual_ml or region not in output.usual_ml:
        return []
    smallest, largest = output.usual_ml[region]
    if FAR_BELOW * smallest <= volume_ml <= FAR_ABOVE * largest:
        return []
    return [f"{volume_ml:.3g} ml is far outside training's {smallest:.3g} to {largest:.3g} ml"]


def failed_row(case_id: str, error: Exception) -> Row:
    """Return the row of volumes.csv of a case that could not be segmented."""
    return {"case": case_id, "warnings": "", "error": " ".join(str(error).split())}


# ------------------------------------------------------------------------------------------------------------
# Cases done before
# ------------------------------------------------------------------------------------------------------------


def digest(content: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_inputs(case: Case) -> list[list[Any]]:
    """Return name, bytes and time of change of each of a case's modality files."""
    paths = [path for name in sorted(case.modalities) for path in case.modalities[name]]
    states = [(path.name, path.stat()) for path in paths]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def note_finished(output: Output, case: Case, inputs: list[list[Any]], rows: Sequence[Row]) -> None:
    """Add a case that is done to the list of them."""
    line = {"case": case.case_id, "inputs": digest(inputs), "made_by": output.made_by, "rows": list(rows)}
    line["sha256"] = digest(line)
    refuse_input(output.folder / FINISHED)
    append_line(output.folder / FINISHED, json.dumps(line) + "\n")  # one write: several ranks may add to it


def read_finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {case id: its last line} of the list of finished cases; lines not as written are left out."""
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = (folder / FINISHED).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    for line in lines:
        try:
            entry = parse_json(line, FinishedCase)
        except ValueError:  # the last line of a program that was killed
            continue
        if entry.pop("sha256") == digest(entry):
            found[entry["case"]] = entry
    return found


def find_done(output: Output, cases: Sequence[Case]) -> dict[str, list[Row]]:
    """Return {case id: rows of volumes.csv} of the cases that need not be done again.

    Those are of the same network, settings and input files, and all that was written of them is there as it
    was written.
    """
    found = read_finished(output.folder)
    done = {}
    for case in cases:
        entry = found.get(case.case_id)
        if entry is None or entry["made_by"] != output.made_by:
            continue
        try:
            is_same = entry["inputs"] == digest(describe_inputs(case))
        except OSError:
            continue
        if is_same and all(is_written_by_us(path) for path in output.paths_of(case)):
            mask = label_paths(case, output.folder)[0]  # the folder may have moved since
            mask = mask.parent if case.layout == "slices" and not is_stack_case(case) else mask
            done[case.case_id] = [row | {"mask": str(mask)} for row in entry["rows"]]
    return done


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def write_table(output: Output, rows: Iterable[Row]) -> pd.DataFrame:
    """Write volumes.csv and return it: a row per case and region, and one per case that failed."""
    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    if table["mean_spread"].isna().all():
        table = table.drop(columns="mean_spread")
    table["slices"] = table["slices"].astype("Int64")  # whole numbers, failed cases have none
    tables.write_table(output.folder / "volumes.csv", table, output.write)
    return table


def log_table(table: pd.DataFrame, rows: Sequence[Row]) -> int:
    """Log the table, then what is out of the ordinary; return the number of cases that failed."""
    shown = table[table["error"].isna()].drop(columns=["mask", "error"])
    if len(shown):
        log.info("%s", shown.fillna("").to_string(index=False))
    for row in rows:
        if row.get("warnings"):
            log.warning("%s: %s", row["case"], row["warnings"])
    failed = [row for row in rows if row.get("error")]
    for row in failed:
        log.error("%s was not segmented: %s", row["case"], row["error"])
    return len(failed)


def report(output: Output, model: Any, rows: Sequence[Row]) -> None:
    """Write volumes.csv and log what is in it; `model` is the TrainedModel of inference_v2."""
    table = write_table(output, rows)
    failures = log_table(table, rows)
    if model.checkpoint.get("data_kind") == "phantom":
        log.warning(TRAINED_ON_PHANTOMS)
    log.info("masks, overlays and volumes.csv are in %s", output.folder)
    if failures:
        log.error("%d case(s) failed; `error` in volumes.csv says why", failures)
