"""A new run from the weights of an old one: which of them fit, and whose scans they have seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cohort.cache import PreparedCase
from cohort.leakage import (
    Identity,
    find_seen,
    identify_case,
    identity_of_ids,
    pack_identities,
    select_proven,
    unpack_identities,
)
from cohort.network import PARTS, check_network_settings, complete_settings
from runtime.checkpoints import load_checkpoint
from runtime.errors import InputError
from runtime.log import log

ARCHITECTURE = ("widths", *PARTS)  # what must be the same
NETWORK_SETTINGS = (*ARCHITECTURE, "modalities", "context", "regions", "size")
FIRST = (
    "encoder.0.convolutions.0.weight",
    "encoder.0.shortcut.0.weight",
)  # (filters, C*K, ...): see the slab


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint to start from."""

    path: Path
    checkpoint: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What the new run's checkpoints say of it."""
        facts = {"path": str(self.path), "weights_sha256": self.checkpoint["weights_sha256"]}
        return facts | {"data_kind": self.checkpoint.get("data_kind", "unknown")}

    @property
    def identities(self) -> list[Identity]:
        """All cases its training and validation have seen, those of the weights it began with included."""
        return identities_of(self.checkpoint)


def read_initial(path: str | Path) -> InitialWeights:
    """Read the checkpoint of --init; InputError where it is none or does not say what it is of."""
    path = Path(path)
    checkpoint = load_checkpoint(path)
    needed = {"widths", "modalities", "regions", "context"}
    if not needed <= checkpoint.get("config", {}).keys() or "seen" not in checkpoint:
        raise InputError(
            f"--init {path}",
            "does not say what network it is of and which cases it has seen",
            "give a best.pt",
        )
    check_network_settings(f"--init {path}", checkpoint["config"], tuple(needed))
    return InitialWeights(path, checkpoint)


def network_settings(initial: InitialWeights) -> dict[str, Any]:
    """Return the settings of a checkpoint's network, the defaults of a run that starts from it."""
    config = complete_settings(initial.checkpoint["config"])
    settings = {name: config[name] for name in NETWORK_SETTINGS if name in config}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


# ------------------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------------------


