"""One complete DLA-B layer step in plain PyTorch: the definition the kernels are held to."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops._registration import flatten, sizes_of, unflatten
from dla_kernels.ops.common import dense_format, without_autocast
from dla_kernels.ops.differentiate import differentiate
from dla_kernels.ops.global_pool.reference import global_pool
from dla_kernels.ops.reference_common import dense_as
from dla_kernels.ops.reference_common import unsupported as unsupported
from dla_kernels.ops.step_checks import STATIC
from dla_kernels.ops.step_formulas import (
    add_branch,
    depthwise,
    filter_channels,
    forward_path,
    gates_of,
    normalise,
    scale,
)

FLAGS = (
    "cell",
    "activation",
    "gate",
    "context",
    "gated",
    "head_dim",
    "norm",
    "eps",
    "relu",
    "residual",
    "return_v",
)


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
) -> tuple[Tensor, ...]:
    """Arguments, shapes and results are those of ``dla_kernels.base_attention``.

    Features are raised to the compute dtype, everything is computed there, and only ``out`` and
    ``v`` are rounded back. ``scores``, ``mean``, ``var`` and ``pooled_x`` come detached.
    """
    with without_autocast(x):
        y = global_pool(x)
        given = state, keys, gates, pooled, cell_params, q_weight, k_weight, key_weights
        flags = cell, activation, gate, context, gated, head_dim
        new_state, keys, gates, scores = attend(y, *given, *flags)

        v = depthwise(x.to(y.dtype), v_weight)
        o = _mix(value_weights(scores, gates, head_dim), [*values, v])
        ends = norm, norm_weight, norm_bias, mean_in, var_in, eps, relu, drop_scale, residual
        out, mean, var = _finish(o, x, *ends)

        if gated == "features":
            keys, own_mean = y.new_empty(0, *y.shape), y
        elif cell != STATIC and return_v:
            own_mean = global_pool(v)
        else:
            own_mean = y.new_empty(0)
        v = v.to(x.dtype) if return_v else x.new_empty(0)
        constants = scores.detach(), mean, var, y.detach().clone()
        return out, v, new_state, keys, gates, own_mean, *constants


def scores_of(q: Tensor, keys: Tensor, head_dim: int) -> Tensor:
    """Attention of the query [B, C] to all layers' keys [T, B, C], per head: [T, B, C / D]."""
    products = (q * keys).unflatten(-1, (-1, head_dim)).sum(dim=-1)
    return torch.softmax(products / math.sqrt(head_dim), dim=0)


def attend(
    y: Tensor,
    state: Tensor,
    keys: Tensor,
    gates: Tensor,
    pooled: Sequence[Tensor],
    cell_params: Sequence[Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    key_weights: Sequence[Tensor],
    cell: str,
    activation: str,
    gate: str,
    context: str,
    gated: str,
    head_dim: int,
    scores_of: Callable[[Tensor, Tensor, int], Tensor] = scores_of,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The small part of a step: state', and keys, gates and scores of all layers, from y [B, C].

    scores_of: a kernel may take the formula's place.
    """
    new_state = forward_path(y, state, cell_params, cell, activation)
    if cell != STATIC:
        gate_path = new_state, cell_params, cell, activation, gate, context
        means = torch.stack(list(pooled)) if pooled else torch.empty_like(gates)
        if gated == "projections":
            keys = keys * gates_of(keys, *gate_path)
        gates = gates * gates_of(gates * means, *gate_path)
    if gated == "features" and pooled:
        gated_means = zip(gates * means, key_weights, strict=True)
        keys = torch.stack([filter_channels(u, weight) for u, weight in gated_means])
    keys = torch.cat([keys, filter_channels(y, k_weight).unsqueeze(0)])
    own_gate = torch.ones_like(y).unsqueeze(0)
    gates = torch.cat([gates, own_gate]) if cell != STATIC else torch.empty_like(gates)
    return new_state, keys, gates, scores_of(filter_channels(y, q_weight), keys, head_dim)


def value_weights(scores: Tensor, gates: Tensor, head_dim: int) -> Tensor:
    """The factor of each value, a_t G_t: [T, B, C]. The gates of a static layer are empty."""
    weights = scores.repeat_interleave(head_dim, dim=-1)
    return weights * gates if len(gates) else weights


def _mix(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """o = sum_t w_t v_t (Eq. 2), in the dtype of the weights."""
    terms = (scale(w, v.to(w.dtype)) for w, v in zip(weights, values, strict=True))
    return functools.reduce(torch.add, terms)


def _finish(
    o: Tensor,
    x: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    eps: float,
    relu: bool,
    drop_scale: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[x +] drop_scale * [relu] norm(o) in the dtype of x, and the batch's mean and variance."""
    branch, mean, var = normalise(o, norm, norm_weight, norm_bias, mean_in, var_in, eps)
    branch = torch.relu(branch) if relu else branch
    return add_branch(x.to(o.dtype), branch, drop_scale, residual).to(x.dtype), mean, var


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::base_attention``."""
    x = args[0]
    flags = dict(zip(FLAGS, args[-len(FLAGS) :], strict=True))
    out, v, *rest = base_attention(*args[: -len(FLAGS)], **flags)
    return dense_as(x, out), dense_as(x, v) if flags["return_v"] else v, *rest


def backward(
    grad_out: Tensor | None,
    grad_v: Tensor | None,
    grad_state: Tensor | None,
    grad_keys: Tensor | None,
    grad_gates: Tensor | None,
    grad_pooled: Tensor | None,
    later_grads: Sequence[Tensor],
    later_weights: Sequence[Tensor],
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
    drop_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scores: Tensor,
    pooled_x: Tensor,
    *flags: Any,
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::base_attention_backward``."""
    *flags, needs_values = flags
    options = dict(zip(FLAGS, (*flags, True), strict=True))
    parameters = [state, keys, gates, pooled, cell_params, q_weight, k_weight, key_weights]
    parameters += [v_weight, norm_weight, norm_bias]

    def step(x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        given = unflatten(flat, sizes_of(parameters))
        return base_attention(x, values, *given, mean, var, drop_scale, **options)

    if later_grads:
        grad_v = _mix(later_weights, later_grads).to(x.dtype)
    inputs = [x, *flatten(parameters)]
    found = differentiate(
        step, inputs, [grad_out, grad_v, grad_state, grad_keys, grad_gates, grad_pooled]
    )
    # Copies, since results of an operator must not share memory.
    dx, *dparameters = (
        None if dt is None else dt.clone(memory_format=dense_format(t))
        for t, dt in zip(inputs, found, strict=True)
    )
    g = weights = None
    if needs_values and grad_out is not None:
        with torch.no_grad(), without_autocast(x):
            gates = step(*inputs)[4]
            weights = value_weights(scores, gates, options["head_dim"])
            o = _mix(weights, [*values, depthwise(x.to(weights.dtype), v_weight)])

        def finish(o: Tensor) -> Tensor:
            affine = norm_weight, norm_bias, mean, var
            ends = options["eps"], options["relu"], drop_scale, options["residual"]
            return _finish(o, x, options["norm"], *affine, *ends)[0]

        (g,) = differentiate(finish, [o], [grad_out])
        g = g.to(x.dtype, copy=True, memory_format=dense_format(x))
    return [dx, g, weights, *dparameters]
