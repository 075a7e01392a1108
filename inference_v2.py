"""From a trained network and a volume to probabilities and masks; as a command, segment new cases.

    python inference_v2.py --checkpoint results/RUN/best.pt --input CASE_FOLDER [MORE ...]
    torchrun --nproc-per-node 2 -- inference_v2.py --input COHORT_FOLDER    the same, cases shared by ranks

Writes one NIfTI mask per case (labels as in the case's layout, its affine and header; PNG masks for PNG
cases), an overlay picture per case, and `volumes.csv`. While one case is computed, a thread reads the next
and another writes the last. Masks are for research, not for clinical use.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from audit.masks import postprocess, settings_of, threshold_regions
from audit.overlays import plot_overlay
from cohort.cases import Case, load_case, log_warnings, save_labels
from cohort.labels import labels_from_regions
from cohort.layouts import (
    CaseSource,
    Channel,
    LayoutName,
    cases_of_files,
    find_cases,
    find_cases_of_run,
    log_cases,
)
from cohort.preprocess import (
    BRAIN_SLICE_VOXELS,
    Frame,
    Placement,
    find_doubts,
    find_head_box,
    find_unlike_spacing,
    fit_slices,
    gather_slab,
    normalise_volume,
    pixel_mm,
    place_case,
    unfit_slices,
)
from cohort.split import cases_of_split, read_split
from model_drunet_v2 import build_network, prepare_network
from runtime import cpu_threads
from runtime.checkpoints import load_checkpoint, load_weights, newest_run
from runtime.command import Count, Share, run_command
from runtime.errors import InputError
from runtime.files import write_atomically
from runtime.log import log, progress
from runtime.machine import DeviceName, amp_dtype, choose_device
from runtime.probe import Batch, compile_network, try_pass
from runtime.ranks import (
    end_together,
    from_main,
    gather_shares,
    is_main,
    join_ranks,
    local_device,
    share_of,
)
from runtime.threads import read_ahead, write_behind

# Test-time augmentation: the axes of (..., H, W) each view flips. A flip is its own inverse.
VIEWS: dict[str, tuple[int, ...]] = {"identity": (), "horizontal": (-1,), "vertical": (-2,)}
UNKNOWN_FRAME = Frame()


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of the segmentation command."""

    input: tuple[str, ...] = ()
    """case folders, cohort folders or NIfTI files; default: the run's test cases"""
    layout: LayoutName = "auto"
    """how files are named and placed; auto detects it by what is there"""
    slice_channel: Channel = 1
    """channel of RGB slices that holds FLAIR: 0, 1 or 2"""
    checkpoint: str | None = None
    """best.pt of a run, or an ONNX file of export_v2.py; default: the newest run in results/"""
    output: str = "predictions"
    """folder to write to"""
    tta: bool = True
    """average identity, horizontal and vertical flip"""
    threshold: Share | None = None
    """probability from which a voxel is tumour; default: the checkpoint's"""
    postprocess: bool = True
    """clean the masks as chosen on validation, where the checkpoint says how"""
    batch_size: Count = 16
    """slabs per forward pass"""
    device: DeviceName = "auto"
    """where to compute"""
    amp: bool = True
    """mixed precision where the device has it"""
    compile: bool = False
    """compile the network first, half a minute or more: for many cases; where that fails, go on without"""


