"""DRUnet V2: a 2.5D deep residual U-Net with dilation, squeeze-and-excitation and attention gates.

    slab -> 64 -> 128 -> 256 -> 512 -> 1024 -> 512 -> 256 -> 128 -> 64 -> logits
            |______|______|______|____ gates ___|______|______|______|

U-Net: Ronneberger et al. 2015 (arXiv 1505.04597). Residual blocks: He et al. 2016 (arXiv 1603.05027 and
1512.03385). Dilation: Yu and Koltun 2016 (arXiv 1511.07122). Squeeze-and-excitation: Hu et al. 2018 (arXiv
1709.01507). Attention gates: Oktay et al. 2018 (arXiv 1804.03999). A decoder lighter than the encoder, with
one 3 x 3 convolution per level, follows the residual-encoder nnU-Net: Isensee et al. 2024 (arXiv 2404.09556).

Run as a command it prints parameters, GFLOP per slab and activation memory:

    python model_drunet_v2.py --widths 64 128 256 512 1024
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime import signals

    signals.catch_signals()

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runtime.command import Length, Side, Width, run_command
from runtime.cost import count_flops, count_parameters, estimate_activation_bytes
from runtime.errors import InputError
from runtime.log import log
from runtime.passes import add_weighted, channel_mean, fork, run_checkpointed

WIDTHS = (64, 128, 256, 512, 1024)
Widths = Annotated[tuple[Width, ...], Length(2, 8)]  # as a setting
MOST_PARAMETERS = 10**9  # of 3 x 3 convolutions, about; those of WIDTHS have 2 % of it
SWITCHES = ("use_se", "use_attention", "dilated", "residual")  # parts that an ablation switches off
SqueezeForm = Literal["slab", "head"]  # over what squeeze-and-excitation averages
BRIGHT_FROM, BRIGHT_SLOPE = 1.0, 0.35  # z-score above which a slab is compressed, and by what factor
HEAD_STEP = 0.1  # of the way from a slab's darkest to its brightest: what is nearer to the darkest is air

# the formatter would move the shapes out of their column
# fmt: off


def conv3x3(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps H and W, without a bias: the norm that follows would undo it."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)


class ResidualBlock(nn.Module):
    """3 x 3 convolutions with batch norm, then SE, added to the input; x (N, in, H, W) -> (N, out, H, W).

    One convolution per entry of `dilations`. With `residual` off the block is the plain stack.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dilations: Sequence[int], use_se: bool, residual: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = (in_channels, *[out_channels] * (len(dilations) - 1))
        for channels, dilation in zip(inputs, dilations, strict=True):
            layers += [conv3x3(channels, out_channels, dilation), nn.BatchNorm2d(out_channels)]
            layers += [nn.ReLU()]  # in place takes twice as long in 16 bits on a CPU
        self.convolutions = nn.Sequential(*layers[:-1])  # the last ReLU follows the sum
        self.se = SqueezeExcitation(out_channels) if use_se else None
        self.shortcut: nn.Module | None = nn.Identity() if residual else None
        if residual and in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """Return the block's output after its last ReLU."""
        x, again = fork(x, 2)                                                 # (N, in, H, W)
        y = self.convolutions(x)                                              # (N, out, H, W)
        weight = None
        if self.se is not None:
            y, judged = fork(y, 2)
            weight = self.se(judged, head)                                    # (N, out, 1, 1)
        base = self.shortcut(again) if self.shortcut is not None else None    # (N, out, H, W)
        return F.relu(add_weighted(base, y, weight))                          # (N, out, H, W)


