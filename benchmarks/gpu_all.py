"""Everything that needs a card, in one command of a few minutes.

    python -m benchmarks.gpu_all

The card's own bf16 matrix product, step time and TFLOP/s against it, peak memory in float32, mixed precision
and with checkpointing, the comparison with MONAI, and the time of a whole case with TTA.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import memory, train_step
from benchmarks.common import print_table, time_pairs, write_result
from inference_v2 import TrainedModel, predict_volume
from model_drunet_v2 import WIDTHS, DRUNetV2, prepare_network
from runtime.command import run_command
from runtime.cost import count_flops
from runtime.errors import InputError
from runtime.machine import amp_dtype

CASE = (1, 155, 240, 240)  # C, D, H, W of a BraTS case


@dataclass(frozen=True)
class GpuConfig:
    """Settings of the measurement."""

    widths: tuple[int, ...] = WIDTHS
    """filters per level"""
    batch_size: int = 16
    """slabs a step"""
    repeats: int = 5
    """rounds of timings"""
    compile: bool = False
    """our network compiled as well; takes some minutes more"""
    seed: int = 0
    """seed of weights and slabs"""


def measure_matmul_tflops(device: torch.device, side: int = 8192) -> float:
    """Return the TFLOP/s of a bf16 (fp16 on older cards) product of two side x side matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=amp_dtype(device, True)) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            a @ b
        torch.cuda.synchronize(device)

    return 10 * 2 * side**3 / float(np.median(time_pairs({"product": multiply})["product"])) / 1e12


def measure_case_s(config: GpuConfig, device: torch.device) -> float:
    """Return the seconds of a BraTS-size case with TTA, no slice empty; the median of three."""
    dtype = amp_dtype(device, True)
    network = prepare_network(DRUNetV2(widths=config.widths), device, dtype)
    model = TrainedModel(network, ("flair",), ("WT",), 1, 256, (0.5,), device, dtype, checkpoint={})
    volume = np.random.default_rng(config.seed).normal(size=CASE).astype(np.float16)

    def predict() -> None:
        predict_volume(model, volume, batch_size=config.batch_size)

    return float(np.median(time_pairs({"case": predict}, 3)["case"]))


def measure(config: GpuConfig) -> dict[str, Any]:
    """Return all figures of the card."""
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    product = measure_matmul_tflops(device)
    steps = train_step.measure(
        train_step.StepConfig(
            widths=config.widths,
            batch_size=config.batch_size,
            steps=5,
            repeats=config.repeats,
            compile=config.compile,
            device="cuda",
            seed=config.seed,
        )
    )
    gflop = count_flops(DRUNetV2(widths=config.widths), (1, 3, 256, 256)) / 1e9
    for row in steps["rows"]:
        if row["network"] in ("DRUNet V2", "DRUNet V2, compiled"):
            passes = 3 if row["work"] == "training" else 1  # the backward pass counts as two forward passes
            row["TFLOP/s"] = row["slabs/s"] * passes * gflop / 1e3
            row["of matrix product"] = row["TFLOP/s"] / product
    peaks = memory.measure(
        memory.MemoryConfig(widths=config.widths, batch_size=config.batch_size, device="cuda")
    )
    return {
        "matrix_product_tflops": product,
        "gflop_per_slab": gflop,
        "steps": steps,
        "memory": peaks,
        "case_tta_s": measure_case_s(config, device),
    }


def main(config: GpuConfig) -> None:
    """Print and write everything, or say that there is no card."""
    if not torch.cuda.is_available():
        raise InputError(
            "--device cuda", "there is no CUDA card that torch can use here", "run this on a machine with one"
        )
    started = time.perf_counter()
    content = measure(config)
    print(f"matrix product {content['matrix_product_tflops']:.0f} TFLOP/s, bf16")
    print_table(content["steps"]["rows"])
    print_table(content["memory"])
    print(f"a case of {CASE[1:]} with TTA: {content['case_tta_s']:.2f} s")
    content["minutes"] = round((time.perf_counter() - started) / 60, 1)
    print(f"{content['minutes']} minutes, written: {write_result('gpu_all', content)}")


if __name__ == "__main__":
    run_command(main, GpuConfig, "Measure on a card all that needs one.")
