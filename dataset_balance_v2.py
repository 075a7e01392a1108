"""From cases to balanced, augmented training slabs: split by patient, slice balance, augmentation, loaders.

Run as a command it prints the slice balance of a data set before and after weighting and draws it, or checks
every file of it, or removes the cache:

    python dataset_balance_v2.py --data-dir data/BraTS2021
    python dataset_balance_v2.py --data-dir data/BraTS2021 --check
    python dataset_balance_v2.py --clear-cache
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# albumentations asks a server for its newest version at import otherwise
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from albumentations.core.type_definitions import Targets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cache_v2 import CACHE_GB, PreparedCase, clear_cache, prepare_cases
from cases_v2 import Case, with_reference
from check_v2 import check_cohort, summarise_problems, write_problems
from layouts_v2 import LayoutName, describe_cases, find_cases
from plots_v2 import plot_balance
from utils_v2 import InputError, option, run_command
from volumes_v2 import (
    BRAIN_SLICE_VOXELS,
    Z_RANGE,
    fit_slices,
    place_slices,
)

DEFAULT_DATA = Path("data/BraTS2021")
DEMO_DATA = Path("data/phantom_internal")
# Elastic deformation: displacement in pixels (SD), the distance over which it is smooth (SD of the blur), and
# the distance of the points at which it is drawn.
ELASTIC_SHIFT, ELASTIC_SMOOTH, ELASTIC_STEP = 0.42, 9.0, 4


def choose_data_dir(data_dir: str | None) -> str:
    """Return the folder asked for, else data/BraTS2021, else the demo's phantoms, made if need be."""
    if data_dir is not None:
        return data_dir
    if DEFAULT_DATA.is_dir():
        return str(DEFAULT_DATA)
    print(f"No --data-dir and no {DEFAULT_DATA}: the demo, on synthetic phantoms, not a BraTS result.")
    demo = (("internal", DEMO_DATA, 40), ("external", DEMO_DATA.with_name("phantom_external"), 10))
    for style, folder, cases in demo:
        if len(list(folder.glob("*/*_seg.nii.gz"))) == cases:
            continue
        script = str(Path(__file__).with_name("make_phantom_v2.py"))
        options = [f"--output={folder}", f"--cases={cases}", f"--style={style}"]
        subprocess.run([sys.executable, script, *options], check=True)
    return str(DEMO_DATA)


# ------------------------------------------------------------------------------------------------------------
# Split
# ------------------------------------------------------------------------------------------------------------

SPLIT_PARTS = ("train", "validation", "test")


