"""Time of a whole case, slices to probabilities with TTA: ours beside MONAI's and nnU-Net's inferers.

    python -m benchmarks.inference

One synthetic case of 240 x 240 x 155, the same weights, the same number format and the same three views for
all, each method's views averaged as probabilities. MONAI and nnU-Net get their input ready made, padded and
with the neighbouring slices as channels; ours makes it within its time. Then each change that made ours
faster, before and after, and the command on several files. The weights are random: time does not depend on
them, agreement is checked on them.

nnU-Net's mirroring has no set of just our three views (two axes make four), so its sliding window runs once a
view, unmirrored, on the flipped case: as many forward passes as ours. What a sliding window costs beside the
passes is then paid three times; `--no-tta` compares one view, where it is not. `ms_a_pass` is the time per
slice and view. Entered at `predict_sliding_window_return_logits`, after preprocessing and before export, with
its default step and Gaussian: one tile a slice, one slice a pass, logits added up in float16. It gets the
slices with brain alone, as its preprocessing cuts the others off.

In these rows all have our number format. On a CPU that is bfloat16, which neither MONAI nor nnU-Net takes by
itself: both are measured in float32 as well, the way they come.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from audit.inputs import read_case
from audit.postprocess import threshold_regions
from benchmarks.common import print_table, time_pairs, write_result
from cohort.layouts import CaseSource, find_cases
from cohort.phantom import make_phantom, write_cohort
from cohort.preprocess import (
    BRAIN_SLICE_VOXELS,
    Placement,
    fit_slices,
    gather_slab,
    normalise_volume,
    place_slices,
    unfit_slices,
)
from inference_v2 import (
    VIEWS,
    InferenceConfig,
    TrainedModel,
    compile_model,
    predict_views,
    predict_volume,
    segment_cases,
    write_case,
)
from model_drunet_v2 import WIDTHS, DRUNetV2, fold_batch_norm, prepare_network
from runtime.command import run_command
from runtime.errors import InputError
from runtime.machine import amp_dtype, choose_device

FULL_SHAPE = (155, 240, 240)
OURS, COMPILED = "ours", "ours, compiled"
MONAI = "MONAI SliceInferer"
MONAI_BRAIN = "MONAI SliceInferer, brain slices"
NNUNET_BRAIN = "nnU-Net 2D predictor, brain slices"
MONAI_FLOAT32 = "MONAI SliceInferer, float32"
NNUNET_FLOAT32 = "nnU-Net 2D predictor, brain slices, float32"
METHODS = (OURS, MONAI, MONAI_BRAIN, NNUNET_BRAIN)
AS_THEY_COME = (MONAI_FLOAT32, NNUNET_FLOAT32)  # where we do not compute in float32, on a CPU
NARROW_WIDTHS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of the measurement."""

    widths: tuple[int, ...] | None = None
    """filters per level; default: the full network on CUDA, 16-32-64-128-256 elsewhere"""
    shape: tuple[int, ...] = FULL_SHAPE
    """voxels of the case along D H W"""
    size: int = 256
    """height and width of the network's input"""
    repeats: int = 5
    """rounds after the warm-up, all methods in each"""
    tta: bool = True
    """three views in the comparison of methods; without, the case as it is"""
    change_slices: int = 32
    """slices in the middle of the case on which the changes are measured"""
    compile: bool = False
    """compare our network compiled, too; half a minute to some minutes more"""
    cases: int = 3
    """files for the command; 0 leaves it out"""
    batch_size: int = 16
    """slabs a forward pass"""
    memory_of: str | None = None
    """run this method alone once and print the peak memory; used inside"""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """where to compute"""


# ------------------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------------------


