"""Which number format the cache should have: error against float32 z-scores, size, and time to read a slab.

    python -m benchmarks.cache_format [--data-dir D]

Phantoms by default. Formats: float16 (used), int16 and uint8 as fixed point over Z_RANGE.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import print_table, time_pairs, write_result
from cohort.cache import find_box
from cohort.cases import load_case
from cohort.layouts import CaseSource, find_cases
from cohort.phantom import is_phantom, write_cohort
from cohort.preprocess import QUARTILE_DISTANCE, Z_RANGE, brain_mask
from runtime.command import run_command

LOW, HIGH = Z_RANGE
LEVELS = {"int16": 65535, "uint8": 255}  # steps of the fixed-point formats; int16 holds them less 32768
SLABS = 40


@dataclass(frozen=True)
class FormatConfig:
    """Settings of the measurement."""

    data_dir: str | None = None
    """folder with cases; default: phantoms made for it"""
    cases: int = 3
    """cases to measure, the first by id"""
    modality: str = "flair"
    """modality to measure"""
    repeats: int = 5
    """timed rounds"""


def exact_scores(intensities: np.ndarray) -> np.ndarray:
    """Return the z-scores of one modality (D, H, W) in float32, clipped but not rounded to float16."""
    inside = intensities[brain_mask(intensities)]
    low, median, high = np.percentile(inside, [25, 50, 75])
    deviation = (high - low) / QUARTILE_DISTANCE or inside.std() or 1.0
    return np.clip((intensities - np.float32(median)) / np.float32(deviation), LOW, HIGH)


def encode(scores: np.ndarray, name: str) -> np.ndarray:
    """Return scores in the format of this name."""
    if name not in LEVELS:
        return scores.astype(name)
    steps = np.rint((scores.astype(np.float64) - LOW) / (HIGH - LOW) * LEVELS[name])
    return (steps - (32768 if name == "int16" else 0)).astype(name)


def decode(stored: np.ndarray) -> np.ndarray:
    """Return float32 scores of a stored array."""
    scores = torch.from_numpy(stored).float()
    if stored.dtype.name in LEVELS:
        offset = 32768 if stored.dtype == np.int16 else 0
        scores.add_(offset).mul_((HIGH - LOW) / LEVELS[stored.dtype.name]).add_(LOW)
    return scores.numpy()


def read_slabs(path: Path) -> None:
    """Read slabs of three slices from all over a stored volume (D, H, W), as float32."""
    for z in np.linspace(1, len(np.load(path, mmap_mode="r")) - 2, SLABS).astype(int):
        decode(np.load(path, mmap_mode="c")[z - 1 : z + 2])


def measure_case(scores: np.ndarray, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Return one row a format for one case's scores (D, H, W)."""
    box = find_box(scores.astype(np.float16)[None], np.zeros((1, *scores.shape), bool))
    cropped = scores[tuple(slice(*edges) for edges in box)].astype(np.float16)
    levels = np.unique(scores)
    rows, readers = [], {}
    for name in ("float32", "float16", "int16", "uint8"):
        error = decode(encode(scores, name)).astype(np.float64) - scores
        path = folder / f"{name}.npy"
        np.save(path, encode(cropped.astype(np.float32), name))
        readers[name] = partial(read_slabs, path)
        row = {"format": name, "max_error": np.abs(error).max(), "rms_error": np.sqrt((error**2).mean())}
        row |= {
            "cropped_mb": path.stat().st_size / 1e6,
            "whole_mb": scores.size * encode(scores[:1, :1], name).itemsize / 1e6,
        }
        rows.append(row | {"file_step": float(np.median(np.diff(levels)))})
    for row, seconds in zip(rows, time_pairs(readers, repeats).values(), strict=True):
        row["slab_ms"] = [second / SLABS * 1e3 for second in seconds]
    return rows


def main(config: FormatConfig) -> None:
    """Measure, print and write benchmarks/results/cache_format.json."""
    with tempfile.TemporaryDirectory() as name:
        data_dir = Path(config.data_dir or name)
        if config.data_dir is None:
            write_cohort(data_dir, config.cases, 0, (155, 240, 240), (1.0, 1.0, 1.0), "internal")
        cases = find_cases(CaseSource(data_dir), (config.modality,))[: config.cases]
        rows = []
        for case in cases:
            scores = exact_scores(load_case(case, (config.modality,)).volume[0])
            rows += measure_case(scores, Path(name), config.repeats)
        kind = "phantom" if is_phantom(cases[0]) else "real"
    table = []
    for format_name in dict.fromkeys(row["format"] for row in rows):
        of_format = [row for row in rows if row["format"] == format_name]
        times = [time for row in of_format for time in row["slab_ms"]]
        table.append(
            {
                "format": format_name,
                "max_error_z": float(max(row["max_error"] for row in of_format)),
                "rms_error_z": float(np.mean([row["rms_error"] for row in of_format])),
                "file_step_z": float(np.mean([row["file_step"] for row in of_format])),
                "whole_mb": float(np.mean([row["whole_mb"] for row in of_format])),
                "cropped_mb": float(np.mean([row["cropped_mb"] for row in of_format])),
                "slab_ms": float(np.median(times)),
                "slab_ms_low": float(min(times)),
                "slab_ms_high": float(max(times)),
            }
        )
    print_table(table)
    print("file_step_z: median distance of the values a file holds; errors far below it lose nothing")
    print(write_result("cache_format", {"data_kind": kind, "cases": len(cases), "formats": table}))


if __name__ == "__main__":
    run_command(main, FormatConfig, "Compare number formats for the cache.")
