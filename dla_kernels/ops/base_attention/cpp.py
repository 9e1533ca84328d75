"""``base_attention`` on the compiled CPU kernels (``csrc/ops/base_attention``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels.ops.common import contiguous, dense, dense_format, empty_features
from dla_kernels.ops.cpp_common import unsupported as unsupported
from dla_kernels.ops.step_checks import STATIC
from dla_kernels.ops.step_cpp import Step, flags, on_cpu, sizes


def forward_step(
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
) -> Step:
    """Arguments and results of ``dla_kernels::base_attention``."""
    layout = dense_format(x)
    (batch, channels), layers = x.shape[:2], len(values) + 1
    dynamic, features = cell != STATIC, gated == "features"
    maps = {"x": dense(x, layout)}
    small = contiguous(
        state=state,
        keys=keys,
        gates=gates,
        q_weight=q_weight,
        k_weight=k_weight,
        v_weight=v_weight,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        drop_scale=drop_scale,
        mean_in=mean_in,
        var_in=var_in,
    )
    lists = {
        "values": [dense(value, layout) for value in values],
        "pooled": [mean.contiguous() for mean in pooled],
        "cell_params": [w.contiguous() for w in cell_params],
        "key_weights": [w.contiguous() for w in key_weights],
    }
    results = {
        "out": empty_features(x),
        "v": empty_features(x) if return_v else x.new_empty(0),
        "state_out": torch.empty_like(small["state"]),
        "keys_out": keys.new_empty(0 if features else layers, batch, channels),
        "gates_out": gates.new_empty(layers if dynamic else 0, batch, channels),
        "pooled_v": state.new_empty(
            (batch, channels) if dynamic and return_v and not features else 0
        ),
        "scores": state.new_empty(layers, batch, channels // head_dim),
        "mean": state.new_empty(channels if norm == "batch" else 0),
        "var": state.new_empty(channels if norm == "batch" else 0),
        "pooled_x": state.new_empty(batch, channels),
    }
    arguments = dict(
        **sizes(x, layout, q_weight, cell_params),
        **flags(cell, activation, gate, context, head_dim, norm, eps, residual),
        gated_features=features,
        relu=relu,
        **maps,
        **small,
        **lists,
        **results,
    )
    return Step(
        "base_attention_forward",
        arguments,
        tuple(results.values()),
        _with_own_mean if features else None,
    )


def backward_step(
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
    needs_values: bool,
    memory_for_dv: bool = False,
) -> Step:
    """Arguments and results of ``dla_kernels::base_attention_backward``; the last is for GPUs."""
    layout = dense_format(x)
    features = gated == "features"
    maps = {"x": dense(x, layout), "grad_out": dense(grad_out, layout)}
    maps["grad_v"] = dense(grad_v, layout)
    weights = contiguous(
        state=state,
        keys=keys,
        gates=gates,
        q_weight=q_weight,
        k_weight=k_weight,
        v_weight=v_weight,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    small = contiguous(
        drop_scale=drop_scale,
        mean=mean,
        var=var,
        scores=scores,
        pooled_x=pooled_x,
        grad_state=grad_state,
        grad_keys=grad_keys,
        grad_gates=grad_gates,
        grad_pooled_v=None if features else grad_pooled,
        grad_pooled_x=grad_pooled if features else None,
    )
    weight_lists = {
        "pooled": [t.contiguous() for t in pooled],
        "cell_params": [w.contiguous() for w in cell_params],
        "key_weights": [w.contiguous() for w in key_weights],
    }
    lists = {
        "values": [dense(value, layout) for value in values],
        "later_grads": [dense(g, layout) for g in later_grads],
        "later_weights": [w.contiguous() for w in later_weights],
    }
    # The kernel reads g again, whoever else wants it.
    g = mix = None
    if grad_out is not None:
        g, mix = empty_features(x), state.new_empty(len(values) + 1, *x.shape[:2])
    dx = empty_features(x)
    dweights = {name: None if w is None else torch.empty_like(w) for name, w in weights.items()}
    dlists = {name: [torch.empty_like(t) for t in ts] for name, ts in weight_lists.items()}
    terms = len(later_grads) + sum(t is not None for t in (grad_out, grad_v))
    dv = empty_features(x) if memory_for_dv and terms > 1 else None
    arguments = dict(
        **sizes(x, layout, q_weight, cell_params),
        **flags(cell, activation, gate, context, head_dim, norm, eps, residual),
        gated_features=features,
        relu=relu,
        **maps,
        **weights,
        **small,
        **weight_lists,
        **lists,
        **{f"d{name}": found for name, found in (dweights | dlists).items()},
        dx=dx,
        g=g,
        weights=mix,
        dv=dv,
    )
    if not needs_values:
        g = mix = None
    dstate, dkeys, dgates, dq_weight, dk_weight, dv_weight, *dnorm = dweights.values()
    dpooled, dcell_params, dkey_weights = dlists.values()
    dcell = [dstate, dkeys, dgates, *dpooled, *dcell_params]
    results = [dx, g, mix, *dcell, dq_weight, dk_weight, *dkey_weights, dv_weight, *dnorm]
    finish = _without_norm if grad_out is None else None
    return Step("base_attention_backward", arguments, results, finish)


def _with_own_mean(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Under ``gated="features"`` the mean that later layers read is that of x."""
    out, v, state, keys, gates, _, *rest = results
    return out, v, state, keys, gates, rest[-1].clone(), *rest


def _without_norm(results: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Without a gradient of out the kernels take no look at the norm."""
    for grad in results[-2:]:
        if grad is not None:
            grad.zero_()
    return results


forward, backward = on_cpu(forward_step), on_cpu(backward_step)
