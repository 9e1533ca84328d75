"""``light_attention`` in Triton: which kernels of ``triton_kernels.py`` are launched, and between
them the small part, on tensors [B, C]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dla_kernels.ops.common import compute_dtype, dense, dense_format, empty_features
from dla_kernels.ops.differentiate import differentiate
from dla_kernels.ops.light_attention.reference import scores_of
from dla_kernels.ops.light_attention.triton_kernels import (
    FIELDS,
    Gradients,
    Inputs,
    Mixture,
    Norm,
    P,
    P0,
    Size,
    X,
    channel_gradients_kernel,
    gradients_kernel,
    moments_kernel,
    output_kernel,
    statistics_kernel,
)
from dla_kernels.ops.step_formulas import forward_path, gates_of
from dla_kernels.ops.triton_common import Tiles, finish, launch, plane_sums, tiles
from dla_kernels.ops.triton_common import unsupported as unsupported

STENCIL = 512  # elements of a tile: a thread holds several values for each
# Pixels that a program forms g of before it reads what is around them.
GRADIENT_PIXELS = {torch.contiguous_format: 2048, torch.channels_last: 512}
PROGRAMS_PER_PROCESSOR = 2  # of `gradients_kernel`
REGISTERS = 128  # of a thread: two programs of eight warps on a processor
# Of a program that adds up planes: samples, and neighbouring channels (32 bytes).
FOLD = {"ROWS": 64, "CHANNELS": 8, "num_warps": 4}


@dataclass(frozen=True)
class _Cell:
    """How the small part goes from the pooled values to scores, new state and gates."""

    cell: str
    activation: str
    gate: str
    context: str
    head_dim: int

    def forward(
        self,
        y: Tensor,
        pooled_p: Tensor | None,
        state: Tensor,
        params: Sequence[Tensor],
        q_weight: Tensor,
        k_weight: Tensor,
    ) -> tuple[Tensor, ...]:
        """a, new state and, with a pooled p, d. Not yet in Triton: formulas of the reference."""
        attention = scores_of(y, q_weight, k_weight, self.head_dim)
        new_state = forward_path(y, state, params, self.cell, self.activation)
        if pooled_p is None:
            return attention, new_state
        context = new_state, params, self.cell, self.activation, self.gate, self.context
        return attention, new_state, gates_of(pooled_p[None], *context)[0]

    def backward(
        self,
        grads: Sequence[Tensor | None],
        y: Tensor,
        pooled_p: Tensor | None,
        state: Tensor,
        params: Sequence[Tensor],
        q_weight: Tensor,
        k_weight: Tensor,
    ) -> list[Any]:
        """Gradients of the arguments of `forward` (a list of them for params)."""

        def function(y: Tensor, p: Tensor | None, state: Tensor, *rest: Tensor) -> tuple[Any, ...]:
            return self.forward(y, p, state, rest[:-2], *rest[-2:])

        inputs = [y, pooled_p, state, *params, q_weight, k_weight]
        found = [_contiguous(t) for t in differentiate(function, inputs, grads)]
        return [*found[:3], found[3:-2], *found[-2:]]


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
) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::light_attention``."""
    layout = dense_format(x)
    x, p = dense(x, layout), dense(p, layout)
    batch, channels, height, width = x.shape
    area = height * width
    inputs = _inputs(x, p, v_weight, prev_weight, join)
    empty = state.new_empty(0)
    gated = p is not None and cell != "none"
    if norm == "batch":
        sums = _moments(inputs, Gradients(None, None))
        y = sums[X.value] / area
        pooled_p = sums[P0.value] + sums[P.value] / area if gated else None
    else:
        y, pooled_p = _means(inputs, gated)
    step = _Cell(cell, activation, gate, context, head_dim)
    attention, new_state, *gates = step.forward(
        y, pooled_p, state, cell_params, q_weight, k_weight
    )
    rest = (pooled_p, *gates) if gated else (torch.zeros_like(y), torch.ones_like(y))
    summary = torch.stack([y, rest[0], attention, rest[1]])
    mixture = Mixture(summary, lam.contiguous(), batch * channels)
    mean, var = empty, empty
    if norm == "batch":
        mean, var = state.new_empty(channels), state.new_empty(channels)
        grid = (triton.cdiv(channels, FOLD["CHANNELS"]),)
        launch(statistics_kernel, grid, sums, mixture, mean, var, batch, channels, area, **FOLD)
    out, o = empty_features(x), empty_features(x) if return_o else None
    plan = tiles(x, size=STENCIL)
    launch(
        output_kernel,
        (plan.programs,),
        *(inputs, mixture, _norm(norm, mean, var, mean_in, var_in, norm_weight, norm_bias)),
        *(_contiguous(drop_scale), out, o, Size(channels, height, width)),
        EPS=eps,
        RESIDUAL=residual,
        **plan.sizes,
    )
    o = x.new_empty(0) if o is None else o
    return out, o, new_state.contiguous(), mean, var, empty.clone(), empty.clone(), summary


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
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    layout = dense_format(x)
    x, p, grad_out, grad_o = (dense(t, layout) for t in (x, p, grad_out, grad_o))
    batch, channels, height, width = x.shape
    inputs = _inputs(x, p, v_weight, prev_weight, join)
    arriving = Gradients(grad_out, grad_o)
    size = Size(channels, height, width)
    mixture = Mixture(summary.contiguous(), lam.contiguous(), batch * channels)
    of_planes, of_channels = state.new_empty(3, batch, channels), state.new_empty(6, channels)
    launch(
        channel_gradients_kernel,
        (triton.cdiv(channels, FOLD["CHANNELS"]),),
        *(_moments(inputs, arriving), mixture),
        *(_norm(norm, mean, var, mean, var, norm_weight, norm_bias), _contiguous(drop_scale)),
        *(of_planes, of_channels, batch, channels, height * width),
        EPS=eps,
        THROUGH_NORM=norm == "batch",
        **FOLD,
    )
    da, dd, _ = of_planes
    gated = p is not None and cell != "none"
    dy, dpooled_p, dstate, dparams, dq, dk = _Cell(
        cell, activation, gate, context, head_dim
    ).backward(
        [da, grad_state, dd],
        *(summary[0], summary[1] if gated else None, state, cell_params, q_weight, k_weight),
    )
    dx = empty_features(x)
    dp = empty_features(x) if p is not None and needs_p else None
    dpooled_p = torch.zeros_like(dy) if dpooled_p is None else dpooled_p
    plan = tiles(x, size=STENCIL, chunk=GRADIENT_PIXELS[layout])
    programs, length = _programs(x, plan), _neighbourhood(x, plan)
    filters = state.new_empty(20, batch, channels, plan.chunks)
    scratch = state.new_empty(programs, plan.sizes["PLANES"], length)
    launch(
        gradients_kernel,
        (programs,),
        *(inputs, arriving, mixture, of_planes, of_channels, dy, dpooled_p, dx, dp),
        *(filters, filters.stride(0), None, scratch, plan.programs, length, size),
        THROUGH_NORM=norm == "batch",
        RESIDUAL=residual,
        maxnreg=REGISTERS,
        **plan.sizes,
    )
    of_filters = filters.sum((1, 3))
    dlam, dweight, dbias, *_ = of_channels
    dweights = [
        *(dq, dk, _filters(of_filters[:9])),
        *(None if prev_weight is None else _filters(of_filters[9:18] * lam), dlam.clone()),
        *(None if w is None else d.clone() for w, d in ((norm_weight, dweight), (norm_bias, dbias))),
        *(None, None),
    ]
    grads = [dx, dp, dstate, *dweights, *dparams]
    return [state.new_empty(0) if g is None else g for g in grads]


