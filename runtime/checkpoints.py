"""Checkpoints: tensors and plain values, written atomically, read with weights_only=True and a hash."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.files import write_atomically
from runtime.log import log

CHECKPOINT_FORMAT = "drunet-v2/2"
WEIGHTS_HASHED = "drunet-v2/1"  # the format before: a hash of the weights alone
LAST, BEFORE, DAMAGED = "last.pt", "last_before.pt", "last_damaged.pt"  # of a run's folder


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


def content_sha256(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all that a checkpoint holds, but for the entry "sha256" itself.

    Keys, types and values count, and of tensors dtype, shape and bytes; memory layout, the order of keys and
    the device do not.
    """
    digest = hashlib.sha256()
    for place, value in _walk({key: value for key, value in content.items() if key != "sha256"}, ""):
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{place} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{place} {value!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _walk(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield every tensor and plain value in nested dictionaries, lists and tuples, with its place.

    A container comes before what it holds, as its type and length, so that an empty one counts too.
    """
    if isinstance(value, Mapping):
        yield place, ("dict", len(value))
        for key in sorted(value, key=repr):
            yield from _walk(value[key], f"{place}/{key!r}")
    elif isinstance(value, list | tuple):
        yield place, (type(value).__name__, len(value))
        for index, each in enumerate(value):
            yield from _walk(each, f"{place}/{index}")
    else:
        yield place, value


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` holds tensors and plain values, its network under "model".

    last.pt keeps the one before it as last_before.pt. Raises InputError where a tensor is not finite or the
    file cannot be written; what was there stays.
    """
    for place, value in _walk(content, ""):
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise InputError(
                path,
                f"is not written, as {place} is not finite",
                "go on from the checkpoints that are there",
            )
    content = {**content, "format": CHECKPOINT_FORMAT, "weights_sha256": weights_sha256(content["model"])}
    content["sha256"] = content_sha256(content)

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # all that torch says of a full disk
            raise InputError(
                path,
                "cannot be written: the disk is full, or the folder is gone",
                "free space and start again (training: with --resume); the checkpoint before it stands",
            ) from error

    def keep_before() -> None:
        if path.name != LAST or not path.exists():
            return
        before = path.with_name(BEFORE)
        before.unlink(missing_ok=True)
        try:
            os.link(path, before)  # two names for a moment, so that there is never none
        except OSError:  # a file system without links
            os.replace(path, before)

    write_atomically(path, write, keep_before)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, `weights_only=True`; InputError where it is not ours or damaged."""
    if path.is_dir():
        raise InputError(path, "is a folder", "name a best.pt in it, as train_drunet_v2.py writes one")
    if not path.is_file():
        raise InputError(path, "no such checkpoint", "train one with train_drunet_v2.py or give its path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle, zip and runtime errors alike for a file that is foreign, unsafe or cut short
        raise InputError(
            path, f"not a readable checkpoint ({type(error).__name__})", "use a best.pt of a run"
        ) from error
    stamp = content.get("format") if isinstance(content, dict) else None
    hash_name = {CHECKPOINT_FORMAT: "sha256", WEIGHTS_HASHED: "weights_sha256"}.get(str(stamp))
    if hash_name is None or not {"model", "weights_sha256", hash_name} <= content.keys():
        raise InputError(path, "not a DRUnet V2 checkpoint", "use the best.pt or last.pt of a run")
    try:
        found = content_sha256(content) if hash_name == "sha256" else weights_sha256(content["model"])
    except Exception:  # damage can make of a tensor one that has no bytes, or none at all
        found = None
    if found is None or found != content[hash_name]:
        what = "content does" if hash_name == "sha256" else "weights do"
        raise InputError(path, f"the {what} not match the SHA-256", "the file is damaged, take another copy")
    return content


def has_last(folder: Path) -> bool:
    """Return whether a run's folder holds a state to go on from."""
    return any((folder / name).exists() for name in (LAST, BEFORE))


def load_last(folder: Path) -> tuple[dict[str, Any], InputError | None]:
    """Read last.pt of a run; where that is damaged or gone, last_before.pt, with the error of last.pt."""
    try:
        return load_checkpoint(folder / LAST), None
    except InputError as error:
        if not (folder / BEFORE).is_file():
            raise
        return load_checkpoint(folder / BEFORE), error


def fall_back(folder: Path, error: InputError) -> None:
    """Put last_before.pt in the place of last.pt, and that aside as last_damaged.pt; log why."""
    log.warning("%s The run goes on from the epoch before, %s.", error, folder / BEFORE)
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / DAMAGED)
    os.replace(folder / BEFORE, folder / LAST)


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says beside its weights, which are not read; InputError where it is not ours.

    For lists of many checkpoints; what is computed with goes through `load_checkpoint`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # as in load_checkpoint
        raise InputError(path, f"not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") not in (CHECKPOINT_FORMAT, WEIGHTS_HASHED):
        raise InputError(path, "not a DRUnet V2 checkpoint", "use the best.pt or last.pt of a run")
    return {name: value for name, value in content.items() if name != "model"}


def newest_run(results: Path) -> Path:
    """Return the run folder in `results` whose best.pt is newest, or that of one of its folds.

    Raises InputError where there is none.
    """
    runs = {path: path.parent for path in results.glob("*/best.pt")}
    runs |= {path: path.parent.parent for path in results.glob("*/fold_*/best.pt")}
    if not runs:
        raise InputError(results, "no run with a best.pt", "train one first: python train_drunet_v2.py")
    return runs[max(sorted(runs), key=lambda path: path.stat().st_mtime)]


def load_weights(network: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Copy a checkpoint's weights into a network; raises InputError where they do not fit its widths."""
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        widths = "-".join(map(str, checkpoint["config"]["widths"]))
        raise InputError(
            path, f"the weights do not fit the network of its settings, widths {widths}", "take another copy"
        ) from error
