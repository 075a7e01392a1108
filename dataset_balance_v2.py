"""From cases to balanced training slabs: split by patient, slice balance, loaders.

Run as a command it prints the slice balance of a data set before and after weighting and draws it, or checks
every file of it, or removes the cache:

    python dataset_balance_v2.py --data-dir data/BraTS2021
    python dataset_balance_v2.py --data-dir data/BraTS2021 --check
    python dataset_balance_v2.py --clear-cache
"""

import atexit
import contextlib
import dataclasses
import itertools
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import cv2
import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from audit.plots import plot_balance
from cohort.augmentation import build_augmentation, seed_transforms
from cohort.cache import PreparedCase, clear_cache, prepare_cases
from cohort.cases import Modalities, with_reference
from cohort.check import check_cohort, log_problems, write_problems
from cohort.labels import Regions
from cohort.layouts import CaseSource, find_cases, log_cohorts
from cohort.phantom import choose_data_dir
from cohort.preprocess import (
    BRAIN_SLICE_VOXELS,
    MISSING,
    Z_RANGE,
    Placement,
    describe_training_spacing,
    fit_slices,
    pixel_mm,
    place_slices,
)
from runtime import signals
from runtime.command import Share, run_command
from runtime.errors import InputError
from runtime.files import check_output, write_output
from runtime.log import log
from runtime.ranks import gather_shares

# ------------------------------------------------------------------------------------------------------------
# Balance
# ------------------------------------------------------------------------------------------------------------


def slice_table(cases: Sequence[PreparedCase], regions: Sequence[str]) -> pd.DataFrame:
    """Return one row per slice: case (index into `cases`), z, brain_voxels, and the voxels of each region."""
    frames = []
    for index, case in enumerate(cases):
        columns = {"case": index, "z": np.arange(len(case.brain_voxels)), "brain_voxels": case.brain_voxels}
        columns |= dict(zip(regions, case.region_voxels, strict=True))
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def reference_range(cases: Sequence[PreparedCase], regions: Sequence[str]) -> dict[str, list[float]]:
    """Return {region: [smallest, largest]} of the reference volumes in ml; empty references do not count."""
    ranges = {}
    for index, region in enumerate(regions):
        volumes = [sum(case.region_voxels[index]) * float(np.prod(case.spacing_mm)) / 1000 for case in cases]
        if positive := [volume for volume in volumes if volume > 0]:
            ranges[region] = [min(positive), max(positive)]
    return ranges


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
            f"--tumour-share {tumour_share} --empty-share {empty_share}",
            "must be 0 or more, and 1 at most together",
        )
    kind = slice_kind(table)
    shares = {"tumour": tumour_share, "empty": empty_share, "brain": 1 - tumour_share - empty_share}
    weights = np.zeros(len(table))
    for name, share in shares.items():
        rows = kind == name
        if rows.any():
            weights[rows] = share / rows.sum()
    if weights.sum() == 0:
        raise InputError(
            f"--tumour-share {tumour_share} --empty-share {empty_share}",
            "leave no slice that can be drawn",
            "give each kind of slice that the cases have a share",
        )
    return weights / weights.sum()


def balance_cohorts(
    table: pd.DataFrame,
    cases: Sequence[PreparedCase],
    weight_of_cohort: Mapping[str, float],
    tumour_share: float = 0.5,
    empty_share: float = 0.02,
) -> np.ndarray:
    """Return the probability of drawing each slice, balanced in each cohort by itself: shape (rows,), sum 1.

    Draws of a cohort are as frequent as its weight, whatever slices it has. Without weights all slices are
    balanced together (`balance_slices`). A cohort without a training case leaves its share to the others.
    """
    if not weight_of_cohort:
        return balance_slices(table, tumour_share, empty_share)
    cohort = np.array([case.cohort for case in cases])[table["case"]]
    weights = np.zeros(len(table))
    for name, weight in weight_of_cohort.items():
        if not (rows := cohort == name).any():
            log.warning("no training case is of cohort %s, whose weight counts for nothing", name)
            continue
        weights[rows] = weight * balance_slices(table[rows], tumour_share, empty_share)
    return weights / weights.sum()