def channels_of(settings: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return (modality, slice offset) of each input channel, in the order of `gather_slab`."""
    offsets = range(-settings["context"], settings["context"] + 1)
    return [(modality, offset) for modality in settings["modalities"] for offset in offsets]


def start_from(network: nn.Module, settings: Mapping[str, Any], initial: InitialWeights) -> None:
    """Copy a checkpoint's weights into an untrained network with these settings, and log what has none.

    An input channel takes the weights of its modality and slice offset; a new one starts at 0, so that the
    network at first computes what it did. A region takes the output of its name; a new one starts untrained.
    Raises InputError where widths or switches differ, or no channel is the same.
    """
    config, asked = (complete_settings(each) for each in (initial.checkpoint["config"], settings))
    for name in ARCHITECTURE:
        own, other = asked[name], config[name]
        if list(np.atleast_1d(own)) != list(np.atleast_1d(other)):
            raise InputError(
                f"--init {initial.path}",
                f"its network has {name} {other}, this run {own}",
                "leave the flag out",
            )
    weights = dict(initial.checkpoint["model"])
    fresh = network.state_dict()
    for name in FIRST:
        if name in weights and name in fresh:
            weights[name] = place_channels(weights[name], fresh[name], settings, initial)
    for name in ("head.weight", "head.bias"):
        weights[name] = place_regions(weights[name], fresh[name], settings["regions"], config["regions"])
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        # with as many channels as filters the first block has no convolution in its shortcut
        raise InputError(
            f"--init {initial.path}",
            "its weights do not fit this run's network",
            "take the same --modalities",
        ) from error
    log_start_from(settings, initial)


def place_channels(
    weight: Tensor, fresh: Tensor, settings: Mapping[str, Any], initial: InitialWeights
) -> Tensor:
    """Return weights (filters, C*K, ...) for the channels of `settings`, 0 for those the checkpoint lacks."""
    channels, before = channels_of(settings), channels_of(initial.checkpoint["config"])
    if not set(channels) & set(before):
        raise InputError(
            f"--init {initial.path}",
            f"its network takes {', '.join(initial.checkpoint['config']['modalities'])}, this run "
            f"{', '.join(settings['modalities'])}: no input channel is the same",
            "share a modality with it",
        )
    placed = torch.zeros_like(fresh)
    for index, channel in enumerate(channels):
        if channel in before:
            placed[:, index] = weight[:, before.index(channel)]
    return placed


def place_regions(values: Tensor, fresh: Tensor, regions: Sequence[str], before: Sequence[str]) -> Tensor:
    """Return the head's values (R, ...) for `regions`, those of `fresh` for the ones the checkpoint lacks."""
    placed = fresh.clone()
    for index, region in enumerate(regions):
        if region in before:
            placed[index] = values[list(before).index(region)]
    return placed


def log_start_from(settings: Mapping[str, Any], initial: InitialWeights) -> None:
    """Log where the weights come from, and which channels and regions are new or left out."""
    config = initial.checkpoint["config"]
    log.info("starting from the weights of %s", initial.path)
    channels, before = channels_of(settings), channels_of(config)
    for what, names in (
        ("new input channels, which start at weight 0", [c for c in channels if c not in before]),
        ("input channels it had that are left out", [c for c in before if c not in channels]),
    ):
        if names:
            log.warning(
                "%s: %s", what, ", ".join(f"{modality} slice {offset:+d}" for modality, offset in names)
            )
    if new := [region for region in settings["regions"] if region not in config["regions"]]:
        log.warning("new regions, which start untrained: %s", ", ".join(new))


# ------------------------------------------------------------------------------------------------------------
# Whose scans the weights have seen
# ------------------------------------------------------------------------------------------------------------


def identities_of(checkpoint: Mapping[str, Any]) -> list[Identity]:
    """Return the identity of every case a checkpoint has seen, by ids alone where it is an old one."""
    known = unpack_identities(checkpoint)
    if known is not None:
        return known
    seen = checkpoint.get("seen", [])
    if seen:
        log.warning("%d cases that these weights have seen are known by their ids alone", len(seen))
    return [identity_of_ids(case_id, patient_id) for case_id, patient_id, *_ in seen]


def join_identities(own: Sequence[Identity], earlier: Sequence[Identity]) -> list[Identity]:
    """Return the identities of a run's cases, then those of earlier ones that are not among them."""
    names = {(one.case_id, one.image_sha256) for one in own}
    return [*own, *(one for one in earlier if (one.case_id, one.image_sha256) not in names)]


def refuse_seen(
    path: str | Path, seen: Sequence[Identity], validation: Sequence[Identity], test: Sequence[Identity]
) -> int:
    """Raise InputError where the weights a run starts from have seen a case or patient of its test set.

    Returns how many cases of validation they have seen, which are warned of: the epoch and the threshold are
    then chosen on cases that were learnt.
    """
    leakage = select_proven(find_seen("test", test, seen))
    if len(leakage):
        first = leakage.iloc[0]
        raise InputError(
            f"--init {path}",
            f"its weights have seen {first['case']} of the test set, as {first['training_case']} by "
            f"{first['evidence']}, one of {len(leakage)} such",
            "give --split with the split.json of the run they are from, or start from other weights",
        )
    if count := len(select_proven(find_seen("validation", validation, seen))):
        log.warning(
            "%d of %d validation cases were seen by the weights of %s: validation Dice is too high, and the "
            "threshold is chosen on it",
            count,
            len(validation),
            path,
        )
    return count


def find_facts(
    path: str | None,
    weights: InitialWeights | None,
    resumed: Mapping[str, Any] | None,
    cases: Mapping[str, Sequence[PreparedCase]],
) -> dict[str, Any]:
    """Return what a run's checkpoints say of the cases seen, by it and by the weights of --init, `path`.

    `weights` are those of a new run; a resumed one has them from its own checkpoint. Raises InputError where
    they have seen a test case; see `refuse_seen`.
    """
    own, validation, test = (
        list(map(identify_case, cases[part])) for part in ("train", "validation", "test")
    )
    own += validation
    if path is None:
        return pack_identities(own)
    earlier = weights.identities if weights else identities_of(resumed)
    if weights:
        facts = weights.facts | {"validation_seen": refuse_seen(path, earlier, validation, test)}
    else:  # the run's own cases are among them, and it was asked when it started
        facts = resumed.get("init")
    return pack_identities(join_identities(own, earlier)) | {"init": facts}
