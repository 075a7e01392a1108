"""What malloc costs a training step on a CPU: freed memory given back to the system, or kept, in huge pages.

    python -m benchmarks.allocation                                        narrow network, 16 slabs
    python -m benchmarks.allocation --widths 64 128 256 512 1024 --batch-size 4

Each round starts three processes, one without `runtime.machine.keep_freed_memory` and two with it, of which
one is refused huge pages: such options hold for a process. Where the system has none, the two are the same.
"""

import ctypes
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from benchmarks.common import print_table, write_result
from benchmarks.train_step import make_predictor, make_trainer
from model_drunet_v2 import DRUNetV2
from runtime.command import parse
from runtime.machine import amp_dtype, keep_freed_memory, set_seed

Way = Literal["given back", "kept", "kept in huge pages"]
WAYS: tuple[Way, ...] = get_args(Way)
PR_SET_THP_DISABLE = 41  # Linux, prctl.h: no huge pages for this process


@dataclass(frozen=True)
class AllocationConfig:
    """Settings of the measurement."""

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """filters per level"""
    size: int = 256
    """height and width of a slab"""
    batch_size: int = 16
    """slabs a step"""
    steps: int = 5
    """steps timed in each process, after two that are not"""
    repeats: int = 5
    """rounds"""
    way: Way | None = None
    """measure once in this process, what is freed treated so; used inside"""


def measure_here(config: AllocationConfig) -> dict[str, float]:
    """Return slabs/s of training and of a forward pass, page faults a training step and peak memory."""
    if config.way != "given back":
        keep_freed_memory()
    if config.way == "kept":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    set_seed(0)
    dtype = amp_dtype(torch.device("cpu"), True)
    network = DRUNetV2(widths=config.widths).to(memory_format=torch.channels_last)
    slab = torch.randn(config.batch_size, 3, config.size, config.size).to(memory_format=torch.channels_last)
    target = (torch.rand(config.batch_size, 1, config.size, config.size) > 0.95).float()
    figures = {}
    for name, make in (
        ("training", lambda: make_trainer(network, slab, target, dtype, 1)),
        ("inference", lambda: make_predictor(network, slab, dtype, 1)),
    ):
        step, seconds = make(), []
        step(), step()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(config.steps):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        figures[f"{name} slabs/s"] = config.batch_size / float(np.median(seconds))
        figures[f"{name} faults a step"] = faults / config.steps
    return figures | {"peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def measure_in_child(way: Way) -> dict[str, float]:
    """Return what `measure_here` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.allocation", *sys.argv[1:], "--way", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(config: AllocationConfig) -> list[dict[str, Any]]:
    """Return a row per way: medians of the figures, and the ratios of speed, median and extremes."""
    rounds = [{way: measure_in_child(way) for way in WAYS} for _ in range(config.repeats)]
    rows = []
    for name in WAYS:
        figures = [each[name] for each in rounds]
        row: dict[str, Any] = {"freed memory": name}
        row |= {key: float(np.median([each[key] for each in figures])) for key in figures[0]}
        for work in ("training", "inference"):
            ratios = [
                each[name][f"{work} slabs/s"] / each["given back"][f"{work} slabs/s"] for each in rounds
            ]
            row |= {f"{work} times": float(np.median(ratios))}
            row |= {f"{work} least": min(ratios), f"{work} most": max(ratios)}
        rows.append(row)
    return rows


def main(config: AllocationConfig) -> None:
    """Print and write the comparison, or this process's figures."""
    if config.way is not None:
        print(json.dumps(measure_here(config)))
        return
    rows = compare(config)
    print_table(rows)
    settings = {"widths": list(config.widths), "size": config.size, "batch": config.batch_size}
    print(f"written: {write_result('allocation', settings | {'rounds': config.repeats, 'rows': rows})}")


if __name__ == "__main__":
    # not by run_command, which keeps freed memory
    main(parse(AllocationConfig, "Measure what malloc costs a training step on a CPU."))
