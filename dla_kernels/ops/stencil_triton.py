"""What the Triton kernels of ops with a depthwise 3x3 convolution share: filters on tiles of maps.

Filters are [C, 1, 3, 3]. A map is given by where it begins and by the offsets of a tile's pixels
from there; ``step`` is the offset from one pixel of a plane to the next, ``pixel`` their number in
the plane, ``size`` has its height and width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dla_kernels.ops.triton_common import per_plane


@triton.jit
def neighbour(offset, inside, pixel, down, right, size, step):
    """Offsets and mask of the pixels so many lines further down and columns further right."""
    line, column = pixel // size.width + down, pixel % size.width + right
    there = inside & (line >= 0) & (line < size.height) & (column >= 0) & (column < size.width)
    return offset + (down * size.width + right) * step, there


@triton.jit
def filtered(x, weight, offset, inside, pixel, channel, exists, size, step):
    """DW(x) of a tile, in the dtype of the weight."""
    total = tl.zeros_like(offset).to(weight.dtype.element_ty)
    # A loop: of nine taps at once the compiler would load everything first, into many registers.
    for i in range(3):
        for j in tl.static_range(3):
            near, there = neighbour(offset, inside, pixel, i - 1, j - 1, size, step)
            value = tl.load(x + near, there, 0.0).to(total.dtype)
            total += per_plane(weight, channel * 9 + 3 * i + j, exists) * value
    return total


@triton.jit
def through_filter(g, weight, x, offset, inside, pixel, channel, exists, size, step):
    """Gradients for g, that of DW(x): of a tile of x, and terms of those of the nine taps.

    The map is that of g; x are the values of the tile.
    """
    dx = tl.zeros_like(x)
    terms = ()
    for tap in tl.static_range(9):
        # Of the neighbour on the other side, a pixel lies under the tap.
        near, there = neighbour(offset, inside, pixel, 1 - tap // 3, 1 - tap % 3, size, step)
        g_near = tl.load(g + near, there, 0.0).to(x.dtype)
        dx += per_plane(weight, channel * 9 + tap, exists) * g_near
        terms = terms + (x * g_near,)
    return dx, terms


@triton.jit
def zeros(count: tl.constexpr, cut, dtype: tl.constexpr):
    """A tuple of tiles."""
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros((cut.PLANES, cut.PIXELS), dtype),)
    return found


@triton.jit
def added(totals, values):
    """Sums of two tuples, member by member."""
    found = ()
    for i in tl.static_range(len(totals)):
        found = found + (totals[i] + values[i],)
    return found


@triton.jit
def store_sums(totals, to, stride, slot, exists):
    """Sums over the pixels of a tuple of tiles; ``stride`` is from those of one to the next's."""
    for i in tl.static_range(len(totals)):
        tl.store(to + tl.cast(stride, tl.int64) * i + slot, tl.sum(totals[i], axis=1), exists)
