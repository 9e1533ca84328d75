"""What the Triton kernels of ops with a batch norm share: the norm, moments and sums per channel.

A pass over maps leaves two numbers for each chunk of each plane, [B, C, chunks]; a small kernel
folds those of a channel. Moments are means and sums of squared deviations from them, all the way:
sums of squares would lose the variance of a channel whose mean is large. For the same reason the
means of chunks are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import contiguous
from dla_kernels.ops.triton_common import Tiles, launch, new_sums, padded, per_plane, pick

# Of a folding program: a 32-byte sector of neighbouring channels, and partial results of them.
# Registers: with a limit, ptxas does not spill (float64) to get below it.
FOLD = {"CHANNELS": 8, "PARTS": 128, "num_warps": 4, "maxnreg": 128}


@triton.jit
def welford(mean, squares, value, inside, number):
    """Adds the ``number``-th value, where ``inside``, to running moments, element by element."""
    deviation = tl.where(inside, value - mean, 0.0)
    mean += deviation / number
    return mean, squares + deviation * (value - mean)


@triton.jit
def chunk_moments(mean, squares, pixels, cut):
    """Moments [PLANES] of a chunk from those of its tiles' elements [PLANES, PIXELS]."""
    pixel = tl.arange(0, cut.PIXELS)[None, :]
    count = tl.minimum(pixels, cut.CHUNK)
    counts = tl.cdiv(count - pixel, cut.PIXELS).to(mean.dtype)
    first = tl.sum(tl.where(pixel == 0, mean, 0.0), axis=1)
    shifted = mean - first[:, None]
    middle = tl.sum(shifted * counts, axis=1) / count
    deviation = shifted - middle[:, None]
    squares += counts * deviation * deviation
    return first.to(tl.float64) + middle, tl.sum(squares, axis=1)


@triton.jit
def channel_norm(mean, var, weight, row, exists, channels, EPS: tl.constexpr):
    """Per plane [PLANES, 1]: mean, 1 / deviation, and the norm's factor (weight may be None)."""
    channel = row % channels
    rstd = tl.rsqrt(tl.load(var + channel, exists, 1.0) + EPS)[:, None]
    factor = rstd
    if weight is not None:
        factor = rstd * per_plane(weight, channel, exists)
    return per_plane(mean, channel, exists), rstd, factor


class Ending(NamedTuple):
    """What lies between o and its sum with x: drop path; a norm, or None in its four places."""

    mean: Any
    var: Any
    weight: Any
    bias: Any
    drop_scale: Any


def ending(
    norm: str,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    drop_scale: Tensor | None,
) -> Ending:
    """The argument of kernels that call `normed` or `finished`."""
    of_norm = (None,) * 4 if norm == "none" else (mean, var, weight, bias)
    return Ending(**contiguous(**Ending(*of_norm, drop_scale)._asdict()))


@triton.jit
def normed(o, end, row, exists, channels, EPS: tl.constexpr):
    """norm(o), o less the mean, and per plane 1 / deviation and the norm's factor."""
    if end.mean is None:
        # Nobody uses the last two then, but Triton 3.6 returns no None.
        result, deviation, rstd, factor = o, o, 1.0, 1.0
    else:
        middle, rstd, factor = channel_norm(
            end.mean, end.var, end.weight, row, exists, channels, EPS
        )
        deviation = o - middle
        result = deviation * factor
        if end.bias is not None:
            result += per_plane(end.bias, row % channels, exists)
    return result, deviation, rstd, factor


