"""One complete DLA-L layer step in plain PyTorch: the definition the kernels are held to."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv1d, conv2d

from dla_kernels.ops.cell.reference import cell as cell_step
from dla_kernels.ops.common import compute_dtype, without_autocast
from dla_kernels.ops.differentiate import dense_as, differentiate
from dla_kernels.ops.global_pool.reference import global_pool

FLAGS = (
    "cell",
    "activation",
    "gate",
    "context",
    "head_dim",
    "norm",
    "eps",
    "residual",
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
    mean_in: Tensor | None,
    var_in: Tensor | None,
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
    return_o: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments, shapes and results are those of ``dla_kernels.light_attention``.

    Features are raised to the compute dtype, everything is computed there, and only ``out`` and
    ``o`` are rounded back. ``mean``, ``var`` and ``pooled`` come detached.
    """
    feature_dtype = x.dtype
    dtype = compute_dtype(feature_dtype)
    with without_autocast(x):
        y = global_pool(x)
        new_state = _forward_path(y, state, cell_params, cell, activation)
        attention = _scores(y, q_weight, k_weight, head_dim)
        x = x.to(dtype)
        if p is None:
            # p = 0. Every parameter stays part of the graph (DistributedDataParallel needs it):
            # the gradient of lam is zero.
            pooled = torch.stack([y, torch.zeros_like(y)])
            o = _scale(attention + 0.0 * lam, _depthwise(x, v_weight))
        else:
            pooled_p = torch.zeros_like(y) if cell == "none" else global_pool(p)
            pooled = torch.stack([y, pooled_p])
            p = p.to(dtype)
            history = p
            if cell != "none":
                history = _scale(
                    _gate(pooled_p, new_state, cell_params, cell, activation, gate, context), p
                )
            if prev_weight is not None:
                history = history + _depthwise(p, prev_weight)
            o = _scale(attention, _depthwise(x, v_weight)) + lam[:, None, None] * history

        out, mean, var = _normalise(o, norm, norm_weight, norm_bias, mean_in, var_in, eps)
        if drop_scale is not None:
            out = out * drop_scale.detach()[:, None, None, None]
        if residual:
            out = x + out
        kept = o.to(feature_dtype) if return_o else x.new_empty(0, dtype=feature_dtype)
        return out.to(feature_dtype), kept, new_state, mean, var, pooled.detach()


def _forward_path(
    y: Tensor, state: Tensor, params: Sequence[Tensor], cell: str, activation: str
) -> Tensor:
    """c^l = Dyn(y, c^{l-1}) (Eq. 4-5); the static layer has an empty state [0, B, C]."""
    if cell == "none":
        return torch.empty_like(state)
    return cell_step(y, state, params, cell, activation)


def _gate(
    pooled_p: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    cell: str,
    activation: str,
    gate: str,
    context: str,
) -> Tensor:
    """d = gate(Dyn(GAP(p), state^l)) (Eq. 6); the state this step makes is thrown away."""
    if context == "first_sample":
        # The defect of the official code (design 2.5): sample 0 lends its context to all.
        state = state[:, :1].expand_as(state)
    output = cell_step(pooled_p, state, params, cell, activation)[0]
    return torch.sigmoid(output) if gate == "sigmoid" else output


def _scores(y: Tensor, q_weight: Tensor, k_weight: Tensor, head_dim: int) -> Tensor:
    """Attention of each head to its own layer, repeated over the channels of the head: [B, C]."""
    batch, channels = y.shape
    padding = q_weight.shape[-1] // 2
    heads = (batch, channels // head_dim, head_dim)
    q = conv1d(y.unsqueeze(1), q_weight, padding=padding).view(heads)
    k = conv1d(y.unsqueeze(1), k_weight, padding=padding).view(heads)
    scores = (q * k).sum(dim=2, keepdim=True) / math.sqrt(head_dim)
    return torch.sigmoid(scores).expand(heads).reshape(batch, channels)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return conv2d(x, weight, padding=1, groups=x.shape[1])


def _scale(factor: Tensor, x: Tensor) -> Tensor:
    """[B, C] times [B, C, H, W]."""
    return factor[:, :, None, None] * x


def _normalise(
    o: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation; mean and (biased) variance are those of the batch or empty."""
    if norm == "none":
        return o, o.new_empty(0), o.new_empty(0)
    if norm == "running":
        constants = mean_in.detach(), var_in.detach()
        out = batch_norm(o, *constants, weight, bias, training=False, eps=eps)
        return out, o.new_empty(0), o.new_empty(0)
    channels = o.shape[1]
    count = o.numel() // channels
    # Momentum 1: the running statistics are those of this batch. torch.var_mean would be slower.
    mean, unbiased = o.new_zeros(channels), o.new_zeros(channels)
    out = batch_norm(o, mean, unbiased, weight, bias, training=True, momentum=1.0, eps=eps)
    return out, mean, unbiased * ((count - 1) / count)


def unsupported(x: Tensor) -> str | None:
    """The formulas run wherever torch does."""
    return None


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::light_attention``."""
    x = args[0]
    flags = dict(zip(FLAGS, args[-len(FLAGS) :], strict=True))
    out, o, *rest = light_attention(*args[: -len(FLAGS)], **flags)
    o = o.clone() if o is out else o  # results of an operator must not share memory
    return dense_as(x, out), dense_as(x, o) if flags["return_o"] else o, *rest


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
    drop_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pooled: Tensor,
    *flags: Any,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    *flags, needs_p = flags
    options = dict(zip(FLAGS, (*flags, grad_o is not None), strict=True))
    weights = [q_weight, k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias]

    def function(x: Tensor, p: Tensor | None, state: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, params = rest[:7], rest[7:]
        return light_attention(x, p, state, params, *weights, mean, var, drop_scale, **options)

    inputs = [x, p, state, *weights, *cell_params]
    found = differentiate(function, inputs, [grad_out, grad_o, grad_state])
    if not needs_p:
        found[1] = None
    return [
        state.new_empty(0) if g is None else dense_as(t, g)
        for t, g in zip(inputs, found, strict=True)
    ]
