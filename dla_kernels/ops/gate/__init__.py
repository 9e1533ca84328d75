"""``gate``: channel gates for many features at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define
from dla_kernels.ops.common import compute_dtype, empty_features


def gate(features: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """Multiply every feature map by its own channel gate.

    Args:
        features: at least one map [B, C, H, W], any strides; float32, float64, bfloat16 or
            float16, the same for all; shapes may differ.
        gates: one [B, C] per map; float64 for float64 features, else float32.

    Returns:
        One map per input, like it.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; or no backend can serve.
    """
    checks.a_list("features", features)
    checks.a_list("gates", gates)
    return _OPERATOR(features, gates)


def _check(features: Sequence[Tensor], gates: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("features: expected at least one map, got an empty list")
    if len(gates) != len(features):
        raise ValueError(
            f"gates: expected one for each of the {len(features)} features, got {len(gates)}"
        )
    dtype, device = features[0].dtype, features[0].device
    for index, (x, factor) in enumerate(zip(features, gates, strict=True)):
        checks.features(f"features[{index}]", x)
        checks.like(f"features[{index}]", x, x.shape, dtype, device)
        checks.like(f"gates[{index}]", factor, x.shape[:2], compute_dtype(dtype), device)


def _check_backward(
    grads: Sequence[Tensor], features: Sequence[Tensor], gates: Sequence[Tensor]
) -> None:
    _check(features, gates)
    if len(grads) != len(features):
        raise ValueError(
            f"grads: expected one for each of the {len(features)} features, got {len(grads)}"
        )
    for index, (grad, x) in enumerate(zip(grads, features, strict=True)):
        checks.like(f"grads[{index}]", grad, x.shape, x.dtype, x.device)


def _fake(features: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    return [empty_features(x) for x in features]


def _fake_backward(
    grads: Sequence[Tensor], features: Sequence[Tensor], gates: Sequence[Tensor]
) -> list[Tensor]:
    return [empty_features(x) for x in features] + [d.new_empty(d.shape) for d in gates]


def _save(ctx: Any, args: tuple[Any, ...], results: Sequence[Tensor]) -> None:
    features, gates = args
    ctx.save_for_backward(*features, *gates)


def _gradients(ctx: Any, *grads: Tensor | None) -> list[list[Tensor]]:
    count = len(grads)
    saved = ctx.saved_tensors  # once: hooks may allow no second look
    features, gates = saved[:count], saved[count:]
    arrived = [
        torch.zeros_like(x) if grad is None else grad
        for grad, x in zip(grads, features, strict=True)
    ]
    found = _BACKWARD(arrived, features, gates)
    return [found[:count], found[count:]]


_OPERATOR, _BACKWARD = define(
    "gate",
    "(Tensor[] features, Tensor[] gates) -> Tensor[]",
    "(Tensor[] grads, Tensor[] features, Tensor[] gates) -> Tensor[]",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)
