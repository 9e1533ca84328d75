"""ResNets for small images (CIFAR): three stages, 16, 32 and 64 wide, before the expansion."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dla.models.blocks import BLOCKS, ResidualBlock, init_convolutions
from dla.models.registry import VARIANTS, register_family
from dla.nn.checks import integer, positive_int
from dla_kernels.ops.checks import one_of
from dla_kernels.ops.common import describe

_DEPTHS = (20, 29, 47, 56, 110, 164)
_WIDTHS = (16, 32, 64)
_STEM_CHANNELS = 16


def _blocks_per_stage(depth: int, block: str) -> int:
    # A stage's block has three convolutions (two in a basic block); stem and classifier are 2.
    per_block = {"bottleneck": 9, "basic": 6}[one_of("block", block, BLOCKS)]
    count, rest = divmod(positive_int("depth", depth) - 2, per_block)
    if rest or count < 1:
        raise ValueError(
            f"block: {block!r} blocks need a depth of {per_block}n + 2, which {depth} is not"
        )
    return count


def _check_images(x: Any) -> None:
    # What is no tensor is left to torch, since torch.fx traces with its own objects.
    if not isinstance(x, Tensor):
        return
    if not x.is_floating_point():
        raise TypeError(f"x: expected images of floating point, got {describe(x)}")
    if x.dim() != 4:
        raise ValueError(f"x: expected images [B, 3, H, W], got {describe(x)}")


def _classifier(in_features: int, num_classes: int) -> nn.Module:
    if integer("num_classes", num_classes) < 0:
        raise ValueError(f"num_classes: expected at least 0, got {num_classes}")
    return nn.Linear(in_features, num_classes) if num_classes else nn.Identity()


class CifarResNet(nn.Module):
    """ResNet with stride 1 in the stem and a global average pool, so any image size serves.

    Args:
        depth: 9n + 2 for bottleneck blocks, 6n + 2 for basic ones.
        variant: name of a registered variant, see `dla.models.registry`.
        num_classes: width of the classifier; 0 leaves it out.
        block: ``"bottleneck"`` or ``"basic"``.
        **options: what the variant's stage takes.

    Attributes:
        stages: the three stages, each with ``.blocks`` and, under layer attention, ``.layers``.
        feature_info: per stage the channels, the reduction of the resolution and the module.
        num_features: channels that reach the classifier.

    Raises:
        ValueError, TypeError: unknown ``variant`` or ``block``, a ``depth`` that does not fit, or
            an option's value out of its range or of the wrong type.
    """

    def __init__(
        self,
        depth: int,
        variant: str = "plain",
        num_classes: int = 10,
        block: str = "bottleneck",
        **options: Any,
    ) -> None:
        super().__init__()
        one_of("variant", variant, VARIANTS)
        blocks_per_stage = _blocks_per_stage(depth, block)
        block_type = BLOCKS[block]
        self.depth, self.variant, self.block = depth, variant, block
        self.conv1 = nn.Conv2d(3, _STEM_CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        init_convolutions(self.conv1)
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        channels = _STEM_CHANNELS
        for index, width in enumerate(_WIDTHS):
            stride = 1 if index == 0 else 2
            blocks = _make_blocks(block_type, channels, width, stride, blocks_per_stage)
            channels = width * block_type.expansion
            self.stages.append(VARIANTS[variant].build_stage(blocks, channels, **options))
            self.feature_info.append(
                {"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"}
            )
        self.num_features = channels
        self.num_classes = num_classes
        self.fc = _classifier(channels, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer: nn.Linear, or nn.Identity for ``num_classes=0``."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one, on the device and in the dtype of the stem."""
        self.fc = _classifier(self.num_features, num_classes).to(self.conv1.weight)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, num_features, ceil(H / 4), ceil(W / 4)].

        Raises:
            ValueError, TypeError: images of another rank, or not of floating point. What else does
                not fit meets the checks of torch and of the layers.
        """
        _check_images(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C, H, W] -> logits [B, num_classes], or pooled features [B, C]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _make_blocks(
    block_type: type[ResidualBlock], in_channels: int, width: int, stride: int, count: int
) -> list[ResidualBlock]:
    blocks = [block_type(in_channels, width, stride)]
    blocks += [block_type(width * block_type.expansion, width) for _ in range(count - 1)]
    for block in blocks:
        init_convolutions(block)
    return blocks


@register_family("cifar", depths=_DEPTHS, num_classes=10)
def cifar_resnet(depth: int, variant: str, num_classes: int, **options: Any) -> CifarResNet:
    """The CIFAR family, as `create_model` calls it."""
    return CifarResNet(depth, variant, num_classes, **options)
