"""Networks, and ways to train one, under one loop: accuracy at home and abroad, at equal cost.

    python -m benchmarks.compare_networks --entries "ours, no SE" "MONAI AttentionUnet"      run two rows
    python -m benchmarks.compare_networks --table                                           what is there

Each row is trained on patient folds of one cohort ("home") and tested on the fold's patients, and on another
cohort ("abroad") that is never trained on. Data, balance, augmentation, sampler, optimiser and schedule are
the same for all; the network at the end is tested, at the threshold that validation chooses. The budget of a
row is the processor time of its training steps (forward pass, loss, backward pass, update; on a card wall
clock), or with --slabs a number of slabs. Loading, validation and tests are not counted, as they are the same
for all. A row that is there is not run again, so a comparison goes on where it stopped. `networks.py` lists
the rows.
"""

import copy
import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import RESULTS
from benchmarks.comparison_tables import PLACES, show_tables
from benchmarks.networks import ENTRIES, Entry, build_row
from benchmarks.stripping import build_stripping
from cohort.cache import PreparedCase, prepare_cases
from cohort.cases import Modalities, with_reference
from cohort.labels import Regions
from cohort.layouts import CaseSource, find_cases
from cohort.leakage import find_held_out, identify_case
from cohort.split import SPLIT_PARTS, split_folds
from dataset_balance_v2 import (
    BalancedSampler,
    SlabDataset,
    balance_slices,
    make_train_loader,
    slice_table,
    training_spacing,
)
from inference_v2 import TrainedModel, predict_views
from model_drunet_v2 import DRUNetV2, prepare_network
from runtime.command import run_command
from runtime.cost import count_flops, count_parameters, measure_activation_bytes
from runtime.errors import InputError
from runtime.files import write_json
from runtime.log import log
from runtime.machine import amp_dtype, choose_device, describe_machine, describe_versions, set_seed
from runtime.state import average_weights
from train_drunet_v2 import validate
from utils_v2 import AT_HALF, Overlap, choose_thresholds, overlap_at_thresholds

WARMUP_SHARE = 0.03  # of the budget, over which the learning rate rises
LAST_RATE = 0.01  # of the learning rate, where a cosine ends


@dataclass(frozen=True)
class RingConfig:
    """Settings of the comparison."""

    entries: tuple[str, ...] = ()
    """rows to run, by their names in networks.py; none runs none"""
    table: bool = False
    """print the tables and draw the plots of the rows that are there, of the folds of --only"""
    reference: str = "ours, no SE"
    """row that the table compares the others with, paired by case"""
    name: str = "lgg"
    """folder in benchmarks/results/compare_networks that holds the rows"""
    data_dir: tuple[str, ...] = ("data/lgg",)
    """cohort that is trained on"""
    external_dir: tuple[str, ...] = ("data/brats18", "data/brats21")
    """cohort that is tested on alone, if any; of cases in both, by id or content, it loses its own"""
    leave_out: tuple[str, ...] = ("Brats18_TCIA13_623_1", "TCGA_HT_7473_19970826")
    """further cases left out of it: one patient of the defaults, whom only the organisers' sheet joins"""
    modalities: Modalities = ("flair",)
    """modalities, in channel order"""
    regions: Regions = ("WT",)
    """tumour regions"""
    cache_dir: str = "cache"
    """folder of decoded volumes"""
    folds: int = 5
    """parts of the patients"""
    only: tuple[int, ...] = (0,)
    """folds to run, or to show"""
    validation_share: float = 0.15
    """share of a fold's other patients that choose the threshold"""
    seeds: tuple[int, ...] = (0,)
    """seeds of weights, draws and augmentation"""
    seconds: float = 540.0
    """budget of a row"""
    slabs: int | None = None
    """budget of a row as slabs instead"""
    validations: int = 4
    """validations of a row, evenly over its budget; the last network is tested, at its thresholds"""
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """filters per level, where a network has them"""
    batch_size: int = 16
    """slabs per step"""
    learning_rate: float = 2e-3
    """AdamW's highest learning rate"""
    device: str = "auto"
    """where to compute"""


@dataclass(frozen=True)
class Cohorts:
    """Prepared cases of one fold."""

    train: list[PreparedCase]
    validation: list[PreparedCase]
    home: list[PreparedCase]
    abroad: list[PreparedCase]


# ------------------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------------------


def prepare_folders(config: RingConfig, folders: Sequence[str]) -> list[PreparedCase]:
    """Return the prepared cases of several folders."""
    cases = []
    for folder in folders:
        cases += with_reference(find_cases(CaseSource(folder), config.modalities), folder)
    return prepare_cases(cases, config.modalities, config.regions, config.cache_dir)


