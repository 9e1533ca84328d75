"""Batch norms that tests of layers and of stages share."""

from torch import nn


def without_bias(channels: int) -> nn.BatchNorm2d:
    """BatchNorm2d(bias=False), which older versions of torch do not take."""
    norm = nn.BatchNorm2d(channels)
    norm.bias = None
    return norm
