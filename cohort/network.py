"""What a checkpoint or an exported file says of its network, held against the ranges of the settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohort.cases import Modalities
from cohort.labels import Regions
from model_drunet_v2 import SWITCHES, WIDTHS, SqueezeForm, Widths
from runtime.command import Neighbours, Side, from_plain
from runtime.errors import InputError

PARTS = (*SWITCHES, "se_form", "compress")  # of the network, each a setting that earlier versions may lack
NEEDED = ("modalities", "regions", "context", "size", "widths")


@dataclass(frozen=True)
class NetworkSettings:
    """The settings that make a network and its input."""

    modalities: Modalities = ("flair",)
    regions: Regions = ("WT",)
    context: Neighbours = 1
    size: Side = 256
    widths: Widths = WIDTHS
    use_se: bool = True
    use_attention: bool = True
    dilated: bool = True
    residual: bool = True
    se_form: SqueezeForm = "slab"  # where a file does not say it; training's default is another
    compress: bool = False


def complete_settings(config: Any) -> Any:
    """Return a run's settings with what its network had where they, of an earlier version, do not say it."""
    if not isinstance(config, Mapping):
        return config  # which is refused where it is read as settings
    return {name: getattr(NetworkSettings, name) for name in PARTS} | dict(config)


def check_network_settings(path: str | Path, config: Any, needed: tuple[str, ...] = NEEDED) -> None:
    """Raise InputError where the settings in a file make no network.

    A switch that is missing is as `build_network` takes it.
    """
    missing = [name for name in needed if name not in config] if isinstance(config, Mapping) else ["settings"]
    if missing:
        raise InputError(path, f"does not say of its network the {missing[0]}", "take another copy")
    settings = from_plain(NetworkSettings, config, path)
    multiple = 2 ** (len(settings.widths) - 1)
    if "size" in config and settings.size % multiple:
        raise InputError(
            path,
            f"its size {settings.size} is no multiple of {multiple}, as {len(settings.widths)} widths need",
            "take another copy",
        )


def check_widths(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError where weights are not of their checkpoint's widths, before a network is made."""
    widths, weights = checkpoint["config"]["widths"], checkpoint["model"]
    for level, width in enumerate(widths):
        weight = weights.get(f"encoder.{level}.convolutions.0.weight")
        if weight is None or len(weight) != width:
            shown = "-".join(map(str, widths))
            raise InputError(
                path,
                f"the weights do not fit the network of its settings, widths {shown}",
                "take another copy",
            )
