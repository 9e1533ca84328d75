"""``base_attention`` in Triton.

Kernels pass over the maps; what is [T, B, C] or smaller is left to the formulas of the reference.
The values of the earlier layers are a tuple of pointers. This layer's own value is formed from x
wherever it is needed: unrounded, and for no more bytes than reading it.
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
from dla_kernels.ops.common import contiguous, dense, dense_format, empty_features, without_autocast
from dla_kernels.ops.differentiate import Recorded
from dla_kernels.ops.norm_triton import (
    channel_norm,
    chunk_moments,
    fold_moments,
    fold_sums,
    new_moments,
    norm_gradient,
    welford,
)
from dla_kernels.ops.triton_common import (
    SMALL_TILE,
    finish,
    launch,
    new_sums,
    padded,
    place,
    plane_sums,
    tile,
    tiles,
)
from dla_kernels.ops.triton_common import unsupported as unsupported

# Elements of a tile of the kernels with a stencil: 4 per thread. And its planes, each of which may
# have a sum for every value, or for every coefficient of a filter.
LIMITS = {"size": 1024, "max_planes": 32}
REGISTERS = {"maxnreg": 128}  # per thread: with a limit, ptxas does not spill to get below it
# Coefficients of a filter; an argument of the kernels, lest the compiler unroll the loop over them:
# loads of all at once would need too many registers.
TAPS = 9


class Mix(NamedTuple):
    """What o is made of."""

    x: Tensor
    v_weight: Tensor
    taps: int
    maps: tuple[Tensor, ...]  # values of the earlier layers, padded
    count: int  # of these
    weights: Tensor  # [count + 1, B, C]; the last is that of the layer's own value
    channels: int
    rows: int  # B * C
    height: int
    width: int


class Branch(NamedTuple):
    """What lies between o and the sum with x. The first four are None where there is no norm."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    drop_scale: Tensor | None


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
        state, keys, gates, scores = attend(y, *given, *flags)
        weights = value_weights(scores, gates, head_dim)

    mix = _mix(x, values, v_weight, weights)
    branch = _branch(norm, mean_in, var_in, norm_weight, norm_bias, drop_scale)
    options = {"EPS": eps, "RELU": relu, "RESIDUAL": residual, **REGISTERS}
    plan = tiles(x, summing=True, **LIMITS)
    out, v, sums_v = empty_features(x), None, None
    if return_v:
        v = empty_features(x)
    if return_v and cell != "none" and not features:
        sums_v = new_sums(x, plan)
    o, moments = None, None
    if norm == "batch":
        o, moments = torch.empty_like(x, dtype=y.dtype), new_moments(x, plan)
    tensors = mix, branch, v, sums_v, o, moments, out
    launch(_mix_kernel, (plan.programs,), *tensors, **options, **plan.sizes)
    mean, var = y.new_empty(0), y.new_empty(0)
    if norm == "batch":
        mean, var = fold_moments(*moments, plan)
        plan = tiles(x, size=SMALL_TILE)
        tensors = x, o, branch._replace(mean=mean, var=var), out, mix.channels
        launch(_output_kernel, (plan.programs,), *tensors, **options, **plan.sizes)

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
    v: Tensor,
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
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::base_attention_backward``."""
    layout = dense_format(x)
    x, grad_out, grad_v = (dense(t, layout) for t in (x, grad_out, grad_v))
    small = [state, keys, gates, pooled, cell_params, q_weight, k_weight, key_weights]
    flags = cell, activation, gate, context, gated, head_dim

    def attention(y: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        new_state, keys, gates, scores = attend(y, *unflatten(flat, sizes_of(small)), *flags)
        return value_weights(scores, gates, head_dim), new_state, keys, gates

    step = Recorded(attention, [pooled_x, *flatten(small)])
    weights = step.outputs[0]
    # The gradient of v is a sum of maps with factors: of later layers, of this one, of a loss.
    terms = [(dense(g, layout), w) for g, w in zip(later_grads, later_weights, strict=True)]
    if grad_v is not None:
        terms.append((grad_v, torch.ones_like(pooled_x)))
    g, dweights = x.new_empty(0), None
    dnorm = [torch.zeros_like(w) for w in (norm_weight, norm_bias) if w is not None]
    if grad_out is not None:
        mix = _mix(x, values, v_weight, weights)
        branch = _branch(norm, mean, var, norm_weight, norm_bias, drop_scale)
        g, dweights, *sums = _mix_backward(grad_out, mix, branch, norm, eps, relu)
        dnorm = sums if branch.weight is not None else dnorm
        terms.append((g, weights[-1]))
    dv = _weighted_sum(terms) if terms else None

    dy, *dsmall = step.gradients([dweights, grad_state, grad_keys, grad_gates])
    dmean_v = grad_pooled
    if gated == "features" and grad_pooled is not None:
        dy, dmean_v = dy + grad_pooled, None
    dx, dfilter = _value_backward(dv, dmean_v, x, grad_out if residual else None, dy, v_weight)
    if not needs_values or grad_out is None:
        g, weights = x.new_empty(0), state.new_empty(0)
    dsmall = [t.clone(memory_format=torch.contiguous_format) for t in dsmall]
    dnorm = dnorm or [state.new_empty(0) for _ in range(2)]
    return [dx, g, weights, *dsmall, dfilter, *dnorm]


def _mix(x: Tensor, values: Sequence[Tensor], v_weight: Tensor, weights: Tensor) -> Mix:
    batch, channels, height, width = x.shape
    maps = [dense(value, dense_format(x)) for value in values] or [x]
    tensors = x, v_weight.contiguous(), TAPS, padded(maps), len(values), weights.contiguous()
    return Mix(*tensors, channels, batch * channels, height, width)


def _branch(
    norm: str,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    drop_scale: Tensor | None,
) -> Branch:
    of_norm = (None,) * 4 if norm == "none" else (mean, var, weight, bias)
    return Branch(**contiguous(**Branch(*of_norm, drop_scale)._asdict()))


def _mix_backward(
    grad: Tensor, mix: Mix, branch: Branch, norm: str, eps: float, relu: bool
) -> list[Tensor]:
    """Gradients of o and of the weights of the values; with a norm, of its weight and bias."""
    plan = tiles(grad, summing=True, **LIMITS)
    options = {"EPS": eps, "RELU": relu, **REGISTERS, **plan.sizes}
    sums = None if norm == "none" else (new_sums(grad, plan), new_sums(grad, plan))
    dnorm: Sequence[Tensor] = ()
    if norm == "batch":
        launch(_norm_sums_kernel, (plan.programs,), grad, mix, branch, sums, **options)
        dnorm, sums = tuple(fold_sums(sums)), None
    g, products = empty_features(grad), new_sums(grad, plan, mix.count + 1)
    count = grad.numel() // mix.channels
    tensors = grad, mix, branch, dnorm or None, count, g, products, sums
    options["WEIGHTS"] = triton.next_power_of_2(mix.count + 1)
    launch(_mix_backward_kernel, (plan.programs,), *tensors, **options)
    if sums is not None:
        dnorm = fold_sums(sums)
    (dweights,) = finish([products.flatten(0, 1)])
    return [g, dweights.view(mix.weights.shape), *dnorm]


def _weighted_sum(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """sum_t w_t m_t of maps [B, C, H, W], dense in one format, and weights [B, C]."""
    maps = [g for g, _ in terms]
    weights = torch.stack([w for _, w in terms])
    out = empty_features(maps[0])
    plan = tiles(out)
    tensors = padded(maps), len(maps), weights, weights[0].numel(), out
    launch(_weighted_sum_kernel, (plan.programs,), *tensors, **plan.sizes)
    return out


def _value_backward(
    dv: Tensor | None,
    dmean_v: Tensor | None,
    x: Tensor,
    grad: Tensor | None,
    dy: Tensor,
    v_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and v_weight for those of v, its mean, the sum with x, and the mean of x."""
    dx = empty_features(x)
    plan = tiles(x, summing=True, **LIMITS)
    sums = new_sums(x, plan, TAPS)
    small = contiguous(dmean_v=dmean_v, dy=dy, v_weight=v_weight).values()
    tensors = dv, x, grad, *small, dx, sums
    options = REGISTERS | plan.sizes
    launch(_value_backward_kernel, (plan.programs,), *tensors, TAPS, *x.shape, **options)
    return dx, torch.stack(fold_sums(sums.unbind(0)), dim=1).view(v_weight.shape)