# ------------------------------------------------------------------------------------------------------------
# A trained network
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedModel:
    """A network in evaluation mode with all that is needed to use it on a case."""

    network: nn.Module
    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    context: int
    size: int
    thresholds: tuple[float, ...]  # per region, chosen on validation
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None is float32
    checkpoint: dict[str, Any]  # as read, weights included

    def place(self, shape: Sequence[int], frame: Frame) -> Placement:
        """Return how slices of (H, W) of a case lie in the network's input."""
        return place_case(shape, self.size, frame, self.checkpoint.get("spacing_mm"))

    def find_doubts(self, shape: Sequence[int], frame: Frame) -> list[str]:
        """Return in what a case's spacing is unlike training's, and what is done about it."""
        trained = self.checkpoint.get("spacing_mm")
        if not trained or not frame.spacing_mm:
            return []
        doubts = []
        usual = place_case(shape, self.size, frame)
        placement = self.place(shape, frame)
        if placement != usual:
            before, after = (pixel_mm(frame.spacing_mm, each) for each in (usual, placement))
            doubts.append(
                f"pixels of {before[0]:.3g} x {before[1]:.3g} mm where training had "
                f"{_range(trained['in_plane'])}: resampled to {after[0]:.3g} x {after[1]:.3g} mm"
            )
        if find_unlike_spacing(frame.spacing_mm[0], trained["slices"]) is not None:
            doubts.append(
                f"slices {frame.spacing_mm[0]:.3g} mm apart where training had {_range(trained['slices'])}: "
                "not resampled, expect worse masks"
            )
        return doubts


def _range(spacing: dict[str, float]) -> str:
    low, high = (f"{spacing[end]:.3g}" for end in ("low", "high"))
    return f"{low} mm" if low == high else f"{low} to {high} mm"


def load_model(path: str | Path, device: torch.device, amp: bool = True) -> TrainedModel:
    """Read a checkpoint or an ONNX file into a network on `device`, ready to predict (`prepare_network`).

    A file that ends in .onnx is run by onnxruntime, in float32. Raises InputError where the file cannot be
    used or its weights do not fit its settings.
    """
    is_onnx = Path(path).suffix == ".onnx"
    if is_onnx:
        network, checkpoint = load_onnx(path, device)
        dtype = None
    else:
        network, checkpoint = load_checkpoint_network(path)
        dtype = amp_dtype(device, amp)
        network = prepare_network(network, device, dtype)
    config = checkpoint["config"]
    return TrainedModel(
        network=network,
        modalities=tuple(config["modalities"]),
        regions=tuple(config["regions"]),
        context=config["context"],
        size=config["size"],
        thresholds=tuple(checkpoint["thresholds"]),
        device=torch.device("cpu") if is_onnx else device,
        dtype=dtype,
        checkpoint=checkpoint,
    )


def load_checkpoint_network(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a checkpoint as it was trained, float32 on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(Path(path))
    network = build_network(checkpoint["config"])
    load_weights(network, checkpoint, path)
    return network.eval(), checkpoint


# ------------------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_volume(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    tta: bool = True,
    batch_size: int = 16,
    frame: Frame = UNKNOWN_FRAME,
) -> np.ndarray:
    """Return probabilities (R, D, H, W) float32 of a normalised volume (C, D, H, W), on its own grid.

    Slices with fewer than 64 of `brain_voxels` (D,) are not run and get probability 0; None runs all. With
    `tta` the result is the mean over identity, horizontal and vertical flip. `batch_size` is the largest
    number of slabs per forward pass; each view of a slice is a slab. `frame` says where the head is; without
    it slices a little larger than the network's input are cropped around their middle.
    """
    views = tuple(VIEWS) if tta else ("identity",)
    placement = model.place(volume.shape[2:], frame)
    probabilities = np.zeros((len(model.regions), *volume.shape[1:]), np.float32)
    for slices, output in _predict_slices(model, volume, brain_voxels, views, batch_size, placement):
        mean = output.mean(0).cpu().numpy()  # taken before anything leaves the device
        probabilities[:, slices] = unfit_slices(mean, placement).transpose(1, 0, 2, 3)
    return probabilities


@torch.inference_mode()
def predict_views(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    views: Sequence[str] = tuple(VIEWS),
    batch_size: int = 16,
    frame: Frame = UNKNOWN_FRAME,
) -> np.ndarray:
    """Return the probabilities of each view (V, R, D, H, W) float32; see `predict_volume`.

    Every view is flipped back, so views are comparable voxel by voxel.
    """
    placement = model.place(volume.shape[2:], frame)
    probabilities = np.zeros((len(views), len(model.regions), *volume.shape[1:]), np.float32)
    for slices, output in _predict_slices(model, volume, brain_voxels, views, batch_size, placement):
        for view, of_view in zip(probabilities, output.cpu().numpy(), strict=True):
            view[:, slices] = unfit_slices(of_view, placement).transpose(1, 0, 2, 3)
    return probabilities