def build_model(config: BenchmarkConfig) -> tuple[TrainedModel, nn.Module]:
    """Return our model, ready, and the same network as it was trained, both on the device."""
    device = choose_device(config.device)
    dtype = amp_dtype(device, True)
    torch.manual_seed(0)
    widths = config.widths or (WIDTHS if device.type == "cuda" else NARROW_WIDTHS)
    network = DRUNetV2(widths=widths).eval()
    with torch.no_grad():
        network.head.weight.mul_(30)  # probabilities all over 0..1, so that agreement means something
    model = TrainedModel(
        network=prepare_network(network, device, dtype),
        modalities=("flair",),
        regions=("WT",),
        context=1,
        size=config.size,
        thresholds=(0.5,),
        device=device,
        dtype=dtype,
        checkpoint={},
    )
    return model, network.to(device, memory_format=torch.channels_last)


class Mixed(nn.Module):
    """A network that brings its own autocast, so that every method computes in one number format."""

    def __init__(self, network: nn.Module, model: TrainedModel) -> None:
        super().__init__()
        self.network = network
        self.model = model

    def forward(self, slabs: Tensor) -> Tensor:
        """Return the logits in float32."""
        dtype = self.model.dtype
        with torch.autocast(self.model.device.type, dtype, enabled=dtype is not None):
            return self.network(slabs).float()


def make_slabs(model: TrainedModel, volume: np.ndarray) -> Tensor:
    """Return the padded slabs of a volume (1, D, H, W) as one "volume" with channels, (3, D, S, S)."""
    fitted = fit_slices(volume, place_slices(*volume.shape[2:], model.size))
    return torch.from_numpy(np.stack([gather_slab(fitted, z, 1) for z in range(fitted.shape[1])], axis=1))


@torch.inference_mode()
def predict_each_view(
    predict: Callable[[Tensor], Tensor], slabs: Tensor, views: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """Return probabilities (R, D, S, S) of slabs (C*K, D, S, S), the mean over views.

    `predict` gives the logits of flipped slabs. It is called once for each view, each a tuple of axes.
    """
    of_views = [torch.sigmoid(predict(slabs.flip(axes)).float()).flip(axes) for axes in views]
    return torch.stack(of_views).mean(0).cpu().numpy()


def make_monai(network: nn.Module, model: TrainedModel, batch_size: int) -> Callable[[Tensor], Tensor] | None:
    """Return MONAI's SliceInferer as a function from slabs (C*K, D, S, S) to logits (R, D, S, S), or None."""
    try:
        from monai.inferers import SliceInferer
    except ImportError:
        return None
    inferer = SliceInferer(roi_size=(model.size, model.size), sw_batch_size=batch_size, spatial_dim=0)
    return lambda slabs: inferer(slabs.to(model.device)[None], network)[0]


def make_nnunet(network: nn.Module, model: TrainedModel) -> Callable[[Tensor], Tensor] | None:
    """Return nnU-Net's 2D predictor as a function from slabs (C*K, D, S, S) to logits (R, D, S, S), or None.

    None also where a package that nnU-Net itself needs is missing.
    """
    try:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    except ImportError:
        return None
    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=model.device.type == "cuda",
        device=model.device,
        allow_tqdm=False,
    )
    predictor.network = network
    # of its plans, the sliding window asks for these two alone
    predictor.configuration_manager = SimpleNamespace(patch_size=(model.size, model.size))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=len(model.regions))
    return predictor.predict_sliding_window_return_logits


