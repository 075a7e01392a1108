"""An exported network, an ONNX file of export_v2.py, run by onnxruntime in place of the network."""

import hashlib
import mmap
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.files import describe_error
from runtime.onnx_check import check_onnx
from runtime.plain import parse_json

ONNX_FORMAT = "drunet-v2-onnx/2"
FORMATS = "drunet-v2-onnx/"  # of all versions
# The file's own hash among its metadata, as protobuf writes it: key, then a text of 64 characters. The hash
# is over the file with 64 zeros there.
NO_HASH = "0" * 64
HASH_PLACE = re.compile(rb"file_sha256\x12@([0-9a-f]{64})")


class OnnxNetwork(nn.Module):
    """An ONNX file in place of the network: slabs (N, C*K, S, S) in, logits (N, R, S, S) out."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    @property
    def shapes(self) -> list[tuple[str, list[Any]]]:
        """Name and shape behind the batch of each input, then of each output."""
        return [
            (each.name, list(each.shape[1:]))
            for each in (*self.session.get_inputs(), *self.session.get_outputs())
        ]

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of a batch of slabs, in float32 on the CPU."""
        (logits,) = self.session.run(["logits"], {"slab": slab.float().cpu().contiguous().numpy()})
        return torch.from_numpy(logits)


def seal(content: bytes) -> bytes:
    """Return an ONNX file's bytes, with NO_HASH as its `file_sha256`, with their hash in that place."""
    place = HASH_PLACE.search(content)
    assert place, "the metadata has no file_sha256"
    return content[: place.start(1)] + hashlib.sha256(content).hexdigest().encode() + content[place.end(1) :]


def is_sealed(path: Path) -> bool:
    """Return whether an ONNX file has a hash of itself; InputError where it is not the file's."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = HASH_PLACE.search(content)
        if not place:
            return False
        start, end, stated = place.start(1), place.end(1), place[1].decode()
        del place  # it keeps the map open
        digest = hashlib.sha256()
        with memoryview(content) as view:
            for part in (view[:start], NO_HASH.encode(), view[end:]):
                digest.update(part)
                if isinstance(part, memoryview):
                    part.release()
    if digest.hexdigest() != stated:
        raise InputError(path, "does not match its SHA-256: it was damaged or changed", "export it again")
    return True


def load_onnx(path: str | Path, device: torch.device) -> tuple[OnnxNetwork, dict[str, Any]]:
    """Return an exported network and its metadata; see export_v2 for what that holds.

    Runs on CUDA where `device` is a CUDA device and onnxruntime has it, on the CPU elsewhere. Raises
    InputError where onnxruntime is missing, or the file is missing, damaged or not of export_v2.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            path, "an ONNX file needs the package onnxruntime", "pip install onnxruntime"
        ) from error
    if not Path(path).is_file():
        raise InputError(path, "no such file", "write one with export_v2.py")
    try:
        sealed = is_sealed(Path(path))
        check_onnx(Path(path))
    except OSError as error:
        raise InputError(path, f"not readable ({describe_error(error)})", "export it again") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, _choose_providers(onnxruntime, device))
        network, properties = OnnxNetwork(session), session.get_modelmeta().custom_metadata_map
        _ = network.shapes  # their names, too, may be no UTF-8
    except Exception as error:
        # onnxruntime raises a dozen types of its own for a file that is foreign or cut short
        raise InputError(
            path, f"not a readable ONNX file ({type(error).__name__})", "export it again"
        ) from error
    if not properties.get("format", "").startswith(FORMATS):
        raise InputError(path, "not a network of this project", "write one with export_v2.py")
    if properties["format"] != ONNX_FORMAT or not sealed:
        raise InputError(path, "was exported by another version, without a hash", "export it again")
    try:
        facts = {
            name: parse_json(value)
            for name, value in properties.items()
            if name not in ("format", "file_sha256")
        }
    except ValueError as error:
        raise InputError(path, f"its metadata cannot be read ({error})", "export it again") from error
    return network, facts


def _choose_providers(onnxruntime: Any, device: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    providers = onnxruntime.get_available_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" in providers:
        card = {"device_id": device.index or 0}  # else all ranks would take the first
        return [("CUDAExecutionProvider", card), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]
