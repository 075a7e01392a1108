"""The rows of `compare_networks`: our network and its ablations, peers' networks, other ways to train.

A peer is imported where it is built, so that the others run without it. Each gets the same widths where it
has widths, and is otherwise as its authors' defaults have it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_drunet_v2 import DRUNetV2, SqueezeExcitation, compress_bright
from utils_v2 import HybridFocalDiceLoss

Build = Callable[[int, int, Sequence[int]], nn.Module]  # in_channels, num_regions, widths -> logits of a slab
HYBRID = HybridFocalDiceLoss()


@dataclass(frozen=True)
class Entry:
    """A row: a network, and in what its training differs from that of the others."""

    build: Build
    loss: nn.Module = HYBRID
    context: int = 1
    size: int = 128
    tumour_share: float | None = 0.5  # None draws slices as they are stored
    amp: bool = True
    schedule: str = "cosine"  # or "drop" (a tenth for the last quarter) or "constant"
    strip: float = 0.0  # probability that a training slab loses what lies outside of the brain
    average: float = 0.995  # decay of the averaged weights; 0 is off
    compress: bool = True  # whether slabs go through `compress_bright` before the network


def build_row(entry: Entry, in_channels: int, num_regions: int, widths: Sequence[int]) -> nn.Module:
    """Return the untrained network of a row, ours or a peer's, with what all do to their input."""
    network = entry.build(in_channels, num_regions, widths)
    if isinstance(network, DRUNetV2):
        network.compress = entry.compress  # after it has found the head, as in training
    elif entry.compress:
        network.register_forward_pre_hook(compress_input)
    return network


def compress_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the slabs that a network gets, compressed: a hook before its forward pass."""
    return (compress_bright(inputs[0]), *inputs[1:])


class BCEDice(nn.Module):
    """Binary cross-entropy + soft Dice."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of logits and target (N, R, H, W)."""
        dice = HybridFocalDiceLoss(focal_weight=0.0)(logits, target)
        return F.binary_cross_entropy_with_logits(logits.float(), target.float()) + dice


class DeepSupervision(nn.Module):
    """nnU-Net's loss over the logits of all resolutions: Dice and cross-entropy, halved from level to level.

    Isensee et al. 2021 (doi 10.1038/s41592-020-01008-z). Its Dice is per slab where this one is pooled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = BCEDice()

    def forward(self, logits: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss; logits from the finest (N, R, H, W) to the coarsest."""
        levels = [logits] if isinstance(logits, Tensor) else logits
        weights = [0.5**index for index in range(len(levels))]
        total = sum(
            weight * self.loss(level, F.interpolate(target, level.shape[2:], mode="nearest-exact"))
            for weight, level in zip(weights, levels, strict=True)
        )
        return total / sum(weights)


# ------------------------------------------------------------------------------------------------------------
# Ours
# ------------------------------------------------------------------------------------------------------------


def ours(**switches: Any) -> Build:
    """Return how to build our network with some parts switched."""
    return lambda channels, regions, widths: DRUNetV2(channels, regions, widths, **switches)


class WindowSqueeze(nn.Module):
    """SE over windows of a quarter of the slab: x (N, C, H, W) -> weights in 0..1 (N, C, H, W)."""

    def __init__(self, squeeze: SqueezeExcitation) -> None:
        super().__init__()
        self.squeeze, self.excite = squeeze.squeeze, squeeze.excite

    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the weights, interpolated between the windows' centres."""
        mean = F.adaptive_avg_pool2d(x, min(4, x.shape[2]))
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return F.interpolate(weight, x.shape[2:], mode="bilinear")