def make_methods(config: BenchmarkConfig, names: Sequence[str]) -> dict[str, Callable[[], np.ndarray] | None]:
    """Return the methods named, each a function of nothing, on one case; None where not installed.

    Packages are imported for the methods named alone: they weigh in the memory of a process.
    """
    model, plain = build_model(config)
    network = Mixed(plain, model)
    volume, brain_voxels = load_phantom(config)
    batch = config.batch_size
    views = tuple(VIEWS.values()) if config.tta else ((),)
    with_brain = np.flatnonzero(brain_voxels >= BRAIN_SLICE_VOXELS)
    brain = slice(with_brain[0], with_brain[-1] + 1)

    @functools.cache  # made in the warm-up, and only where a method asks for it
    def slabs() -> Tensor:
        return make_slabs(model, volume)

    def on_slices(predict: Callable[[Tensor], Tensor] | None, part: slice) -> Callable[[], np.ndarray] | None:
        return predict and (lambda: predict_each_view(predict, slabs()[:, part], views))

    def predict_by(model: TrainedModel) -> Callable[[], np.ndarray]:
        return lambda: predict_volume(model, volume, brain_voxels, config.tta, batch)

    makers: dict[str, Callable[[], Callable[[], np.ndarray] | None]] = {
        OURS: lambda: predict_by(model),
        COMPILED: lambda: predict_by(compile_model(model, batch, config.tta)),
        MONAI: lambda: on_slices(make_monai(network, model, batch), slice(None)),
        MONAI_BRAIN: lambda: on_slices(make_monai(network, model, batch), brain),
        NNUNET_BRAIN: lambda: on_slices(make_nnunet(network, model), brain),
        MONAI_FLOAT32: lambda: on_slices(make_monai(plain, model, batch), slice(None)),
        NNUNET_FLOAT32: lambda: on_slices(make_nnunet(plain, model), brain),
    }
    return {name: makers[name]() for name in names}


