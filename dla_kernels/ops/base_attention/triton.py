"""``base_attention`` in Triton.

Kernels pass over the maps and form the scores; what else is [T, B, C] or smaller is left to the
formulas of the reference. The values of the earlier layers are a tuple of pointers. This layer's
own value is formed from x wherever it is needed: unrounded, and for no more bytes than reading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops._registration import flatten, sizes_of, unflatten
from dla_kernels.ops.base_attention.reference import attend, value_weights
from dla_kernels.ops.base_attention.scores_triton import scores_of
from dla_kernels.ops.common import dense, dense_format, empty_features, without_autocast
from dla_kernels.ops.differentiate import Recorded
from dla_kernels.ops.norm_triton import (
    Ending,
    chunk_moments,
    ending,
    finished,
    fold_moments,
    fold_sums,
    new_moments,
    norm_gradient,
    normed,
    welford,
)
from dla_kernels.ops.stencil_triton import added, filtered, store_sums, through_filter, zeros
from dla_kernels.ops.step_checks import STATIC
from dla_kernels.ops.triton_common import (
    SMALL_TILE,
    finish,
    in_plane,
    launch_tiles,
    new_sums,
    padded,
    per_plane,
    place,
    plane_sums,
    step_of,
    tile,
    tiles,
)
from dla_kernels.ops.triton_common import unsupported as unsupported

# Elements of a tile of the kernels that form o: 4 per thread. And its planes, each of which may
# have a sum for every value.
LIMITS = {"size": 1024, "max_planes": 32}
REGISTERS = {"maxnreg": 128}  # per thread: with a limit, ptxas does not spill to get below it
TAPS = tl.constexpr(9)  # of a filter
STENCIL = 512  # elements of a tile of the kernel that keeps a sum for each tap


class Mix(NamedTuple):
    """What o is made of."""

    x: Tensor
    v_weight: Tensor
    maps: tuple[Tensor, ...]  # values of the earlier layers, padded
    count: int  # of these
    weights: Tensor  # [count + 1, B, C]; the last is that of the layer's own value
    channels: int
    rows: int  # B * C
    height: int
    width: int


class Size(NamedTuple):
    """Of a map."""

    batch: int
    channels: int
    height: int
    width: int


def forward(
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
) -> tuple[Tensor, ...]:
    """Arguments and results of ``dla_kernels::base_attention``."""
    x = dense(x, dense_format(x))
    features = gated == "features"
    area = x.shape[2] * x.shape[3]
    (y,) = plane_sums([x], area)
    given = state, keys, gates, pooled, cell_params, q_weight, k_weight, key_weights
    flags = cell, activation, gate, context, gated, head_dim
    with without_autocast(x):
        state, keys, gates, scores = attend(y, *given, *flags, scores_of)
        weights = value_weights(scores, gates, head_dim)

    mix = _mix(x, values, v_weight, weights)
    end = ending(norm, mean_in, var_in, norm_weight, norm_bias, drop_scale)
    options = {"EPS": eps, "RELU": relu, "RESIDUAL": residual, **REGISTERS}
    plan = tiles(x, summing=True, **LIMITS)
    out, v, sums_v = empty_features(x), None, None
    if return_v:
        v = empty_features(x)
    if return_v and cell != STATIC and not features:
        sums_v = new_sums(x, plan)
    o, moments = None, None
    if norm == "batch":
        o, moments = torch.empty_like(x, dtype=y.dtype), new_moments(x, plan)
    tensors = mix, end, v, sums_v, o, moments, out
    launch_tiles(plan, _mix_kernel, *tensors, **options)
    mean, var = y.new_empty(0), y.new_empty(0)
    if norm == "batch":
        mean, var = fold_moments(*moments, plan)
        plan = tiles(x, size=SMALL_TILE)
        tensors = x, o, end._replace(mean=mean, var=var), out, mix.channels
        launch_tiles(plan, _output_kernel, *tensors, **options)

    own_mean = y.new_empty(0)
    if features:
        keys, own_mean = keys.new_empty(0, *y.shape), y.clone()
    elif sums_v is not None:
        own_mean = finish([sums_v])[0] / area
    v = x.new_empty(0) if v is None else v
    return out, v, state, keys, gates, own_mean, scores, mean, var, y


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
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::base_attention_backward``."""
    layout = dense_format(x)
    x, grad_out, grad_v = (dense(t, layout) for t in (x, grad_out, grad_v))
    small = [state, keys, gates, pooled, cell_params, q_weight, k_weight, key_weights]
    flags = cell, activation, gate, context, gated, head_dim

    def attention(y: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        given = unflatten(flat, sizes_of(small))
        new_state, keys, gates, scores = attend(y, *given, *flags, scores_of)
        return value_weights(scores, gates, head_dim), new_state, keys, gates

    step = Recorded(attention, [pooled_x, *flatten(small)])
    weights = step.outputs[0]
    # The gradient of v is a sum of maps with factors: of later layers, of this one, of a loss.
    terms = [(dense(g, layout), w) for g, w in zip(later_grads, later_weights, strict=True)]
    if grad_v is not None:
        terms.append((grad_v, torch.ones_like(pooled_x)))
    g = dweights = None
    dnorm = [torch.zeros_like(w) for w in (norm_weight, norm_bias) if w is not None]
    if grad_out is not None:
        mix = _mix(x, values, v_weight, weights)
        end = ending(norm, mean, var, norm_weight, norm_bias, drop_scale)
        g, dweights, *sums = _mix_backward(grad_out, mix, end, norm, eps, relu)
        dnorm = sums if end.weight is not None else dnorm
        terms.append((g, weights[-1]))
    level = torch.zeros_like(pooled_x)
    if grad_pooled is not None and gated == "projections":
        level = grad_pooled / (x.shape[2] * x.shape[3])
    dv = _value_gradient(x, terms, level)

    dy, *dsmall = step.gradients([dweights, grad_state, grad_keys, grad_gates])
    if grad_pooled is not None and gated == "features":
        dy = dy + grad_pooled
    dx, dfilter = _value_backward(dv, x, grad_out if residual else None, dy, v_weight)
    if not needs_values or grad_out is None:
        g = weights = None
    dsmall = [t.clone(memory_format=torch.contiguous_format) for t in dsmall]
    return [dx, g, weights, *dsmall, dfilter, *(dnorm or (None, None))]


def _mix(x: Tensor, values: Sequence[Tensor], v_weight: Tensor, weights: Tensor) -> Mix:
    batch, channels, height, width = x.shape
    maps = [dense(value, dense_format(x)) for value in values] or [x]
    tensors = x, v_weight.contiguous(), padded(maps), len(values), weights.contiguous()
    return Mix(*tensors, channels, batch * channels, height, width)


def _mix_backward(
    grad: Tensor, mix: Mix, end: Ending, norm: str, eps: float, relu: bool
) -> list[Tensor]:
    """Gradients of o and of the weights of the values; with a norm, of its weight and bias."""
    plan = tiles(grad, summing=True, **LIMITS)
    options = {"EPS": eps, "RELU": relu, **REGISTERS}
    sums = None if norm == "none" else (new_sums(grad, plan), new_sums(grad, plan))
    dnorm: Sequence[Tensor] = ()
    if norm == "batch":
        launch_tiles(plan, _norm_sums_kernel, grad, mix, end, sums, **options)
        dnorm, sums = tuple(fold_sums(sums)), None
    g, products = empty_features(grad), new_sums(grad, plan, mix.count + 1)
    count = grad.numel() // mix.channels
    tensors = grad, mix, end, dnorm or None, count, g, products, sums
    options["WEIGHTS"] = triton.next_power_of_2(mix.count + 1)
    launch_tiles(plan, _mix_backward_kernel, *tensors, **options)
    if sums is not None:
        dnorm = fold_sums(sums)
    (dweights,) = finish([products.flatten(0, 1)])
    return [g, dweights.view(mix.weights.shape), *dnorm]


def _value_gradient(x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], level: Tensor) -> Tensor:
    """dv = level + sum_t w_t m_t of maps like x and weights [B, C]; level is [B, C]."""
    maps, dv = [m for m, _ in terms], empty_features(x)
    weights = torch.stack([*(w for _, w in terms), level])
    plan = tiles(x, size=SMALL_TILE)
    tensors = padded(maps or [x]), len(maps), weights, level.numel(), dv
    launch_tiles(plan, _value_gradient_kernel, *tensors)
    return dv