def prepare_cohorts(config: RingConfig) -> dict[int, Cohorts]:
    """Return the cases of each fold that is asked for."""
    home = prepare_folders(config, config.data_dir)
    abroad = prepare_folders(config, config.external_dir) if config.external_dir else []
    known = find_held_out([identify_case(case) for case in abroad], [identify_case(case) for case in home])
    for row in known.itertuples():
        log.info("left out abroad: %s, %s as %s", row.case, row.evidence, row.known_as)
    left_out = {*known["case"], *config.leave_out}
    abroad = [case for case in abroad if case.case_id not in left_out]
    by_id = {case.case_id: case for case in home}
    cohorts = {}
    for fold, split in enumerate(split_folds(home, config.folds, 0, config.validation_share)):
        if fold in config.only:
            parts = [[by_id[case_id] for case_id in split[part]] for part in SPLIT_PARTS]
            cohorts[fold] = Cohorts(*parts, abroad)
    return cohorts


def make_batches(config: RingConfig, entry: Entry, cases: Sequence[PreparedCase], seed: int) -> DataLoader:
    """Return the loader of a row: more slabs than any budget lasts for."""
    table = slice_table(cases, config.regions)
    weights = np.full(len(table), 1 / len(table))
    if entry.tumour_share is not None:
        weights = balance_slices(table, entry.tumour_share)
    slabs = SlabDataset(cases, table, entry.context, entry.size)
    if entry.strip:
        slabs.augmentation = build_stripping(entry.strip)
    sampler = BalancedSampler(weights, 10_000_000, seed)
    return make_train_loader(slabs, sampler, config.batch_size)


# ------------------------------------------------------------------------------------------------------------
# One row
# ------------------------------------------------------------------------------------------------------------


def scheduled_rate(schedule: str, share: float) -> float:
    """Return the factor on the learning rate after a share (0..1) of the budget."""
    warm = min(1.0, share / WARMUP_SHARE + 0.02)
    if schedule == "cosine":
        return warm * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1.0, share))) / 2)
    return warm * (0.1 if schedule == "drop" and share >= 0.75 else 1.0)


@dataclass
class Budget:
    """What a row may use and has used."""

    config: RingConfig
    device: torch.device
    seconds: float = 0.0
    slabs: int = 0

    def share(self) -> float:
        """Return the share of the budget that is used."""
        if self.config.slabs:
            return self.slabs / self.config.slabs
        return self.seconds / self.config.seconds

    def clock(self) -> float:
        """Return the seconds that count: of the processor on a CPU, of the wall on a card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def train_row(
    config: RingConfig,
    entry: Entry,
    network: nn.Module,
    batches: DataLoader,
    sweep_validation: Callable[[nn.Module], np.ndarray],
) -> tuple[nn.Module, dict[str, Any]]:
    """Train until the budget is used; return the network, averaged where the row says so, and its facts."""
    device = choose_device(config.device)
    dtype = amp_dtype(device, entry.amp)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=1e-2, fused=True
    )
    average = average_weights(network, entry.average) if entry.average else None
    kept = average.module if average else network
    budget, history = Budget(config, device), []
    for slab, target in batches:
        started = budget.clock()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * scheduled_rate(entry.schedule, budget.share())
        network.train()
        slab = slab.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = network(slab)
        loss = entry.loss(logits, target.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update_parameters(network)
        budget.slabs += len(slab)
        budget.seconds += budget.clock() - started
        if budget.share() >= (len(history) + 1) / config.validations:
            dice = sweep_validation(kept)  # (cases, R, T)
            score = float(dice[..., AT_HALF].mean())
            history.append({"seconds": budget.seconds, "slabs": budget.slabs, "validation_dice": score})
            log.info("  %3.0f s  %6d slabs  validation %.4f", budget.seconds, budget.slabs, score)
        if budget.share() >= 1:
            break
    facts = {"seconds": budget.seconds, "slabs": budget.slabs, "validation_dice": score, "history": history}
    facts["thresholds"] = choose_thresholds(dice)
    return kept, facts


def as_model(
    config: RingConfig, entry: Entry, network: nn.Module, spacing: Any, thresholds: Sequence[float] = ()
) -> TrainedModel:
    """Return a network as a model ready to predict."""
    device = choose_device(config.device)
    dtype = amp_dtype(device, entry.amp)
    if isinstance(network, DRUNetV2):
        ready = prepare_network(network, device, dtype)
    else:
        ready = copy.deepcopy(network).eval()
        if hasattr(ready, "decoder") and hasattr(ready.decoder, "deep_supervision"):
            ready.decoder.deep_supervision = False
    return TrainedModel(
        network=ready,
        modalities=config.modalities,
        regions=config.regions,
        context=entry.context,
        size=entry.size,
        thresholds=tuple(thresholds) or (0.5,) * len(config.regions),
        device=device,
        dtype=dtype,
        checkpoint={"spacing_mm": spacing},
    )


def test_cases(model: TrainedModel, cases: Sequence[PreparedCase]) -> list[dict[str, Any]]:
    """Return a row per case, region and mode with its Dice at the model's thresholds."""
    rows = []
    for case in cases:
        views = predict_views(model, case.volume, case.brain_voxels, frame=case.frame)  # (V, R, D, H, W)
        for mode, output in (("plain", views[0]), ("tta", views.mean(0))):
            for region, name in enumerate(model.regions):
                counts = overlap_at_thresholds(
                    output[region], case.reference[region], np.array([model.thresholds[region]])
                )
                row = {"case": case.case_id, "patient": case.patient_id, "region": name, "mode": mode}
                rows.append(row | {"dice": Overlap(*counts[0].tolist()).dice})
    return rows


