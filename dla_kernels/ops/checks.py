"""Checks of what the ops are called with: messages name the argument, what fits and what came."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dla_kernels.ops.common import FEATURE_DTYPES, describe


def a_tensor(name: str, x: object) -> None:
    """A tensor with an address and strides: none that is sparse, nested or packed. (Nor None, which
    torch lets pass for a tensor.)"""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {describe(x)}")
    if x.layout is not torch.strided or x.is_nested:
        came = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {came}")


def features(name: str, x: Tensor) -> None:
    """Floating-point [B, C, H, W] with at least one element."""
    a_tensor(name, x)
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {describe(x)}"
        )
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty [B, C, H, W], got {describe(x)}")


def like(
    name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Exactly this shape, dtype and device."""
    a_tensor(name, x)
    if x.shape != shape or x.dtype != dtype or x.device != device:
        kind = ValueError if x.dtype == dtype else TypeError
        raise kind(f"{name}: expected {dtype} {list(shape)} on {device}, got {describe(x)}")


def like_if_given(
    tensors: Mapping[str, Tensor | None],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Each, by its name, of exactly this shape, dtype and device, or None."""
    for name, x in tensors.items():
        if x is not None:
            like(name, x, shape, dtype, device)


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    """One of a few words, which is returned."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
    return value


def more_than_one_per_channel(name: str, x: Tensor) -> None:
    """What statistics of the batch need."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"{name}: expected more than one value per channel for norm='batch', "
            f"got {list(x.shape)}"
        )


def at_least_zero(name: str, value: float) -> None:
    """No negative number, infinity or NaN."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def a_list(name: str, value: object) -> None:
    """A list or tuple; torch itself would take one tensor for a list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")


def list_like(
    name: str,
    tensors: Sequence[Tensor],
    count: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """So many tensors, each of exactly this shape, dtype and device."""
    if len(tensors) != count:
        raise ValueError(f"{name}: expected {count} tensors {list(shape)}, got {len(tensors)}")
    for index, tensor in enumerate(tensors):
        like(f"{name}[{index}]", tensor, shape, dtype, device)
