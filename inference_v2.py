"""From a trained network and a volume to probabilities and masks; as a command, segment new cases.

    python inference_v2.py --checkpoint results/RUN/best.pt --input CASE_FOLDER [MORE ...]
    python inference_v2.py --checkpoint results/RUN --input COHORT_FOLDER    of a run of folds, their mean
    torchrun --nproc-per-node 2 -- inference_v2.py --input COHORT_FOLDER    the same, cases shared by ranks

Writes one NIfTI mask per case (labels as in the case's layout, its affine and header; PNG masks for PNG
cases), an overlay picture per case, and `volumes.csv`. While one case is computed, a thread reads the next
and another writes the last. A case that cannot be read is listed with the reason, the others are done, and
the exit code is 1. Masks are for research, not for clinical use.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import numpy as np
import torch
from torch import Tensor, nn

from audit.facts import check_facts, check_onnx_facts
from audit.inputs import choose_inputs, read_case
from audit.output import (
    Output,
    Prediction,
    ReadCase,
    Row,
    check_outputs,
    digest,
    failed_row,
    find_done,
    report,
    write_case,
)
from audit.postprocess import join_settings, postprocess, settings_of, threshold_regions
from cohort.cases import Case
from cohort.ensemble import Members, check_members, join_checkpoints
from cohort.folds import list_checkpoints
from cohort.layouts import Channel, LayoutName, log_cases
from cohort.network import check_widths
from cohort.preprocess import (
    BRAIN_SLICE_VOXELS,
    Frame,
    Placement,
    find_unlike_spacing,
    fit_slices,
    gather_slab,
    pixel_mm,
    place_case,
    unfit_slices,
)
from model_drunet_v2 import build_network, prepare_network
from runtime import cpu_threads, signals
from runtime.checkpoints import load_checkpoint, load_weights, newest_run
from runtime.claims import claim_folder
from runtime.command import BatchSize, Share, run_command
from runtime.errors import InputError
from runtime.files import protect_inputs
from runtime.log import log, progress
from runtime.machine import DeviceName, amp_dtype, choose_device
from runtime.onnx_file import OnnxNetwork, load_onnx
from runtime.probe import Batch, FixedBatch, compile_network, try_pass
from runtime.ranks import (
    agree_to_stop,
    end_together,
    from_main,
    gather_shares,
    is_main,
    join_ranks,
    local_device,
    share_of,
    wait_for_all,
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
    checkpoint: tuple[str, ...] = ()
    """best.pt or last.pt of a run, an ONNX file of export_v2.py, or a run folder, of a run of folds all its
    networks; of several the mean probability counts; default: the newest run in results/"""
    output: str = "predictions"
    """folder to write to; files of the cases are never replaced, there or elsewhere"""
    overwrite: bool = False
    """replace other files too that this program did not write, by the list `.drunet_written` in the folder"""
    skip_done: bool = False
    """leave out cases whose masks are there, by the same network and settings, of the same files"""
    probabilities: bool = False
    """write the probabilities of each region as NIfTI, and their spread (SD): over the networks where there
    are several, else with TTA over its views"""
    tta: bool = True
    """average identity, horizontal and vertical flip"""
    threshold: Share | None = None
    """probability from which a voxel is tumour; default: the checkpoint's"""
    postprocess: bool = True
    """clean the masks as chosen on validation, where the checkpoint says how"""
    batch_size: BatchSize = 16
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

    @property
    def is_ensemble(self) -> bool:
        """Whether the network is several, whose mean probability counts."""
        return "members" in self.checkpoint

    @property
    def is_partial(self) -> bool:
        """Whether the network was trained to work without some of its modalities."""
        return bool(self.checkpoint.get("config", {}).get("modality_dropout"))

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


def load_models(paths: Sequence[str | Path], device: torch.device, amp: bool = True) -> TrainedModel:
    """Return the network of a checkpoint, or several as one whose probabilities are the mean of theirs.

    A run folder stands for its best.pt, that of a run of folds for the best.pt of each. Raises InputError as
    `load_model` does, and where networks cannot be averaged.
    """
    files = list_checkpoints(paths)
    return join_models(files, [load_model(path, device, amp) for path in files])


