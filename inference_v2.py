"""From a trained network and a volume to probabilities and masks; as a command, segment new cases.

    python inference_v2.py --checkpoint results/RUN/best.pt --input CASE_FOLDER [MORE ...]

Writes one NIfTI mask a case (BraTS labels, the input's affine and header; PNG masks for PNG cases), an
overlay picture a case, and `volumes.csv`. Masks are for research, not for clinical use.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from cases_v2 import Case, cases_of_files, find_cases, labels_from_regions, load_case, save_labels
from dataset_balance_v2 import cases_of_split, read_split
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
    fit_slices,
    gather_slab,
    normalise_volume,
    place_slices,
    unfit_slices,
)

# Test-time augmentation: the axes of (..., H, W) each view flips. A flip is its own inverse.
VIEWS: dict[str, tuple[int, ...]] = {"identity": (), "horizontal": (-1,), "vertical": (-2,)}


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


def load_model(path: str | Path, device: torch.device, amp: bool = True) -> TrainedModel:
    """Read a checkpoint into a network on `device`; InputError where the file or its widths do not fit."""
    checkpoint = load_checkpoint(Path(path))
    config = checkpoint["config"]
    network = build_network(
        len(config["modalities"]), len(config["regions"]), config["context"], config["widths"]
    )
    load_weights(network, checkpoint, path)
    network.to(device, memory_format=torch.channels_last).eval()
    return TrainedModel(
        network=network,
        modalities=tuple(config["modalities"]),
        regions=tuple(config["regions"]),
        context=config["context"],
        size=config["size"],
        thresholds=tuple(checkpoint["thresholds"]),
        device=device,
        dtype=amp_dtype(device, amp),
        checkpoint=checkpoint,
    )


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
    """
    depth, height, width = volume.shape[1:]
    placement = place_slices(height, width, model.size)
    probabilities = np.zeros((len(views), len(model.regions), depth, height, width), np.float32)
    slices = [z for z in range(depth) if brain_voxels is None or brain_voxels[z] >= BRAIN_SLICE_VOXELS]
    for start in range(0, len(slices), batch_size):
        chosen = slices[start : start + batch_size]
        slabs = np.stack([gather_slab(volume, z, model.context) for z in chosen]).astype(np.float32)
        batch = torch.from_numpy(np.ascontiguousarray(fit_slices(slabs, placement))).to(model.device)
        batch = batch.to(memory_format=torch.channels_last)
        for index, view in enumerate(views):
            with torch.autocast(model.device.type, model.dtype, enabled=model.dtype is not None):
                logits = model.network(batch.flip(VIEWS[view]))  # (N, R, S, S)
            output = torch.sigmoid(logits.float()).flip(VIEWS[view]).cpu().numpy()
            probabilities[index][:, chosen] = unfit_slices(output, placement).transpose(1, 0, 2, 3)
    return probabilities


def predict_volume(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    tta: bool = True,
    batch_size: int = 16,
) -> np.ndarray:
    """Return probabilities (R, D, H, W) float32 of a normalised volume (C, D, H, W), on its own grid.

    With `tta` the mean over identity, horizontal and vertical flip; see `predict_views`.
    """
    views = tuple(VIEWS) if tta else ("identity",)
    return predict_views(model, volume, brain_voxels, views, batch_size).mean(0)


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
# Command: segment new cases
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of the segmentation command."""

    input: tuple[str, ...] = option(
        (), "case folders, cohort folders or FLAIR files; default: the run's test cases"
    )
    checkpoint: str | None = option(None, "best.pt of a run; default: the newest run in results/")
    output: str = option("predictions", "folder to write to")
    tta: bool = option(True, "average identity, horizontal and vertical flip")
    threshold: float | None = option(
        None, "probability from which a voxel is tumour; default: the checkpoint's"
    )
    postprocess: bool = option(True, "clean the masks as chosen on validation, where the checkpoint says how")
    batch_size: int = option(16, "slabs a forward pass")
    slice_channel: int = option(1, "channel of RGB slices that holds FLAIR")
    device: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "where to compute")
    amp: bool = option(True, "mixed precision where the device has it")
    seed: int = option(0, "seed; prediction itself draws nothing")


def choose_inputs(config: InferenceConfig, model: TrainedModel, checkpoint: Path) -> list[Case]:
    """Return the cases to segment: those named, or the held-out test cases of the checkpoint's run."""
    if not config.input:
        data_dir = model.checkpoint["config"]["data_dir"]
        print(f"no --input: segmenting the held-out test cases of {data_dir}")
        cases = find_cases(data_dir, model.modalities, config.slice_channel)
        return cases_of_split(cases, read_split(checkpoint.parent / "split.json"), "test", data_dir)
    cases: list[Case] = []
    for name in config.input:
        if Path(name).is_file():
            cases += cases_of_files([Path(name)], model.modalities)
        else:
            cases += find_cases(name, model.modalities, config.slice_channel)
    ids = [case.case_id for case in cases]
    if twice := [case_id for case_id in ids if ids.count(case_id) > 1]:
        raise InputError(
            f"--input: case {twice[0]} is there twice and would be written over; segment them apart."
        )
    return cases


def main(config: InferenceConfig) -> None:
    """Segment cases and write masks, overlays and the volume table."""
    set_seed(config.seed)
    checkpoint = Path(config.checkpoint) if config.checkpoint else newest_run(Path("results")) / "best.pt"
    model = load_model(checkpoint, choose_device(config.device), config.amp)
    thresholds = model.thresholds if config.threshold is None else (config.threshold,) * len(model.regions)
    output = Path(config.output)
    rows = []
    for case in tqdm(choose_inputs(config, model, checkpoint), desc="segmenting", unit="case"):
        loaded = load_case(case, model.modalities)
        volume, brain_voxels = normalise_volume(loaded.volume)
        probabilities = predict_volume(model, volume, brain_voxels, config.tta, config.batch_size)
        masks = threshold_regions(probabilities, thresholds, model.regions)
        if config.postprocess:
            masks = postprocess(masks, model.regions, loaded.spacing_mm, settings_of(model.checkpoint))
        written = save_labels(labels_from_regions(masks, model.regions), case, output)
        overlay = output / f"{case.case_id}_overlay.png"
        plot_overlay(overlay, case.case_id, loaded.volume[0], masks, model.regions, loaded.spacing_mm)
        voxel_ml = float(np.prod(loaded.spacing_mm)) / 1000
        spacing = "1 mm assumed, unknown" if case.layout == "slices" else "from the file"
        rows += [
            {"case": case.case_id, "region": region, "volume_ml": round(mask.sum() * voxel_ml, 3)}
            | {"slices": int(mask.any((1, 2)).sum()), "spacing": spacing, "mask": str(written)}
            for region, mask in zip(model.regions, masks, strict=True)
        ]
    table = pd.DataFrame(rows)
    write_atomically(output / "volumes.csv", lambda target: table.to_csv(target, index=False))
    print(table.drop(columns="mask").to_string(index=False))
    if model.checkpoint["data_kind"] == "phantom":
        print("The network was trained on synthetic phantoms; its masks of real scans mean nothing.")
    print(f"masks, overlays and volumes.csv are in {output}")


if __name__ == "__main__":
    run_command(
        main, InferenceConfig, "Segment brain tumours in new cases and write masks, overlays and volumes."
    )
