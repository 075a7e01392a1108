"""From a trained network and a volume to probabilities and masks; as a command, segment new cases.

    python inference_v2.py --checkpoint results/RUN/best.pt --input CASE_FOLDER [MORE ...]
    torchrun --nproc-per-node 2 -- inference_v2.py --input COHORT_FOLDER    the same, cases shared by ranks

Writes one NIfTI mask a case (labels as in the case's layout, its affine and header; PNG masks for PNG cases),
an overlay picture a case, and `volumes.csv`. While one case is computed, a thread reads the next and another
writes the last. Masks are for research, not for clinical use.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from backends_v2 import OnnxNetwork, compile_prepared, load_onnx, prepare_network
from cases_v2 import Case, labels_from_regions, load_case, save_labels
from dataset_balance_v2 import cases_of_split, read_split
from distributed_v2 import (
    from_main,
    gather_shares,
    is_main,
    join_ranks,
    local_device,
    share_of,
    with_one_voice,
)
from layouts_v2 import LayoutName, cases_of_files, describe_cases, find_cases, find_cases_of_run
from model_drunet_v2 import DRUNetV2
from plots_v2 import plot_overlay
from postprocess_v2 import postprocess, settings_of
from utils_v2 import (
    InputError,
    amp_dtype,
    choose_device,
    load_checkpoint,
    newest_run,
    option,
    run_command,
    set_seed,
    write_atomically,
)
from volumes_v2 import (
    BRAIN_SLICE_VOXELS,
    Placement,
    fit_slices,
    gather_slab,
    normalise_volume,
    place_slices,
    unfit_slices,
)

# Test-time augmentation: the axes of (..., H, W) each view flips. A flip is its own inverse.
VIEWS: dict[str, tuple[int, ...]] = {"identity": (), "horizontal": (-1,), "vertical": (-2,)}

T = TypeVar("T")


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


def build_network(modalities: int, regions: int, context: int, widths: Sequence[int]) -> DRUNetV2:
    """Return an untrained network for so many modalities and regions and 2 * context + 1 slices."""
    return DRUNetV2(modalities * (2 * context + 1), regions, tuple(widths))


def load_model(
    path: str | Path,
    device: torch.device,
    amp: bool = True,
    backend: Literal["auto", "torch", "onnx"] = "auto",
) -> TrainedModel:
    """Read a checkpoint or an ONNX file into a network on `device`, ready to predict (`prepare_network`).

    Backend auto takes onnx for a file that ends in .onnx. An ONNX network computes in float32. Raises
    InputError where the file or its widths do not fit.
    """
    is_onnx = Path(path).suffix == ".onnx"
    if backend != "auto" and is_onnx != (backend == "onnx"):
        remedy = "leave --backend out" if is_onnx else "export it with export_v2.py first"
        raise InputError(f"{path}: not a file for --backend {backend}; {remedy}.")
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
    config = checkpoint["config"]
    network = build_network(
        len(config["modalities"]), len(config["regions"]), config["context"], config["widths"]
    )
    load_weights(network, checkpoint, path)
    return network.eval(), checkpoint


def load_weights(network: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Copy a checkpoint's weights into a network; raises InputError where they do not fit its widths."""
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        widths = "-".join(map(str, checkpoint["config"]["widths"]))
        raise InputError(
            f"{path}: the weights do not fit the network of its settings, widths {widths}; take another copy."
        ) from error


@torch.inference_mode()
def predict_views(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    views: Sequence[str] = tuple(VIEWS),
    batch_size: int = 16,
) -> np.ndarray:
    """Return the probabilities of each view (V, R, D, H, W) float32 on the volume's own grid.

    `volume` is a normalised case (C, D, H, W). Slices with fewer than 64 of `brain_voxels` (D,) are not run
    and get probability 0; None runs all. Every view is flipped back, so they are comparable voxel by voxel.
    `batch_size` is the most slabs a forward pass, a view of a slice counting as one.
    """
    placement = place_slices(*volume.shape[2:], model.size)
    probabilities = np.zeros((len(views), len(model.regions), *volume.shape[1:]), np.float32)
    for slices, output in _predict_slices(model, volume, brain_voxels, views, batch_size, placement):
        for view, of_view in zip(probabilities, output.cpu().numpy(), strict=True):
            view[:, slices] = unfit_slices(of_view, placement).transpose(1, 0, 2, 3)
    return probabilities


