"""Export a trained network to ONNX or torch.export, and check the file against the network.

    python export_v2.py --checkpoint results/RUN/best.pt --output model.onnx
    python inference_v2.py --checkpoint model.onnx --input CASE_FOLDER

The file holds the network in float32 with batch norm folded: input "slab" (N, C*K, size, size), output
"logits" (N, R, size, size), any N. A region's probability is the sigmoid of its logit. The file also holds
what a user must know beside the weights: modalities, regions, context, size, thresholds, post-processing, the
checkpoint's SHA-256. In ONNX these are metadata properties, each a JSON value; in torch.export they are
metadata.json. TorchScript is not offered, as torch has deprecated it.
"""

import dataclasses
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import numpy as np
import torch
from torch import nn

from audit.postprocess import threshold_regions
from cohort.cases import load_case
from cohort.folds import list_checkpoints
from cohort.layouts import CaseSource, find_cases
from cohort.preprocess import Z_RANGE, normalise_volume
from inference_v2 import TrainedModel, load_model, predict_volume
from runtime.checkpoints import newest_run
from runtime.command import Seed, run_command
from runtime.errors import InputError
from runtime.files import check_output, file_sha256, protect_inputs, write_output
from runtime.log import log
from runtime.onnx_file import NO_HASH, ONNX_FORMAT, load_onnx, seal
from utils_v2 import dice_score


@dataclass(frozen=True)
class ExportConfig:
    """Settings of the export."""

    checkpoint: str | None = None
    """best.pt of a run, or its folder; default: the newest run in results/"""
    format: Literal["onnx", "torch-export"] = "onnx"
    """format of the file"""
    output: str | None = None
    """file to write; default: model.onnx or model.pt2 beside the checkpoint"""
    overwrite: bool = False
    """replace a file that this program did not write"""
    check_input: str | None = None
    """case folder to check the export on; default: one batch of noise"""
    seed: Seed = 0
    """seed of the noise"""


OPSET = 18
CPU = torch.device("cpu")
# What of a checkpoint goes into the file: never the data folder or the patients' ids.
EXPORTED_RESULTS = ("thresholds", "postprocessing", "data_kind", "epoch", "validation_dice")
EXPORTED_RESULTS += ("spacing_mm", "reference_ml")
EXPORTED_SETTINGS = ("modalities", "regions", "context", "size", "widths")
TOLERANCE = 1e-4  # of probabilities, between the network and its export


