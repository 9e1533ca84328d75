"""``base_attention``: one complete DLA-B layer step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define, flatten, sizes_of, unflatten
from dla_kernels.ops.base_attention.deferred import WeightedSum, value_gradient
from dla_kernels.ops.base_attention.reference import FLAGS
from dla_kernels.ops.common import compute_dtype, empty_features
from dla_kernels.ops.step_checks import (
    STATIC,
    check_cell,
    check_convolutions,
    check_drop,
    check_flags,
    check_map,
    check_norm,
)
from dla_kernels.ops.step_formulas import step_flops

GATED = ("projections", "features")
MAX_LAYERS = 64  # of a stage: the kernels take the addresses of all values as one argument


def base_attention(
    x: Tensor,
    values: Sequence[Tensor],
    state: Tensor,
    keys: Tensor,
    gates: Tensor,
    pooled: Sequence[Tensor],
    cell_params: Sequence[Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    key_weights: Sequence[Tensor],
    v_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    drop_scale: Tensor | None,
    *,
    cell: str,
    activation: str = "sigmoid",
    gate: str = "identity",
    context: str = "per_sample",
    gated: str = "projections",
    head_dim: int,
    norm: str = "batch",
    eps: float = 1e-5,
    relu: bool = True,
    residual: bool = True,
    return_v: bool = True,
) -> tuple[Tensor, ...]:
    """Attention of a layer to itself and the T layers before it (Eq. 2), as one op::

        y, v   = mean of x over space, conv(x, v_weight)
        state' = cell(y, state)
        d(u)   = gate(cell(u, state')[0])                       (Eq. 6)
        G_t'   = G_t * d(G_t * pooled_t)                        t < T; of this layer, 1
        K_t'   = K_t * d(K_t)                                   gated="projections"
               = conv1d(G_t' * pooled_t, key_weight_t)          gated="features"
        a      = softmax over t of q . K_t' / sqrt(head_dim)    per head; K_T' = conv1d(y, k_weight)
        o      = sum_t a_t * G_t' * v_t
        out    = [x +] drop_scale * [relu] norm(o)

    Values are never rewritten: a gate per sample and channel commutes with pooling and with the
    depthwise convolution, so their gates are kept apart, as products G. Everything but features
    is float64 for float64 features, else float32.

    Args:
        x: features [B, C, H, W], any strides; float32, float64, bfloat16 or float16.
        values: v of each of the T < 64 earlier layers, like x.
        state: of the cell [S, B, C]; S = 0 for ``cell="none"``.
        keys: K of the earlier layers [T, B, C]; [0, B, C] for ``gated="features"``.
        gates: G of the earlier layers [T, B, C]; [0, B, C] for ``cell="none"``.
        pooled: of each earlier layer [B, C], the mean of what is gated: of v for
            ``gated="projections"``, of x for "features". Empty for ``cell="none"``.
        cell_params: see ``dla_kernels.cell``; empty for ``cell="none"``.
        q_weight, k_weight: [1, 1, k], k odd.
        key_weights: k_weight of each earlier layer for ``gated="features"``, else empty.
        v_weight: [C, 1, 3, 3].
        norm_weight, norm_bias: [C], both or neither; None for ``norm="none"``.
        mean_in, var_in: [C], constants, for ``norm="running"``.
        drop_scale: [B], a constant factor for each sample's branch; None for 1.
        cell: a kind of ``dla_kernels.cell``, or "none": static (MRLA-B), all gates 1.
        activation: see ``dla_kernels.cell``.
        gate: "identity" or "sigmoid".
        context: "per_sample"; or "first_sample": all gates read row 0 of state', a defect of
            the official code.
        gated: what the gates act on: "projections", keys and values each by their own gate, as
            the official code has it; or "features", from which both are made, as the paper has it.
        head_dim: channels per head; divides C.
        norm: "batch" (statistics of o), "running" (mean_in and var_in), or "none".
        eps: added to the variance.
        relu: whether the branch is rectified.
        residual: whether x is added.
        return_v: whether a later layer will want v and its mean.

    Returns:
        out like x; v like x, or empty; state' [S, B, C]; keys and gates [T + 1, B, C] and pooled
        [B, C] for the next layer, each empty where an input of that name is (pooled also for
        "projections" without ``return_v``); the scores a [T + 1, B, C / head_dim]; mean and
        (biased) variance [C] of o for ``norm="batch"``, else empty; the mean of x [B, C]. The
        last four are not differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; or no backend can serve.
    """
    for name, tensors in (
        ("values", values),
        ("pooled", pooled),
        ("cell_params", cell_params),
        ("key_weights", key_weights),
    ):
        checks.a_list(name, tensors)
    return _OPERATOR(
        x,
        values,
        state,
        keys,
        gates,
        pooled,
        cell_params,
        q_weight,
        k_weight,
        key_weights,
        v_weight,
        norm_weight,
        norm_bias,
        mean_in,
        var_in,
        drop_scale,
        cell,
        activation,
        gate,
        context,
        gated,
        head_dim,
        norm,
        eps,
        relu,
        residual,
        return_v,
    )


def _check(
    x: Tensor,
    values: Sequence[Tensor],
    state: Tensor,
    keys: Tensor,
    gates: Tensor,
    pooled: Sequence[Tensor],
    cell_params: Sequence[Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    key_weights: Sequence[Tensor],
    v_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    drop_scale: Tensor | None,
    cell: str,
    activation: str,
    gate: str,
    context: str,
    gated: str,
    head_dim: int,
    norm: str,
    eps: float,
    relu: bool,
    residual: bool,
    return_v: bool,
) -> None:
    check_flags(cell, activation, gate, context, norm, eps)
    checks.one_of("gated", gated, ("projections",) if cell == STATIC else GATED)
    check_map(x, head_dim, norm)
    batch, channels = x.shape[:2]
    rest = (compute_dtype(x.dtype), x.device)
    if len(values) >= MAX_LAYERS:
        raise ValueError(
            f"values: expected those of at most {MAX_LAYERS - 1} earlier layers (any number with "
            f"fused=False), got {len(values)}"
        )
    checks.list_like("values", values, len(values), x.shape, x.dtype, x.device)
    check_cell(state, cell_params, cell, batch, channels, *rest)
    layers = len(values)
    means = 0 if cell == STATIC else layers
    filters = layers if gated == "features" else 0
    checks.like("keys", keys, (layers - filters, batch, channels), *rest)
    checks.like("gates", gates, (means, batch, channels), *rest)
    checks.list_like("pooled", pooled, means, (batch, channels), *rest)
    check_convolutions(q_weight, k_weight, v_weight, channels, *rest)
    checks.list_like("key_weights", key_weights, filters, k_weight.shape, *rest)
    affine = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_norm("norm", norm, affine, {"mean_in": mean_in, "var_in": var_in}, channels, *rest)
    check_drop(drop_scale, batch, *rest)


def _check_backward(*args: Any) -> None:
    (grad_out, grad_v, grad_state, grad_keys, grad_gates, grad_pooled), later = args[:6], args[6:8]
    inputs, rest = args[GRADS : GRADS + 2 + _PARAMETERS], args[GRADS + 2 + _PARAMETERS :]
    drop_scale, mean, var, scores, pooled_x, *flags, _ = rest
    cell, _, _, _, gated, head_dim, norm, *_ = flags
    constants = (mean, var) if norm == "running" else (None, None)
    _check(*inputs, *constants, drop_scale, *flags, False)
    x, values, state, *_ = inputs
    (batch, channels), layers = x.shape[:2], len(values) + 1
    kind = compute_dtype(x.dtype), x.device
    checks.like_if_given({"grad_out": grad_out, "grad_v": grad_v}, x.shape, x.dtype, x.device)
    checks.like_if_given({"grad_state": grad_state}, state.shape, *kind)
    keys, gates = 0 if gated == "features" else layers, 0 if cell == STATIC else layers
    checks.like_if_given({"grad_keys": grad_keys}, (keys, batch, channels), *kind)
    checks.like_if_given({"grad_gates": grad_gates}, (gates, batch, channels), *kind)
    checks.like_if_given({"grad_pooled": grad_pooled}, (batch, channels), *kind)
    later_grads, later_weights = later
    checks.list_like("later_grads", later_grads, len(later_grads), x.shape, x.dtype, x.device)
    checks.list_like("later_weights", later_weights, len(later_grads), (batch, channels), *kind)
    checks.like("scores", scores, (layers, batch, channels // head_dim), *kind)
    checks.like("pooled_x", pooled_x, (batch, channels), *kind)
    for name, statistic in (("mean", mean), ("var", var)):
        checks.like(name, statistic, (0 if norm == "none" else channels,), *kind)


def _fake(
    x: Tensor,
    values: Sequence[Tensor],
    state: Tensor,
    keys: Tensor,
    gates: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    cell, _, _, _, gated, head_dim, norm, _, _, _, return_v = rest[-11:]
    (batch, channels), layers = x.shape[:2], len(values) + 1
    dynamic, features = cell != STATIC, gated == "features"
    has_pooled = features or (dynamic and return_v)
    statistics = channels if norm == "batch" else 0
    return (
        empty_features(x),
        empty_features(x) if return_v else x.new_empty(0),
        state.new_empty(state.shape),
        keys.new_empty(0 if features else layers, batch, channels),
        gates.new_empty(layers if dynamic else 0, batch, channels),
        state.new_empty((batch, channels) if has_pooled else 0),
        state.new_empty(layers, batch, channels // head_dim),
        state.new_empty(statistics),
        state.new_empty(statistics),
        state.new_empty(batch, channels),
    )


def _fake_backward(*args: Any) -> list[Tensor | None]:
    grad_out, needs_values = args[0], args[-1]
    x, values, *parameters = args[GRADS : GRADS + 2 + _PARAMETERS]
    state = parameters[0]
    wanted = needs_values and grad_out is not None
    return [
        empty_features(x),
        empty_features(x) if wanted else None,
        state.new_empty(len(values) + 1, *x.shape[:2]) if wanted else None,
        *(None if t is None else state.new_empty(t.shape) for t in flatten(parameters)),
    ]


def _save(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    x, values, *parameters, mean, var, drop_scale = args[:_TENSORS]
    *ctx.flags, _ = args[_TENSORS:]
    *_, norm, _, _, _ = ctx.flags
    *_, scores, batch_mean, batch_var, pooled_x = results
    empty = [t for t in results if t.numel() == 0]
    ctx.mark_non_differentiable(scores, batch_mean, batch_var, pooled_x, *empty)
    if norm != "running":
        mean, var = batch_mean, batch_var
    kept = [x, values, *parameters, drop_scale, mean, var, scores, pooled_x]
    ctx.save_for_backward(*flatten(kept))
    ctx.sizes = sizes_of(kept)
    ctx.by_layers = [_is_of_a_layer(value) for value in values]


def _is_of_a_layer(value: Tensor) -> bool:
    """Whether the gradient of ``value`` goes to this op's own backward pass."""
    return value.grad_fn is not None and value.grad_fn.name() == "base_attention_functionBackward"


def _gradients(ctx: Any, *grads: Tensor | None) -> list[Any]:
    grad_out, grad_v, *grads = grads[:6]
    later = ()
    if isinstance(grad_v, WeightedSum):
        later, grad_v = grad_v.terms, None
    kept = unflatten(ctx.saved_tensors, ctx.sizes)
    values, parameters = kept[1], kept[2 : 2 + _PARAMETERS]
    needs_values = any(ctx.needs_input_grad[_VALUES : _VALUES + len(values)])
    dx, g, mix, *dparameters = _BACKWARD(
        grad_out,
        grad_v,
        *grads,
        [g for _, g in later],
        [w for w, _ in later],
        *kept,
        *ctx.flags,
        needs_values,
    )
    dvalues = [None] * len(values)
    if needs_values and grad_out is not None:
        dvalues = [
            value_gradient(w, g, by_layer) for w, by_layer in zip(mix, ctx.by_layers, strict=False)
        ]
    dparameters = unflatten(dparameters, sizes_of(parameters))
    dparameters = [None if t is None else dt for t, dt in zip(parameters, dparameters, strict=True)]
    return [dx, dvalues, *dparameters, None, None, None]


def _flops(*args: Any) -> int:
    x, _, _, keys, gates, _, cell_params, *_ = args
    cell, _, _, _, gated, *_ = args[-len(FLAGS) :]
    gated_rows = [len(gates)] if gated == "features" else [len(keys), len(gates)]
    return step_flops(x, 1, cell_params, cell, [1, *gated_rows])


def _backward_flops(*args: Any) -> int:
    return 2 * _flops(*args[GRADS:])  # a product has two gradients


_TENSORS = 16  # leading arguments
_PARAMETERS = 11  # of these, the small differentiable ones, from state to norm_bias
_VALUES = 3  # place of values in ctx.needs_input_grad, after the two of the registration and x
GRADS = 8  # leading arguments of the backward op, before x

_PARAMETER_LIST = (
    "Tensor state, Tensor keys, Tensor gates, Tensor[] pooled, Tensor[] cell_params, "
    "Tensor q_weight, Tensor k_weight, Tensor[] key_weights, Tensor v_weight, "
    "Tensor? norm_weight, Tensor? norm_bias, "
)
_FLAGS = (
    "str cell, str activation, str gate, str context, str gated, int head_dim, str norm, "
    "float eps, bool relu, bool residual, "
)

_OPERATOR, _BACKWARD = define(
    "base_attention",
    f"(Tensor x, Tensor[] values, {_PARAMETER_LIST} Tensor? mean_in, Tensor? var_in, "
    f"Tensor? drop_scale, {_FLAGS} bool return_v) -> (Tensor out, Tensor v, Tensor new_state, "
    "Tensor new_keys, Tensor new_gates, Tensor new_pooled, Tensor scores, Tensor mean, "
    "Tensor var, Tensor pooled_x)",
    "(Tensor? grad_out, Tensor? grad_v, Tensor? grad_state, Tensor? grad_keys, "
    "Tensor? grad_gates, Tensor? grad_pooled, Tensor[] later_grads, Tensor[] later_weights, "
    f"Tensor x, Tensor[] values, {_PARAMETER_LIST} Tensor? drop_scale, Tensor mean, "
    f"Tensor var, Tensor scores, Tensor pooled_x, {_FLAGS} bool needs_values) -> Tensor[]",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    gradients=_gradients,
    flops=_flops,
    backward_flops=_backward_flops,
)
