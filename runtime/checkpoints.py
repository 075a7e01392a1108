"""Checkpoints: tensors and plain values, written atomically, read with weights_only=True and a hash."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.files import write_atomically

CHECKPOINT_FORMAT = "drunet-v2/1"


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of a state dict, on whatever device it is."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` holds tensors and plain values, its network under "model"."""
    content = {**content, "format": CHECKPOINT_FORMAT, "weights_sha256": weights_sha256(content["model"])}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, `weights_only=True`; InputError where it is not ours or damaged."""
    if not path.is_file():
        raise InputError(path, "no such checkpoint", "train one with train_drunet_v2.py or give its path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle, zip and runtime errors alike for a file that is foreign, unsafe or cut short
        raise InputError(
            path, f"not a readable checkpoint ({type(error).__name__})", "use a best.pt of a run"
        ) from error
    is_ours = isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT
    if not is_ours or not {"model", "weights_sha256"} <= content.keys():
        raise InputError(path, "not a DRUnet V2 checkpoint", "use the best.pt or last.pt of a run")
    if weights_sha256(content["model"]) != content["weights_sha256"]:
        raise InputError(
            path, "the weights do not match their SHA-256", "the file is damaged, take another copy"
        )
    return content


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says beside its weights, which are not read; InputError where it is not ours.

    For lists of many checkpoints; what is computed with goes through `load_checkpoint`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # as in load_checkpoint
        raise InputError(path, f"not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise InputError(path, "not a DRUnet V2 checkpoint", "use the best.pt or last.pt of a run")
    return {name: value for name, value in content.items() if name != "model"}


def newest_run(results: Path) -> Path:
    """Return the run folder in `results` whose best.pt is newest; raises InputError where there is none."""
    runs = sorted(results.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(results, "no run with a best.pt", "train one first: python train_drunet_v2.py")
    return runs[-1].parent


def load_weights(network: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Copy a checkpoint's weights into a network; raises InputError where they do not fit its widths."""
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        widths = "-".join(map(str, checkpoint["config"]["widths"]))
        raise InputError(
            path, f"the weights do not fit the network of its settings, widths {widths}", "take another copy"
        ) from error
