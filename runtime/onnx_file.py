"""An exported network, an ONNX file of export_v2.py, run by onnxruntime in place of the network."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.onnx_check import check_onnx

ONNX_FORMAT = "drunet-v2-onnx/1"


class OnnxNetwork(nn.Module):
    """An ONNX file in place of the network: slabs (N, C*K, S, S) in, logits (N, R, S, S) out."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of a batch of slabs, in float32 on the CPU."""
        (logits,) = self.session.run(["logits"], {"slab": slab.float().cpu().contiguous().numpy()})
        return torch.from_numpy(logits)


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
    check_onnx(Path(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, _choose_providers(onnxruntime, device))
    except Exception as error:
        # onnxruntime raises a dozen types of its own for a file that is foreign or cut short
        raise InputError(
            path, f"not a readable ONNX file ({type(error).__name__})", "export it again"
        ) from error
    properties = session.get_modelmeta().custom_metadata_map
    if properties.get("format") != ONNX_FORMAT:
        raise InputError(path, "not a network of this project", "write one with export_v2.py")
    return OnnxNetwork(session), {
        name: json.loads(value) for name, value in properties.items() if name != "format"
    }


def _choose_providers(onnxruntime: Any, device: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    providers = onnxruntime.get_available_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" in providers:
        card = {"device_id": device.index or 0}  # else all ranks would take the first
        return [("CUDAExecutionProvider", card), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]
