"""How a run starts: its place in results/, its cases, its network, and the step that trains it."""

import dataclasses
import functools
import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import model_drunet_v2 as model
from audit import overlays, plots
from cohort import initial, phantom, selection, several
from cohort.split import SPLIT_PARTS
from runtime import checkpoints, claims, command, cost, cpu_threads, files, machine, probe, ranks
from runtime.errors import InputError
from runtime.log import log, log_to_file
from runtime.state import Recipe, TrainState, start_state
from training.run import Run
from training.settings import TrainConfig


def place_run(config: TrainConfig) -> TrainConfig:
    """Return the settings with data folder and run name; the demo's phantoms are made where missing.

    The run's folder is this program's until it ends; InputError where another one has it.
    """
    if config.resume:
        claims.claim_folder(Path(config.results_dir) / config.run, "wait until that one ends")
        return config
    if config.modality_dropout and len(config.source.modalities) < 2:
        raise InputError(
            f"--modality-dropout {config.modality_dropout:g}",
            "there is one modality",
            "name more in --modalities",
        )
    data_dir = phantom.choose_data_dir(config.source.data_dir)
    results = Path(config.results_dir)
    remedy = "choose another --run" if config.source.fold is None else "wait until that one ends"
    if config.run:
        name = config.run
        claims.claim_folder(results / name, remedy)
    else:
        cohorts = "_".join(several.name_cohorts(several.list_folders(data_dir)))
        name = f"{files.make_plain_name(cohorts)}_{datetime.now():%Y%m%d_%H%M%S}"
        name = claims.claim_new_folder(results, name, remedy)
    if checkpoints.has_last(results / name):
        raise InputError(f"--run {name}", "this run exists", "choose another name or --resume it")
    source = dataclasses.replace(config.source, data_dir=data_dir)
    return dataclasses.replace(config, source=source, run=name)


def make_state(
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    weights: initial.InitialWeights | None = None,
) -> TrainState:
    """Return the state of a run before its first step, with the weights of --init where there are."""
    try:
        network = model.build_network(command.to_plain(config))
    except ValueError as error:
        raise InputError("--widths", str(error)) from error
    if config.size % network.multiple:
        raise InputError(
            f"--size {config.size}",
            f"must be a multiple of {network.multiple} for {len(config.widths)} widths",
        )
    if weights:
        initial.start_from(network, command.to_plain(config), weights)
    network.checkpointing = config.checkpointing
    if config.sync_batchnorm:
        network = ranks.sync_batchnorm(network, device)
    network = network.to(device, memory_format=torch.channels_last)
    recipe = Recipe(
        config.learning_rate,
        config.min_learning_rate,
        config.patience,
        config.weight_decay,
        config.ema,
        dtype,
    )
    return start_state(network, recipe)


def open_run(
    config: TrainConfig, device: torch.device, dtype: torch.dtype | None
) -> tuple[Run, selection.Selection]:
    """Make the run's folder, choose its cases, and write config.json."""
    folder = Path(config.results_dir) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    log_to_file(folder / "train.log")
    chosen = None
    if ranks.is_main():
        chosen = selection.select_cases(config.source, config.seed, folder, resumed=bool(config.resume))
    chosen = ranks.from_main(chosen)
    if ranks.is_main():
        made = {"command": command.command_line(), "ranks": ranks.world_size()}
        if config.resume:
            made |= list_commands(folder / "config.json", made["command"])
        made |= {"split_patients": chosen.count_patients()}
        made |= {"hardware": machine.describe_machine(device, dtype), "versions": machine.describe_versions()}
        files.write_json(folder / "config.json", {**command.to_plain(config), **chosen.facts, **made})
    names = ("config.json", "split.json", "skipped.csv", "held_out.csv")
    records = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    return Run(config, folder, device, dtype, chosen.facts, records), chosen


def list_commands(path: Path, command_now: str) -> dict[str, Any]:
    """Return the command that started a run, and all that resumed it, from its config.json."""
    try:
        earlier = files.read_json(path, "", "a run's config.json")
    except InputError:  # the run goes on without; its checkpoint has what it needs
        return {}
    if "command" not in earlier:
        return {}
    return {"command": earlier["command"], "resumed_with": [*earlier.get("resumed_with", ()), command_now]}


def prepare_step(run: Run, network: nn.Module) -> nn.Module:
    """Return what a training step calls: the network, compiled and shared among ranks where asked for."""
    config, forward = run.config, network
    shape = (config.batch_size, network.in_channels, config.size, config.size)
    batch = probe.Batch(shape, run.device, run.dtype)
    if config.probe:
        count = functools.partial(
            cost.estimate_activation_bytes, network, shape, run.dtype, side=2 * network.multiple
        )
        alone = ranks.world_size() == 1 or not config.sync_batchnorm
        probe.probe_memory(network, batch, count, config.accumulate, try_smaller=alone)
    if config.compile:
        forward = probe.compile_network(network, lambda compiled: probe.try_step(compiled, network, batch))
    return ranks.wrap_network(forward, run.device)


def choose_threads(run: Run, network: nn.Module) -> None:
    """Compute with the number of threads that is fastest now, where a CPU computes."""
    if run.device.type == "cpu" and not run.config.deterministic:
        shape = (min(run.config.batch_size, 4), network.in_channels, run.config.size, run.config.size)
        batch = probe.Batch(shape, run.device, run.dtype)
        cpu_threads.choose_threads(lambda: probe.try_step(network, network, batch))


def draw_first_batch(run: Run, loader: DataLoader) -> None:
    """Draw the first training batch, as the network sees it, into batch.png."""
    keys = itertools.islice(loader.sampler, run.config.batch_size)
    slabs, targets = zip(*(loader.dataset[key] for key in keys), strict=True)
    batch = (torch.stack(slabs), torch.stack(targets), run.config.context, run.title)
    path = run.folder / "batch.png"
    plots.try_to_draw(path, lambda: overlays.plot_batch(path, *batch))


def log_start(
    run: Run, chosen: selection.Selection, network: nn.Module, loader: DataLoader, phantoms: int
) -> None:
    """Log what is trained on what."""
    counts = " / ".join(str(len(chosen.split[name])) for name in SPLIT_PARTS)
    number_format = str(run.dtype or torch.float32).removeprefix("torch.")
    log.info(
        f"{run.title}; {len(chosen.cases)} cases, split {counts} by patient, {len(loader.dataset)} training "
        f"slices, {cost.count_parameters(network) / 1e6:.2f} M parameters, {run.device.type}, "
        f"{number_format}" + (f", {ranks.world_size()} ranks" if ranks.world_size() > 1 else "")
    )
    if phantoms:
        log.info(
            "among these slices are those of %d phantoms, synthetic heads, drawn %.0f %% of the time",
            phantoms,
            100 * run.config.phantom_share,
        )
