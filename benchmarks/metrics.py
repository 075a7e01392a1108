"""HD95 and surface Dice of BraTS-size masks: ours, MONAI's and the surface-distance package's, in one run.

    python -m benchmarks.metrics

Phantom tumours on 240 x 240 x 155 at 1 mm, each against a smoothly deformed copy of itself, one of them with
false positives all over the head too, and one against a copy on the other side of the head. Both metrics are
computed for each pair: ours from one pass over the surfaces, surface-distance's too, MONAI's by its two
functions. MONAI's surface Dice is asked for sub-voxel surfaces, which is the definition of the other two; its
HD95 has no such option and counts voxels of the border, unweighted, so that its value differs.
"""

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import surface_distance
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from benchmarks.common import print_table, time_pairs, write_result
from cohort.phantom import make_phantom
from runtime.command import run_command
from utils_v2 import surface_metrics

SHAPE, SPACING_MM, TOLERANCE_MM = (155, 240, 240), (1.0, 1.0, 1.0), 1.0
SEEDS = (0, 1, 2)
Metrics = tuple[float, float]


@dataclass(frozen=True)
class MetricsConfig:
    """Settings of the measurement."""

    repeats: int = 5
    """rounds of timings"""


def deform(mask: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask like one a network might predict: its border moved by a smooth field of SD 1.5 voxels."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=mask.shape).astype(np.float32), 4)
    depth = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return depth + 1.5 * noise / noise.std() > 0


def scatter(mask: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask with many small false positives anywhere in the volume."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=mask.shape).astype(np.float32), 4)
    return mask | (noise > 2.5 * noise.std())


def make_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {name: (reference, prediction)}, both (D, H, W) bool."""
    pairs = {}
    for seed in SEEDS:
        reference = make_phantom(seed, SHAPE, SPACING_MM).labels > 0
        pairs[f"tumour {seed}"] = (reference, deform(reference, seed))
    reference, prediction = pairs["tumour 0"]
    pairs["tumour 0, false positives"] = (reference, scatter(prediction, 1))
    pairs["tumour 0, wrong side"] = (reference, np.ascontiguousarray(prediction[:, :, ::-1]))
    return pairs


def by_monai(reference: np.ndarray, prediction: np.ndarray) -> Metrics:
    """Return (HD95, surface Dice) by MONAI."""
    tensors = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    distance = compute_hausdorff_distance(
        *tensors, include_background=True, percentile=95, spacing=SPACING_MM
    )
    dice = compute_surface_dice(
        *tensors, [TOLERANCE_MM], include_background=True, spacing=SPACING_MM, use_subvoxels=True
    )
    return float(distance), float(dice)


def by_surface_distance(reference: np.ndarray, prediction: np.ndarray) -> Metrics:
    """Return (HD95, surface Dice) by the surface-distance package."""
    surfaces = surface_distance.compute_surface_distances(reference, prediction, SPACING_MM)
    return (
        float(surface_distance.compute_robust_hausdorff(surfaces, 95)),
        float(surface_distance.compute_surface_dice_at_tolerance(surfaces, TOLERANCE_MM)),
    )


def by_us(reference: np.ndarray, prediction: np.ndarray) -> Metrics:
    """Return (HD95, surface Dice) by utils_v2."""
    return surface_metrics(reference, prediction, SPACING_MM, TOLERANCE_MM)


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Metrics]] = {
    "DRUnet V2": by_us,
    "MONAI": by_monai,
    "surface-distance": by_surface_distance,
}


def measure_pair(
    name: str, reference: np.ndarray, prediction: np.ndarray, repeats: int
) -> list[dict[str, Any]]:
    """Return one row a method: its values, median and range of seconds, and the median of paired ratios."""
    seconds = time_pairs({key: lambda m=m: m(reference, prediction) for key, m in METHODS.items()}, repeats)
    rows = []
    for key, method in METHODS.items():
        distance, dice = method(reference, prediction)
        ratios = [theirs / ours for theirs, ours in zip(seconds[key], seconds["DRUnet V2"], strict=True)]
        rows.append(
            {
                "pair": name,
                "voxels": int(reference.sum()),
                "method": key,
                "hd95_mm": distance,
                "surface_dice_1mm": dice,
                "median_ms": 1000 * statistics.median(seconds[key]),
                "least_ms": 1000 * min(seconds[key]),
                "most_ms": 1000 * max(seconds[key]),
                "times_ours": statistics.median(ratios),
                "least_times_ours": min(ratios),
                "most_times_ours": max(ratios),
            }
        )
    return rows


def main(config: MetricsConfig) -> None:
    """Measure all pairs, print the table and write benchmarks/results/metrics.json."""
    warnings.filterwarnings("ignore")  # the packages compared announce what they will drop
    rows = []
    for name, (reference, prediction) in make_pairs().items():
        rows += measure_pair(name, reference, prediction, config.repeats)
    print_table(rows)
    print("HD95: MONAI counts border voxels unweighted, the other two weigh surface by area (the BraTS one)")
    print(f"written: {write_result('metrics', {'rows': rows})}")


if __name__ == "__main__":
    run_command(main, MetricsConfig, "Time HD95 and surface Dice against MONAI's and surface-distance's.")
