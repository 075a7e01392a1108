"""How fast slabs with full augmentation are fed: each transform, one slab, the loader with 0 to 2 workers.

    python -m benchmarks.feeding

One phantom case of BraTS size, 3 slices of 256 x 256. Beside a transform of ours stands the one of
albumentations that it replaces, in the same rounds.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import albumentations as A
import cv2
import numpy as np

from benchmarks.common import print_table, time_pairs, write_result
from cohort.augmentation import BiasField, TumourContrast, Warp
from cohort.cache import prepare_cases
from cohort.layouts import CaseSource, find_cases
from cohort.phantom import write_cohort
from cohort.preprocess import fit_slices, place_slices
from dataset_balance_v2 import (
    BalancedSampler,
    SlabDataset,
    balance_slices,
    make_train_loader,
    slice_table,
    start_worker,
)
from runtime.command import run_command

CALLS = 30  # of a transform in one timed run


@dataclass(frozen=True)
class FeedingConfig:
    """Settings of the measurement."""

    repeats: int = 5
    """timed rounds"""
    slabs: int = 320
    """slabs of one loader run"""
    batch_size: int = 16
    """slabs a batch"""


def transforms() -> dict[str, A.BasicTransform]:
    """Return the transforms to time, always applied; names in brackets are those that were replaced."""
    border = {"border_mode": cv2.BORDER_REPLICATE}
    ranges = {
        "scale": (0.85, 1.15),
        "rotate": (-20, 20),
        "shear": (-5, 5),
        "translate_percent": (-0.06, 0.06),
    }
    return {
        "horizontal flip": A.HorizontalFlip(p=1),
        "vertical flip": A.VerticalFlip(p=1),
        "affine": Warp(1, 0),
        "(A.Affine)": A.Affine(**ranges, **border, p=1),
        "elastic": Warp(0, 1),
        "(A.ElasticTransform)": A.ElasticTransform(alpha=60, sigma=9, **border, p=1),
        "affine and elastic": Warp(1, 1),
        "tumour contrast": TumourContrast((-0.3, 1.2), p=1),
        "bias field": BiasField(0.35, p=1),
        "brightness, contrast": A.RandomBrightnessContrast(0.08, 0.25, p=1),
        "gamma": A.RandomGamma((75, 130), p=1),
        "blur": A.GaussianBlur(blur_limit=0, sigma_limit=(0.4, 1.2), p=1),
        "noise": A.GaussNoise((0.005, 0.03), p=1),
    }


def repeat(function: Callable[[int], object]) -> Callable[[], None]:
    """Return a function that calls another CALLS times, with 0, 1, 2 and so on."""

    def run() -> None:
        for index in range(CALLS):
            function(index)

    return run


def stages(dataset: SlabDataset) -> dict[str, Callable[[int], object]]:
    """Return the stages of one slab's way, each a function of the draw's seed."""
    case = dataset.cases[0]
    z = int(np.argmax(case.brain_voxels))
    slab, target = case.slab(z, 1), case.reference_slice(z)
    placement = place_slices(*slab.shape[1:], dataset.size)
    fitted = fit_slices(slab, placement)
    mask = fit_slices(target, placement, is_mask=True).astype(np.uint8)
    image = np.ascontiguousarray((fitted.transpose(1, 2, 0) + 4) / 12)
    flags = np.ascontiguousarray(mask.transpose(1, 2, 0))
    found: dict[str, Callable[[int], object]] = {
        "read slab and reference": lambda _: (case.slab(z, 1), case.reference_slice(z)),
        "fit to 256 x 256": lambda _: (fit_slices(slab, placement), fit_slices(target, placement, True)),
    }
    for name, transform in transforms().items():
        compose = A.Compose([transform])
        found[name] = lambda _, compose=compose: compose(image=image, mask=flags)
    found["all transforms as drawn"] = lambda seed: dataset.augment(fitted, mask, seed)
    found["one slab, disk to tensor"] = lambda seed: dataset[z, seed]
    return found


def measure_loader(
    dataset: SlabDataset, weights: np.ndarray, workers: int, config: FeedingConfig
) -> list[float]:
    """Return slabs per second of each epoch, the first, which starts the workers, left out."""
    sampler = BalancedSampler(weights, config.slabs, seed=0)
    loader = make_train_loader(dataset, sampler, config.batch_size, workers)
    rates = []
    for epoch in range(config.repeats + 1):
        sampler.epoch = epoch
        started = time.perf_counter()
        count = sum(len(slab) for slab, _ in loader)
        rates.append(count / (time.perf_counter() - started))
    return rates[1:]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and largest of some values."""
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


def main(config: FeedingConfig) -> None:
    """Measure, print and write benchmarks/results/feeding.json."""
    start_worker(0)  # one thread, as in a worker
    with tempfile.TemporaryDirectory() as name:
        write_cohort(Path(name) / "data", 1, 0, (155, 240, 240), (1.0, 1.0, 1.0), "internal")
        cases = prepare_cases(
            find_cases(CaseSource(Path(name) / "data")), ("flair",), ("WT",), Path(name) / "cache"
        )
        table = slice_table(cases, ("WT",))
        dataset = SlabDataset(cases, table, 1, 256)
        timed = time_pairs({key: repeat(step) for key, step in stages(dataset).items()}, config.repeats)
        rows = [{"step": key} | spread([s / CALLS * 1e3 for s in seconds]) for key, seconds in timed.items()]
        weights = balance_slices(table)
        loaders = [
            {"workers": workers} | spread([rate / max(workers, 1) for rate in rates])
            for workers in (0, 1, 2)
            if (rates := measure_loader(dataset, weights, workers, config))
        ]
    print("milliseconds, transforms always applied")
    print_table(rows)
    print("slabs per second and worker")
    print_table(loaders)
    print(write_result("feeding", {"milliseconds": rows, "slabs_per_second_per_worker": loaders}))


if __name__ == "__main__":
    run_command(main, FeedingConfig, "Measure how fast augmented slabs are fed.")