def load_phantom(config: BenchmarkConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return a normalised phantom (1, D, H, W) that fills BraTS's field of view, and its brain voxels."""
    spacing_mm = tuple(full / asked for full, asked in zip(FULL_SHAPE, config.shape, strict=True))
    flair = make_phantom(0, config.shape, spacing_mm).modalities["flair"]
    volume, brain = normalise_volume(flair[None].astype(np.float32))
    return volume, brain.sum((1, 2))


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def measure_memory(name: str) -> float:
    """Return the peak resident memory in GiB of a process of its own that runs one method once.

    NaN where the method is not installed. Called while this process is small: a child starts with its
    parent's peak.
    """
    command = [sys.executable, "-m", "benchmarks.inference", *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def own_peak_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def compare(functions: dict[str, Callable[[], Any]], reference: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row per function: median seconds, their range, and the median of its ratio to `reference`."""
    seconds = time_pairs(functions, repeats)
    rows = []
    for name, values in seconds.items():
        ratios = np.divide(values, seconds[reference])
        row = {"what": name, "seconds": float(np.median(values))}
        row |= {"min": min(values), "max": max(values), f"times {reference}": float(np.median(ratios))}
        rows.append(row | {"ratio_min": float(ratios.min()), "ratio_max": float(ratios.max())})
    return rows


def judge_output(name: str, found: np.ndarray, ours: np.ndarray, placement: Placement) -> dict[str, Any]:
    """Return how many slices a method ran and its largest difference from ours (R, D, H, W) where ours ran.

    Other methods' probabilities are padded to (R, D, S, S), or (R, slices with brain, S, S).
    """
    run = np.flatnonzero(ours.any((0, 2, 3)))
    if name == OURS:
        return {"slices_run": len(run)}
    if name == COMPILED:
        return {"slices_run": len(run), "largest_difference": float(np.abs(found - ours).max())}
    brain = slice(run[0], run[-1] + 1)
    part = found[:, brain] if found.shape[1] == ours.shape[1] else found
    difference = np.abs(unfit_slices(part, placement) - ours[:, brain])
    return {"slices_run": found.shape[1], "largest_difference": float(difference.max())}


def compare_methods(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Return the rows of the whole-case comparison, with peak memory and agreement with ours."""
    names = (*METHODS, COMPILED) if config.compile else METHODS
    device = choose_device(config.device)
    if device.type == "cpu" and amp_dtype(device, True):
        names = (*names, *AS_THEY_COME)
    memory = {name: measure_memory(name) for name in names}
    methods = make_methods(config, names)
    installed = {name: method for name, method in methods.items() if method}
    ours = installed[OURS]()
    placement = place_slices(*config.shape[1:], config.size)
    rows = compare(installed, OURS, config.repeats)
    for row in rows:
        row |= judge_output(row["what"], installed[row["what"]](), ours, placement)
        row["ms_a_pass"] = 1000 * row["seconds"] / row["slices_run"] / (len(VIEWS) if config.tta else 1)
        row["peak_gib"] = memory[row["what"]]
    missing = [{"what": name, "note": "not installed"} for name, method in methods.items() if not method]
    return rows + missing


def compare_changes(config: BenchmarkConfig) -> list[list[dict[str, Any]]]:
    """Return a pair of rows, before and after, for each change to the way a case is computed."""
    model, plain = build_model(config)
    volume, brain_voxels = load_phantom(config)
    first = max(0, (len(brain_voxels) - config.change_slices) // 2)
    part = volume[:, first : first + config.change_slices]
    folded = fold_batch_norm(plain).to(memory_format=torch.channels_last)
    of = {
        "batch norm apart": dataclasses.replace(model, network=plain),
        "batch norm folded": dataclasses.replace(model, network=folded),
        "weights kept in bfloat16": model,
    }
    batch = config.batch_size

    def predict(name: str, tta: bool = False) -> Callable[[], np.ndarray]:
        return lambda: predict_volume(of[name], part, None, tta, batch)

    def view_by_view() -> np.ndarray:
        return np.mean([predict_views(model, part, None, (view,), batch)[0] for view in VIEWS], axis=0)

    pairs: list[dict[str, Callable[[], Any]]] = [
        {name: predict(name) for name in ("batch norm apart", "batch norm folded")},
        {name: predict(name) for name in ("batch norm folded", "weights kept in bfloat16")},
        {"view by view": view_by_view, "all views in one pass": predict("weights kept in bfloat16", True)},
        {
            "all slices": lambda: predict_volume(model, volume, None, False, batch),
            "slices with brain": lambda: predict_volume(model, volume, brain_voxels, False, batch),
        },
    ]
    if model.dtype is None:
        del pairs[1]
    return [compare(pair, next(iter(pair)), config.repeats) for pair in pairs]


def compare_command(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Return the rows of the command on several files: one thing after another, and side by side."""
    model, _ = build_model(config)
    with tempfile.TemporaryDirectory() as folder:
        spacing_mm = tuple(full / asked for full, asked in zip(FULL_SHAPE, config.shape, strict=True))
        write_cohort(Path(folder) / "cases", config.cases, 0, config.shape, spacing_mm, "internal")
        cases = find_cases(CaseSource(Path(folder) / "cases"), model.modalities)
        settings = InferenceConfig(output=f"{folder}/masks", tta=False, batch_size=config.batch_size)

        def one_after_another() -> None:
            for case in cases:
                read = read_case(case, model.modalities)
                probabilities = predict_volume(
                    model, read.volume, read.brain_voxels, False, config.batch_size, read.frame
                )
                masks = threshold_regions(probabilities, model.thresholds, model.regions)
                write_case(read, masks, model.regions, Path(settings.output))

        functions = {
            "one after another": one_after_another,
            "read, compute, write at once": lambda: list(segment_cases(settings, model, cases)),
        }
        return compare(functions, "one after another", config.repeats)


def compared_versions() -> dict[str, str]:
    """Return the versions of the packages compared with, those that are there."""
    found = [name for name in ("monai", "nnunetv2") if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in found}


def main(config: BenchmarkConfig) -> None:
    """Measure, print the tables and write the JSON."""
    if config.memory_of is not None:
        known = (*METHODS, COMPILED, *AS_THEY_COME)
        if config.memory_of not in known:
            raise InputError(f"--memory-of {config.memory_of}", f"not one of {', '.join(known)}")
        method = make_methods(config, (config.memory_of,))[config.memory_of]
        if method:
            method()
        print(own_peak_gib() if method else float("nan"))
        return
    whole = compare_methods(config)
    print_table(whole)
    changes = compare_changes(config)
    for pair in changes:
        print_table(pair)
    command = compare_command(config) if config.cases else []
    if command:
        print_table(command)
    content = {
        "settings": dataclasses.asdict(config),
        "compared_with": compared_versions(),
        "case": whole,
        "changes": changes,
        "command_rows": command,
    }
    print(write_result("inference", content))


if __name__ == "__main__":
    run_command(main, BenchmarkConfig, "Time a whole case against MONAI's and nnU-Net's inferers.")