class SqueezeExcitation(nn.Module):
    """Judge each channel by the means of all: x (N, C, H, W) -> weights in 0..1 (N, C, 1, 1).

    The means are over the head alone where its share of each pixel is given, `head` (N, 1, H, W), or over the
    whole slab, as first published. A mean over the slab also measures how much air and scalp there is, by
    which a network that was trained on whole heads misjudges a skull-stripped brain; benchmarks/README.md.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """Return the weights by which x is to be multiplied."""
        mean = channel_mean(x) if head is None else head_mean(x, head)  # (N, C, 1, 1)
        hidden = F.relu(self.squeeze(mean))                                   # (N, C/16, 1, 1)
        return torch.sigmoid(self.excite(hidden))                             # (N, C, 1, 1)


def compress_bright(slab: Tensor) -> Tensor:
    """Return a slab of z-scores whose brightest tissue stands out less, in the same order.

    Where training shows whole heads, fat and scalp are the brightest (z 3 to 8) and a tumour is less bright
    (LGG: 0.6 to 2.4), so a network learns that what is brighter is no tumour. On another scanner, or in a
    skull-stripped brain, a tumour can be as bright as scalp and is left out; benchmarks/README.md.
    """
    return slab - (1 - BRIGHT_SLOPE) * F.relu(slab - BRIGHT_FROM)             # (N, C*K, H, W)


def find_head(slab: Tensor) -> Tensor:
    """Return where a slab (N, C*K, H, W) shows the head, (N, 1, H, W) of 0 and 1; 0 for a constant slab."""
    brightness = slab.float().mean(1, keepdim=True)                           # (N, 1, H, W)
    low, high = (edge(brightness, (2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
    return (brightness > low + HEAD_STEP * (high - low)).to(slab.dtype)       # (N, 1, H, W)


def head_mean(x: Tensor, head: Tensor) -> Tensor:
    """Return the mean of x (N, C, H, W) weighted by head (N, 1, H, W), (N, C, 1, 1); 0 without a head."""
    share = head.float() / head.float().sum((2, 3), keepdim=True).clamp(min=1)  # sums to 1
    # as a product of matrices: without a copy of x where channels are last, and fast in 16 bits
    mean = share.to(x.dtype).flatten(2) @ x.flatten(2).transpose(1, 2)        # (N, 1, C)
    return mean.transpose(1, 2).unsqueeze(3)                                  # (N, C, 1, 1)


class AttentionGate(nn.Module):
    """Judge each pixel of a skip from the skip and the coarser decoder features below it.

    skip (N, C, H, W), below (N, G, H/2, W/2) -> weights in 0..1 (N, 1, H, W). The gate judges at the coarse
    resolution, at a quarter of the cost, and its weights are upsampled.
    """

    def __init__(self, skip_channels: int, below_channels: int) -> None:
        super().__init__()
        hidden = max(4, skip_channels // 2)
        self.from_skip = nn.Conv2d(skip_channels, hidden, 2, stride=2, bias=False)
        self.from_below = nn.Conv2d(below_channels, hidden, 1)
        self.judge = nn.Conv2d(hidden, 1, 1)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return the weights by which the skip is to be multiplied."""
        joint = F.relu(self.from_skip(skip) + self.from_below(below))         # (N, C/2, H/2, W/2)
        weight = torch.sigmoid(self.judge(joint))                             # (N, 1, H/2, W/2)
        return F.interpolate(weight, scale_factor=2.0, mode="bilinear")       # (N, 1, H, W)


class DecoderLevel(nn.Module):
    """Join the features below with the gated skip and refine them.

    below (N, G, H/2, W/2), skip (N, C, H, W) -> (N, C, H, W). The usual join upsamples the features, gates
    the skip, concatenates both and applies a 1 x 1 convolution. That is the sum of two 1 x 1 convolutions,
    and each of them runs where it is cheap: it commutes with bilinear upsampling, so one runs at the coarse
    resolution; it commutes with the gate's weight per pixel, so gating and adding are one pass.
    """

    def __init__(
        self, below_channels: int, channels: int, use_attention: bool, use_se: bool, residual: bool
    ) -> None:
        super().__init__()
        self.gate = AttentionGate(channels, below_channels) if use_attention else None
        self.from_below = nn.Conv2d(below_channels, channels, 1, bias=False)
        self.from_skip = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.refine = ResidualBlock(channels, channels, (1,), use_se, residual)

    def forward(self, below: Tensor, skip: Tensor, head: Tensor | None = None) -> Tensor:
        """Return the level's output."""
        weight = None
        if self.gate is not None:
            (below, below_too), (skip, skip_too) = fork(below, 2), fork(skip, 2)
            weight = self.gate(skip_too, below_too)                           # (N, 1, H, W)
        up = self.from_below(below)                                           # (N, C, H/2, W/2)
        up = F.interpolate(up, scale_factor=2.0, mode="bilinear")             # (N, C, H, W)
        x = add_weighted(up, self.from_skip(skip), weight)                    # (N, C, H, W)
        return self.refine(F.relu(self.norm(x)), head)                        # (N, C, H, W)


