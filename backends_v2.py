"""What runs a trained network: torch with batch norm folded into the convolutions, or onnxruntime.

Both take slabs (N, C*K, H, W) float32 and give logits (N, R, H, W), as the network they were made from does.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model_drunet_v2 import DecoderLevel
from utils_v2 import InputError

ONNX_FORMAT = "drunet-v2-onnx/1"


# ------------------------------------------------------------------------------------------------------------
# torch
# ------------------------------------------------------------------------------------------------------------


def prepare_network(network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a network for inference: batch norm folded, channels last, weights kept in `dtype`.

    Autocast would cast the weights anew in every forward pass. None is float32. The copy does not follow
    later changes of the network.
    """
    ready = fold_batch_norm(network).requires_grad_(False)
    return ready.to(device, dtype or torch.float32, memory_format=torch.channels_last)


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose batch norms are part of the convolutions before them.

    In evaluation mode a batch norm is s * x + t per channel. After a convolution, s goes into its weight and
    t into its bias. A decoder level norms the sum of two maps: s goes into both convolutions, t into one.
    """
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
        elif isinstance(module, DecoderLevel):
            _fold_join(module)
    return folded


def _fold_sequence(layers: nn.Sequential) -> None:
    for index in range(len(layers) - 1):
        if isinstance(layers[index], nn.Conv2d) and isinstance(layers[index + 1], _BatchNorm):
            layers[index] = fuse_conv_bn_eval(layers[index], layers[index + 1])
            layers[index + 1] = nn.Identity()


def _fold_join(level: DecoderLevel) -> None:
    if not isinstance(level.norm, _BatchNorm):
        return
    # bilinear upsampling leaves the constant t as it is, the gate would not: t goes below, not to the skip
    level.from_below = fuse_conv_bn_eval(level.from_below, level.norm)
    level.from_skip = fuse_conv_bn_eval(level.from_skip, level.norm)
    level.from_skip.bias = None
    level.norm = nn.Identity()


class FixedBatch(nn.Module):
    """A network that always sees one batch size, free places zero: another one would be compiled anew."""

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.network = network
        self.batch_size = batch_size

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of at most `batch_size` slabs."""
        free = self.batch_size - len(slab)
        if free:
            slab = torch.cat([slab, slab.new_zeros(free, *slab.shape[1:])])
            slab = slab.contiguous(memory_format=torch.channels_last)
        return self.network(slab)[: self.batch_size - free]


def compile_prepared(
    network: nn.Module, shape: Sequence[int], device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, str]:
    """Return a network of `prepare_network` compiled for slabs (N, C*K, H, W), and a sentence that says so.

    Where that fails the network comes back as it is. Weights are built into the code; fewer slabs than N are
    filled up.
    """
    try:
        compiled = FixedBatch(torch.compile(network, options={"freezing": True}), shape[0])
        slab = torch.zeros(tuple(shape), device=device).contiguous(memory_format=torch.channels_last)
        # torch compiles in the first forward pass
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            compiled(slab)
    except Exception as error:
        # no compiler, an operator or a Python version it lacks, no memory: each has a type of its own
        return network, warn_of_compiling(error)
    return compiled, f"the network is compiled, for {shape[0]} slabs a pass"


def warn_of_compiling(error: Exception) -> str:
    """Return the sentence that says why --compile is not followed."""
    first_line = str(error).strip().split("\n")[0]
    return f"warning: --compile failed ({type(error).__name__}: {first_line}); going on without it"


# ------------------------------------------------------------------------------------------------------------
# onnxruntime
# ------------------------------------------------------------------------------------------------------------


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
            f"{path}: the ONNX backend needs the package onnxruntime; pip install onnxruntime."
        ) from error
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; write one with export_v2.py.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(str(path), options, _choose_providers(onnxruntime, device))
    except Exception as error:
        # onnxruntime raises a dozen types of its own for a file that is foreign or cut short
        raise InputError(
            f"{path}: not a readable ONNX file ({type(error).__name__}); export it again."
        ) from error
    properties = session.get_modelmeta().custom_metadata_map
    if properties.get("format") != ONNX_FORMAT:
        raise InputError(f"{path}: not a network of this project; write one with export_v2.py.")
    return OnnxNetwork(session), {
        name: json.loads(value) for name, value in properties.items() if name != "format"
    }


def _choose_providers(onnxruntime: Any, device: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    providers = onnxruntime.get_available_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" in providers:
        card = {"device_id": device.index or 0}  # else all ranks would take the first
        return [("CUDAExecutionProvider", card), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]
