"""Several networks as one: the mean of their probabilities, and what their checkpoints say together."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cohort.initial import identities_of, join_identities
from cohort.leakage import pack_identities
from cohort.phantom import join_kinds
from runtime.errors import InputError

ALIKE = ("modalities", "regions", "context", "size")  # the settings that members must have in common


class Members(nn.Module):
    """Networks that see the same slabs: (N, C*K, S, S) in, the logits of each (N, M, R, S, S) out."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of each member. Their probabilities are to be averaged, not these."""
        return torch.stack([network(slab) for network in self.networks], 1)


def check_members(paths: Sequence[Path], checkpoints: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where checkpoints cannot be averaged, or one is named twice."""
    known: dict[str, Path] = {}
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if path.suffix == ".onnx":
            raise InputError(path, "an ONNX file cannot be averaged with others", "name best.pt or last.pt")
        for name in ALIKE:
            own, other = (
                np.atleast_1d(each["config"][name]).tolist() for each in (checkpoint, checkpoints[0])
            )
            if own != other:
                raise InputError(
                    path,
                    f"its {name} is {_words(own)}, that of {paths[0]} is {_words(other)}",
                    "average networks of the same input and regions",
                )
        weights = checkpoint["weights_sha256"]
        if weights in known:
            raise InputError(path, f"has the weights of {known[weights]}", "name each network once")
        known[weights] = path


def _words(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


def join_checkpoints(paths: Sequence[Path], checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the checkpoints of an ensemble say together, without weights and post-processing.

    The threshold of a region is the mean of the members'. It has seen what any of them has. "members" lists
    their files. "split_sha256" is there where all have one split, else no case is held out from all.
    """
    thresholds = [each.get("thresholds") or [0.5] * len(each["config"]["regions"]) for each in checkpoints]
    dropout = min(each["config"].get("modality_dropout", 0.0) for each in checkpoints)  # 0 where one has none
    joined: dict[str, Any] = {
        "config": checkpoints[0]["config"] | {"modality_dropout": dropout},
        "members": [str(path) for path in paths],
        "thresholds": [float(value) for value in np.mean(thresholds, 0)],
        "weights_sha256": join_sha256([each["weights_sha256"] for each in checkpoints]),
        "data_kind": join_kinds(each["data_kind"] for each in checkpoints),
        "spacing_mm": join_spacing([each["spacing_mm"] for each in checkpoints if each.get("spacing_mm")]),
        "reference_ml": join_ranges([each.get("reference_ml") or {} for each in checkpoints]),
        "declared_different": sorted(
            {tuple(pair) for each in checkpoints for pair in each.get("declared_different", ())}
        ),
    }
    seen = identities_of(checkpoints[0])
    for checkpoint in checkpoints[1:]:
        seen = join_identities(seen, identities_of(checkpoint))
    splits = {each.get("split_sha256") for each in checkpoints}
    return joined | pack_identities(seen) | ({"split_sha256": splits.pop()} if len(splits) == 1 else {})


def join_sha256(digests: Sequence[str]) -> str:
    """Return the SHA-256 that stands for several files: that of their own, one a line, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def join_spacing(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any] | None:
    """Return the spacings in mm that any member was trained at; None where no member knows its own."""
    if not tables:
        return None
    joins = {"median": statistics.median, "low": min, "high": max}
    return {
        axis: {name: float(join([table[axis][name] for table in tables])) for name, join in joins.items()}
        for axis in tables[0]
    }


def join_ranges(ranges: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return per region the smallest and the largest volume in ml of any member's training."""
    regions = dict.fromkeys(region for each in ranges for region in each)
    return {
        region: [
            min(each[region][0] for each in ranges if region in each),
            max(each[region][1] for each in ranges if region in each),
        ]
        for region in regions
    }