class DRUNetV2(nn.Module):
    """The network: slabs (N, in_channels, H, W) -> logits (N, num_regions, H, W), one sigmoid per region.

    `widths` are the filters of each level, the last one the bottleneck. H and W must be multiples of 2 **
    (levels - 1), 16 by default; ValueError otherwise. `use_se`, `use_attention`, `dilated` and `residual`
    each switch one part off, for ablations; `se_form` says over what SE averages, `compress` whether slabs
    first go through `compress_bright`. With the attribute `checkpointing` on, a training step keeps only the
    levels' outputs and computes what is between them again in the backward pass (Chen et al. 2016, arXiv
    1604.06174): the same function and gradients in less memory and more time.
    """

    def __init__(
        self, in_channels: int = 3, num_regions: int = 1, widths: Sequence[int] = WIDTHS,
        use_se: bool = True, use_attention: bool = True, dilated: bool = True, residual: bool = True,
        se_form: SqueezeForm = "head", compress: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths {tuple(widths)}: at least two positive filter counts are needed")
        if in_channels < 1 or num_regions < 1:
            raise ValueError(f"in_channels {in_channels} and num_regions {num_regions} must be positive")
        parameters = 9 * sum(a * b for a, b in zip((in_channels, *widths), widths, strict=False))
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"widths {tuple(widths)}: more than {parameters:,} parameters")
        self.in_channels = in_channels
        self.multiple = 2 ** (len(widths) - 1)
        self.checkpointing = False
        self.compress = compress
        self.squeezes_head = use_se and se_form == "head"
        dilations = (1, 2) if dilated else (1, 1)
        down = zip((in_channels, *widths[:-1]), widths, strict=True)          # (3, 64) ... (512, 1024)
        up = zip(widths[:0:-1], widths[-2::-1], strict=True)                  # (1024, 512) ... (128, 64)
        self.encoder = nn.ModuleList(ResidualBlock(*step, dilations, use_se, residual) for step in down)
        self.decoder = nn.ModuleList(DecoderLevel(*step, use_attention, use_se, residual) for step in up)
        self.head = nn.Conv2d(widths[0], num_regions, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: He et al. 2015; the head starts at p = 0.05, as tumour is rare."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.constant_(self.head.bias, -2.94)  # log(0.05 / 0.95)

    def forward(self, slab: Tensor) -> Tensor:
        """Return the logits of a batch of slabs; the filters beside it are those of the default widths."""
        self.check_shape(slab)
        heads = [find_head(slab) if self.squeezes_head else None]             # (N, 1, H, W), or None
        skips = []
        slab = compress_bright(slab) if self.compress else slab
        x = self.run_level(self.encoder[0], slab, heads[0])                   # (N, 64, H, W)
        for level in self.encoder[1:]:
            x, skip = fork(x, 2)
            skips.append(skip)
            heads.append(halve(heads[-1]))                                    # (N, 1, H/2..H/16, ...)
            x = self.run_level(level, x, heads[-1], pooled=True)              # (N, 128..1024, H/2..H/16, ...)
        for level, head in zip(self.decoder, heads[-2::-1], strict=True):
            x = self.run_level(level, x, skips.pop(), head)                   # (N, 512..64, H/8..H, ...)
        return self.head(x)                                                   # (N, R, H, W)

    def check_shape(self, slab: Tensor) -> None:
        """Raise ValueError where a batch of slabs does not fit the network."""
        if slab.ndim != 4 or slab.shape[1] != self.in_channels:
            raise ValueError(f"slabs of shape (N, {self.in_channels}, H, W) needed, got {tuple(slab.shape)}")
        if slab.shape[2] % self.multiple or slab.shape[3] % self.multiple:
            raise ValueError(f"H and W must be multiples of {self.multiple}, got {tuple(slab.shape[2:])}")

    def run_level(
        self, level: nn.Module, x: Tensor, *others: Tensor | None, pooled: bool = False
    ) -> Tensor:
        """Return a level's output; with `pooled` x is max-pooled first."""

        def run(x: Tensor, *others: Tensor | None) -> Tensor:
            return level(F.max_pool2d(x, 2) if pooled else x, *others)

        is_checkpointed = self.checkpointing and self.training and torch.is_grad_enabled()
        return run_checkpointed(level, run, x, *others) if is_checkpointed else run(x, *others)


def halve(head: Tensor | None) -> Tensor | None:
    """Return the share of the head in each pixel of half the resolution; None stays None."""
    return None if head is None else F.avg_pool2d(head, 2)                    # (N, 1, H/2, W/2)


def build_network(settings: Mapping[str, Any]) -> DRUNetV2:
    """Return an untrained network for the settings of a run; ValueError where they make none.

    Settings hold `modalities`, `regions`, `context` (slices on each side of the one segmented) and `widths`.
    Of the switches `use_se`, `use_attention`, `dilated` and `residual`, one that is missing is on. `se_form`
    is "slab" where it is missing, `compress` off: such settings are of an earlier version.
    """
    in_channels = len(settings["modalities"]) * (2 * settings["context"] + 1)
    switches = {name: settings.get(name, True) for name in SWITCHES}
    return DRUNetV2(
        in_channels, len(settings["regions"]), tuple(settings["widths"]), **switches,
        se_form=settings.get("se_form", "slab"), compress=settings.get("compress", False),
    )


# fmt: on

# ------------------------------------------------------------------------------------------------------------
# Ready for inference
# ------------------------------------------------------------------------------------------------------------


def prepare_network(network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a network for inference: batch norm folded, channels last, weights kept in `dtype`.

    Autocast would cast the weights again in every forward pass. None is float32. The copy does not follow
    later changes of the network.
    """
    ready = fold_batch_norm(network).requires_grad_(False)
    ready = ready.to(device, dtype or torch.float32, memory_format=torch.channels_last)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        for layers in [module for module in ready.modules() if isinstance(module, nn.Sequential)]:
            _join_rectifiers(layers)
    return ready


class RectifiedConv(nn.Module):
    """A convolution and the ReLU after it in one pass, for inference on a CPU; the same numbers."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(convolution(x))."""
        own = self.convolution
        dtype = own.weight.dtype
        is_left_to_autocast = dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        is_known = dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
        if is_left_to_autocast or not is_known:
            return F.relu(own(x))
        geometry = (own.padding, own.stride, own.dilation, own.groups)
        x = x.to(dtype)
        return torch.ops.mkldnn._convolution_pointwise(x, own.weight, own.bias, *geometry, "relu", [], "")


def _join_rectifiers(layers: nn.Sequential) -> None:
    """Make one of each convolution, the identity that a folded batch norm left, and the ReLU after it."""
    kinds = (nn.Conv2d, nn.Identity, nn.ReLU)
    for index in range(len(layers) - 2):
        if all(isinstance(*pair) for pair in zip(layers[index : index + 3], kinds, strict=True)):
            layers[index], layers[index + 2] = RectifiedConv(layers[index]), nn.Identity()


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose batch norms are folded into the convolutions before them.

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
    # bilinear upsampling keeps the constant t, the gate would not: t goes below, not to the skip
    level.from_below = fuse_conv_bn_eval(level.from_below, level.norm)
    level.from_skip = fuse_conv_bn_eval(level.from_skip, level.norm)
    level.from_skip.bias = None
    level.norm = nn.Identity()


# ------------------------------------------------------------------------------------------------------------
# Command: show size and cost
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the model report."""

    in_channels: Width = 3
    """channels of a slab: modalities times slices"""
    num_regions: Width = 1
    """regions, one logit map each"""
    widths: Widths = WIDTHS
    """filters per level, the last is the bottleneck"""
    size: Side = 256
    """height and width of a slab"""
    use_se: bool = True
    """squeeze-and-excitation in every residual block"""
    se_form: SqueezeForm = "head"
    """over what it averages: the head alone, or the whole slab, as first published"""
    use_attention: bool = True
    """attention gates on the skips"""
    dilated: bool = True
    """dilation in the encoder"""
    residual: bool = True
    """residual connections in the blocks"""


def main(config: ModelConfig) -> None:
    """Show the network's size and cost."""
    switches = {name: getattr(config, name) for name in (*SWITCHES, "se_form")}
    shape = (1, config.in_channels, config.size, config.size)
    try:
        model = DRUNetV2(config.in_channels, config.num_regions, config.widths, **switches)
        flops = count_flops(model, shape)
    except ValueError as error:
        raise InputError("--widths", str(error), "change --widths or --size") from error
    saved = []
    for is_on in (False, True):
        model.checkpointing = is_on
        saved.append(estimate_activation_bytes(model, (16, *shape[1:]), side=2 * model.multiple) / 2**30)
    model.checkpointing = False
    with torch.no_grad():
        output = model(torch.zeros(2, *shape[1:])).shape
    log.info("DRUNetV2, widths %s, input %s", "-".join(map(str, config.widths)), shape[1:])
    log.info("parameters           %.2f million", count_parameters(model) / 1e6)
    log.info("forward pass         %.1f GFLOP per slab (a multiply-add is 2)", flops / 1e9)
    log.info(
        "saved activations    %.2f GiB for the backward pass, batch 16, bfloat16 (%.2f with --checkpointing)",
        *saved,
    )
    log.info("output               (N, %s)", ", ".join(map(str, output[1:])))


if __name__ == "__main__":
    run_command(main, ModelConfig, "Print the size and cost of the network.")
