"""``light_attention`` on the compiled CPU kernels (``csrc/ops/light_attention``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.cell.cpp import ACTIVATIONS, KINDS
from dla_kernels.ops.cpp_common import DTYPES, address, dense, memory_format
from dla_kernels.ops.cpp_common import unsupported as unsupported

NORMS = {"none": 0, "batch": 1, "running": 2}


def forward(
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
    """Arguments and results of ``dla_kernels::light_attention``."""
    layout = memory_format(x)
    x, p = dense(x, layout), dense(p, layout)
    small = _contiguous(state, q_weight, k_weight, v_weight, prev_weight, lam, norm_weight)
    small += _contiguous(norm_bias, drop_scale, mean_in, var_in)
    params = _contiguous(*cell_params)
    out = torch.empty_like(x, memory_format=layout)
    o = torch.empty_like(out) if return_o else x.new_empty(0)
    new_state = torch.empty_like(small[0])
    channels = x.shape[1]
    mean, var = (state.new_empty(channels if norm == "batch" else 0) for _ in range(2))
    pooled = state.new_empty(2, x.shape[0], channels)
    module = native.load()
    module.light_attention_forward(
        module.LightAttentionForward(
            **_inputs(x, p, small[:9], params, head_dim, norm, eps, residual),
            **_switches(cell, activation, gate, context),
            mean_in=address(small[9]),
            var_in=address(small[10]),
            out=address(out),
            o=address(o) if return_o else None,
            state_out=address(new_state),
            mean=address(mean),
            var=address(var),
            pooled=address(pooled),
        )
    )
    return out, o, new_state, mean, var, pooled


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
    cell: str,
    activation: str,
    gate: str,
    context: str,
    head_dim: int,
    norm: str,
    eps: float,
    residual: bool,
    needs_p: bool,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    layout = memory_format(x)
    x, p, grad_out, grad_o = (dense(t, layout) for t in (x, p, grad_out, grad_o))
    small = _contiguous(state, q_weight, k_weight, v_weight, prev_weight, lam, norm_weight)
    small += _contiguous(norm_bias, drop_scale, mean, var, pooled, grad_state)
    params = _contiguous(*cell_params)
    dx = torch.empty_like(x, memory_format=layout)
    dp = torch.empty_like(dx) if p is not None and needs_p else None
    # The kernel adds to the gradients of the cell: it is evaluated twice.
    dstate = torch.zeros_like(small[0])
    dparams = [torch.zeros_like(w) for w in params]
    # Of q_weight, k_weight, v_weight, prev_weight, lam, norm_weight and norm_bias.
    dsmall = [None if w is None else torch.empty_like(w) for w in small[1:8]]
    module = native.load()
    module.light_attention_backward(
        module.LightAttentionBackward(
            **_inputs(x, p, small[:9], params, head_dim, norm, eps, residual),
            **_switches(cell, activation, gate, context),
            grad_out=address(grad_out),
            grad_o=address(grad_o),
            grad_state=address(small[12]),
            mean=address(small[9]),
            var=address(small[10]),
            pooled=address(small[11]),
            dx=address(dx),
            dp=address(dp),
            dstate=address(dstate),
            dq_weight=address(dsmall[0]),
            dk_weight=address(dsmall[1]),
            dv_weight=address(dsmall[2]),
            dprev_weight=address(dsmall[3]),
            dlam=address(dsmall[4]),
            dnorm_weight=address(dsmall[5]),
            dnorm_bias=address(dsmall[6]),
            dcell_params=[address(w) for w in dparams],
        )
    )
    grads = [dx, dp, dstate, *dsmall]
    return [state.new_empty(0) if g is None else g for g in grads] + dparams


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _inputs(
    x: Tensor,
    p: Tensor | None,
    small: list[Tensor | None],
    params: list[Tensor],
    head_dim: int,
    norm: str,
    eps: float,
    residual: bool,
) -> dict[str, object]:
    """Fields of the native ``LightAttentionInputs`` that hold tensors and sizes."""
    state, q_weight, k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias, drop = small
    batch, channels, height, width = x.shape
    return {
        "x": address(x),
        "p": address(p),
        "state": address(state),
        "cell_params": [address(w) for w in params],
        "q_weight": address(q_weight),
        "k_weight": address(k_weight),
        "v_weight": address(v_weight),
        "prev_weight": address(prev_weight),
        "lam": address(lam),
        "norm_weight": address(norm_weight),
        "norm_bias": address(norm_bias),
        "drop_scale": address(drop),
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "head_dim": head_dim,
        "kernel_size": q_weight.numel(),
        "hidden": params[0].shape[0] if params else 0,
        "dtype": DTYPES[x.dtype],
        "norm": NORMS[norm],
        "channels_last": memory_format(x) is torch.channels_last,
        "residual": residual,
        "eps": eps,
        "threads": torch.get_num_threads(),
    }


def _switches(cell: str, activation: str, gate: str, context: str) -> dict[str, object]:
    return {
        "cell": KINDS.get(cell, 0),  # a static layer has no cell parameters and reads no kind
        "activation": ACTIVATIONS[activation],
        "sigmoid_gate": gate == "sigmoid",
        "first_sample": context == "first_sample",
    }
