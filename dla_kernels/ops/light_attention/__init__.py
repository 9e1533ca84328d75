"""``light_attention``: one complete DLA-L layer step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define
from dla_kernels.ops.common import compute_dtype, empty_features
from dla_kernels.ops.light_attention.reference import FLAGS, summary_size
from dla_kernels.ops.step_checks import (
    NORMS,
    STATIC,
    check_cell,
    check_convolutions,
    check_drop,
    check_flags,
    check_map,
    check_norm,
)
from dla_kernels.ops.step_formulas import step_flops


def light_attention(
    x: Tensor,
    p: Tensor | None,
    state: Tensor,
    cell_params: Sequence[Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    prev_weight: Tensor | None,
    lam: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    branch_weight: Tensor | None,
    branch_bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    branch_mean_in: Tensor | None,
    branch_var_in: Tensor | None,
    drop_scale: Tensor | None,
    *,
    cell: str,
    activation: str = "sigmoid",
    gate: str = "identity",
    context: str = "per_sample",
    head_dim: int,
    norm: str = "batch",
    eps: float = 1e-5,
    residual: bool = True,
    join: bool = False,
    branch_norm: str = "none",
    branch_eps: float = 1e-5,
    return_o: bool = False,
) -> tuple[Tensor, ...]:
    """Pooling, cell, scores, two depthwise convolutions, norm, drop path and residual in one op::

        [x     = relu([branch_norm](x) + p)]
        y      = mean of x over space
        state' = cell(y, state)
        d      = gate(cell(mean of p over space, state')[0])
        a      = sigmoid(q . k / sqrt(head_dim)) per head,   q, k = conv1d(y) over the channels
        o      = a * conv(x, v_weight) + lam * (p * d [+ conv(p, prev_weight)])
        out    = [x +] drop_scale * norm(o)

    Everything but features is float64 for float64 features, else float32.

    Args:
        x: features [B, C, H, W], any strides; float32, float64, bfloat16 or float16.
        p: what stands for the output of the layer before, like x; None for zeros.
        state: of the cell [S, B, C]; S = 0 for ``cell="none"``.
        cell_params: see ``dla_kernels.cell``; empty for ``cell="none"``.
        q_weight, k_weight: [1, 1, k], k odd.
        v_weight, prev_weight: [C, 1, 3, 3]; no prev_weight, no convolution of p.
        lam: [C].
        norm_weight, norm_bias: [C], both or neither; None for ``norm="none"``.
        branch_weight, branch_bias: of the branch's norm, likewise.
        mean_in, var_in: [C], constants, for ``norm="running"``.
        branch_mean_in, branch_var_in: likewise, for ``branch_norm="running"``.
        drop_scale: [B], a constant factor for each sample's branch; None for 1.
        cell: a kind of ``dla_kernels.cell``, or "none": static, d = 1.
        activation: see ``dla_kernels.cell``.
        gate: "identity" or "sigmoid".
        context: "per_sample"; or "first_sample": all gates read row 0 of state', a defect of
            the official code.
        head_dim: channels per head; divides C.
        norm: "batch" (statistics of o), "running" (mean_in and var_in), or "none".
        eps: added to the variance.
        residual: whether x is added.
        join: x is a residual branch and p its shortcut: their sum, rectified, takes x's place
            first. The sum is formed where it is read, in the compute dtype, and never stored.
        branch_norm: the norm that x passes before it is joined: "batch", "running" or "none".
        branch_eps: added to its variance.
        return_o: whether o is wanted.

    Returns:
        out like x; o like x, or empty; state' [S, B, C]; mean and (biased) variance [C] for
        ``norm="batch"``, else empty; those of x for ``branch_norm="batch"``; summary [4, B, C]: the
        means over space of x (joined) and of p (zeros where no gate reads it), a, and d (ones where
        there is no gate). Under ``norm="batch"`` it is [12, B, C], always has the mean of p (zeros
        where there is none) and goes on, for backward, with those of u = conv(x, v_weight) and
        e = conv(p, prev_weight), what rounding took from the means of u, p and e, and the
        covariances of u, p and e with o over space. Statistics and summary are not differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; or no backend can serve.
    """
    checks.a_list("cell_params", cell_params)
    return _OPERATOR(
        x,
        p,
        state,
        cell_params,
        q_weight,
        k_weight,
        v_weight,
        prev_weight,
        lam,
        norm_weight,
        norm_bias,
        branch_weight,
        branch_bias,
        mean_in,
        var_in,
        branch_mean_in,
        branch_var_in,
        drop_scale,
        cell,
        activation,
        gate,
        context,
        head_dim,
        norm,
        eps,
        residual,
        join,
        branch_norm,
        branch_eps,
        return_o,
    )


def _check(
    x: Tensor,
    p: Tensor | None,
    state: Tensor,
    cell_params: Sequence[Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    prev_weight: Tensor | None,
    lam: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    branch_weight: Tensor | None,
    branch_bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    branch_mean_in: Tensor | None,
    branch_var_in: Tensor | None,
    drop_scale: Tensor | None,
    cell: str,
    activation: str,
    gate: str,
    context: str,
    head_dim: int,
    norm: str,
    eps: float,
    residual: bool,
    join: bool,
    branch_norm: str,
    branch_eps: float,
    return_o: bool,
) -> None:
    check_flags(cell, activation, gate, context, norm, eps)
    checks.one_of("branch_norm", branch_norm, NORMS)
    checks.at_least_zero("branch_eps", branch_eps)
    check_map(x, head_dim, norm, branch_norm)
    batch, channels = x.shape[:2]
    if p is not None:
        checks.like("p", p, x.shape, x.dtype, x.device)
    elif prev_weight is not None:
        raise ValueError("prev_weight: expected None where p is None, got a tensor")
    elif join:
        raise ValueError("p: expected the shortcut that x is joined with, got None")
    if branch_norm != "none" and not join:
        raise ValueError(f"branch_norm: expected 'none' without join, got {branch_norm!r}")
    rest = (compute_dtype(x.dtype), x.device)
    check_cell(state, cell_params, cell, batch, channels, *rest)
    check_convolutions(q_weight, k_weight, v_weight, channels, *rest)
    checks.like_if_given({"prev_weight": prev_weight}, (channels, 1, 3, 3), *rest)
    checks.like("lam", lam, (channels,), *rest)
    affine = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    statistics = {"mean_in": mean_in, "var_in": var_in}
    check_norm("norm", norm, affine, statistics, channels, *rest)
    affine = {"branch_weight": branch_weight, "branch_bias": branch_bias}
    statistics = {"branch_mean_in": branch_mean_in, "branch_var_in": branch_var_in}
    check_norm("branch_norm", branch_norm, affine, statistics, channels, *rest)
    check_drop(drop_scale, batch, *rest)


def _check_backward(
    grad_out: Tensor | None,
    grad_o: Tensor | None,
    grad_state: Tensor | None,
    *args: Any,
) -> None:
    inputs, rest = args[: _TENSORS - _CONSTANTS], args[_TENSORS - _CONSTANTS :]
    drop_scale, *statistics, new_state, summary = rest[:_FOUND]
    *flags, _ = rest[_FOUND:]
    norm, _, _, _, branch_norm, _ = flags[-6:]
    norms = norm, norm, branch_norm, branch_norm
    constants = [t if one == "running" else None for t, one in zip(statistics, norms, strict=True)]
    _check(*inputs, *constants, drop_scale, *flags, False)
    x, _, state, *_ = inputs
    (batch, channels), kind = x.shape[:2], (compute_dtype(x.dtype), x.device)
    checks.like_if_given({"grad_out": grad_out, "grad_o": grad_o}, x.shape, x.dtype, x.device)
    checks.like_if_given({"grad_state": grad_state, "new_state": new_state}, state.shape, *kind)
    checks.like("summary", summary, (summary_size(norm), batch, channels), *kind)
    names = "mean", "var", "branch_mean", "branch_var"
    for name, statistic, one in zip(names, statistics, norms, strict=True):
        checks.like(name, statistic, (0 if one == "none" else channels,), *kind)


def _fake(x: Tensor, p: Tensor | None, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norm, _, _, _, branch_norm, _, return_o = rest[-7:]
    batch, channels = x.shape[:2]
    statistics = [channels if kind == "batch" else 0 for kind in (norm, norm, *2 * (branch_norm,))]
    return (
        empty_features(x),
        empty_features(x) if return_o else x.new_empty(0),
        state.new_empty(state.shape),
        *(state.new_empty(size) for size in statistics),
        state.new_empty(summary_size(norm), batch, channels),
    )


def _fake_backward(
    grad_out: Tensor | None,
    grad_o: Tensor | None,
    grad_state: Tensor | None,
    x: Tensor,
    p: Tensor | None,
    state: Tensor,
    cell_params: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor | None]:
    weights, needs_p = rest[:_WEIGHTS], rest[-1]
    return [
        empty_features(x),
        empty_features(x) if p is not None and needs_p else None,
        state.new_empty(state.shape),
        *(None if w is None else state.new_empty(w.shape) for w in weights),
        *(w.new_empty(w.shape) for w in cell_params),
    ]


def _save(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    x, p, state, cell_params, *weights = args[: _TENSORS - _CONSTANTS]
    *statistics_in, drop_scale = args[_TENSORS - _CONSTANTS : _TENSORS]
    *ctx.flags, return_o = args[_TENSORS:]
    norm, _, _, _, branch_norm, _ = ctx.flags[-6:]
    _, o, new_state, *statistics, summary = results
    constant = [*statistics, summary]
    constant += [] if return_o else [o]
    constant += [] if cell_params else [new_state]
    ctx.mark_non_differentiable(*constant)
    if norm == "running":
        statistics[:2] = statistics_in[:2]
    if branch_norm == "running":
        statistics[2:] = statistics_in[2:]
    found = drop_scale, *statistics, new_state, summary
    ctx.save_for_backward(x, p, state, *cell_params, *weights, *found)


def _gradients(
    ctx: Any,
    grad_out: Tensor | None,
    grad_o: Tensor | None,
    grad_state: Tensor | None,
    *_: None,
) -> list[Any]:
    x, p, state, *rest = ctx.saved_tensors
    rest, found = rest[:-_FOUND], rest[-_FOUND:]
    cell_params, weights = rest[:-_WEIGHTS], rest[-_WEIGHTS:]
    needs_p = p is not None and ctx.needs_input_grad[_NEEDS_P]
    dx, dp, dstate, *dweights = _BACKWARD(
        grad_out,
        grad_o,
        grad_state,
        x,
        p,
        state,
        cell_params,
        *weights,
        *found,
        *ctx.flags,
        needs_p,
    )
    dparams = dweights[_WEIGHTS:]
    dweights = [None if w is None else dw for w, dw in zip(weights, dweights, strict=False)]
    if p is None and grad_state is None:
        # The cell had no influence. None, not zeros, as plain autograd says it.
        dstate, dparams = None, [None] * len(dparams)
    constants = [None] * _CONSTANTS
    return [dx, dp if needs_p else None, dstate, dparams, *dweights, *constants]


def _flops(*args: Any) -> int:
    x, p, _, cell_params, _, _, _, prev_weight, *_ = args
    convolutions = 1 if prev_weight is None else 2
    cell = args[-len(FLAGS)]
    return step_flops(x, convolutions, cell_params, cell, [1] if p is None else [1, 1])


def _backward_flops(
    grad_out: Tensor | None, grad_o: Tensor | None, grad_state: Tensor | None, *args: Any
) -> int:
    x, p = args[:2]
    if p is None and grad_state is None:  # the cell had no influence
        return 2 * step_flops(x, 1, (), STATIC, [])
    return 2 * _flops(*args)  # a product has two gradients


_WEIGHTS = 9  # from q_weight to branch_bias
_CONSTANTS = 5  # statistics and drop_scale
_FOUND = 7  # what forward keeps for backward beside its inputs
_TENSORS = 4 + _WEIGHTS + _CONSTANTS  # leading arguments
_NEEDS_P = 3  # place of p in ctx.needs_input_grad, after the two of the registration and x

_INPUTS = (
    "Tensor x, Tensor? p, Tensor state, Tensor[] cell_params, Tensor q_weight, Tensor k_weight, "
    "Tensor v_weight, Tensor? prev_weight, Tensor lam, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? branch_weight, Tensor? branch_bias, "
)
_FLAGS = (
    "str cell, str activation, str gate, str context, int head_dim, str norm, float eps, "
    "bool residual, bool join, str branch_norm, float branch_eps, "
)

_OPERATOR, _BACKWARD = define(
    "light_attention",
    f"({_INPUTS} Tensor? mean_in, Tensor? var_in, Tensor? branch_mean_in, Tensor? branch_var_in, "
    f"Tensor? drop_scale, {_FLAGS} bool return_o) -> (Tensor out, Tensor o, Tensor new_state, "
    "Tensor mean, Tensor var, Tensor branch_mean, Tensor branch_var, Tensor summary)",
    f"(Tensor? grad_out, Tensor? grad_o, Tensor? grad_state, {_INPUTS} Tensor? drop_scale, "
    "Tensor mean, Tensor var, Tensor branch_mean, Tensor branch_var, Tensor new_state, "
    f"Tensor summary, {_FLAGS} bool needs_p) -> Tensor[]",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    gradients=_gradients,
    flops=_flops,
    backward_flops=_backward_flops,
)