def join_models(files: Sequence[Path], models: Sequence[TrainedModel]) -> TrainedModel:
    """Return several networks as one, a single one as it is; InputError where they cannot be averaged."""
    if len(models) == 1:
        return models[0]
    checkpoints = [model.checkpoint for model in models]
    check_members(files, checkpoints)
    joined = join_checkpoints(files, checkpoints)
    joined["postprocessing"] = {"settings": join_settings([settings_of(each) for each in checkpoints])}
    thresholds = ", ".join(f"{value:.3g}" for value in joined["thresholds"])
    log.info("the mean of %d networks, whose mean threshold is %s", len(models), thresholds)
    return dataclasses.replace(
        models[0],
        network=Members([model.network for model in models]),
        thresholds=tuple(joined["thresholds"]),
        checkpoint=joined,
    )


def load_model(path: str | Path, device: torch.device, amp: bool = True) -> TrainedModel:
    """Read a checkpoint or an ONNX file into a network on `device`, ready to predict (`prepare_network`).

    A file that ends in .onnx is run by onnxruntime, in float32. Raises InputError where the file cannot be
    used or its weights do not fit its settings.
    """
    is_onnx = Path(path).suffix == ".onnx"
    if is_onnx:
        network, checkpoint = load_onnx(path, device)
        check_onnx_facts(path, network, checkpoint)
        dtype = None
    else:
        network, checkpoint = load_checkpoint_network(path)
        dtype = amp_dtype(device, amp)
        network = prepare_network(network, device, dtype)
    config = checkpoint["config"]
    if "thresholds" not in checkpoint:  # last.pt: they are chosen for best.pt alone
        log.info("%s has no thresholds and no post-processing, as best.pt has: 0.5, and none", path)
    thresholds = checkpoint.get("thresholds", (0.5,) * len(config["regions"]))
    return TrainedModel(
        network=network,
        modalities=tuple(config["modalities"]),
        regions=tuple(config["regions"]),
        context=config["context"],
        size=config["size"],
        thresholds=tuple(thresholds),
        device=torch.device("cpu") if is_onnx else device,
        dtype=dtype,
        checkpoint=checkpoint,
    )


