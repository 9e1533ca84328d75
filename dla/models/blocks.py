"""Residual blocks. A block returns its output *and* its shortcut, which DLA reads as ``p``."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``relu(last_norm(branch(x)) + shortcut(x))``; subclasses define these and ``expansion``.

    Args:
        in_channels: channels of the input.
        width: channels inside the block; the output has ``width * expansion``.
        stride: of the block's 3x3 convolution and of its shortcut.
    """

    expansion: int

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, before its last norm. [B, C_in, H, W] -> [B, C_out, H', W']."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """What the branch passes before the addition."""
        raise NotImplementedError

    def raw_parts(self, x: Tensor) -> tuple[Tensor, nn.BatchNorm2d, Tensor]:
        """[B, C_in, H, W] -> (branch, norm, shortcut), both [B, C_out, H', W'], for those who join
        them themselves: the output is relu(norm(branch) + shortcut)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.branch(x), self.last_norm, shortcut

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `raw_parts`, with the branch behind its norm."""
        branch, norm, shortcut = self.raw_parts(x)
        return norm(branch), shortcut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_in, H, W] -> (output, shortcut), both [B, C_out, H', W']."""
        branch, shortcut = self.parts(x)
        # In place: batch norm keeps its input for backward, not the output overwritten here.
        return F.relu(branch.add_(shortcut), inplace=True), shortcut


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__(in_channels, width, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.conv2(x)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(ResidualBlock):
    """1x1 down, 3x3 (with the stride), 1x1 up."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__(in_channels, width, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.conv3(x)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3


BLOCKS: dict[str, type[ResidualBlock]] = {"bottleneck": Bottleneck, "basic": BasicBlock}


def init_convolutions(module: nn.Module) -> None:
    """He initialisation by fan-out for the dense convolutions of ``module``."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            fan_out = child.kernel_size[0] * child.kernel_size[1] * child.out_channels
            nn.init.normal_(child.weight, std=math.sqrt(2.0 / fan_out))