def _predict_slices(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None,
    views: Sequence[str],
    batch_size: int,
    placement: Placement,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield slice numbers and their probabilities (V, n, R, size, size) float32, on the model's device.

    Slabs are not cropped to the brain: squeeze-and-excitation weighs channels by means over the whole slab,
    and a network trained on whole slabs knows no others. Cropping to the brain's box saves 0.6 of the work,
    but a briefly trained network's Dice on three phantoms fell from 0.77, 0.70, 0.86 to 0.46, 0.40, 0.70.
    """
    depth = volume.shape[1]
    with_brain = [z for z in range(depth) if brain_voxels is None or brain_voxels[z] >= BRAIN_SLICE_VOXELS]
    at_once = max(1, batch_size // len(views))
    for start in range(0, len(with_brain), at_once):
        slices = with_brain[start : start + at_once]
        # each slice is fitted once, not once for every slab it is in; only the volume's ends are repeated
        first, last = max(0, slices[0] - model.context), min(depth, slices[-1] + model.context + 1)
        fitted = fit_slices(volume[:, first:last].astype(np.float32), placement)
        slabs = np.stack([gather_slab(fitted, z - first, model.context) for z in slices])
        batch = torch.from_numpy(slabs).to(model.device)  # (n, C*K, S, S)
        batch = torch.cat([batch.flip(VIEWS[view]) for view in views])  # (V*n, C*K, S, S)
        passes = batch.contiguous(memory_format=torch.channels_last).split(batch_size)
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype is not None):
            logits = torch.cat([model.network(slabs) for slabs in passes])  # (V*n, R, S, S)
        output = torch.sigmoid(logits.float()).unflatten(0, (len(views), -1))  # (V, n, R, S, S)
        flipped_back = [of_view.flip(VIEWS[view]) for of_view, view in zip(output, views, strict=True)]
        yield slices, torch.stack(flipped_back)


# ------------------------------------------------------------------------------------------------------------
# Segmenting cases
# ------------------------------------------------------------------------------------------------------------


def choose_inputs(config: InferenceConfig, model: TrainedModel, checkpoint: Path) -> list[Case]:
    """Return the cases to segment: those named, or the held-out test cases of the checkpoint's run."""
    if not config.input:
        settings = model.checkpoint["config"]
        if "data_dir" not in settings:
            raise InputError(checkpoint, "an exported network knows no test cases", "name some by --input")
        data_dir = settings["data_dir"]
        log.info("no --input: segmenting the held-out test cases of %s", data_dir)
        cases = find_cases_of_run(settings, data_dir)
        return cases_of_split(cases, read_split(checkpoint.parent / "split.json"), "test", data_dir)
    cases: list[Case] = []
    for name in config.input:
        if Path(name).is_file():
            cases += cases_of_files([Path(name)], model.modalities)
        else:
            cases += find_cases(
                CaseSource(name, config.layout, slice_channel=config.slice_channel), model.modalities
            )
    ids = [case.case_id for case in cases]
    if twice := [case_id for case_id in ids if ids.count(case_id) > 1]:
        raise InputError(
            "--input",
            f"case {twice[0]} occurs twice, and one would overwrite the other",
            "segment them apart",
        )
    return cases


class ReadCase(NamedTuple):
    """A case as the network and the overlay need it."""

    case: Case
    volume: np.ndarray  # (C, D, H, W) normalised
    brain_voxels: np.ndarray  # (D,)
    intensities: np.ndarray  # (D, H, W) of the first modality, as in the file
    spacing_mm: tuple[float, float, float]
    frame: Frame
    doubts: tuple[str, ...]  # what is odd about the intensities, one sentence each


def read_case(case: Case, modalities: Sequence[str]) -> ReadCase:
    """Read and normalise one case; of the raw intensities only those of the first modality stay."""
    loaded = load_case(case, modalities)
    log_warnings([(case.case_id, loaded.warnings)])
    volume, brain = normalise_volume(loaded.volume)
    frame = Frame(find_head_box(brain), loaded.spacing_mm if case.layout != "slices" else None)
    doubts = [
        f"{name} {doubt}"
        for name, intensities in zip(modalities, loaded.volume, strict=True)
        for doubt in find_doubts(intensities)
    ]
    first = loaded.volume[0].copy()
    return ReadCase(case, volume, brain.sum((1, 2)), first, loaded.spacing_mm, frame, tuple(doubts))


def write_case(
    read: ReadCase, masks: np.ndarray, regions: Sequence[str], output: Path
) -> list[dict[str, Any]]:
    """Write a case's labels and overlay; return its rows of volumes.csv, one per region."""
    case = read.case
    written = save_labels(labels_from_regions(masks, regions, case.convention), case, output)
    overlay = output / f"{case.case_id}_overlay.png"
    plot_overlay(overlay, case.case_id, read.intensities, masks, regions, read.spacing_mm)
    voxel_ml = float(np.prod(read.spacing_mm)) / 1000
    spacing = "1 mm assumed, unknown" if case.layout == "slices" else "from the file"
    return [
        {"case": case.case_id, "region": region, "volume_ml": round(mask.sum() * voxel_ml, 3)}
        | {"slices": int(mask.any((1, 2)).sum()), "spacing": spacing, "mask": str(written)}
        for region, mask in zip(regions, masks, strict=True)
    ]


def segment_cases(
    config: InferenceConfig, model: TrainedModel, cases: Sequence[Case]
) -> Iterator[list[dict[str, Any]]]:
    """Segment cases and write their masks and overlays; yield each case's rows of volumes.csv, in order."""
    thresholds = model.thresholds if config.threshold is None else (config.threshold,) * len(model.regions)

    def compute() -> Iterator[Callable[[], list[dict[str, Any]]]]:
        for read in read_ahead(cases, lambda case: read_case(case, model.modalities)):
            for doubt in (*read.doubts, *model.find_doubts(read.volume.shape[2:], read.frame)):
                log.warning("%s: %s", read.case.case_id, doubt)
            probabilities = predict_volume(
                model, read.volume, read.brain_voxels, config.tta, config.batch_size, read.frame
            )
            masks = threshold_regions(probabilities, thresholds, model.regions)
            if config.postprocess:
                masks = postprocess(masks, model.regions, read.spacing_mm, settings_of(model.checkpoint))
            yield functools.partial(write_case, read, masks, model.regions, Path(config.output))

    return write_behind(compute())


def main(config: InferenceConfig) -> None:
    """Segment cases and write masks, overlays and the volume table.

    Ranks share the cases; each writes the masks and overlays of its own, the main one the table of all.
    """
    join_ranks()
    checkpoint = Path(config.checkpoint) if config.checkpoint else newest_run(Path("results")) / "best.pt"
    checkpoint = from_main(checkpoint)
    model = load_model(checkpoint, local_device(choose_device(config.device)), config.amp)
    cases = from_main(choose_inputs(config, model, checkpoint) if is_main() else None)
    if config.compile:
        model = compile_model(model, config.batch_size, config.tta)
    log_cases(cases)
    choose_threads(model, config.batch_size)
    own_cases = share_of(cases)
    segmented = segment_cases(config, model, own_cases)
    rows_by_case = gather_shares(list(progress(segmented, "segmenting", "case", len(own_cases))))
    if not is_main():
        return
    output = Path(config.output)
    table = pd.DataFrame([row for rows in rows_by_case for row in rows])
    write_atomically(output / "volumes.csv", lambda target: table.to_csv(target, index=False))
    log.info("%s", table.drop(columns="mask").to_string(index=False))
    if model.checkpoint["data_kind"] == "phantom":
        log.warning("the network was trained on synthetic phantoms; its masks of real scans mean nothing")
    log.info("masks, overlays and volumes.csv are in %s", output)


# ------------------------------------------------------------------------------------------------------------
# Compiled and exported networks
# ------------------------------------------------------------------------------------------------------------

ONNX_FORMAT = "drunet-v2-onnx/1"


class FixedBatch(nn.Module):
    """A network that always sees one batch size, filled up with zeros: torch compiles again for another."""

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.network = network
        self.batch_size = batch_size

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of at most `batch_size` slabs."""
        free = self.batch_size - len(slab)
        if free:
            slab = torch.cat([slab, slab.new_zeros(free, *slab.shape[1:])])
            slab = slab.contiguous(memory_format=torch.channels_last)
        return self.network(slab)[: self.batch_size - free]


def choose_threads(model: TrainedModel, batch_size: int) -> None:
    """Compute with the number of threads that is fastest now, where torch computes on a CPU."""
    if model.device.type == "cpu" and not isinstance(model.network, OnnxNetwork):
        channels = len(model.modalities) * (2 * model.context + 1)
        batch = Batch((min(batch_size, 4), channels, model.size, model.size), model.device, model.dtype)
        cpu_threads.choose_threads(lambda: try_pass(model.network, batch))


def compile_model(model: TrainedModel, batch_size: int, tta: bool) -> TrainedModel:
    """Return the model compiled for the passes of `predict_volume`; where that fails, as it is."""
    if isinstance(model.network, OnnxNetwork):
        raise InputError("--compile", "an ONNX file is no torch network", "leave it out, or name best.pt")
    views = len(VIEWS) if tta else 1
    slabs = min(batch_size, max(1, batch_size // views) * views)  # all views of as many slices as fit
    shape = (slabs, len(model.modalities) * (2 * model.context + 1), model.size, model.size)
    batch = Batch(shape, model.device, model.dtype)
    compiled = compile_network(model.network, functools.partial(try_pass, batch=batch), freeze=True)
    is_compiled = compiled is not model.network
    return dataclasses.replace(model, network=FixedBatch(compiled, slabs)) if is_compiled else model


class OnnxNetwork(nn.Module):
    """An ONNX file in place of the network: slabs (N, C*K, S, S) in, logits (N, R, S, S) out."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of a batch of slabs, in float32 on the CPU."""
        (logits,) = self.session.run(["logits"], {"slab": slab.float().cpu().contiguous().numpy()})
        return torch.from_numpy(logits)


def load_onnx(path: str | Path, device: torch.device) -> tuple[OnnxNetwork, dict[str, Any]]:
    """Return an exported network and its metadata; see export_v2 for what that holds.

    Runs on CUDA where `device` is a CUDA device and onnxruntime has it, on the CPU elsewhere. Raises
    InputError where onnxruntime is missing, or the file is missing, damaged or not of export_v2.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            path, "an ONNX file needs the package onnxruntime", "pip install onnxruntime"
        ) from error
    if not Path(path).is_file():
        raise InputError(path, "no such file", "write one with export_v2.py")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, _choose_providers(onnxruntime, device))
    except Exception as error:
        # onnxruntime raises a dozen types of its own for a file that is foreign or cut short
        raise InputError(
            path, f"not a readable ONNX file ({type(error).__name__})", "export it again"
        ) from error
    properties = session.get_modelmeta().custom_metadata_map
    if properties.get("format") != ONNX_FORMAT:
        raise InputError(path, "not a network of this project", "write one with export_v2.py")
    return OnnxNetwork(session), {
        name: json.loads(value) for name, value in properties.items() if name != "format"
    }


def _choose_providers(onnxruntime: Any, device: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    providers = onnxruntime.get_available_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" in providers:
        card = {"device_id": device.index or 0}  # else all ranks would take the first
        return [("CUDAExecutionProvider", card), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


if __name__ == "__main__":
    run_command(
        end_together(main),
        InferenceConfig,
        "Segment brain tumours in new cases and write masks, overlays and volumes. Under torchrun the ranks "
        "share the cases.",
    )