@triton.jit
def neighbour(offset, inside, pixel, height, width, stride, down, right):
    """Offsets and mask of the pixels so many lines further down and columns further right."""
    line, column = pixel // width + down, pixel % width + right
    there = inside & (line >= 0) & (line < height) & (column >= 0) & (column < width)
    return offset + (down * width + right) * stride, there


@triton.jit
def weighted_sum(
    maps, count, weights, rows, first, row, exists, offset, inside,
    PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """sum_t weights_t maps_t of one tile, t < count, in the dtype of the weights."""
    total = tl.zeros((PLANES, PIXELS), weights.dtype.element_ty)
    for t in tl.static_range(len(maps)):
        if t < count:
            factor = tl.load(weights + t * rows + row, exists, 0.0)[:, None]
            total += factor * tl.load(maps[t] + first + offset, inside, 0.0).to(total.dtype)
    return total


@triton.jit
def mixture(
    mix, first, row, exists, offset, inside, pixel, planes,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """o and the layer's own value, of one tile."""
    dtype = mix.weights.dtype.element_ty
    filters = mix.v_weight + row % mix.channels * mix.taps
    own = tl.zeros((PLANES, PIXELS), dtype)
    stride = planes if CHANNELS_LAST else 1
    for tap in range(mix.taps):
        offset_there, there = neighbour(
            offset, inside, pixel, mix.height, mix.width, stride, tap // 3 - 1, tap % 3 - 1
        )
        near = tl.load(mix.x + first + offset_there, there, 0.0).to(dtype)
        own += tl.load(filters + tap, exists, 0.0)[:, None] * near
    o = weighted_sum(
        mix.maps, mix.count, mix.weights, mix.rows, first, row, exists, offset, inside,
        PLANES, PIXELS,
    )  # fmt: skip
    factor = tl.load(mix.weights + mix.count * mix.rows + row, exists, 0.0)[:, None]
    return o + factor * own, own


@triton.jit
def normed(o, branch, row, exists, channels, EPS: tl.constexpr):
    """norm(o), o less the mean, and per plane 1 / deviation and the norm's factor."""
    if branch.mean is None:
        result, deviation, rstd, factor = o, o, None, None
    else:
        middle, rstd, factor = channel_norm(
            branch.mean, branch.var, branch.weight, row, exists, channels, EPS
        )
        deviation = o - middle
        result = deviation * factor
        if branch.bias is not None:
            result += tl.load(branch.bias + row % channels, exists, 0.0)[:, None]
    return result, deviation, rstd, factor


@triton.jit
def finished(
    o, branch, x, row, exists, channels,
    EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out of one tile."""
    total, _, _, _ = normed(o, branch, row, exists, channels, EPS)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays NaN, as in torch.relu
    if branch.drop_scale is not None:
        total *= tl.load(branch.drop_scale + row // channels, exists, 0.0)[:, None]
    if RESIDUAL:
        total += x.to(total.dtype)
    return total


@triton.jit
def unfinished(grad, o, branch, row, exists, channels, EPS: tl.constexpr, RELU: tl.constexpr):
    """Gradient of norm(o) for that of out; and what `normed` returns beside norm(o)."""
    result, deviation, rstd, factor = normed(o, branch, row, exists, channels, EPS)
    grad = grad.to(o.dtype)
    if branch.drop_scale is not None:
        grad *= tl.load(branch.drop_scale + row // channels, exists, 0.0)[:, None]
    if RELU:
        grad = tl.where(result > 0, grad, 0.0)
    return grad, deviation, rstd, factor


@triton.jit
def _mix_kernel(
    mix, branch, v, sums_v, o, moments, out, planes, area,
    EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """v of one chunk of planes and its sums; and o and its moments if they are wanted, else out."""
    first, row, exists, slot, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    dtype = mix.weights.dtype.element_ty
    total = tl.zeros((PLANES, PIXELS), dtype)
    mean = tl.zeros((PLANES, PIXELS), dtype)
    squares = tl.zeros((PLANES, PIXELS), dtype)
    for start in tl.range(0, tl.minimum(pixels, CHUNK), PIXELS, disable_licm=True):
        offset, inside = tile(
            start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
        )
        pixel = area - pixels + start + tl.arange(0, PIXELS)[None, :]
        sum_of_values, own = mixture(
            mix, first, row, exists, offset, inside, pixel, planes, PLANES, PIXELS, CHANNELS_LAST
        )
        if v is not None:
            tl.store(v + first + offset, own.to(v.dtype.element_ty), inside)
        if sums_v is not None:
            total += own
        if moments is not None:
            tl.store(o + first + offset, sum_of_values, inside)
            mean, squares = welford(mean, squares, sum_of_values, inside, start // PIXELS + 1)
        else:
            x = tl.load(mix.x + first + offset, inside, 0.0)
            result = finished(
                sum_of_values, branch, x, row, exists, mix.channels, EPS, RELU, RESIDUAL
            )
            tl.store(out + first + offset, result.to(out.dtype.element_ty), inside)
    if sums_v is not None:
        tl.store(sums_v + slot, tl.sum(total, axis=1), exists)
    if moments is not None:
        middle, spread = chunk_moments(mean, squares, pixels, PIXELS, CHUNK)
        tl.store(moments[0] + slot, middle, exists)
        tl.store(moments[1] + slot, spread, exists)


@triton.jit
def _output_kernel(
    x, o, branch, out, channels, planes, area,
    EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    first, row, exists, _, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    offset, inside = tile(0, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST)
    value = tl.load(o + first + offset, inside, 0.0)
    given = tl.load(x + first + offset, inside, 0.0)
    result = finished(value, branch, given, row, exists, channels, EPS, RELU, RESIDUAL)
    tl.store(out + first + offset, result.to(out.dtype.element_ty), inside)


@triton.jit
def _norm_sums_kernel(
    grad, mix, branch, sums, planes, area, EPS: tl.constexpr, RELU: tl.constexpr,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """What one chunk of planes adds to the gradients of the norm's weight and bias."""
    first, row, exists, slot, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    dweight = tl.zeros((PLANES, PIXELS), mix.weights.dtype.element_ty)
    dbias = tl.zeros((PLANES, PIXELS), mix.weights.dtype.element_ty)
    for start in tl.range(0, tl.minimum(pixels, CHUNK), PIXELS, disable_licm=True):
        offset, inside = tile(
            start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
        )
        pixel = area - pixels + start + tl.arange(0, PIXELS)[None, :]
        o, _ = mixture(
            mix, first, row, exists, offset, inside, pixel, planes, PLANES, PIXELS, CHANNELS_LAST
        )
        given = tl.load(grad + first + offset, inside, 0.0)
        passed, deviation, rstd, _ = unfinished(
            given, o, branch, row, exists, mix.channels, EPS, RELU
        )
        dweight += passed * deviation * rstd
        dbias += passed
    tl.store(sums[0] + slot, tl.sum(dweight, axis=1), exists)
    tl.store(sums[1] + slot, tl.sum(dbias, axis=1), exists)


@triton.jit
def _mix_backward_kernel(
    grad, mix, branch, dnorm, values, g, products, sums, planes, area, WEIGHTS: tl.constexpr,
    EPS: tl.constexpr, RELU: tl.constexpr,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """g = dL/do of one chunk of planes, and the sums of its products with the values.

    dnorm: of the norm's weight and bias, if g depends on them as the batch's moments do; else sums
    takes what the chunk adds to them, if there is a norm.
    """
    first, row, exists, slot, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    dtype = mix.weights.dtype.element_ty
    number = tl.arange(0, WEIGHTS)[None, :]
    found = tl.zeros((PLANES, WEIGHTS), dtype)
    dweight = tl.zeros((PLANES, PIXELS), dtype)
    dbias = tl.zeros((PLANES, PIXELS), dtype)
    for start in tl.range(0, tl.minimum(pixels, CHUNK), PIXELS, disable_licm=True):
        offset, inside = tile(
            start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
        )
        pixel = area - pixels + start + tl.arange(0, PIXELS)[None, :]
        o, own = mixture(
            mix, first, row, exists, offset, inside, pixel, planes, PLANES, PIXELS, CHANNELS_LAST
        )
        given = tl.load(grad + first + offset, inside, 0.0)
        change, deviation, rstd, factor = unfinished(
            given, o, branch, row, exists, mix.channels, EPS, RELU
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
        elif factor is not None:
            change = change * factor
        tl.store(g + first + offset, change.to(g.dtype.element_ty), inside)
        for t in tl.static_range(len(mix.maps)):
            if t < mix.count:
                value = tl.load(mix.maps[t] + first + offset, inside, 0.0).to(dtype)
                found += tl.where(number == t, tl.sum(change * value, axis=1)[:, None], 0.0)
        found += tl.where(number == mix.count, tl.sum(change * own, axis=1)[:, None], 0.0)
    slots = mix.rows * tl.cdiv(area, CHUNK)
    wanted = exists[:, None] & (number <= mix.count)
    tl.store(products + number * slots + slot[:, None], found, wanted)
    if sums is not None:
        tl.store(sums[0] + slot, tl.sum(dweight, axis=1), exists)
        tl.store(sums[1] + slot, tl.sum(dbias, axis=1), exists)


@triton.jit
def _weighted_sum_kernel(
    maps, count, weights, rows, out, planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One tile of the sum."""
    first, row, exists, _, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    offset, inside = tile(0, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST)
    total = weighted_sum(
        maps, count, weights, rows, first, row, exists, offset, inside, PLANES, PIXELS
    )
    tl.store(out + first + offset, total.to(out.dtype.element_ty), inside)


@triton.jit
def _value_backward_kernel(
    dv, x, grad, dmean_v, dy, v_weight, dx, sums, taps, batch, channels, height, width,
    planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx of one chunk of planes, and what it adds to the gradients of their filters."""
    first, row, exists, slot, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    dtype = v_weight.dtype.element_ty
    filters = v_weight + row % channels * taps
    level = tl.load(dy + row, exists, 0.0) / area
    level_v = tl.zeros((PLANES,), dtype)
    if dmean_v is not None:
        level_v += tl.load(dmean_v + row, exists, 0.0) / area
    stride = planes if CHANNELS_LAST else 1
    number = tl.arange(0, 16)[None, :]
    found = tl.zeros((PLANES, 16), dtype)
    for start in tl.range(0, tl.minimum(pixels, CHUNK), PIXELS, disable_licm=True):
        offset, inside = tile(
            start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
        )
        pixel = area - pixels + start + tl.arange(0, PIXELS)[None, :]
        own = tl.load(x + first + offset, inside, 0.0).to(dtype)
        total = tl.zeros((PLANES, PIXELS), dtype) + level[:, None]
        if grad is not None:
            total += tl.load(grad + first + offset, inside, 0.0).to(dtype)
        for tap in range(taps):
            # A pixel adds to the value on the other side of it.
            offset_there, there = neighbour(
                offset, inside, pixel, height, width, stride, 1 - tap // 3, 1 - tap % 3
            )
            change = tl.where(there, level_v[:, None], 0.0)
            if dv is not None:
                change += tl.load(dv + first + offset_there, there, 0.0).to(dtype)
            total += tl.load(filters + tap, exists, 0.0)[:, None] * change
            found += tl.where(number == tap, tl.sum(own * change, axis=1)[:, None], 0.0)
        tl.store(dx + first + offset, total.to(dx.dtype.element_ty), inside)
    slots = batch * channels * tl.cdiv(area, CHUNK)
    wanted = exists[:, None] & (number < taps)
    tl.store(sums + number * slots + slot[:, None], found, wanted)