def _value_backward(
    dv: Tensor, x: Tensor, grad: Tensor | None, dy: Tensor, v_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and v_weight for those of v, of the sum with x, and of the mean of x."""
    dx = empty_features(x)
    plan = tiles(x, summing=True, size=STENCIL)
    sums = new_sums(x, plan, TAPS.value)
    tensors = dv, x, grad, dy.contiguous(), v_weight.contiguous(), dx, sums
    launch_tiles(plan, _value_backward_kernel, *tensors, Size(*x.shape), **REGISTERS)
    return dx, torch.stack(fold_sums(sums.unbind(0)), dim=1).view(v_weight.shape)


@triton.jit
def weighted_sum(maps, count, weights, rows, first, row, exists, offset, inside):
    """sum_t weights_t maps_t of one tile, t < count, in the dtype of the weights."""
    total = tl.zeros_like(offset).to(weights.dtype.element_ty)
    for t in tl.static_range(len(maps)):
        if t < count:
            factor = per_plane(weights, tl.cast(rows, tl.int64) * t + row, exists)
            total += factor * tl.load(maps[t] + first + offset, inside, 0.0).to(total.dtype)
    return total


@triton.jit
def mixture(mix, first, row, exists, offset, inside, pixel, step):
    """o and the layer's own value, of one tile."""
    channel = row % mix.channels
    own = filtered(mix.x + first, mix.v_weight, offset, inside, pixel, channel, exists, mix, step)
    o = weighted_sum(mix.maps, mix.count, mix.weights, mix.rows, first, row, exists, offset, inside)
    factor = per_plane(mix.weights, tl.cast(mix.rows, tl.int64) * mix.count + row, exists)
    return o + factor * own, own


@triton.jit
def unfinished(grad, o, end, row, exists, channels, EPS: tl.constexpr, RELU: tl.constexpr):
    """Gradient of norm(o) for that of out; and what `normed` returns beside norm(o)."""
    result, deviation, rstd, factor = normed(o, end, row, exists, channels, EPS)
    grad = grad.to(o.dtype)
    if end.drop_scale is not None:
        grad *= per_plane(end.drop_scale, row // channels, exists)
    if RELU:
        grad = tl.where(result <= 0, 0.0, grad)
    return grad, deviation, rstd, factor


@triton.jit
def _mix_kernel(
    mix, end, v, sums_v, o, moments, out, cut,
    EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """v of one chunk of planes and its sums; and o and its moments if they are wanted, else out."""
    first, row, exists, slot, pixels = place(cut)
    dtype = mix.weights.dtype.element_ty
    total = tl.zeros((cut.PLANES, cut.PIXELS), dtype)
    mean = tl.zeros((cut.PLANES, cut.PIXELS), dtype)
    squares = tl.zeros((cut.PLANES, cut.PIXELS), dtype)
    for start in tl.range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS, disable_licm=True):
        offset, inside = tile(cut, start, pixels, exists)
        pixel = in_plane(cut, start, pixels)
        sum_of_values, own = mixture(mix, first, row, exists, offset, inside, pixel, step_of(cut))
        if v is not None:
            tl.store(v + first + offset, own.to(v.dtype.element_ty), inside)
        if sums_v is not None:
            total += own
        if moments is not None:
            tl.store(o + first + offset, sum_of_values, inside)
            mean, squares = welford(mean, squares, sum_of_values, inside, start // cut.PIXELS + 1)
        else:
            x = tl.load(mix.x + first + offset, inside, 0.0)
            result = finished(sum_of_values, end, x, row, exists, mix.channels, EPS, RELU, RESIDUAL)
            tl.store(out + first + offset, result.to(out.dtype.element_ty), inside)
    if sums_v is not None:
        tl.store(sums_v + slot, tl.sum(total, axis=1), exists)
    if moments is not None:
        middle, spread = chunk_moments(mean, squares, pixels, cut)
        tl.store(moments[0] + slot, middle, exists)
        tl.store(moments[1] + slot, spread, exists)


@triton.jit
def _output_kernel(
    x, o, end, out, channels, cut,
    EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    first, row, exists, _, pixels = place(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    value = tl.load(o + first + offset, inside, 0.0)
    given = tl.load(x + first + offset, inside, 0.0)
    result = finished(value, end, given, row, exists, channels, EPS, RELU, RESIDUAL)
    tl.store(out + first + offset, result.to(out.dtype.element_ty), inside)


@triton.jit
def _norm_sums_kernel(grad, mix, end, sums, cut, EPS: tl.constexpr, RELU: tl.constexpr):
    """What one chunk of planes adds to the gradients of the norm's weight and bias."""
    first, row, exists, slot, pixels = place(cut)
    dweight = tl.zeros((cut.PLANES, cut.PIXELS), mix.weights.dtype.element_ty)
    dbias = tl.zeros((cut.PLANES, cut.PIXELS), mix.weights.dtype.element_ty)
    for start in tl.range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS, disable_licm=True):
        offset, inside = tile(cut, start, pixels, exists)
        pixel = in_plane(cut, start, pixels)
        o, _ = mixture(mix, first, row, exists, offset, inside, pixel, step_of(cut))
        given = tl.load(grad + first + offset, inside, 0.0)
        passed, deviation, rstd, _ = unfinished(given, o, end, row, exists, mix.channels, EPS, RELU)
        dweight += passed * deviation * rstd
        dbias += passed
    tl.store(sums[0] + slot, tl.sum(dweight, axis=1), exists)
    tl.store(sums[1] + slot, tl.sum(dbias, axis=1), exists)


@triton.jit
def _mix_backward_kernel(
    grad, mix, end, dnorm, values, g, products, sums, cut,
    WEIGHTS: tl.constexpr, EPS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """g = dL/do of one chunk of planes, and the sums of its products with the values.

    dnorm: of the norm's weight and bias, if g depends on them as the batch's moments do; else sums
    takes what the chunk adds to them, if there is a norm.
    """
    first, row, exists, slot, pixels = place(cut)
    dtype = mix.weights.dtype.element_ty
    number = tl.arange(0, WEIGHTS)[None, :]
    found = tl.zeros((cut.PLANES, WEIGHTS), dtype)
    dweight = tl.zeros((cut.PLANES, cut.PIXELS), dtype)
    dbias = tl.zeros((cut.PLANES, cut.PIXELS), dtype)
    for start in tl.range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS, disable_licm=True):
        offset, inside = tile(cut, start, pixels, exists)
        pixel = in_plane(cut, start, pixels)
        o, own = mixture(mix, first, row, exists, offset, inside, pixel, step_of(cut))
        given = tl.load(grad + first + offset, inside, 0.0)
        change, deviation, rstd, factor = unfinished(
            given, o, end, row, exists, mix.channels, EPS, RELU
        )
        if sums is not None:
            dweight += change * deviation * rstd
            dbias += change
        if dnorm is not None:
            change = norm_gradient(
                change, deviation, rstd, factor, dnorm[0], dnorm[1], row, exists, mix.channels,
                values,
            )  # fmt: skip
            change = tl.where(inside, change, 0.0)
        elif end.mean is not None:
            change = change * factor
        tl.store(g + first + offset, change.to(g.dtype.element_ty), inside)
        for t in tl.static_range(len(mix.maps)):
            if t < mix.count:
                value = tl.load(mix.maps[t] + first + offset, inside, 0.0).to(dtype)
                found += tl.where(number == t, tl.sum(change * value, axis=1)[:, None], 0.0)
        found += tl.where(number == mix.count, tl.sum(change * own, axis=1)[:, None], 0.0)
    slots = tl.cast(mix.rows, tl.int64) * tl.cdiv(cut.area, cut.CHUNK)
    wanted = exists[:, None] & (number <= mix.count)
    tl.store(products + number * slots + slot[:, None], found, wanted)
    if sums is not None:
        tl.store(sums[0] + slot, tl.sum(dweight, axis=1), exists)
        tl.store(sums[1] + slot, tl.sum(dbias, axis=1), exists)


@triton.jit
def _value_gradient_kernel(maps, count, weights, rows, dv, cut):
    """One tile of dv. weights: [count + 1, B, C]; the last is that of 1."""
    first, row, exists, _, pixels = place(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    total = weighted_sum(maps, count, weights, rows, first, row, exists, offset, inside)
    total += per_plane(weights, tl.cast(rows, tl.int64) * count + row, exists)
    tl.store(dv + first + offset, total.to(dv.dtype.element_ty), inside)


@triton.jit
def _value_backward_kernel(dv, x, grad, dy, v_weight, dx, sums, size, cut):
    """dx of one chunk of planes, and what it adds to the gradients of their filters."""
    first, row, exists, slot, pixels = place(cut)
    dtype = v_weight.dtype.element_ty
    level = per_plane(dy, row, exists) / cut.area
    step = step_of(cut)
    totals = zeros(TAPS, cut, dtype)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        pixel = in_plane(cut, start, pixels)
        own = tl.load(x + first + offset, inside, 0.0).to(dtype)
        total, terms = through_filter(
            dv + first, v_weight, own, offset, inside, pixel, row % size.channels, exists, size,
            step,
        )  # fmt: skip
        totals = added(totals, terms)
        total += level
        if grad is not None:
            total += tl.load(grad + first + offset, inside, 0.0).to(dtype)
        tl.store(dx + first + offset, total.to(dx.dtype.element_ty), inside)
    stride = tl.cast(size.batch, tl.int64) * size.channels * tl.cdiv(cut.area, cut.CHUNK)
    store_sums(totals, sums, stride, slot, exists)