def split_cases(
    cases: Sequence[Case], seed: int = 0, fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)
) -> dict[str, Any]:
    """Return a split by patient: seed, fractions, the case ids of each part, and a SHA-256 of them.

    Patients are sorted, then shuffled by the seed, so the split depends on the ids alone. Each part gets at
    least one patient; fewer than three patients raise InputError.
    """
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 3:
        raise InputError(
            f"{len(patients)} patient(s) cannot be split into train, validation and test; 3 are needed."
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    validation = max(1, min(round(fractions[1] * len(patients)), len(patients) - 2))
    test = max(1, min(round(fractions[2] * len(patients)), len(patients) - validation - 1))
    edges = [0, validation, validation + test, len(patients)]
    part_of = {}
    for part, start, stop in zip(("validation", "test", "train"), edges, edges[1:], strict=False):
        part_of |= {patients[index]: part for index in order[start:stop]}
    parts = {
        part: sorted(case.case_id for case in cases if part_of[case.patient_id] == part)
        for part in SPLIT_PARTS
    }
    return {"seed": seed, "fractions": list(fractions), **parts, "sha256": split_sha256(parts)}


def split_sha256(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the case ids in train, validation and test."""
    return hashlib.sha256(json.dumps([parts[part] for part in SPLIT_PARTS]).encode()).hexdigest()


def read_split(path: str | Path) -> dict[str, Any]:
    """Read a split file; raises InputError where it is missing, altered, or its parts share a case."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such split file; give the split.json of a run.")
    try:
        split = json.loads(path.read_text())
        intact = split["sha256"] == split_sha256(split)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a split file ({error}); give the split.json of a run.") from error
    if not intact:
        raise InputError(
            f"{path}: the case ids do not match their SHA-256; the split was altered, take the original."
        )
    ids = [case_id for part in SPLIT_PARTS for case_id in split[part]]
    if len(ids) != len(set(ids)):
        raise InputError(f"{path}: a case is in more than one part of the split.")
    return split


def cases_of_split(
    cases: Sequence[Case], split: Mapping[str, Any], part: str, data_dir: str | Path
) -> list[Case]:
    """Return the cases of one part in the split's order; raises InputError where one is not among `cases`."""
    by_id = {case.case_id: case for case in cases}
    if missing := [case_id for case_id in split[part] if case_id not in by_id]:
        raise InputError(
            f"{data_dir}: {len(missing)} {part} case(s) of the split are not there, first {missing[0]}."
        )
    return [by_id[case_id] for case_id in split[part]]


# ------------------------------------------------------------------------------------------------------------
# Balance
# ------------------------------------------------------------------------------------------------------------


def slice_table(cases: Sequence[PreparedCase], regions: Sequence[str]) -> pd.DataFrame:
    """Return one row a slice: case (index into `cases`), z, brain_voxels, and the voxels of each region."""
    frames = []
    for index, case in enumerate(cases):
        columns = {"case": index, "z": np.arange(len(case.brain_voxels)), "brain_voxels": case.brain_voxels}
        columns |= dict(zip(regions, case.region_voxels, strict=True))
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def slice_kind(table: pd.DataFrame) -> np.ndarray:
    """Return the kind of each row of a slice table: "tumour", "brain" (brain without tumour) or "empty"."""
    regions = table.columns.difference(["case", "z", "brain_voxels"])
    has_tumour = (table[regions] > 0).any(axis=1)
    return np.where(
        has_tumour, "tumour", np.where(table["brain_voxels"] >= BRAIN_SLICE_VOXELS, "brain", "empty")
    )


def balance_slices(table: pd.DataFrame, tumour_share: float = 0.5, empty_share: float = 0.02) -> np.ndarray:
    """Return the probability of drawing each slice, shape (rows,), sum 1.

    A draw is a tumour slice with `tumour_share`, an empty one with `empty_share`, and otherwise brain without
    tumour; slices of one kind are equally likely. A kind with no slice leaves its share to the others in
    proportion.
    """
    if min(tumour_share, empty_share) < 0 or tumour_share + empty_share > 1:
        raise InputError(
            f"--tumour-share {tumour_share} and --empty-share {empty_share} must be 0 or more and 1 at most "
            f"together."
        )
    kind = slice_kind(table)
    shares = {"tumour": tumour_share, "empty": empty_share, "brain": 1 - tumour_share - empty_share}
    weights = np.zeros(len(table))
    for name, share in shares.items():
        rows = kind == name
        if rows.any():
            weights[rows] = share / rows.sum()
    if weights.sum() == 0:
        raise ValueError(f"no slice can be drawn with tumour_share={tumour_share}, empty_share={empty_share}")
    return weights / weights.sum()


# ------------------------------------------------------------------------------------------------------------
# Augmentation and loaders
# ------------------------------------------------------------------------------------------------------------


class Warp(A.DualTransform):
    """Affine and mild elastic deformation in one interpolation, the mask by nearest neighbour.

    The affine part is drawn with probability `affine`, the elastic one with `elastic`. Beyond the edge both
    repeat it. They are drawn as A.Affine and A.ElasticTransform (alpha 60, sigma 9 at 256 x 256) draw them,
    but the displacement, smooth as it is, on a coarse grid.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    def __init__(self, affine: float, elastic: float) -> None:
        super().__init__(p=1.0)
        self.affine = affine
        self.elastic = elastic

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the source column and row of every pixel, (H, W) float32 each; None for no deformation."""
        generator = self.random_generator
        is_affine, is_elastic = generator.random(2) < (self.affine, self.elastic)
        if not (is_affine or is_elastic):
            return {"source": None}
        height, width = params["shape"][:2]
        x = np.arange(width, dtype=np.float32)[None]
        y = np.arange(height, dtype=np.float32)[:, None]
        if is_elastic:
            dx, dy = draw_displacement(height, width, generator)
            x, y = x + dx, y + dy
        matrix = draw_affine(height, width, generator) if is_affine else np.eye(2, 3, dtype=np.float32)
        (a, b, c), (d, e, f) = matrix.tolist()
        columns, rows = x * a + (y * b + c), x * d + (y * e + f)
        shape = (height, width)
        return {
            "source": tuple(np.ascontiguousarray(np.broadcast_to(map_, shape)) for map_ in (columns, rows))
        }

    def apply(self, img: np.ndarray, source: tuple[np.ndarray, np.ndarray] | None, **_: Any) -> np.ndarray:
        """Return the image (H, W, C) float32 deformed, by linear interpolation."""
        return img if source is None else warp_channels(img, source, cv2.INTER_LINEAR)

    def apply_to_mask(
        self, mask: np.ndarray, source: tuple[np.ndarray, np.ndarray] | None, **_: Any
    ) -> np.ndarray:
        """Return the mask (H, W, R) uint8 deformed, by nearest neighbour."""
        return mask if source is None else warp_channels(mask, source, cv2.INTER_NEAREST)


def draw_displacement(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Return a smooth random displacement in pixels, (2, height, width) float32: columns, then rows."""
    coarse = (2, -(-height // ELASTIC_STEP), -(-width // ELASTIC_STEP))
    noise = generator.standard_normal(coarse, dtype=np.float32)
    sigma = ELASTIC_SMOOTH / ELASTIC_STEP
    noise *= ELASTIC_SHIFT * 2 * np.sqrt(np.pi) * sigma  # by which blurring divides the SD of white noise
    smooth = (cv2.GaussianBlur(part, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) for part in noise)
    return np.stack([cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) for part in smooth])


def draw_affine(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Return the (2, 3) matrix from a pixel (column, row, 1) to its source, about the slice's centre.

    Scale within 15 % and shear within 5 degrees for each axis, rotation within 20 degrees, shift within 6 %.
    """
    scale = np.diag(generator.uniform(0.85, 1.15, 2))
    angle, *shears = np.deg2rad(generator.uniform((-20, -5, -5), (20, 5, 5)))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, np.tan(shears[0])], [np.tan(shears[1]), 1]])
    inverse = np.linalg.inv(shear @ rotation @ scale)
    centre = np.array([width - 1, height - 1]) / 2
    shift = generator.uniform(-0.06, 0.06, 2) * (width, height)
    return np.column_stack([inverse, centre - inverse @ (centre + shift)]).astype(np.float32)