@triton.jit
def finished(
    o, end, x, row, exists, channels,
    EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out = [x +] drop_scale * [relu] norm(o) of one tile."""
    total, _, _, _ = normed(o, end, row, exists, channels, EPS)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays NaN, as in torch.relu
    if end.drop_scale is not None:
        total *= per_plane(end.drop_scale, row // channels, exists)
    if RESIDUAL:
        total += x.to(total.dtype)
    return total


@triton.jit
def norm_gradient(passed, deviation, rstd, factor, dweight, dbias, row, exists, channels, count):
    """Gradient of what was normalised, over ``count`` values per channel, with their own moments.

    passed: of the norm's result. deviation: from the mean. dweight, dbias: [C], sums of ``passed``
    with and without deviation / standard deviation.
    """
    channel = row % channels
    slope = per_plane(dweight, channel, exists) / count * rstd
    level = per_plane(dbias, channel, exists) / count
    return factor * (passed - level - deviation * slope)


def new_moments(x: Tensor, plan: Tiles) -> tuple[Tensor, Tensor]:
    """Room for the moments of the chunks of a map: [B, C, chunks] each."""
    squares = new_sums(x, plan)
    return torch.empty_like(squares, dtype=torch.float64), squares


def fold_moments(means: Tensor, squares: Tensor, plan: Tiles) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] from the moments of the chunks of ``plan``."""
    batch, channels, chunks = squares.shape
    area = plan.cut.area
    mean, var = (squares.new_empty(channels) for _ in range(2))
    launch(
        _fold_moments_kernel,
        (triton.cdiv(channels, FOLD["CHANNELS"]),),
        *(means, squares, mean, var, batch * area, channels),
        *(batch * chunks, chunks, area, plan.cut.CHUNK.value),
        **FOLD,
    )
    return mean, var


def fold_sums(sums: Sequence[Tensor]) -> list[Tensor]:
    """Sums [C] over batch and chunks of tensors [B, C, chunks] of one shape."""
    batch, channels, chunks = sums[0].shape
    totals = [s.new_empty(channels) for s in sums]
    launch(
        _fold_sums_kernel,
        (triton.cdiv(channels, FOLD["CHANNELS"]), len(sums)),
        *(padded(sums), padded(totals), channels, batch * chunks, chunks),
        **FOLD,
    )
    return totals


@triton.jit
def _parts(start, channels, parts, chunks, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Offsets in a [B, C, chunks] and mask [CHANNELS, PARTS], and which chunk each one is."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    part = start + tl.arange(0, PARTS)[None, :]
    sample, chunk = part // chunks, part % chunks
    inside = (channel < channels) & (part < parts)
    return (sample.to(tl.int64) * channels + channel) * chunks + chunk, inside, chunk


@triton.jit
def _fold_moments_kernel(
    means, squares, mean, var, values, channels, parts, chunks, area, chunk_size,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of a few channels, in two passes over the moments of their chunks."""
    total = tl.zeros((CHANNELS, PARTS), tl.float64)
    for start in range(0, parts, PARTS):
        slot, inside, chunk = _parts(start, channels, parts, chunks, CHANNELS, PARTS)
        count = tl.minimum(area - chunk * chunk_size, chunk_size)
        total += tl.load(means + slot, inside, 0.0) * count
    middle = tl.sum(total, axis=1) / values
    total = tl.zeros((CHANNELS, PARTS), var.dtype.element_ty)
    for start in range(0, parts, PARTS):
        slot, inside, chunk = _parts(start, channels, parts, chunks, CHANNELS, PARTS)
        count = tl.minimum(area - chunk * chunk_size, chunk_size)
        deviation = (tl.load(means + slot, inside, 0.0) - middle[:, None]).to(total.dtype)
        spread = tl.load(squares + slot, inside, 0.0) + count * deviation * deviation
        total += tl.where(inside, spread, 0.0)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(mean + channel, middle, channel < channels)
    tl.store(var + channel, tl.sum(total, axis=1) / values, channel < channels)


@triton.jit
def _fold_sums_kernel(
    sums, totals, channels, parts, chunks, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):
    """Sums of a few channels of the tensor on grid axis 1."""
    given, out = pick(sums, tl.program_id(1)), pick(totals, tl.program_id(1))
    total = tl.zeros((CHANNELS, PARTS), out.dtype.element_ty)
    for start in range(0, parts, PARTS):
        slot, inside, _ = _parts(start, channels, parts, chunks, CHANNELS, PARTS)
        total += tl.load(given + slot, inside, 0.0)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(out + channel, tl.sum(total, axis=1), channel < channels)
