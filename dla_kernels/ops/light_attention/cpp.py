"""``light_attention`` on the compiled CPU kernels (``csrc/ops/light_attention``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels.ops.common import contiguous, dense, dense_format
from dla_kernels.ops.cpp_common import NORMS
from dla_kernels.ops.cpp_common import unsupported as unsupported
from dla_kernels.ops.light_attention.reference import summary_size
from dla_kernels.ops.step_cpp import Step, flags, on_cpu, sizes


def forward_step(
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
) -> Step:
    """Arguments and results of ``dla_kernels::light_attention``."""
    layout = dense_format(x)
    x, p = dense(x, layout), dense(p, layout)
    small = contiguous(
        state=state,
        q_weight=q_weight,
        k_weight=k_weight,
        v_weight=v_weight,
        prev_weight=prev_weight,
        lam=lam,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        branch_weight=branch_weight,
        branch_bias=branch_bias,
        drop_scale=drop_scale,
        mean_in=mean_in,
        var_in=var_in,
        branch_mean_in=branch_mean_in,
        branch_var_in=branch_var_in,
    )
    params = [w.contiguous() for w in cell_params]
    out = torch.empty_like(x, memory_format=layout)
    o = torch.empty_like(out) if return_o else x.new_empty(0)
    new_state = torch.empty_like(small["state"])
    batch, channels = x.shape[:2]
    mean, var, branch_mean, branch_var = (
        state.new_empty(channels if kind == "batch" else 0)
        for kind in (norm, norm, branch_norm, branch_norm)
    )
    summary = state.new_empty(summary_size(norm), batch, channels)
    arguments = dict(
        **sizes(x, layout, q_weight, params),
        **flags(cell, activation, gate, context, head_dim, norm, eps, residual),
        join=join,
        branch_norm=NORMS[branch_norm],
        branch_eps=branch_eps,
        **small,
        x=x,
        p=p,
        cell_params=params,
        out=out,
        o=o,
        new_state=new_state,
        mean=mean,
        var=var,
        branch_mean=branch_mean,
        branch_var=branch_var,
        summary=summary,
    )
    results = out, o, new_state, mean, var, branch_mean, branch_var, summary
    return Step("light_attention_forward", arguments, results)


def backward_step(
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
    needs_p: bool,
) -> Step:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    layout = dense_format(x)
    x, p, grad_out, grad_o = (dense(t, layout) for t in (x, p, grad_out, grad_o))
    weights = contiguous(
        q_weight=q_weight,
        k_weight=k_weight,
        v_weight=v_weight,
        prev_weight=prev_weight,
        lam=lam,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        branch_weight=branch_weight,
        branch_bias=branch_bias,
    )
    small = contiguous(
        state=state,
        drop_scale=drop_scale,
        mean=mean,
        var=var,
        branch_mean=branch_mean,
        branch_var=branch_var,
        new_state=new_state,
        summary=summary,
        grad_state=grad_state,
    )
    params = [w.contiguous() for w in cell_params]
    dx = torch.empty_like(x, memory_format=layout)
    dp = torch.empty_like(dx) if p is not None and needs_p else None
    dweights = {
        f"d{name}": None if w is None else torch.empty_like(w) for name, w in weights.items()
    }
    dstate, *dparams = [torch.empty_like(t) for t in (small["state"], *params)]
    arguments = dict(
        **sizes(x, layout, q_weight, params),
        **flags(cell, activation, gate, context, head_dim, norm, eps, residual),
        join=join,
        branch_norm=NORMS[branch_norm],
        branch_eps=branch_eps,
        **weights,
        **small,
        **dweights,
        x=x,
        p=p,
        cell_params=params,
        grad_out=grad_out,
        grad_o=grad_o,
        dx=dx,
        dp=dp,
        dstate=dstate,
        dcell_params=dparams,
    )
    results = [dx, dp, dstate, *dweights.values(), *dparams]
    return Step("light_attention_backward", arguments, results)


forward, backward = on_cpu(forward_step), on_cpu(backward_step)
