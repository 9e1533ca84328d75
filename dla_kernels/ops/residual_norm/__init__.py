"""``residual_norm``: the tail of a residual block, from the last norm of its branch on."""

from typing import Any

from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define
from dla_kernels.ops.common import compute_dtype, empty_features
from dla_kernels.ops.step_checks import check_norm


def residual_norm(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None = None,
    var_in: Tensor | None = None,
    *,
    norm: str = "batch",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) + shortcut), the end of a block of a ResNet, in one op.

    Args:
        x: residual branch [B, C, H, W], any strides; float32, float64, bfloat16 or float16.
        shortcut: like x.
        weight, bias: of the batch norm, [C], both or neither; float64 for float64 features, else
            float32.
        mean_in, var_in: [C], constants, for ``norm="running"``.
        norm: "batch" (statistics of x) or "running" (mean_in and var_in).
        eps: added to the variance.

    Returns:
        out like x; mean and (biased) variance [C] for ``norm="batch"``, else empty. These two are
        not differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; or no backend can serve.
    """
    return _OPERATOR(x, shortcut, weight, bias, mean_in, var_in, norm, eps)


def _check(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    norm: str,
    eps: float,
) -> None:
    checks.one_of("norm", norm, ("batch", "running"))
    checks.at_least_zero("eps", eps)
    checks.features("x", x)
    channels = x.shape[1]
    if norm == "batch":
        checks.more_than_one_per_channel("x", x)
    checks.like("shortcut", shortcut, x.shape, x.dtype, x.device)
    affine = {"weight": weight, "bias": bias}
    statistics = {"mean_in": mean_in, "var_in": var_in}
    check_norm("norm", norm, affine, statistics, channels, compute_dtype(x.dtype), x.device)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    norm: str,
    eps: float,
) -> None:
    statistics = (mean, var) if norm == "running" else (None, None)
    _check(x, x, weight, bias, *statistics, norm, eps)
    for name, like_x in (("grad", grad), ("out", out)):
        checks.like(name, like_x, x.shape, x.dtype, x.device)
    for name, statistic in (("mean", mean), ("var", var)):
        checks.like(name, statistic, (x.shape[1],), compute_dtype(x.dtype), x.device)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, norm, _ = rest
    size = x.shape[1] if norm == "batch" else 0
    like = {"dtype": compute_dtype(x.dtype)}
    return empty_features(x), x.new_empty(size, **like), x.new_empty(size, **like)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, *_: Any
) -> list[Tensor | None]:
    dweights = (None if w is None else w.new_empty(w.shape) for w in (weight, bias))
    return [empty_features(x), empty_features(x), *dweights]


def _save(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, mean_in, var_in, *ctx.flags = args
    out, mean, var = results
    ctx.mark_non_differentiable(mean, var)
    if ctx.flags[0] == "running":
        mean, var = mean_in, var_in
    # Where out is 0, no gradient passes: the shortcut is not needed.
    ctx.save_for_backward(x, weight, bias, out, mean, var)


def _gradients(ctx: Any, grad: Tensor, *_: None) -> list[Tensor | None]:
    x, weight, *saved = ctx.saved_tensors
    dx, dshortcut, *dweights = _BACKWARD(grad, x, weight, *saved, *ctx.flags)
    dweights = [None if weight is None else dw for dw in dweights]
    return [dx, dshortcut, *dweights, None, None]


_OPERATOR, _BACKWARD = define(
    "residual_norm",
    "(Tensor x, Tensor shortcut, Tensor? weight, Tensor? bias, Tensor? mean_in, Tensor? var_in, "
    "str norm, float eps) -> (Tensor out, Tensor mean, Tensor var)",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor out, Tensor mean, Tensor var, "
    "str norm, float eps) -> Tensor[]",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)
