"""``light_attention`` in Triton: which kernels of ``triton_kernels.py`` are launched, and between
them the small part, on tensors [B, C]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dla_kernels.ops import triton_tuning
from dla_kernels.ops.cell import triton as cell_triton
from dla_kernels.ops.common import (
    contiguous,
    dense,
    dense_format,
    empty_features,
    without_autocast,
)
from dla_kernels.ops.differentiate import differentiate
from dla_kernels.ops.light_attention.reference import scores_of, summary_size
from dla_kernels.ops.light_attention.triton_kernels import (
    FIELDS,
    GRADIENT_FIELDS,
    Gradients,
    Inputs,
    Mixture,
    Moments,
    OfMaps,
    P,
    Rule,
    Size,
    X,
    channel_gradients_kernel,
    gradients_kernel,
    means_kernel,
    moments_kernel,
    output_kernel,
    statistics_kernel,
)
from dla_kernels.ops.norm_triton import Ending, ending
from dla_kernels.ops.residual_norm.triton import moments, through_norm
from dla_kernels.ops.step_checks import STATIC
from dla_kernels.ops.step_formulas import context_of
from dla_kernels.ops.triton_common import (
    Setting,
    Tiles,
    finish,
    launch,
    launch_tiles,
    new_sums,
    plane_sums,
    tiles,
)
from dla_kernels.ops.triton_common import unsupported as unsupported

STENCIL = 512  # elements of a tile of eight warps: a thread holds many values for each
GRADIENTS = 256  # of `gradients_kernel`, which needs the most registers
# Per thread; with a limit, ptxas does not spill to get below it.
REGISTERS, GRADIENTS_REGISTERS = 128, 255
# Pixels that a program forms g of before it reads what is around them.
GRADIENT_PIXELS = {torch.contiguous_format: 2048, torch.channels_last: 512}
PROGRAMS_PER_PROCESSOR = 2  # of `gradients_kernel`, with either of its settings
GRADIENTS_SETTINGS = Setting(False, 4), Setting(True, 4)
# Of a program that adds up planes: samples, and neighbouring channels (32 bytes).
FOLD = {"ROWS": 32, "CHANNELS": 8, "num_warps": 4}


class _Cell(NamedTuple):
    """The cell's part of a step: the new state, and the gates under it."""

    kind: str
    activation: str
    gate: str
    context: str
    params: Sequence[Tensor]

    def forward(
        self, y: Tensor, pooled_p: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """New state, and d if there is a pooled p."""
        if self.kind == STATIC:
            return torch.empty_like(state), None
        new_state = cell_triton.forward(y, state, self.params, self.kind, self.activation)
        if pooled_p is None:
            return new_state, None
        context = context_of(new_state, self.context)
        output = cell_triton.forward(pooled_p, context, self.params, self.kind, self.activation)[0]
        return new_state, torch.sigmoid(output) if self.gate == "sigmoid" else output

    def backward(
        self,
        dd: Tensor,
        grad_state: Tensor | None,
        y: Tensor,
        pooled_p: Tensor | None,
        d: Tensor,
        state: Tensor,
        new_state: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, list[Tensor]]:
        """Gradients of y and pooled p (None: zeros), of the state and of the parameters."""
        dpooled_p, dparams = None, [torch.zeros_like(w) for w in self.params]
        if pooled_p is not None:
            grad = torch.zeros_like(new_state)
            grad[0] = dd * d * (1 - d) if self.gate == "sigmoid" else dd
            context = context_of(new_state, self.context)
            dpooled_p, dcontext, *dparams = cell_triton.backward(
                grad, pooled_p, context, self.params, self.kind, self.activation
            )
            if self.context == "first_sample":
                of_all = dcontext.sum(1)
                dcontext.zero_()[:, 0] = of_all
            grad_state = dcontext if grad_state is None else grad_state + dcontext
        if grad_state is None or self.kind == STATIC:
            return None, dpooled_p, torch.zeros_like(state), dparams
        dy, dstate, *of_y = cell_triton.backward(
            grad_state, y, state, self.params, self.kind, self.activation
        )
        return dy, dpooled_p, dstate, list(torch._foreach_add(of_y, dparams))


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
    branch_mean, branch_var = _statistics(x, branch_norm, state)
    branch = _branch(
        branch_norm,
        *(branch_mean_in, branch_var_in) if branch_norm == "running" else (branch_mean, branch_var),
        *(branch_weight, branch_bias, branch_eps),
    )
    inputs = _inputs(x, p, v_weight, prev_weight, join, branch)
    gated = p is not None and cell != STATIC
    if norm == "batch":
        found = _moments(inputs, None, state.new_zeros(3, batch, channels), KNOWN=False)
        y = found.sums[X.value] / area
        pooled_p = found.shifts[1] + found.sums[P.value] / area if gated else None
    else:
        y, pooled_p = _means(inputs, gated)
    with without_autocast(x):
        attention = scores_of(y, q_weight, k_weight, head_dim)
    step = _Cell(cell, activation, gate, context, cell_params)
    new_state, d = step.forward(y, pooled_p, state)
    pooled_p = torch.zeros_like(y) if pooled_p is None else pooled_p
    d = torch.ones_like(y) if d is None else d
    summary = state.new_empty(summary_size(norm), batch, channels)
    torch.stack([y, pooled_p, attention, d], out=summary[:4])
    mixture = Mixture(*summary[2:4], lam.contiguous())
    mean, var = state.new_empty(0), state.new_empty(0)
    if norm == "batch":
        mean, var = state.new_empty(channels), state.new_empty(channels)
        launch(
            statistics_kernel,
            (triton.cdiv(channels, FOLD["CHANNELS"]),),
            *(found, mixture, mean, var, _of_maps(summary), batch, channels, area),
            **FOLD,
        )
    used = (mean_in, var_in) if norm == "running" else (mean, var)
    out, o = empty_features(x), empty_features(x) if return_o else None
    plan = tiles(x, size=STENCIL)
    launch_tiles(
        plan,
        output_kernel,
        *(inputs, mixture, ending(norm, *used, norm_weight, norm_bias, drop_scale), out, o),
        Size(channels, height, width),
        EPS=eps,
        RESIDUAL=residual,
    )
    o = x.new_empty(0) if o is None else o
    return out, o, new_state, mean, var, branch_mean, branch_var, summary


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
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::light_attention_backward``."""
    layout = dense_format(x)
    x, p, grad_out, grad_o = (dense(t, layout) for t in (x, p, grad_out, grad_o))
    branch = _branch(branch_norm, branch_mean, branch_var, branch_weight, branch_bias, branch_eps)
    inputs = _inputs(x, p, v_weight, prev_weight, join, branch)
    arriving = Gradients(grad_out, grad_o)
    summary = summary.contiguous()
    y, pooled_p, a, d = summary[:4]
    mixture = Mixture(a, d, lam.contiguous())
    end = ending(norm, mean, var, norm_weight, norm_bias, drop_scale)
    found = _channel_gradients(
        inputs, arriving, mixture, end, eps, _of_maps(summary) if norm == "batch" else None
    )
    da, dd, dlam, dnorm_weight, dnorm_bias, rule = found

    dy, dq, dk = differentiate(
        lambda *given: scores_of(*given, head_dim), [y, q_weight, k_weight], [da]
    )
    gated = p is not None and cell != STATIC
    step = _Cell(cell, activation, gate, context, cell_params)
    of_cell, dpooled_p, dstate, dparams = step.backward(
        dd, grad_state, y, pooled_p if gated else None, d, state, new_state
    )
    dy = dy if of_cell is None else dy + of_cell

    dx, dp, dv_weight, dprev_weight, of_branch = _map_gradients(
        *(inputs, arriving, mixture, rule, dy.contiguous(), dpooled_p),
        *(None if branch is None else branch_mean.contiguous(), needs_p),
        RESIDUAL=residual,
        SCALED=branch_norm == "running",
    )
    dbranch = None, None
    if branch is not None:
        dbranch = of_branch[1] * torch.rsqrt(branch_var + branch_eps), of_branch[0]
    if branch_norm == "batch":
        statistics = branch_mean, branch_var, branch_weight
        through_norm(dx, x, *statistics, *dbranch, branch_eps, out=dx)
    dweights = [
        _gradient_of(q_weight, dq),
        _gradient_of(k_weight, dk),
        _gradient_of(v_weight, dv_weight.t()),
        _gradient_of(prev_weight, dprev_weight.t()),
        _gradient_of(lam, dlam),
        _gradient_of(norm_weight, dnorm_weight),
        _gradient_of(norm_bias, dnorm_bias),
        _gradient_of(branch_weight, dbranch[0]),
        _gradient_of(branch_bias, dbranch[1]),
    ]
    return [dx, dp, dstate, *dweights, *dparams]


def _gradient_of(weight: Tensor | None, found: Tensor | None) -> Tensor | None:
    """A tensor of its own, of the weight's shape; None for a weight that is not there."""
    if weight is None:
        return None
    return weight.new_empty(weight.shape).copy_(found.reshape(weight.shape))


def _of_maps(summary: Tensor) -> OfMaps:
    """What the summary of a step whose norm takes statistics of the batch has for backward."""
    return OfMaps(summary[4], summary[1], summary[5], summary[6:9], summary[9:])


class _Branch(NamedTuple):
    """The norm that a joined x passes first, as a product and a sum: [C]."""

    scale: Tensor
    shift: Tensor


def _statistics(x: Tensor, norm: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of x, or nothing if the norm needs none."""
    return moments(x) if norm == "batch" else (like.new_empty(0), like.new_empty(0))


def _branch(
    norm: str,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> _Branch | None:
    if norm == "none":
        return None
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return _Branch(scale, shift if bias is None else shift + bias)


def _inputs(
    x: Tensor,
    p: Tensor | None,
    v_weight: Tensor,
    prev_weight: Tensor | None,
    join: bool,
    branch: _Branch | None,
) -> Inputs:
    filters = contiguous(v_weight=v_weight, prev_weight=prev_weight).values()
    return Inputs(x, p, *filters, *(branch or (None, None)), p if join else None)


def _moments(
    inputs: Inputs, gradients: Gradients | None, shifts: Tensor, *, KNOWN: bool
) -> Moments:
    """The numbers of all planes: forward, or with gradients. See `moments_kernel`."""
    x = inputs.x
    batch, channels, height, width = x.shape
    plan = tiles(x, summing=True, size=STENCIL)
    fields = FIELDS if gradients is None else GRADIENT_FIELDS
    found = Moments(
        shifts.new_zeros(fields, batch, channels, plan.chunks), shifts, batch * channels
    )
    launch_tiles(
        plan,
        moments_kernel,
        *(inputs, gradients or Gradients(None, None), found, Size(channels, height, width)),
        KNOWN=KNOWN,
        FORWARD=gradients is None,
        maxnreg=REGISTERS,
    )
    (sums,) = finish([found.sums.view(fields * batch, channels, plan.chunks)])
    return found._replace(sums=sums.view(fields, batch, channels))


def _means(inputs: Inputs, gated: bool) -> tuple[Tensor, Tensor | None]:
    """Means [B, C] of x, and of p if that is wanted."""
    x = inputs.x
    area = x.shape[2] * x.shape[3]
    if inputs.shortcut is None:
        y, *pooled_p = plane_sums([x, inputs.p] if gated else [x], area)
        return y, *(pooled_p or [None])
    plan = tiles(x, summing=True, size=STENCIL)
    sums = new_sums(x, plan), new_sums(x, plan)
    launch_tiles(plan, means_kernel, inputs, *sums, x.shape[1])
    y, pooled_p = finish(sums)
    return y / area, pooled_p / area if gated else None


def _channel_gradients(
    inputs: Inputs,
    arriving: Gradients,
    mixture: Mixture,
    end: Ending,
    eps: float,
    known: OfMaps | None,
) -> tuple[Tensor | Rule, ...]:
    """Gradients of a, d [B, C], of lam and of the norm's weight and bias [C]; what g is made by.

    known: of a step whose norm took statistics of the batch.
    """
    batch, channels, height, width = inputs.x.shape
    through_norm = known is not None
    shifts = torch.stack(known[:3]) if through_norm else mixture.a.new_zeros(3, batch, channels)
    found = _moments(inputs, arriving, shifts, KNOWN=through_norm)
    of_planes = mixture.a.new_empty(3, batch, channels)
    of_channels = mixture.a.new_empty(6, channels)
    launch(
        channel_gradients_kernel,
        (triton.cdiv(channels, FOLD["CHANNELS"]),),
        *(found, known, mixture, end, of_planes, of_channels),
        *(batch, channels, height * width),
        EPS=eps,
        maxnreg=GRADIENTS_REGISTERS,
        **FOLD,
    )
    da, dd, factor = of_planes
    of_norm = of_channels[3:] if through_norm else (None,) * 3
    return da, dd, *of_channels[:3], Rule(factor, *of_norm)


def _map_gradients(
    inputs: Inputs,
    arriving: Gradients,
    mixture: Mixture,
    rule: Rule,
    dy: Tensor,
    dpooled_p: Tensor | None,
    branch_mean: Tensor | None,
    needs_p: bool,
    **flags: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, p and the filters [9, C], and sums for the branch's norm [2, C].

    The last two are empty where there is no such thing. A branch's x is what has passed its norm;
    see `gradients_kernel`.
    """
    x = inputs.x
    batch, channels, height, width = x.shape
    dx = empty_features(x)
    dp = empty_features(x) if inputs.p is not None and needs_p else None
    plan = tiles(x, size=GRADIENTS, chunk=GRADIENT_PIXELS[dense_format(x)])
    programs, length = _programs(x, plan), _neighbourhood(x, plan)
    parts = [9, 0 if inputs.prev_weight is None else 9, 0 if branch_mean is None else 2]
    shares = dy.new_empty(sum(parts), batch, channels, plan.chunks)
    scratch = dy.new_empty(programs, plan.cut.PLANES.value, length)
    tensors = inputs, arriving, mixture, rule, dy, dpooled_p, dx, dp, shares

    def run(setting: Setting) -> None:
        cover = plan.halved if setting.halved else plan
        launch(
            gradients_kernel,
            (programs,),
            *(*tensors, shares.stride(0), branch_mean, scratch, cover.programs, length),
            *(Size(channels, height, width), cover.cut),
            num_warps=setting.warps,
            maxnreg=GRADIENTS_REGISTERS,
            **flags,
        )

    about = plan.kind, tensors, branch_mean, *flags.values()
    run(triton_tuning.fastest(gradients_kernel, about, GRADIENTS_SETTINGS, run))
    return dx, dp, *shares.sum((1, 3)).split(parts)


def _programs(x: Tensor, plan: Tiles) -> int:
    """How many programs of `gradients_kernel` run at a time."""
    if not x.is_cuda:
        return min(plan.programs, PROGRAMS_PER_PROCESSOR)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(plan.programs, PROGRAMS_PER_PROCESSOR * processors)


def _neighbourhood(x: Tensor, plan: Tiles) -> int:
    """Pixels of a plane that a chunk of it and all that is around can have."""
    height, width = x.shape[2:]
    return min(height * width, plan.cut.CHUNK.value + 2 * (width + 1))