def measure_cost(config: RingConfig, entry: Entry, network: nn.Module) -> dict[str, float]:
    """Return parameters, GFLOP per slab and the memory of a training step's activations at the batch size."""
    channels = len(config.modalities) * (2 * entry.context + 1)
    shape = (config.batch_size, channels, entry.size, entry.size)
    dtype = torch.bfloat16 if entry.amp else None
    facts = {"parameters": count_parameters(network)}
    facts["activation_gb"] = measure_activation_bytes(network, (2, *shape[1:]), dtype) * shape[0] / 2 / 1e9
    facts["gflop"] = count_flops(network, (1, *shape[1:])) / 1e9
    network.train()
    return facts


def run_row(config: RingConfig, name: str, fold: int, seed: int, cohorts: Cohorts) -> None:
    """Train and test a row, and write it."""
    entry = ENTRIES[name]
    set_seed(seed)
    channels = len(config.modalities) * (2 * entry.context + 1)
    network = build_row(entry, channels, len(config.regions), config.widths)
    cost = measure_cost(config, entry, network)
    log.info("%s, fold %d, seed %d: %.2f M parameters", name, fold, seed, cost["parameters"] / 1e6)
    spacing = training_spacing(cohorts.train, entry.size)
    batches = make_batches(config, entry, cohorts.train, seed)

    def sweep(evaluated: nn.Module) -> np.ndarray:
        model = as_model(config, entry, evaluated, spacing)
        return validate(model, cohorts.validation, config.batch_size)

    kept, facts = train_row(config, entry, network, batches, sweep)
    model = as_model(config, entry, kept, spacing, facts["thresholds"])
    row = {"entry": name, "fold": fold, "seed": seed, **cost, **facts}
    row |= {"home": test_cases(model, cohorts.home), "abroad": test_cases(model, cohorts.abroad)}
    row |= {"settings": dataclasses.asdict(config), "hardware": describe_machine(model.device)}
    row |= {"threads": torch.get_num_threads(), "versions": describe_versions()}
    write_json(row_path(config, name, fold, seed), row)
    for place in PLACES:
        if row[place]:
            table = pd.DataFrame(row[place])
            log.info("  %s: %s", place, table.groupby(["region", "mode"])["dice"].mean().round(3).to_dict())


def folder_of(config: RingConfig) -> Path:
    """Return the folder of the rows of one cohort and budget."""
    budget = f"{config.slabs}_slabs" if config.slabs else f"{config.seconds:g}_s"
    return RESULTS / "compare_networks" / f"{config.name}_{budget}"


def row_path(config: RingConfig, name: str, fold: int, seed: int) -> Path:
    """Return the file of a row."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return folder_of(config) / f"{plain}_fold{fold}_seed{seed}.json"


def main(config: RingConfig) -> None:
    """Run the rows that are asked for and not there yet; print the tables."""
    for flag, names in (("--entries", config.entries), ("--reference", (config.reference,))):
        if unknown := sorted(set(names) - ENTRIES.keys()):
            raise InputError(f"{flag} {unknown[0]!r}", "no such row", f"one of: {'; '.join(ENTRIES)}")
    wanted = [
        (name, fold, seed)
        for seed in config.seeds
        for fold in config.only
        for name in config.entries
        if not row_path(config, name, fold, seed).exists()
    ]
    cohorts = prepare_cohorts(config) if wanted else {}
    for name, fold, seed in wanted:
        run_row(config, name, fold, seed, cohorts[fold])
    if config.table:
        show_tables(folder_of(config), tuple(ENTRIES), config.regions, config.reference, config.only)


if __name__ == "__main__":
    run_command(main, RingConfig, "Compare networks and ways to train under one loop.")