def describe_checkpoint(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an exported file, as plain values."""
    config = {name: checkpoint["config"][name] for name in EXPORTED_SETTINGS}
    if checkpoint["config"].get("modality_dropout"):  # else a case needs all modalities
        config["modality_dropout"] = checkpoint["config"]["modality_dropout"]
    results = {name: checkpoint[name] for name in EXPORTED_RESULTS if name in checkpoint}
    results.setdefault("thresholds", [0.5] * len(config["regions"]))  # last.pt has none
    return {"config": config, **results, "opset": OPSET, "checkpoint_sha256": file_sha256(path)}


def trace_network(network: nn.Module, in_channels: int, size: int) -> torch.export.ExportedProgram:
    """Return the graph of a network with a free batch size and slabs of (in_channels, size, size)."""
    slabs = torch.zeros(2, in_channels, size, size)
    return torch.export.export(network, (slabs,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(
    program: torch.export.ExportedProgram, metadata: dict[str, Any], path: Path, overwrite: bool = False
) -> None:
    """Write a graph as one ONNX file; InputError where a package is missing."""
    try:
        import onnx
        import onnxscript  # noqa: F401, torch's exporter imports it late and fails with a traceback
    except ImportError as error:
        raise InputError(
            "--format onnx", f"the package {error.name} is missing", "pip install onnx onnxscript"
        ) from error
    exported = torch.onnx.export(
        program,
        input_names=["slab"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's stack traces, which name folders of this machine
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    properties = {name: json.dumps(value) for name, value in metadata.items()}
    properties |= {"format": ONNX_FORMAT, "file_sha256": NO_HASH}
    onnx.helper.set_model_props(model, properties)
    content = seal(model.SerializeToString())
    write_output(path, lambda target: target.write_bytes(content), overwrite)


def write_program(
    program: torch.export.ExportedProgram, metadata: dict[str, Any], path: Path, overwrite: bool = False
) -> None:
    """Write a graph as a torch.export file; `torch.export.load(path).module()` needs no code of ours."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    extra = {"metadata.json": json.dumps(metadata)}
    write_output(path, lambda target: torch.export.save(program, str(target), extra_files=extra), overwrite)


def load_export(path: Path, like: TrainedModel) -> TrainedModel:
    """Return `like` with the network of an exported file in place of its own."""
    if path.suffix == ".onnx":
        return dataclasses.replace(like, network=load_onnx(path, CPU)[0])
    return dataclasses.replace(like, network=torch.export.load(str(path)).module())


def compare_on_noise(model: TrainedModel, exported: TrainedModel, in_channels: int, seed: int) -> float:
    """Return the largest difference of probabilities over three slabs of noise in the range of real ones."""
    noise = np.random.default_rng(seed).uniform(*Z_RANGE, (3, in_channels, model.size, model.size))
    slabs = torch.from_numpy(noise.astype(np.float32))
    with torch.inference_mode():
        expected, actual = (torch.sigmoid(each.network(slabs)) for each in (model, exported))
    return float((expected - actual).abs().max())


def compare_on_case(
    model: TrainedModel, exported: TrainedModel, folder: str
) -> tuple[float, dict[str, float]]:
    """Return the largest difference of a case's probabilities, with TTA, and its masks' Dice by region."""
    volume, brain = normalise_volume(
        load_case(find_cases(CaseSource(folder), model.modalities)[0], model.modalities).volume
    )
    expected, actual = (predict_volume(each, volume, brain.sum((1, 2))) for each in (model, exported))
    masks = [threshold_regions(each, model.thresholds, model.regions) for each in (expected, actual)]
    dice = {region: dice_score(*pair) for region, *pair in zip(model.regions, *masks, strict=True)}
    return float(np.abs(expected - actual).max()), dice


def check_export(model: TrainedModel, path: Path, config: ExportConfig, in_channels: int) -> None:
    """Run the file beside the network and log how far apart they are; RuntimeError beyond TOLERANCE."""
    try:
        exported = load_export(path, model)
    except InputError as error:
        log.warning("not checked: %s", error)
        return
    if config.check_input:
        difference, dice = compare_on_case(model, exported, config.check_input)
        agreement = ", ".join(f"{region} {value:.6f}" for region, value in dice.items())
        log.info("%s: Dice of the two masks %s", config.check_input, agreement)
    else:
        difference = compare_on_noise(model, exported, in_channels, config.seed)
    log.info("largest difference of probabilities between the network and the file: %.1e", difference)
    if not difference <= TOLERANCE:  # NaN is no agreement
        raise RuntimeError(f"{path}: differs from the network by {difference:.1e}, more than {TOLERANCE:.0e}")


def choose_checkpoint(named: str | None) -> Path:
    """Return the checkpoint to export; InputError where the run has several, one per fold."""
    checkpoints = list_checkpoints(named or newest_run(Path("results")))
    if len(checkpoints) > 1:
        run = checkpoints[0].parent.parent
        remedy = f"name one of them, such as --checkpoint {checkpoints[0]}"
        raise InputError(run, f"is a run of {len(checkpoints)} folds, and a file holds one network", remedy)
    return checkpoints[0]


def main(config: ExportConfig) -> None:
    """Write the export and check it."""
    checkpoint = choose_checkpoint(config.checkpoint)
    suffix = ".onnx" if config.format == "onnx" else ".pt2"
    path = Path(config.output) if config.output else checkpoint.with_name(f"model{suffix}")
    if path.suffix != suffix:
        raise InputError(f"--output {path}", f"a file of --format {config.format} ends in {suffix}")
    if checkpoint.suffix == ".onnx":
        raise InputError(checkpoint, "is an exported file already", "name the best.pt of a run")
    protect_inputs([checkpoint])
    check_output(path, config.overwrite)
    model = load_model(checkpoint, CPU, amp=False)
    metadata = describe_checkpoint(checkpoint, model.checkpoint)
    in_channels = len(model.modalities) * (2 * model.context + 1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about itself; a user cannot act on it
        program = trace_network(model.network, in_channels, model.size)
        (write_onnx if config.format == "onnx" else write_program)(program, metadata, path, config.overwrite)
        kind = f"ONNX, opset {OPSET}" if config.format == "onnx" else "torch.export"
        log.info("%s: %s, slab (any N, %d, %d, %d), float32", path, kind, in_channels, model.size, model.size)
        check_export(model, path, config, in_channels)


if __name__ == "__main__":
    run_command(main, ExportConfig, "Export a trained network to ONNX or torch.export and check the file.")
