"""Checks of arguments of layers, with messages that name them."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn

from dla_kernels.ops.checks import a_tensor
from dla_kernels.ops.common import FEATURE_DTYPES, describe, under_autocast


def integer(name: str, value: Any) -> int:
    """``value`` if it is an integer, else TypeError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    return value


def positive_int(name: str, value: Any) -> int:
    """``value`` if it is an integer above zero, else TypeError or ValueError."""
    if integer(name, value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def boolean(name: str, value: Any) -> bool:
    """``value`` if it is True or False, else TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return value


def number(name: str, value: Any) -> float:
    """``value`` as a float if it is a real number, else TypeError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    return float(value)


def module_list(name: str, modules: Any) -> nn.ModuleList:
    """The modules as nn.ModuleList, or TypeError or ValueError: there must be one at least."""
    if not isinstance(modules, Iterable):
        raise TypeError(f"{name}: expected a list of modules, got {describe(modules)}")
    given = list(modules)
    if not given:
        raise ValueError(f"{name}: expected at least one, got none")
    for index, module in enumerate(given):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}[{index}]: expected a Module, got {describe(module)}")
    return nn.ModuleList(given)


def hidden_width(channels: int, reduction: int) -> int:
    """channels // reduction; ValueError if nothing is left."""
    hidden = positive_int("channels", channels) // positive_int("reduction", reduction)
    if hidden < 1:
        raise ValueError(
            f"reduction: expected at most the number of channels, {channels}, got {reduction}: "
            "the hidden width channels // reduction would be 0"
        )
    return hidden


def check_rows(name: str, y: Any, channels: int) -> None:
    """Raises unless ``y`` is [B, channels], of floating point."""
    a_tensor(name, y)
    if not y.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {describe(y)}")
    if y.dim() != 2 or y.shape[1] != channels:
        raise ValueError(f"{name}: expected [B, {channels}], got {describe(y)}")


def check_features(name: str, x: Any, channels: int, weight: Tensor) -> None:
    """Raises unless ``x`` is [B, channels, H, W] and goes with ``weight``, the layer's own."""
    a_tensor(name, x)
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {describe(x)}"
        )
    if x.dim() != 4 or x.shape[1] != channels or x.numel() == 0:
        raise ValueError(
            f"{name}: expected [B, {channels}, H, W] with B, H, W >= 1, got {describe(x)}"
        )
    if x.device != weight.device:
        raise ValueError(
            f"{name}: expected it on {weight.device} with the layer's parameters, got {describe(x)}"
        )
    if x.dtype != weight.dtype and not under_autocast(x):
        raise TypeError(
            f"{name}: expected {weight.dtype} as the layer's parameters are (or autocast), "
            f"got {describe(x)}"
        )


def match_autocast(other: Any, x: Tensor) -> Any:
    """``other`` in the dtype of ``x`` under autocast, which mixes dtypes; else, and if it is no
    tensor, as it is."""
    if not isinstance(other, Tensor) or other.dtype == x.dtype:
        return other
    return other.to(x.dtype) if other.is_floating_point() and under_autocast(x) else other