def warp_channels(image: np.ndarray, source: tuple[np.ndarray, np.ndarray], interpolation: int) -> np.ndarray:
    """Return (H, W, C) resampled at the source columns and rows, the edge repeated beyond it."""
    parts = [  # OpenCV takes four channels at once
        cv2.remap(image[..., first : first + 4], *source, interpolation, borderMode=cv2.BORDER_REPLICATE)
        for first in range(0, image.shape[2], 4)
    ]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)


class BrightnessContrast(A.ImageOnlyTransform):
    """`A.RandomBrightnessContrast` for float32 in 0..1 in three passes over the pixels."""

    def __init__(self, brightness: float, contrast: float, p: float) -> None:
        super().__init__(p=p)
        self.brightness = brightness
        self.contrast = contrast

    def get_params(self) -> dict[str, Any]:
        """Return the factor and the offset of this draw."""
        factor = 1 + self.random_generator.uniform(-self.contrast, self.contrast)
        return {"factor": factor, "offset": self.random_generator.uniform(-self.brightness, self.brightness)}

    def apply(self, img: np.ndarray, factor: float, offset: float, **_: Any) -> np.ndarray:
        """Return the image times factor plus offset, clipped to 0..1."""
        out = img * np.float32(factor)
        out += np.float32(offset)
        return np.clip(out, 0, 1, out=out)


