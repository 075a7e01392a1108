"""Slabs a second in training and inference, against MONAI's AttentionUnet in the same loop.

    python -m benchmarks.train_step                              full widths
    python -m benchmarks.train_step --widths 4 8 16 --size 64    seconds, to see that it runs

Slabs lie in memory already: this is the network's speed alone. Ratios are taken round by round. In inference
our network is what inference_v2.py runs, batch norm folded; as trained it stands beside it.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.common import print_table, time_pairs, write_result
from model_drunet_v2 import WIDTHS, DRUNetV2, prepare_network
from runtime.command import run_command
from runtime.errors import InputError
from runtime.machine import amp_dtype, choose_device, set_seed
from runtime.probe import Batch, compile_network, try_pass
from utils_v2 import HybridFocalDiceLoss

OURS, MONAI = "DRUNet V2", "MONAI AttentionUnet"


@dataclass(frozen=True)
class StepConfig:
    """Settings of the comparison."""

    widths: tuple[int, ...] = WIDTHS
    """filters per level of both networks"""
    size: int = 256
    """height and width of a slab"""
    batch_size: int | None = None
    """slabs a step; default: 16 on CUDA, 4 elsewhere"""
    steps: int = 2
    """steps a timing"""
    repeats: int = 5
    """rounds of timings"""
    amp: bool = True
    """mixed precision where the device has it"""
    compile: bool = False
    """both networks compiled as well, where that works; takes minutes"""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """where to compute"""
    seed: int = 0
    """seed of weights and slabs"""


def make_networks(widths: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
    """Return our network, the same with checkpointing, and MONAI's, channels last."""
    try:
        from monai.networks.nets import AttentionUnet
    except ImportError as error:
        raise InputError(
            "monai", "is needed to compare with", "pip install -r requirements-dev.txt"
        ) from error
    networks = {OURS: DRUNetV2(widths=widths), f"{OURS}, checkpointing": DRUNetV2(widths=widths)}
    networks[f"{OURS}, checkpointing"].checkpointing = True
    networks[MONAI] = AttentionUnet(2, 3, 1, widths, (2,) * (len(widths) - 1))
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in networks.items()}


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_trainer(
    forward: nn.Module, slab: torch.Tensor, target: torch.Tensor, dtype: torch.dtype | None, steps: int
) -> Callable[[], None]:
    """Return a function that runs training steps as train_drunet_v2.py does."""
    weights = list(forward.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=slab.device.type != "mps")
    loss_function = HybridFocalDiceLoss()

    def train() -> None:
        forward.train()
        for _ in range(steps):
            with torch.autocast(slab.device.type, dtype, enabled=dtype is not None):
                logits = forward(slab)
            loss_function(logits, target).backward()
            nn.utils.clip_grad_norm_(weights, 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait_for(slab.device)

    return train


def make_predictor(
    forward: nn.Module, slab: torch.Tensor, dtype: torch.dtype | None, steps: int
) -> Callable[[], None]:
    """Return a function that runs forward passes as inference_v2.py does."""

    @torch.inference_mode()
    def predict() -> None:
        forward.eval()
        for _ in range(steps):
            with torch.autocast(slab.device.type, dtype, enabled=dtype is not None):
                forward(slab)
        wait_for(slab.device)

    return predict


def compare(
    functions: dict[str, Callable[[], None]], work: str, slabs: int, repeats: int
) -> list[dict[str, Any]]:
    """Return a row per function: median slabs a second, and its ratio to MONAI's, median and extremes."""
    seconds = {name: np.array(times) for name, times in time_pairs(functions, repeats).items()}
    rows = []
    for name, times in seconds.items():
        ratios = seconds[MONAI] / times
        row = {"work": work, "network": name, "slabs/s": slabs / float(np.median(times))}
        row |= {"times MONAI": float(np.median(ratios))}
        rows.append(row | {"lowest": float(ratios.min()), "highest": float(ratios.max())})
    return rows


def measure(config: StepConfig) -> dict[str, Any]:
    """Return the rows of training and of inference, with batch and precision."""
    set_seed(config.seed)
    device = choose_device(config.device)
    dtype = amp_dtype(device, config.amp)
    batch = config.batch_size or (16 if device.type == "cuda" else 4)
    slab = torch.randn(batch, 3, config.size, config.size, device=device)
    slab = slab.to(memory_format=torch.channels_last)
    target = (torch.rand(batch, 1, config.size, config.size, device=device) > 0.95).float()
    networks = make_networks(config.widths, device)
    trainers = {name: make_trainer(net, slab, target, dtype, config.steps) for name, net in networks.items()}
    if config.compile:
        for name in (OURS, MONAI):
            forward = torch.compile(copy.deepcopy(networks[name]))
            trainers[f"{name}, compiled"] = make_trainer(forward, slab, target, dtype, config.steps)
    rows = compare(trainers, "training", batch * config.steps, config.repeats)
    ready = {
        OURS: prepare_network(networks[OURS], device, dtype),
        f"{OURS}, not folded": networks[OURS],
        MONAI: networks[MONAI],
    }
    if config.compile:
        for name in (OURS, MONAI):
            network = copy.deepcopy(ready[name]).eval()
            first_pass = functools.partial(try_pass, batch=Batch(tuple(slab.shape), device, dtype))
            forward = compile_network(network, first_pass, freeze=True)
            if forward is not network:  # else it could not be compiled
                ready[f"{name}, compiled"] = forward
    predictors = {name: make_predictor(net, slab, dtype, config.steps) for name, net in ready.items()}
    rows += compare(predictors, "inference", batch * config.steps, config.repeats)
    precision = str(dtype or torch.float32).removeprefix("torch.")
    return {"widths": list(config.widths), "size": config.size, "batch": batch, "type": precision} | {
        "rounds": config.repeats, "rows": rows
    }  # fmt: skip


def main(config: StepConfig) -> None:
    """Print and write the comparison."""
    content = measure(config)
    print_table(content["rows"])
    print(f"written: {write_result('train_step', content)}")


if __name__ == "__main__":
    run_command(main, StepConfig, "Compare slabs a second with MONAI's AttentionUnet.")
