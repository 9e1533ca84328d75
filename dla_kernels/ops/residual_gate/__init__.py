"""``residual_gate``: the tail of a residual block with channel attention."""

from typing import Any

from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define
from dla_kernels.ops.common import compute_dtype, empty_features


def residual_gate(u: Tensor, h: Tensor, shortcut: Tensor) -> Tensor:
    """relu(u * h + shortcut) in one pass, as DIANet and LII end a block (also SE and ECA).

    Args:
        u: residual branch [B, C, H, W], any strides; float32, float64, bfloat16 or float16.
        h: channel gate [B, C]; float64 for float64 features, else float32.
        shortcut: like u.

    Returns:
        A map like u.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; or no backend can serve.
    """
    return _OPERATOR(u, h, shortcut)


def _check(u: Tensor, h: Tensor, shortcut: Tensor) -> None:
    checks.features("u", u)
    checks.like("h", h, u.shape[:2], compute_dtype(u.dtype), u.device)
    checks.like("shortcut", shortcut, u.shape, u.dtype, u.device)


def _check_backward(grad: Tensor, u: Tensor, h: Tensor, out: Tensor) -> None:
    _check(u, h, u)
    for name, x in (("grad", grad), ("out", out)):
        checks.like(name, x, u.shape, u.dtype, u.device)


def _fake(u: Tensor, h: Tensor, shortcut: Tensor) -> Tensor:
    return empty_features(u)


def _fake_backward(grad: Tensor, u: Tensor, h: Tensor, out: Tensor) -> list[Tensor]:
    return [empty_features(u), h.new_empty(h.shape), empty_features(u)]


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    u, h, _ = args
    ctx.save_for_backward(u, h, result)  # where the result is 0, no gradient passes


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor]:
    return _BACKWARD(grad, *ctx.saved_tensors)


_OPERATOR, _BACKWARD = define(
    "residual_gate",
    "(Tensor u, Tensor h, Tensor shortcut) -> Tensor",
    "(Tensor grad, Tensor u, Tensor h, Tensor out) -> Tensor[]",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)