def build_augmentation() -> A.Compose:
    """Return the training transforms, for float32 slabs (H, W, C*K) in 0..1 and uint8 masks (H, W, R).

    All slices of a slab get the same geometry and the same contrast; only noise differs from slice to slice.
    benchmarks/feeding.py times each.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            Warp(affine=0.6, elastic=0.15),
            BrightnessContrast(brightness=0.08, contrast=0.2, p=0.4),
            A.RandomGamma(gamma_limit=(75, 130), p=0.3),
            A.GaussNoise(std_range=(0.005, 0.03), p=0.2),
        ]
    )


class SlabDataset(Dataset):
    """Training slabs by key (row of the slice table, seed of the draw): (slab (C*K, S, S), target (R, S, S)).

    Both are float32. What comes out depends on the key alone, not on the worker that made it or on what it
    made before, so any number of workers gives the same batches.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        table: pd.DataFrame,
        context: int,
        size: int,
        augment: bool = True,
    ) -> None:
        self.cases = list(cases)
        self.rows = table[["case", "z"]].to_numpy()
        self.context = context
        self.size = size
        self.augmentation = build_augmentation() if augment else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        row, draw_seed = key
        case_index, z = self.rows[row]
        case = self.cases[case_index]
        slab = case.slab(int(z), self.context)
        placement = place_slices(*slab.shape[1:], self.size)
        slab = fit_slices(slab, placement)
        target = fit_slices(case.reference_slice(int(z)), placement, is_mask=True).astype(np.uint8)
        if self.augmentation is not None:
            slab, target = self.augment(slab, target, draw_seed)
        return torch.from_numpy(np.ascontiguousarray(slab)), torch.from_numpy(target.astype(np.float32))

    def augment(self, slab: np.ndarray, target: np.ndarray, draw_seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a slab (C*K, S, S) and its target (R, S, S) transformed alike, seeded by the draw."""
        low, high = Z_RANGE
        self.augmentation.set_random_seed(draw_seed)
        pixels = cv2.merge(list(slab)).reshape(*slab.shape[1:], -1)  # (S, S, C*K)
        pixels -= low
        pixels /= high - low
        out = self.augmentation(image=pixels, mask=np.ascontiguousarray(target.transpose(1, 2, 0)))
        slab = np.ascontiguousarray(out["image"].transpose(2, 0, 1))
        slab *= high - low
        slab += low
        return slab, np.ascontiguousarray(out["mask"].transpose(2, 0, 1))


class BalancedSampler(Sampler):
    """Draws rows of the slice table by their weights, with replacement, anew and seeded in each epoch.

    Of several ranks each takes every `ranks`-th draw of one order, equally many: no draw is taken twice, and
    two ranks at batch 8 see in each step what one sees at batch 16.
    """

    def __init__(self, weights: np.ndarray, draws: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.weights = weights
        self.draws = draws
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0  # set before each pass

    def __len__(self) -> int:
        return self.draws // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.choice(len(self.weights), self.draws, p=self.weights)
        seeds = generator.integers(0, 2**31, self.draws)
        mine = slice(self.rank, len(self) * self.ranks, self.ranks)
        return iter(zip(rows[mine].tolist(), seeds[mine].tolist(), strict=True))


def start_worker(_: int) -> None:
    """Keep a loader worker to one thread: the workers share the processor with each other."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def make_train_loader(
    dataset: SlabDataset,
    sampler: BalancedSampler,
    batch_size: int,
    workers: int = 0,
    start_method: Literal["fork", "spawn"] | None = None,
) -> DataLoader:
    """Return the training loader; `start_method` None is the platform's. A last short batch is dropped."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        multiprocessing_context=start_method if workers else None,
    )


# ------------------------------------------------------------------------------------------------------------
# Command: show the balance
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalanceConfig:
    """Settings of the balance report."""

    data_dir: str | None = option(
        None, "folder with the cases; default: data/BraTS2021, without it the demo's"
    )
    modalities: tuple[str, ...] = option(("flair",), "modalities to read")
    regions: tuple[str, ...] = option(("WT",), "tumour regions: WT, TC, ET")
    layout: LayoutName = option("auto", "layout of the cases; auto tells it by what is there")
    mapping: str | None = option(None, "CSV sheet of ids, beside the mapping sheets found with the cases")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR")
    check: bool = option(
        False, "read every file of the cohort instead, list what is wrong, end with 1 on errors"
    )
    check_csv: str = option("results/check.csv", "table that --check writes")
    tumour_share: float = option(0.5, "share of draws that show tumour")
    empty_share: float = option(0.02, "share of draws that show no brain")
    cache_dir: str = option("cache", "folder of decoded volumes")
    cache_gb: float = option(CACHE_GB, "largest size of that folder in GB; what is unused longest goes first")
    clear_cache: bool = option(False, "remove the cache and do nothing else")
    output: str = option("results/balance.png", "plot to write")


def check_data(config: BalanceConfig, data_dir: str) -> None:
    """Check every file of a cohort, print and write what is wrong; exit code 1 on errors."""
    where = (config.slice_channel, config.layout, config.mapping)
    cases, problems = check_cohort(data_dir, config.modalities, *where)
    write_problems(Path(config.check_csv), problems)
    print("\n".join([*describe_cases(cases), *summarise_problems(cases, problems)]))
    print(f"table: {config.check_csv}")
    if any(problem.severity == "error" for problem in problems):
        sys.exit(1)


def main(config: BalanceConfig) -> None:
    """Print the slice balance of a data set before and after weighting, and draw it; or check, or clear."""
    if config.clear_cache:
        print(f"{config.cache_dir}: removed {clear_cache(config.cache_dir) / 1e9:.3g} GB")
        return
    data_dir = choose_data_dir(config.data_dir)
    if config.check:
        check_data(config, data_dir)
        return
    found = find_cases(data_dir, config.modalities, config.slice_channel, config.layout, config.mapping)
    print("\n".join(describe_cases(found)))
    cases = with_reference(found, data_dir)
    prepared = prepare_cases(
        cases, config.modalities, config.regions, config.cache_dir, cache_gb=config.cache_gb
    )
    table = slice_table(prepared, config.regions)
    weights = balance_slices(table, config.tumour_share, config.empty_share)
    kind = pd.Series(slice_kind(table))
    order = ["tumour", "brain", "empty"]
    counts = kind.value_counts().reindex(order, fill_value=0)
    after = pd.Series(weights).groupby(kind).sum().reindex(order, fill_value=0.0)
    patients = len({case.patient_id for case in prepared})
    print(f"{len(prepared)} cases of {patients} patients, {len(table)} slices in {data_dir}")
    print(f"{'slices':<8} {'count':>8} {'as stored':>10} {'as drawn':>10}")
    for name in order:
        print(f"{name:<8} {counts[name]:>8} {counts[name] / len(table):>10.1%} {after[name]:>10.1%}")
    plot_balance(counts / len(table), after, Path(config.output))
    print(f"plot: {config.output}")


if __name__ == "__main__":
    run_command(main, BalanceConfig, "Show the slice balance of a data set before and after weighting.")
