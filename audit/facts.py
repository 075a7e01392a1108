"""What a trained network's file says of it, checked before it is believed: a checkpoint's, an ONNX file's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from cohort.labels import Region
from cohort.network import check_network_settings
from runtime.command import CountOrZero, NotNegative, Positive, Share
from runtime.errors import InputError
from runtime.onnx_file import OnnxNetwork
from runtime.plain import find_misfit


class SpacingRange(TypedDict):
    """The spacings that training met, in mm."""

    low: Positive
    high: Positive


class TrainingSpacing(TypedDict):
    """The spacings that training met; see `describe_training_spacing`."""

    in_plane: SpacingRange
    slices: SpacingRange


class Cleaning(TypedDict):
    """The post-processing of one region; see `candidate_settings`."""

    fill_holes: bool
    min_component_mm3: NotNegative
    min_total_mm3: NotNegative


class Postprocessing(TypedDict):
    """What was chosen on validation."""

    settings: dict[Region, Cleaning]


class ModelFacts(TypedDict, total=False):
    """What inference and audit read of a network's file beside its settings."""

    thresholds: tuple[Share, ...]
    postprocessing: Postprocessing | None
    data_kind: Literal["phantom", "real", "mixed"]
    epoch: CountOrZero
    validation_dice: Share
    spacing_mm: TrainingSpacing | None
    reference_ml: dict[Region, tuple[float, float]]


def check_facts(path: str | Path, facts: Mapping[str, Any]) -> None:
    """Raise InputError where what a file says of its network is of a wrong type, out of range, or at odds."""
    check_network_settings(path, facts.get("config"))
    misfit = find_misfit(facts, ModelFacts)
    thresholds, regions = facts.get("thresholds"), facts["config"]["regions"]
    if not misfit and thresholds is not None and len(thresholds) != len(regions):
        misfit = f"it has {len(thresholds)} thresholds for {len(regions)} regions"
    cleaned = (facts.get("postprocessing") or {}).get("settings", {}) if not misfit else {}
    if other := [region for region in cleaned if region not in regions]:
        misfit = f"its post-processing is of {other[0]}, which it does not segment"
    if misfit:
        raise InputError(path, f"its settings cannot be used: {misfit}", "take another copy of the file")


def check_onnx_facts(path: str | Path, network: OnnxNetwork, facts: Mapping[str, Any]) -> None:
    """Raise InputError where an ONNX file's metadata cannot be used or is not of its graph."""
    check_facts(path, facts)
    config = facts["config"]
    channels = len(config["modalities"]) * (2 * config["context"] + 1)
    plane = [config["size"], config["size"]]
    if network.shapes != [("slab", [channels, *plane]), ("logits", [len(config["regions"]), *plane])]:
        raise InputError(path, "its graph has not the shapes that its settings say", "export it again")