def balance_phantoms(
    table: pd.DataFrame, real: np.ndarray, share: float, tumour_share: float = 0.5, empty_share: float = 0.02
) -> np.ndarray:
    """Return the probability of drawing each slice where `share` of the draws are of phantoms, sum 1.

    The first rows of the table are those of the cases, whose probabilities among themselves are `real`; the
    others are of phantoms.
    """
    phantoms = balance_slices(table[len(real) :], tumour_share, empty_share)
    return np.concatenate([(1 - share) * real, share * phantoms])


def drop_modalities(slab: np.ndarray, modalities: int, share: float, draw_seed: int) -> None:
    """Set each modality of a slab (C*K, S, S) to MISSING with probability `share`, in all of its slices.

    One drawn at random stays where all would be gone. What is drawn depends on the seed of the draw alone.
    """
    generator = np.random.default_rng([draw_seed, modalities])
    is_dropped = generator.random(modalities) < share
    spared = generator.integers(modalities)
    if is_dropped.all():
        is_dropped[spared] = False
    slab.reshape(modalities, -1, *slab.shape[1:])[is_dropped] = MISSING


def balance_shares(table: pd.DataFrame, weights: np.ndarray) -> pd.DataFrame:
    """Return slices, and their share as stored and as drawn, of each kind of slice (the index)."""
    kind = pd.Series(slice_kind(table))
    order = pd.Index(["tumour", "brain", "empty"], name="kind")
    slices = kind.value_counts().reindex(order, fill_value=0)
    drawn = pd.Series(weights).groupby(kind).sum().reindex(order, fill_value=0.0)
    return pd.DataFrame({"slices": slices, "stored": slices / len(table), "drawn": drawn})


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
        modality_dropout: float = 0.0,
    ) -> None:
        self.cases = list(cases)
        self.rows = table[["case", "z"]].to_numpy()
        self.context = context
        self.size = size
        self.augmentation = build_augmentation() if augment else None
        self.modality_dropout = modality_dropout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        row, draw_seed = key
        case_index, z = self.rows[row]
        case = self.cases[case_index]
        slab = case.slab(int(z), self.context)
        placement = place_prepared(case, self.size)
        slab = fit_slices(slab, placement)
        target = fit_slices(case.reference_slice(int(z)), placement, is_mask=True).astype(np.uint8)
        if self.augmentation is not None:
            slab, target = self.augment(slab, target, draw_seed)
        slab = np.ascontiguousarray(slab)
        if self.modality_dropout:
            drop_modalities(slab, len(case.background), self.modality_dropout, draw_seed)
        return torch.from_numpy(slab), torch.from_numpy(target.astype(np.float32))

    def augment(self, slab: np.ndarray, target: np.ndarray, draw_seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a slab (C*K, S, S) and its target (R, S, S) transformed alike, seeded by the draw."""
        low, high = Z_RANGE
        seed_transforms(self.augmentation, draw_seed)
        pixels = cv2.merge(list(slab)).reshape(*slab.shape[1:], -1)  # (S, S, C*K)
        pixels -= low
        pixels /= high - low
        np.clip(pixels, 0, 1, out=pixels)  # resizing rounds air to just below it, of which gamma makes NaN
        out = self.augmentation(image=pixels, mask=np.ascontiguousarray(target.transpose(1, 2, 0)))
        slab = np.ascontiguousarray(out["image"].transpose(2, 0, 1))
        slab *= high - low
        slab += low
        return slab, np.ascontiguousarray(out["mask"].transpose(2, 0, 1))


def place_prepared(case: PreparedCase, size: int) -> Placement:
    """Return how the slices of a case lie in a size x size input of training."""
    return place_slices(*case.shape[1:], size, case.head_box)


def training_spacing(cases: Sequence[PreparedCase], size: int) -> dict[str, dict[str, float]] | None:
    """Return median and range of the spacings that a network of this input size meets in these cases."""
    return describe_training_spacing([(case.frame, place_prepared(case, size)) for case in cases])


def median_pixel_mm(cases: Sequence[PreparedCase], size: int) -> float:
    """Return what a pixel of a size x size input spans in these cases, in mm; 1 natively where unknown."""
    spans = []
    for case in cases:
        spans += pixel_mm(case.frame.spacing_mm or (1.0, 1.0, 1.0), place_prepared(case, size))
    return float(np.median(spans))


def warn_of_crop(cases: Sequence[PreparedCase], size: int, multiple: int = 16) -> None:
    """Log a warning where the network's input of size x size cuts tumour off some cases.

    Such tumour lies outside of the head, and is neither learnt nor found. Slices that are resized are not
    cropped. The size advised is a multiple of `multiple` and cuts none off.
    """

    def cut_at(side: int) -> list[PreparedCase]:
        return [case for case in cases if is_cut(case, side)]

    if not (cut := cut_at(size)):
        return
    sides = range(size // multiple * multiple + multiple, 2**31, multiple)
    enough = next(side for side in sides if not cut_at(side))
    log.warning(
        f"--size {size} cuts tumour off {len(cut)} of {len(cases)} cases, first {cut[0].case_id}; "
        f"--size {enough} keeps it"
    )


def is_cut(case: PreparedCase, size: int) -> bool:
    """Return whether the crop to size x size cuts tumour off."""
    placement = place_prepared(case, size)
    if placement.inner != placement.native or not np.any(case.region_voxels):
        return False
    return any(
        start < first or stop > end
        for (start, stop), (first, end) in zip(case.reference_box[1:], placement.kept, strict=True)
    )


class BalancedSampler(Sampler):
    """Draws rows of the slice table with replacement, by their weights, in a new seeded order each epoch.

    Of several ranks each takes every `ranks`-th draw of one order, equally many: no draw is taken twice, and
    two ranks at batch 8 see in each step what one sees at batch 16.
    """

    def __init__(self, weights: np.ndarray, draws: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.weights = weights
        self.draws = draws
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0  # both are set before each pass
        self.drawn = 0  # how many of this rank's draws of the epoch were taken before

    def __len__(self) -> int:
        return self.draws // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.choice(len(self.weights), self.draws, p=self.weights)
        seeds = generator.integers(0, 2**31, self.draws)
        mine = slice(self.rank + self.drawn * self.ranks, len(self) * self.ranks, self.ranks)
        return iter(zip(rows[mine].tolist(), seeds[mine].tolist(), strict=True))


def start_worker(_: int) -> None:
    """Keep a loader worker to one thread, and let what computes go first where both want one core.

    A signal that stops training is often sent to its workers too; they serve the step that is finished first.
    """
    if get_worker_info() is not None:
        signals.spare_worker()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)


def make_train_loader(
    dataset: SlabDataset,
    sampler: BalancedSampler,
    batch_size: int,
    workers: int = 0,
    start_method: Literal["fork", "spawn"] | None = None,
) -> DataLoader:
    """Return the training loader; `start_method` None is the platform's. A last short batch is dropped."""
    loader = DataLoader(
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
    if workers:
        still_there = weakref.ref(loader)
        atexit.register(lambda: end_workers(still_there()))
    return loader


@contextlib.contextmanager
def workers_of(loader: DataLoader) -> Iterator[None]:
    """End the loader's processes with this block, whoever still holds the loader."""
    try:
        yield
    finally:
        end_workers(loader)


def end_workers(loader: DataLoader | None) -> None:
    """End the processes of a loader, if there is one.

    At exit Python sends them one SIGTERM, which `start_worker` lets them survive, and waits for ever. So this
    must come before.
    """
    if loader is not None and loader._iterator is not None:  # torch has no public way to end them
        loader._iterator._shutdown_workers()
        loader._iterator = None


def name_cases(loader: DataLoader, first: int, last: int) -> list[str]:
    """Return the ids of the cases in the batches `first` to `last` of this epoch, on all ranks, sorted.

    The sampler draws the same each time it is asked, so no batch need say what it is of.
    """
    begin, end = (batch * loader.batch_size - loader.sampler.drawn for batch in (first, last + 1))
    keys = itertools.islice(loader.sampler, begin, end)
    slabs = loader.dataset
    mine = {slabs.cases[slabs.rows[row][0]].case_id for row, _ in keys}
    return sorted(set().union(*gather_shares([mine])))


# ------------------------------------------------------------------------------------------------------------
# Command: show the balance
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalanceConfig:
    """Settings of the balance report."""

    source: tyro.conf.OmitArgPrefixes[CaseSource] = CaseSource()
    modalities: Modalities = ("flair",)
    """modalities to read"""
    regions: Regions = ("WT",)
    """tumour regions to count"""
    tumour_share: Share = 0.5
    """share of draws that show tumour"""
    empty_share: Share = 0.02
    """share of draws that show no brain"""
    cache_dir: str = "cache"
    """folder of decoded volumes"""
    output: str = "results/balance.png"
    """plot to write"""
    check: bool = False
    """read every file of the cohort instead, list what is wrong, end with exit code 1 on errors"""
    check_csv: str = "results/check.csv"
    """table that --check writes"""
    overwrite: bool = False
    """replace a plot or table that this program did not write"""
    clear_cache: bool = False
    """remove the cache and do nothing else"""


def check_data(config: BalanceConfig, source: CaseSource) -> None:
    """Check every file of a cohort, log and write what is wrong; exit code 1 on errors."""
    cases, problems = check_cohort(source, config.modalities)
    table = Path(config.check_csv)
    write_output(table, lambda target: write_problems(target, problems), config.overwrite)
    log_cohorts(cases)
    log_problems(cases, problems)
    log.info(f"table: {config.check_csv}")
    if any(problem.severity == "error" for problem in problems):
        sys.exit(1)


def main(config: BalanceConfig) -> None:
    """Log the slice balance of a data set before and after weighting, and draw it; or check, or clear."""
    if config.clear_cache:
        log.info(f"{config.cache_dir}: removed {clear_cache(config.cache_dir) / 1e9:.3g} GB")
        return
    check_output(Path(config.check_csv if config.check else config.output), config.overwrite)
    source = dataclasses.replace(config.source, data_dir=choose_data_dir(config.source.data_dir))
    if config.check:
        check_data(config, source)
        return
    cases = find_cases(source, config.modalities)
    log_cohorts(cases)
    cases = with_reference(cases, source.place)
    prepared = prepare_cases(cases, config.modalities, config.regions, config.cache_dir)
    table = slice_table(prepared, config.regions)
    weights = balance_slices(table, config.tumour_share, config.empty_share)
    balance = balance_shares(table, weights)
    before, after = balance["stored"], balance["drawn"]
    patients = len({case.patient_id for case in prepared})
    log.info(f"{len(prepared)} cases of {patients} patients, {len(table)} slices in {source.place}")
    shares = {"as stored": before.map("{:.1%}".format), "as drawn": after.map("{:.1%}".format)}
    log.info(pd.DataFrame({"slices": balance["slices"], **shares}).rename_axis(None).to_string())
    plot = Path(config.output)
    write_output(plot, lambda target: plot_balance(before, after, target), config.overwrite)
    log.info(f"plot: {config.output}")


if __name__ == "__main__":
    run_command(main, BalanceConfig, "Show the slice balance of a data set before and after weighting.")