def _inputs(
    x: Tensor, p: Tensor | None, v_weight: Tensor, prev_weight: Tensor | None, join: bool
) -> Inputs:
    filters = v_weight.contiguous(), _contiguous(prev_weight)
    return Inputs(x, p, *filters, None, None, p if join else None)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _norm(
    norm: str,
    mean: Tensor,
    var: Tensor,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Norm:
    """The statistics that the norm uses: those of the batch, those given, or none."""
    used = {"batch": (mean, var), "running": (mean_in, var_in), "none": (None, None)}[norm]
    return Norm(*(_contiguous(t) for t in (*used, weight, bias)))


def _filters(taps: Tensor) -> Tensor:
    """[C, 1, 3, 3] from [9, C]."""
    return taps.t().reshape(-1, 1, 3, 3)


def _moments(inputs: Inputs, gradients: Gradients) -> Tensor:
    """The numbers of all planes [FIELDS, B, C], see `moments_kernel`."""
    x = inputs.x
    batch, channels, height, width = x.shape
    plan = tiles(x, summing=True, size=STENCIL)
    dtype = compute_dtype(x.dtype)
    sums = x.new_zeros((FIELDS.value, batch, channels, plan.chunks), dtype=dtype)
    size = Size(channels, height, width)
    launch(
        moments_kernel,
        (plan.programs,),
        *(inputs, gradients, sums, sums.stride(0), size),
        maxnreg=REGISTERS,
        **plan.sizes,
    )
    (sums,) = finish([sums.view(FIELDS.value * batch, channels, plan.chunks)])
    return sums.view(FIELDS.value, batch, channels)


def _means(inputs: Inputs, gated: bool) -> tuple[Tensor, Tensor | None]:
    """Means [B, C] of x, and of p if that is wanted."""
    area = inputs.x.shape[2] * inputs.x.shape[3]
    maps = [inputs.x, inputs.p] if gated else [inputs.x]
    y, *pooled_p = plane_sums(maps, area)
    return y, *(pooled_p or [None])


def _programs(x: Tensor, plan: Tiles) -> int:
    """How many programs of `gradients_kernel` run at a time."""
    if not x.is_cuda:
        return min(plan.programs, PROGRAMS_PER_PROCESSOR)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(plan.programs, PROGRAMS_PER_PROCESSOR * processors)


def _neighbourhood(x: Tensor, plan: Tiles) -> int:
    """Pixels of a plane that a chunk of it and all that is around can have."""
    height, width = x.shape[2:]
    return min(height * width, plan.sizes["CHUNK"] + 2 * (width + 1))
