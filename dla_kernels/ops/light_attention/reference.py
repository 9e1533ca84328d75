"""One complete DLA-L layer step in plain PyTorch: the definition the kernels are held to."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops.common import compute_dtype, without_autocast
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
    "head_dim",
    "norm",
    "eps",
    "residual",
    "join",
    "branch_norm",
    "branch_eps",
    "return_o",
)


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
) -> tuple[Tensor, ...]:
    """Arguments, shapes and results are those of ``dla_kernels.light_attention``.

    Features are raised to the compute dtype, everything is computed there, and only ``out`` and
    ``o`` are rounded back. Statistics and summary come detached.
    """
    feature_dtype = x.dtype
    dtype = compute_dtype(feature_dtype)
    with without_autocast(x):
        x, p = x.to(dtype), None if p is None else p.to(dtype)
        affine = branch_weight, branch_bias, branch_mean_in, branch_var_in
        x, *branch_statistics = normalise(x, branch_norm, *affine, branch_eps)
        if join:
            x = torch.relu(x + p)
        y = global_pool(x)
        u, e = depthwise(x, v_weight), None
        new_state = forward_path(y, state, cell_params, cell, activation)
        attention = scores_of(y, q_weight, k_weight, head_dim)
        pooled_p, gates = torch.zeros_like(y), torch.ones_like(y)
        if p is None:
            # p = 0. Every parameter stays part of the graph (DistributedDataParallel needs it):
            # the gradient of lam is zero.
            o = scale(attention + 0.0 * lam, u)
        else:
            if cell != STATIC:
                pooled_p = global_pool(p)
                context_and_cell = new_state, cell_params, cell, activation, gate, context
                gates = gates_of(pooled_p.unsqueeze(0), *context_and_cell)[0]
            history = scale(gates, p)
            if prev_weight is not None:
                e = depthwise(p, prev_weight)
                history = history + e
            o = scale(attention, u) + lam[:, None, None] * history
        summary = [y, pooled_p, attention, gates]
        if norm == "batch":
            mean_u, summary[1], *rest = moments_of_planes(o, u, p, e)
            summary += [mean_u, *rest]

        out, mean, var = normalise(o, norm, norm_weight, norm_bias, mean_in, var_in, eps)
        out = add_branch(x, out, drop_scale, residual)
        kept = o.to(feature_dtype) if return_o else x.new_empty(0, dtype=feature_dtype)
        summary = torch.stack(summary).detach()
        return out.to(feature_dtype), kept, new_state, mean, var, *branch_statistics, summary


def summary_size(norm: str) -> int:
    """How many arrays [B, C] the summary of a step has."""
    return 12 if norm == "batch" else 4


@torch.no_grad()
def moments_of_planes(o: Tensor, *maps: Tensor | None) -> list[Tensor]:
    """Means of maps over space, what rounding took from these, and their covariances with o.

    [B, C] each, zeros for None.
    """
    o = o - global_pool(o)[:, :, None, None]
    none = torch.zeros_like(o[:, :, 0, 0])
    found = []
    for m in maps:
        if m is None:
            found.append((none, none, none))
            continue
        mean = global_pool(m)
        rest = m.double().mean((2, 3)) - mean
        product = (o * (m - mean[:, :, None, None])).mean((2, 3))
        found.append((mean, rest.to(o.dtype), product))
    means, rests, products = zip(*found, strict=True)
    return [*means, *rests, *products]


def scores_of(y: Tensor, q_weight: Tensor, k_weight: Tensor, head_dim: int) -> Tensor:
    """Attention of each head to its own layer, repeated over the channels of the head: [B, C]."""
    batch, channels = y.shape
    heads = (batch, channels // head_dim, head_dim)
    q, k = (filter_channels(y, weight).view(heads) for weight in (q_weight, k_weight))
    scores = (q * k).sum(dim=2, keepdim=True) / math.sqrt(head_dim)
    return torch.sigmoid(scores).expand(heads).reshape(batch, channels)


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::light_attention``."""
    x = args[0]
    flags = dict(zip(FLAGS, args[-len(FLAGS) :], strict=True))
    out, o, *rest = light_attention(*args[: -len(FLAGS)], **flags)
    o = o.clone() if o is out else o  # results of an operator must not share memory
    o = dense_as(x, o) if flags["return_o"] else o
    return dense_as(x, out), o, *rest


def backward(
    grad_out: Tensor | None,
    grad_o: Tensor | None,
    grad_state: Tensor | None,
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
    drop_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    branch_mean: Tensor,
    branch_var: Tensor,
    new_state: Tensor,
    summary: Tensor,
    *flags: Any,
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    *flags, needs_p = flags
    options = dict(zip(FLAGS, (*flags, grad_o is not None), strict=True))
    weights = [q_weight, k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias]
    weights += [branch_weight, branch_bias]
    constants = mean, var, branch_mean, branch_var, drop_scale

    def function(x: Tensor, p: Tensor | None, state: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, params = rest[: len(rest) - len(cell_params)], rest[len(rest) - len(cell_params) :]
        return light_attention(x, p, state, params, *weights, *constants, **options)

    inputs = [x, p, state, *weights, *cell_params]
    found = differentiate(function, inputs, [grad_out, grad_o, grad_state])
    if not needs_p:
        found[1] = None
    return [None if g is None else dense_as(t, g) for t, g in zip(inputs, found, strict=True)]