@torch.inference_mode()
def predict_volume(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    tta: bool = True,
    batch_size: int = 16,
) -> np.ndarray:
    """Return probabilities (R, D, H, W) float32 of a normalised volume (C, D, H, W), on its own grid.

    With `tta` the mean over identity, horizontal and vertical flip, taken before anything leaves the device;
    see `predict_views`.
    """
    views = tuple(VIEWS) if tta else ("identity",)
    placement = place_slices(*volume.shape[2:], model.size)
    probabilities = np.zeros((len(model.regions), *volume.shape[1:]), np.float32)
    for slices, output in _predict_slices(model, volume, brain_voxels, views, batch_size, placement):
        mean = output.mean(0).cpu().numpy()
        probabilities[:, slices] = unfit_slices(mean, placement).transpose(1, 0, 2, 3)
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
    and a network trained on whole slabs knows no others. Cropped to the brain's box, at 0.4 of the work, a
    briefly trained network's Dice on three phantoms fell from 0.77, 0.70, 0.86 to 0.46, 0.40, 0.70.
    """
    depth = volume.shape[1]
    wanted = [z for z in range(depth) if brain_voxels is None or brain_voxels[z] >= BRAIN_SLICE_VOXELS]
    at_once = max(1, batch_size // len(views))
    for start in range(0, len(wanted), at_once):
        slices = wanted[start : start + at_once]
        # each slice is fitted once, not once for every slab it is in; only the volume's ends are repeated
        first, last = max(0, slices[0] - model.context), min(depth, slices[-1] + model.context + 1)
        fitted = fit_slices(volume[:, first:last].astype(np.float32), placement)
        slabs = np.stack([gather_slab(fitted, z - first, model.context) for z in slices])
        batch = torch.from_numpy(slabs).to(model.device)  # (n, C*K, S, S)
        batch = torch.cat([batch.flip(VIEWS[view]) for view in views])  # (V*n, C*K, S, S)
        parts = batch.contiguous(memory_format=torch.channels_last).split(batch_size)
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype is not None):
            logits = torch.cat([model.network(part) for part in parts])  # (V*n, R, S, S)
        output = torch.sigmoid(logits.float()).unflatten(0, (len(views), -1))  # (V, n, R, S, S)
        yield slices, torch.stack([part.flip(VIEWS[view]) for part, view in zip(output, views, strict=True)])


def compile_model(model: TrainedModel, batch_size: int, tta: bool) -> TrainedModel:
    """Return the model compiled for the passes of `predict_volume`, and print what came of it."""
    if isinstance(model.network, OnnxNetwork):
        raise InputError("--compile: an ONNX file is no torch network; leave it out, or name best.pt.")
    views = len(VIEWS) if tta else 1
    slabs = min(batch_size, max(1, batch_size // views) * views)  # all views of as many slices as fit
    shape = (slabs, len(model.modalities) * (2 * model.context + 1), model.size, model.size)
    network, line = compile_prepared(model.network, shape, model.device, model.dtype)
    print(line)
    return dataclasses.replace(model, network=network)


def threshold_regions(
    probabilities: np.ndarray, thresholds: Sequence[float], regions: Sequence[str]
) -> np.ndarray:
    """Return masks (R, D, H, W) bool: probability at or above the threshold, ET inside TC inside WT."""
    masks = probabilities >= np.reshape(np.asarray(thresholds, probabilities.dtype), (-1, 1, 1, 1))
    nested = [list(regions).index(region) for region in ("WT", "TC", "ET") if region in regions]
    for outer, inner in itertools.pairwise(nested):
        masks[inner] &= masks[outer]
    return masks


# ------------------------------------------------------------------------------------------------------------
# Many cases: reading, computing and writing at once
# ------------------------------------------------------------------------------------------------------------


def read_ahead(items: Iterable[T], read: Callable[[T], Any], ahead: int = 1) -> Iterator[Any]:
    """Yield read(item) for each item, in order, with the next `ahead` (1 or more) being read in a thread.

    An error is raised where its item would have come; nothing is read after it.
    """
    waiting: collections.deque[Future[Any]] = collections.deque()
    remaining = iter(items)
    with ThreadPoolExecutor(1, "read") as pool:
        try:
            for item in itertools.islice(remaining, ahead):
                waiting.append(pool.submit(read, item))
            while waiting:
                ready = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in itertools.islice(remaining, 1))
                yield ready
        finally:
            for future in waiting:
                future.cancel()


def write_behind(jobs: Iterable[Callable[[], T]], behind: int = 1) -> Iterator[T]:
    """Run each job in a thread while the next is being made, and yield the results in order.

    At most `behind` jobs wait or run while the next is made, so that memory is bounded. A job's error is
    raised here; the jobs handed over before an error of `jobs` itself are finished first.
    """
    running: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(1, "write") as pool:
        for job in jobs:
            running.append(pool.submit(job))
            if len(running) > behind:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


# ------------------------------------------------------------------------------------------------------------
# Command: segment new cases
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of the segmentation command."""

    input: tuple[str, ...] = option(
        (), "case folders, cohort folders or FLAIR files; default: the run's test cases"
    )
    checkpoint: str | None = option(
        None, "best.pt of a run, or an ONNX file of export_v2.py; default: the newest run in results/"
    )
    backend: Literal["auto", "torch", "onnx"] = option(
        "auto", "what computes; auto: onnx for a file that ends in .onnx"
    )
    output: str = option("predictions", "folder to write to")
    tta: bool = option(True, "average identity, horizontal and vertical flip")
    threshold: float | None = option(
        None, "probability from which a voxel is tumour; default: the checkpoint's"
    )
    postprocess: bool = option(True, "clean the masks as chosen on validation, where the checkpoint says how")
    batch_size: int = option(16, "slabs a forward pass")
    layout: LayoutName = option("auto", "layout of the cases; auto tells it by what is there")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR")
    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "where to compute")
    amp: bool = option(True, "mixed precision where the device has it")
    compile: bool = option(
        False,
        "compile the network first, half a minute or more: for many cases; where that fails, go on without",
    )
    seed: int = option(0, "seed; prediction itself draws nothing")


