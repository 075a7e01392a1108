"""What a training step keeps in memory: saved activations exactly, and on a card the peak.

    python -m benchmarks.memory

Saved activations hold on any machine; they are counted by saved-tensor hooks on small steps and are exact.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.common import print_table, write_result
from model_drunet_v2 import WIDTHS, DRUNetV2
from runtime.command import run_command
from runtime.cost import count_parameters, estimate_activation_bytes
from runtime.machine import amp_dtype, choose_device
from runtime.probe import Batch, try_step

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of the measurement."""

    widths: tuple[int, ...] = WIDTHS
    """filters per level"""
    size: int = 256
    """height and width of a slab"""
    batch_size: int = 16
    """slabs a step"""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """where to compute"""


def measure_peak_gib(network: DRUNetV2, batch: Batch) -> float | str:
    """Return the peak of a step in GiB, weights, gradients and optimiser included; a word without a card."""
    if batch.device.type != "cuda":
        return NOT_MEASURED
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(batch.device)
    try:
        try_step(network, network, batch)
    except torch.cuda.OutOfMemoryError:
        return "does not fit"
    return torch.cuda.max_memory_allocated(batch.device) / 2**30


def measure(config: MemoryConfig) -> list[dict[str, Any]]:
    """Return a row each for float32, mixed precision and mixed precision with checkpointing."""
    device = choose_device(config.device)
    shape = (config.batch_size, 3, config.size, config.size)
    network = DRUNetV2(widths=config.widths)
    side = 2 * network.multiple
    amp = amp_dtype(device, True) if device.type == "cuda" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for name, dtype, network.checkpointing in (
        ("float32", None, False),
        ("mixed precision", amp, False),
        ("mixed precision, checkpointing", amp, True),
    ):
        network.to("cpu")
        count_as = torch.bfloat16 if dtype else None
        kept = estimate_activation_bytes(network, shape, count_as, side) / 2**30
        level = estimate_activation_bytes(network.encoder[0], shape, count_as, side) / 2**30
        weights = 16 * count_parameters(network) / 2**30  # float32: weight, gradient, two moments
        row = {"step": name, "saved GiB": kept, "recomputed GiB": level if network.checkpointing else 0.0}
        row |= {"weights GiB": weights, "sum GiB": sum(row[key] for key in list(row)[1:]) + weights}
        network.to(device, memory_format=torch.channels_last)
        rows.append(row | {"peak GiB": measure_peak_gib(network, Batch(shape, device, dtype))})
    for row in rows:
        row["saved, of float32"] = row["saved GiB"] / rows[0]["saved GiB"]
    return rows


def main(config: MemoryConfig) -> None:
    """Print and write the memory of a step."""
    rows = measure(config)
    print_table(rows)
    content = {"widths": list(config.widths), "size": config.size, "batch": config.batch_size, "rows": rows}
    print(f"written: {write_result('memory', content)}")


if __name__ == "__main__":
    run_command(main, MemoryConfig, "Measure what a training step keeps in memory.")
