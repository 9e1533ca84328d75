"""``global_pool``: global average pooling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define
from dla_kernels.ops.common import FEATURE_DTYPES, compute_dtype, dense_format, features_like


def global_pool(x: Tensor) -> Tensor:
    """Mean over height and width.

    Args:
        x: features [B, C, H, W], any strides; float32, float64, bfloat16 or float16.

    Returns:
        [B, C], float64 for float64 features, else float32.

    Raises:
        ValueError, TypeError, RuntimeError: ``x`` does not fit; or no backend can serve.
    """
    return _OPERATOR(x)


def _check(x: Tensor) -> None:
    checks.features("x", x)


def _check_backward(
    grad: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> None:
    checks.a_tensor("grad", grad)
    if dtype not in FEATURE_DTYPES:
        raise TypeError(f"dtype: expected one of {FEATURE_DTYPES}, got {dtype}")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape: expected that of a non-empty [B, C, H, W], got {list(shape)}")
    checks.like("grad", grad, tuple(shape[:2]), compute_dtype(dtype), grad.device)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    (x,) = args  # of which nothing is kept
    ctx.form = tuple(x.shape), x.dtype, dense_format(x) is torch.channels_last


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    return [_BACKWARD(grad, *ctx.form)]


_OPERATOR, _BACKWARD = define(
    "global_pool",
    "(Tensor x) -> Tensor",
    "(Tensor grad, SymInt[] shape, ScalarType dtype, bool channels_last) -> Tensor",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=features_like,
    save=_save,
    gradients=_gradients,
)
