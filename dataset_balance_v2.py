"""From cases to balanced training slabs: split by patient, slice balance, loaders.

Run as a command it prints the slice balance of a data set before and after weighting and draws it, or checks
every file of it, or removes the cache:

    python dataset_balance_v2.py --data-dir data/BraTS2021
    python dataset_balance_v2.py --data-dir data/BraTS2021 --check
    python dataset_balance_v2.py --clear-cache
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from augmentation_v2 import build_augmentation
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
    kept_range,
    place_slices,
)

DEFAULT_DATA = Path("data/BraTS2021")
DEMO_DATA = Path("data/phantom_internal")


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
# Slabs and loaders
# ------------------------------------------------------------------------------------------------------------


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


def warn_of_crop(cases: Sequence[PreparedCase], size: int, multiple: int = 16) -> str | None:
    """Return a sentence where the network's input of size x size cuts tumour off some cases, else None.

    Such tumour is neither learnt nor found. Slices that are resized are not cropped. The size advised is a
    multiple of `multiple` and cuts none off.
    """

    def cut_at(side: int) -> list[PreparedCase]:
        return [case for case in cases if is_cut(case, side)]

    cut = cut_at(size)
    if not cut:
        return None
    sides = range(size // multiple * multiple + multiple, 2**31, multiple)
    enough = next(side for side in sides if not cut_at(side))
    return (
        f"warning: --size {size} cuts tumour off {len(cut)} of {len(cases)} cases, first {cut[0].case_id}; "
        f"--size {enough} keeps it"
    )


def is_cut(case: PreparedCase, size: int) -> bool:
    """Return whether the crop to size x size cuts tumour off."""
    placement = place_slices(*case.shape[1:], size)
    if placement.inner != placement.native or not np.any(case.region_voxels):
        return False
    kept = (kept_range(length, size) for length in placement.native)
    return any(
        start < first or stop > end
        for (start, stop), (first, end) in zip(case.reference_box[1:], kept, strict=True)
    )


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