def ours_window(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
    """Return our network with SE over windows."""
    network = DRUNetV2(channels, regions, widths, se_form="slab")
    for module in network.modules():
        if isinstance(getattr(module, "se", None), SqueezeExcitation):
            module.se = WindowSqueeze(module.se)
    return network


def ours_instance(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
    """Return our network without SE, instance norm in place of batch norm."""
    network = DRUNetV2(channels, regions, widths, use_se=False)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                # groups of one channel: InstanceNorm2d itself takes no 16-bit weights on a card
                setattr(module, name, nn.GroupNorm(child.num_features, child.num_features))
    return network


# ------------------------------------------------------------------------------------------------------------
# Peers
# ------------------------------------------------------------------------------------------------------------


def monai_attention(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
    """MONAI's AttentionUnet."""
    from monai.networks.nets import AttentionUnet

    strides = [2] * (len(widths) - 1)
    return AttentionUnet(2, channels, regions, channels=list(widths), strides=strides)


def monai_segresnet(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
    """MONAI's SegResNet, with the first width."""
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=2, init_filters=widths[0], in_channels=channels, out_channels=regions)


def monai_unet(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
    """MONAI's UNet with two residual units a level."""
    from monai.networks.nets import UNet

    strides = [2] * (len(widths) - 1)
    return UNet(2, channels, regions, channels=list(widths), strides=strides, num_res_units=2)


def nnunet_settings(widths: Sequence[int]) -> dict[str, Any]:
    """What nnU-Net's planner sets for its 2D networks."""
    return {
        "n_stages": len(widths),
        "features_per_stage": list(widths),
        "conv_op": nn.Conv2d,
        "kernel_sizes": 3,
        "strides": [1] + [2] * (len(widths) - 1),
        "n_conv_per_stage_decoder": [2] * (len(widths) - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def nnunet_plain(supervised: bool) -> Build:
    """nnU-Net's PlainConvUNet."""

    def build(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He

        settings = nnunet_settings(widths) | {"n_conv_per_stage": [2] * len(widths)}
        network = PlainConvUNet(channels, num_classes=regions, deep_supervision=supervised, **settings)
        return network.apply(InitWeights_He(1e-2))

    return build


def nnunet_residual(supervised: bool) -> Build:
    """nnU-Net's ResidualEncoderUNet, blocks as its preset M has them."""

    def build(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He

        settings = nnunet_settings(widths) | {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][: len(widths)]}
        settings["n_conv_per_stage_decoder"] = [1] * (len(widths) - 1)
        network = ResidualEncoderUNet(channels, num_classes=regions, deep_supervision=supervised, **settings)
        return network.apply(InitWeights_He(1e-2))

    return build


def smp_resnet34(channels: int, regions: int, widths: Sequence[int]) -> nn.Module:  # noqa: ARG001
    """Return the Unet of segmentation_models.pytorch on resnet34, from random weights as all others."""
    from segmentation_models_pytorch import Unet

    return Unet("resnet34", encoder_weights=None, in_channels=channels, classes=regions)


NO_SE = Entry(ours(use_se=False))
ENTRIES: dict[str, Entry] = {
    # over what squeeze-and-excitation averages
    "ours, no SE": NO_SE,
    "ours, SE over the slab": Entry(ours(se_form="slab")),
    "ours, SE over the head": Entry(ours()),
    "ours, SE over windows": Entry(ours_window),
    # backgrounds varied in training
    "ours, no SE, stripped": replace(NO_SE, strip=0.4),
    "ours, SE over the slab, stripped": Entry(ours(se_form="slab"), strip=0.4),
    "ours, SE over the head, stripped": Entry(ours(), strip=0.4),
    # peers
    "MONAI AttentionUnet": Entry(monai_attention),
    "MONAI SegResNet": Entry(monai_segresnet),
    "MONAI UNet, residual": Entry(monai_unet),
    "nnU-Net PlainConvUNet": Entry(nnunet_plain(supervised=False)),
    "nnU-Net ResidualEncoderUNet": Entry(nnunet_residual(supervised=False)),
    "nnU-Net ResidualEncoderUNet, own loss": Entry(nnunet_residual(supervised=True), DeepSupervision()),
    "smp Unet-resnet34": Entry(smp_resnet34),
    # parts of our network off
    "no SE, no gates": Entry(ours(use_se=False, use_attention=False)),
    "no SE, no dilation": Entry(ours(use_se=False, dilated=False)),
    "no SE, no residual": Entry(ours(use_se=False, residual=False)),
    "no SE, instance norm": Entry(ours_instance),
    # the claims about training
    "no SE, not compressed": replace(NO_SE, compress=False),
    "no SE, one slice": replace(NO_SE, context=0),
    "no SE, five slices": replace(NO_SE, context=2),
    "no SE, focal alone": replace(NO_SE, loss=HybridFocalDiceLoss(dice_weight=0.0)),
    "no SE, Dice alone": replace(NO_SE, loss=HybridFocalDiceLoss(focal_weight=0.0)),
    "no SE, BCE + Dice": replace(NO_SE, loss=BCEDice()),
    "no SE, natural sampling": replace(NO_SE, tumour_share=None),
    "no SE, float32": replace(NO_SE, amp=False),
    "no SE, rate drop": replace(NO_SE, schedule="drop"),
    "no SE, constant rate": replace(NO_SE, schedule="constant"),
    "no SE, no EMA": replace(NO_SE, average=0.0),
    "no SE, 192": replace(NO_SE, size=192),
    "no SE, 256": replace(NO_SE, size=256),
}