def load_checkpoint_network(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a checkpoint as it was trained, float32 on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(Path(path))
    check_facts(path, checkpoint)
    check_widths(path, checkpoint)
    network = build_network(checkpoint["config"])
    load_weights(network, checkpoint, path)
    return network.eval(), checkpoint


# ------------------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------------------


class NotFiniteError(InputError):
    """A network gives probabilities that are NaN or infinite."""


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
    for slices, members in _predict_members(model, volume, brain_voxels, views, batch_size, placement):
        mean = _mean_of(members).mean(0).cpu().numpy()  # taken before anything leaves the device
        probabilities[:, slices] = unfit_slices(mean, placement).transpose(1, 0, 2, 3)
    return probabilities


@torch.inference_mode()
def predict_with_spread(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    batch_size: int = 16,
    frame: Frame = UNKNOWN_FRAME,
    tta: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of `predict_volume`, and their standard deviation.

    Both (R, D, H, W) float32. The deviation is that of the three views of TTA (divisor 3): 0 where all agree,
    0.47 at most. Of an ensemble it is that of its M networks, each with its views averaged (divisor M).
    """
    placement = model.place(volume.shape[2:], frame)
    views = tuple(VIEWS) if tta else ("identity",)
    mean = np.zeros((len(model.regions), *volume.shape[1:]), np.float32)
    spread = np.zeros_like(mean)
    for slices, members in _predict_members(model, volume, brain_voxels, views, batch_size, placement):
        for moment, values in ((mean, _mean_of(members).mean(0)), (spread, _spread_of(members))):
            moment[:, slices] = unfit_slices(values.cpu().numpy(), placement).transpose(1, 0, 2, 3)
    return mean, spread


@torch.inference_mode()
def predict_views(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None = None,
    views: Sequence[str] = tuple(VIEWS),
    batch_size: int = 16,
    frame: Frame = UNKNOWN_FRAME,
    spread: np.ndarray | None = None,
) -> np.ndarray:
    """Return the probabilities of each view (V, R, D, H, W) float32; see `predict_volume`.

    Every view is flipped back, so views are comparable voxel by voxel. `spread` (R, D, H, W), where given, is
    filled with the deviation of `predict_with_spread`.
    """
    placement = model.place(volume.shape[2:], frame)
    probabilities = np.zeros((len(views), len(model.regions), *volume.shape[1:]), np.float32)
    for slices, members in _predict_members(model, volume, brain_voxels, views, batch_size, placement):
        for view, of_view in zip(probabilities, _mean_of(members).cpu().numpy(), strict=True):
            view[:, slices] = unfit_slices(of_view, placement).transpose(1, 0, 2, 3)
        if spread is not None:
            values = _spread_of(members).cpu().numpy()
            spread[:, slices] = unfit_slices(values, placement).transpose(1, 0, 2, 3)
    return probabilities


def _mean_of(members: Tensor) -> Tensor:
    """Return the mean over networks (V, n, R, S, S) of probabilities (M, V, n, R, S, S)."""
    return members.mean(0) if len(members) > 1 else members[0]


def _spread_of(members: Tensor) -> Tensor:
    """Return the SD (n, R, S, S) of probabilities (M, V, n, R, S, S) over networks, or over views."""
    return members.mean(1).std(0, correction=0) if len(members) > 1 else members[0].std(0, correction=0)


def _predict_members(
    model: TrainedModel,
    volume: np.ndarray,
    brain_voxels: Sequence[int] | None,
    views: Sequence[str],
    batch_size: int,
    placement: Placement,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield slice numbers and their probabilities (M, V, n, R, size, size) float32, on the model's device.

    M is the number of networks, 1 but for an ensemble.

    Slabs are not cropped to the brain: squeeze-and-excitation weighs channels by means over the whole slab,
    and a network trained on whole slabs knows no others. Cropping to the brain's box saves 0.6 of the work,
    but a briefly trained network's Dice on three phantoms fell from 0.77, 0.70, 0.86 to 0.46, 0.40, 0.70.
    Raises NotFiniteError where a probability is not finite: no metric and no mask is ever made of it.
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
            logits = torch.cat([model.network(slabs) for slabs in passes])  # (V*n, [M,] R, S, S)
        output = torch.sigmoid(logits.float()).unflatten(0, (len(views), -1))  # (V, n, [M,] R, S, S)
        if not output.isfinite().all():
            raise NotFiniteError(
                "the network",
                f"gives probabilities that are not finite in slices {slices[0]} to {slices[-1]}",
                "take another checkpoint, or pass --no-amp",
            )
        flipped_back = [of_view.flip(VIEWS[view]) for of_view, view in zip(output, views, strict=True)]
        by_view = torch.stack(flipped_back)
        yield slices, by_view.movedim(2, 0) if by_view.ndim == 6 else by_view[None]


# ------------------------------------------------------------------------------------------------------------
# Segmenting cases
# ------------------------------------------------------------------------------------------------------------


def thresholds_of(config: InferenceConfig, model: TrainedModel) -> tuple[float, ...]:
    """Return the threshold per region: the one asked for, else the checkpoint's."""
    return model.thresholds if config.threshold is None else (config.threshold,) * len(model.regions)


def choose_output(config: InferenceConfig, model: TrainedModel) -> Output:
    """Return where and what to write."""
    known = model.checkpoint
    made_by = {
        "weights": known.get("weights_sha256") or known.get("checkpoint_sha256"),
        "thresholds": thresholds_of(config, model),
        "tta": config.tta,
        "postprocessing": settings_of(known) if config.postprocess else {},
    }
    maps = ("probability", "spread") if has_spread(config, model) else ("probability",)
    maps = maps if config.probabilities else ()
    return Output(
        folder=Path(config.output),
        regions=model.regions,
        overwrite=config.overwrite,
        made_by=digest(made_by),
        maps=maps,
        usual_ml=known.get("reference_ml"),
    )


def has_spread(config: InferenceConfig, model: TrainedModel) -> bool:
    """Return whether there is more than one probability per voxel: of several networks, or of TTA's views."""
    return config.tta or model.is_ensemble


def predict_case(config: InferenceConfig, model: TrainedModel, read: ReadCase) -> Prediction:
    """Return the masks of a case, and its probabilities and their spread where they are asked for."""
    inputs = (model, read.volume, read.brain_voxels)
    spread = None
    if config.probabilities and has_spread(config, model):
        probabilities, spread = predict_with_spread(*inputs, config.batch_size, read.frame, config.tta)
    else:
        probabilities = predict_volume(*inputs, config.tta, config.batch_size, read.frame)
    masks = threshold_regions(probabilities, thresholds_of(config, model), model.regions)
    if config.postprocess:
        masks = postprocess(masks, model.regions, read.spacing_mm, settings_of(model.checkpoint))
    return Prediction(masks, probabilities if config.probabilities else None, spread)


def segment_cases(config: InferenceConfig, model: TrainedModel, cases: Sequence[Case]) -> Iterator[list[Row]]:
    """Segment cases and write their masks and overlays; yield each case's rows of volumes.csv, in order.

    A case that cannot be read or written gets one row, with the reason under "error". After a signal the case
    at hand is finished and no other one is begun.
    """
    output = choose_output(config, model)

    def try_read(case: Case) -> ReadCase | list[Row]:
        try:
            return read_case(case, model.modalities)
        except (InputError, OSError) as error:
            return [failed_row(case.case_id, error)]

    def try_write(read: ReadCase, prediction: Prediction) -> list[Row]:
        try:
            return write_case(read, prediction, output)
        except InputError as error:  # of an OSError, such as a full disk, the next case would die too
            return [failed_row(read.case.case_id, error)]

    def compute() -> Iterator[Callable[[], list[Row]]]:
        for read in read_ahead(cases, try_read):
            if signals.is_stopping():
                return
            if isinstance(read, ReadCase):
                doubts = model.find_doubts(read.volume.shape[2:], read.frame)
                read = read._replace(warnings=(*read.warnings, *doubts))
                try:
                    prediction = predict_case(config, model, read)
                except NotFiniteError as error:
                    yield functools.partial(list, [failed_row(read.case.case_id, error)])
                    continue
                yield functools.partial(try_write, read, prediction)
            else:
                yield functools.partial(list, read)

    return write_behind(compute())


def main(config: InferenceConfig) -> None:
    """Segment cases and write masks, overlays and the volume table; exit code 1 where a case failed.

    Ranks share the cases; each writes the masks and overlays of its own, the main one the table of all.
    """
    join_ranks()
    files = from_main(list_checkpoints(config.checkpoint or newest_run(Path("results"))))
    model = load_models(files, local_device(choose_device(config.device)), config.amp)
    failed: list[Row] = []
    cases = from_main(choose_inputs(config, model, files[0], failed) if is_main() else None)
    protect_inputs([*files, *(path for case in cases for path in case.files)])
    output = choose_output(config, model)
    if is_main():
        check_outputs(output, cases)
        claim_folder(output.folder, "choose another --output")
    done = from_main(find_done(output, cases) if is_main() and config.skip_done else {})
    if config.compile:
        model = compile_model(model, config.batch_size, config.tta)
    log_cases(cases)
    choose_threads(model, config.batch_size)
    if done:
        log.info("%d of %d cases are done already", len(done), len(cases))
    waiting = [case for case in cases if case.case_id not in done]
    own_cases = share_of(waiting)
    with signals.finish_first():
        segmented = segment_cases(config, model, own_cases)
        rows_by_case = gather_shares(list(progress(segmented, "segmenting", "case", len(own_cases))))
        done |= {rows[0]["case"]: rows for rows in rows_by_case}
        rows = [row for case in cases for row in done.get(case.case_id, ())] + from_main(failed)
        if is_main():
            report(output, model, rows)
        if agree_to_stop():
            words = f"{len(done)} of {len(cases)} cases are done and in {output.folder / 'volumes.csv'}"
            raise signals.Stopped(f"{words}; go on by the same command with --skip-done", is_agreed=True)
    wait_for_all()  # torchrun stops the other ranks once one has ended with an exit code
    if any(row.get("error") for row in rows):
        sys.exit(1)


# ------------------------------------------------------------------------------------------------------------
# Compiled networks
# ------------------------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    run_command(
        end_together(main),
        InferenceConfig,
        "Segment brain tumours in new cases and write masks, overlays and volumes. Under torchrun the ranks "
        "share the cases.",
    )