def choose_inputs(config: InferenceConfig, model: TrainedModel, checkpoint: Path) -> list[Case]:
    """Return the cases to segment: those named, or the held-out test cases of the checkpoint's run."""
    if not config.input:
        settings = model.checkpoint["config"]
        if "data_dir" not in settings:
            raise InputError(f"{checkpoint}: an exported network knows no test cases; name some by --input.")
        data_dir = settings["data_dir"]
        print(f"no --input: segmenting the held-out test cases of {data_dir}")
        cases = find_cases_of_run(settings, data_dir)
        return cases_of_split(cases, read_split(checkpoint.parent / "split.json"), "test", data_dir)
    cases: list[Case] = []
    for name in config.input:
        if Path(name).is_file():
            cases += cases_of_files([Path(name)], model.modalities)
        else:
            cases += find_cases(name, model.modalities, config.slice_channel, config.layout)
    ids = [case.case_id for case in cases]
    if twice := [case_id for case_id in ids if ids.count(case_id) > 1]:
        raise InputError(
            f"--input: case {twice[0]} is there twice and would be written over; segment them apart."
        )
    return cases


class ReadCase(NamedTuple):
    """A case as the network and the overlay need it."""

    case: Case
    volume: np.ndarray  # (C, D, H, W) normalised
    brain_voxels: np.ndarray  # (D,)
    intensities: np.ndarray  # (D, H, W) of the first modality, as in the file
    spacing_mm: tuple[float, float, float]


def read_case(case: Case, modalities: Sequence[str]) -> ReadCase:
    """Read and normalise one case; the other modalities' raw intensities are let go."""
    loaded = load_case(case, modalities)
    volume, brain_voxels = normalise_volume(loaded.volume)
    return ReadCase(case, volume, brain_voxels, loaded.volume[0].copy(), loaded.spacing_mm)


def write_case(
    read: ReadCase, masks: np.ndarray, regions: Sequence[str], output: Path
) -> list[dict[str, Any]]:
    """Write a case's labels and overlay; return its rows of volumes.csv, one a region."""
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
            probabilities = predict_volume(
                model, read.volume, read.brain_voxels, config.tta, config.batch_size
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
    set_seed(config.seed)
    if config.batch_size < 1:
        raise InputError(f"--batch-size {config.batch_size} must be at least 1.")
    checkpoint = Path(config.checkpoint) if config.checkpoint else newest_run(Path("results")) / "best.pt"
    checkpoint = from_main(checkpoint)
    model = load_model(checkpoint, local_device(choose_device(config.device)), config.amp, config.backend)
    cases = from_main(choose_inputs(config, model, checkpoint) if is_main() else None)
    if config.compile:
        model = compile_model(model, config.batch_size, config.tta)
    mine = share_of(cases)
    output = Path(config.output)
    print("\n".join(describe_cases(cases)))
    progress = tqdm(segment_cases(config, model, mine), desc="segmenting", unit="case", total=len(mine))
    rows_by_case = gather_shares(list(progress))
    if not is_main():
        return
    table = pd.DataFrame([row for rows in rows_by_case for row in rows])
    write_atomically(output / "volumes.csv", lambda target: table.to_csv(target, index=False))
    print(table.drop(columns="mask").to_string(index=False))
    if model.checkpoint["data_kind"] == "phantom":
        print("The network was trained on synthetic phantoms; its masks of real scans mean nothing.")
    print(f"masks, overlays and volumes.csv are in {output}")


if __name__ == "__main__":
    run_command(
        with_one_voice(main),
        InferenceConfig,
        "Segment brain tumours in new cases and write masks, overlays and volumes. Under torchrun the ranks "
        "share the cases.",
    )
