"""Triton kernels of ``light_attention``: passes over maps, and what lies between them.

With u = DW_v(x) and e = DW_prev(p), both formed wherever they are needed and never stored:

    moments             per plane: sums of x, u, p, e and of products of the last three; backward
                        of the gradients that arrive and of their products with u, p, e
    statistics          mean and variance of o = a u + lam (d p + e) from these; for backward, per
                        plane, means of u, p, e and covariances with o
    output              out = [x +] drop_scale * norm(o)
    channel gradients   of norm, lam, a and d, from the moments
    gradients           g = dL/do, and from it dx, dp and the correlations that are the filters'
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dla_kernels.ops.norm_triton import finished
from dla_kernels.ops.stencil_triton import added, neighbour, store_sums, through_filter, zeros
from dla_kernels.ops.triton_common import (
    aligned,
    in_plane,
    offsets,
    per_plane,
    place,
    place_of,
    step_of,
    tile,
)


class Inputs(NamedTuple):
    """The two maps and their filters; p and prev_weight may be None.

    scale, shift: [C], of the norm that a joined x passes first, or None. shortcut: p once more if x
    is joined with it, else None.
    """

    x: Any
    p: Any
    v_weight: Any
    prev_weight: Any
    scale: Any
    shift: Any
    shortcut: Any


class Gradients(NamedTuple):
    """What arrives at out and at o; may be None."""

    out: Any
    o: Any


class Size(NamedTuple):
    """What a kernel has to know of maps besides planes and area."""

    channels: int
    height: int
    width: int


class Mixture(NamedTuple):
    """Coefficients of o = a u + lam (d p + e): a and d [B, C], lam [C]."""

    a: Any
    d: Any
    lam: Any


class Moments(NamedTuple):
    """What `moments_kernel` leaves: sums [fields, B, C, chunks] of u, p, e less shifts [3, B, C].

    Later the sums are [fields, B, C]: chunks added up.
    """

    sums: Any
    shifts: Any
    planes: int  # B * C


class OfMaps(NamedTuple):
    """What a forward step leaves of u, p and e for backward: their means [B, C]; what rounding took
    from these, and the covariances with o, [3, B, C]."""

    mean_u: Any
    mean_p: Any
    mean_e: Any
    rests: Any
    covariances: Any


class Rule(NamedTuple):
    """g = factor * dL/dout [+ slope * (o - mean) + level] [+ the gradient that arrives at o].

    factor is [B, C]; the others are [C], None unless o has a part in the norm's statistics.
    """

    factor: Any
    mean: Any
    slope: Any
    level: Any


# Sums over a plane, forward: x; u, p, e; their products with each other.
FIELDS = 10
X, U, P, E, UU, UP, UE, PP, PE, EE = (tl.constexpr(i) for i in range(FIELDS))
# Backward: the gradient of out and its products with u, p, e; likewise that of o.
GRADIENT_FIELDS = 8
G, GU, GP, GE, D, DU, DP, DE = (tl.constexpr(i) for i in range(GRADIENT_FIELDS))

# --- maps -----------------------------------------------------------------------------------------


@triton.jit
def read_x(inputs, offset, inside, channel, exists, p):
    """The x of the step; zeros outside. p: its values at the same place."""
    dtype: tl.constexpr = inputs.v_weight.dtype.element_ty
    x = tl.load(inputs.x + offset, inside, 0.0).to(dtype)
    if inputs.scale is not None:
        scale = per_plane(inputs.scale, channel, exists)
        x = x * scale + per_plane(inputs.shift, channel, exists)
    if inputs.shortcut is not None:
        x += p
        x = tl.where(inside & ~(x < 0), x, 0.0)  # NaN stays NaN, as in torch.relu
    return x


@triton.jit
def read_p(inputs, offset, inside):
    """p; zeros outside."""
    return tl.load(inputs.p + offset, inside, 0.0).to(inputs.v_weight.dtype.element_ty)


@triton.jit
def features(inputs, first, offset, inside, pixel, channel, exists, size, step):
    """x at the pixels of a tile; and u, p, e there, as many of them as there are."""
    dtype: tl.constexpr = inputs.v_weight.dtype.element_ty
    u = tl.zeros_like(offset).to(dtype)
    e = tl.zeros_like(offset).to(dtype)
    p = tl.zeros_like(offset).to(dtype)
    # A loop: of nine taps at once the compiler would load everything first, into many registers.
    for i in range(3):
        for j in tl.static_range(3):
            near, there = neighbour(offset, inside, pixel, i - 1, j - 1, size, step)
            if inputs.prev_weight is not None or inputs.shortcut is not None:
                p = read_p(inputs, first + near, there)
            x = read_x(inputs, first + near, there, channel, exists, p)
            tap = channel * 9 + 3 * i + j
            u += per_plane(inputs.v_weight, tap, exists) * x
            if inputs.prev_weight is not None:
                e += per_plane(inputs.prev_weight, tap, exists) * p
    if inputs.p is not None:
        p = read_p(inputs, first + offset, inside)
    x = read_x(inputs, first + offset, inside, channel, exists, p)
    if inputs.prev_weight is not None:
        return x, (u, p, e)
    elif inputs.p is not None:
        return x, (u, p)
    else:
        return x, (u,)


@triton.jit
def mixed(mixture, row, channel, exists, values):
    """o from those of u, p, e that there are."""
    o = per_plane(mixture.a, row, exists) * values[0]
    if len(values) > 1:
        rest = per_plane(mixture.d, row, exists) * values[1]
        if len(values) > 2:
            rest += values[2]
        o += per_plane(mixture.lam, channel, exists) * rest
    return o


@triton.jit
def means_kernel(inputs, of_x, of_p, channels, cut):
    """Sums of a joined x and of p over one chunk of planes."""
    first, row, exists, slot, pixels = place(cut)
    total_x = tl.zeros((cut.PLANES, cut.PIXELS), of_x.dtype.element_ty)
    total_p = tl.zeros((cut.PLANES, cut.PIXELS), of_x.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        p = read_p(inputs, first + offset, inside)
        total_p += p
        total_x += read_x(inputs, first + offset, inside, row % channels, exists, p)
    tl.store(of_x + slot, tl.sum(total_x, axis=1), exists)
    tl.store(of_p + slot, tl.sum(total_p, axis=1), exists)


# --- moments --------------------------------------------------------------------------------------


@triton.jit
def fields(count: tl.constexpr, gradients, FORWARD: tl.constexpr):
    """The fields of `terms`, in the same order, where ``count`` of u, p and e are there."""
    found = ()
    if FORWARD:
        for i in tl.static_range(count + 1):
            found = found + (X + i,)
        for i in tl.static_range(count):
            for j in tl.static_range(i, count):
                found = found + (UU + i * (5 - i) // 2 + j,)
    else:
        if gradients.out is not None:
            for i in tl.static_range(count + 1):
                found = found + (G + i,)
        if gradients.o is not None:
            for i in tl.static_range(count + 1):
                found = found + (D + i,)
    return found


@triton.jit
def terms(x, values, gradients, offset, inside, FORWARD: tl.constexpr):
    """What is summed up over the pixels of planes."""
    found = ()
    if FORWARD:
        found = (x,) + values
        for i in tl.static_range(len(values)):
            for j in tl.static_range(i, len(values)):
                found = found + (values[i] * values[j],)
    else:
        if gradients.out is not None:
            found = found + with_gradient(gradients.out + offset, inside, values)
        if gradients.o is not None:
            found = found + with_gradient(gradients.o + offset, inside, values)
    return found


@triton.jit
def with_gradient(at, inside, values):
    """A gradient and its products with the values."""
    g = tl.load(at, inside, 0.0).to(values[0].dtype)
    found = (g,)
    for i in tl.static_range(len(values)):
        found = found + (g * values[i],)
    return found


@triton.jit
def deviations(values, shifts, inside):
    """The values less their shifts; zeros outside."""
    found = ()
    for i in tl.static_range(len(values)):
        found = found + (tl.where(inside, values[i] - shifts[i], 0.0),)
    return found


@triton.jit
def middle_values(inputs, moments, first, row, exists, pixels, size, cut):
    """Shifts of as many of u, p, e as there are: their values at the middle pixel. Stores them.

    All chunks of a plane subtract the same, so that their sums can be added. A value inside the
    map is close enough to the mean: float32 squares of large numbers would lose the variance.
    """
    begin = cut.area - pixels
    middle = tl.full((1, 1), cut.area // 2, tl.int32)
    planes, area = aligned(cut)
    at = offsets(cut, middle - begin, planes, area)
    channel = row % size.channels
    _, found = features(
        inputs, first, at, exists[:, None], middle, channel, exists, size, step_of(cut)
    )
    if begin == 0:
        for i in tl.static_range(len(found)):
            to = moments.shifts + tl.cast(moments.planes, tl.int64) * i + row
            tl.store(to, tl.sum(found[i], axis=1), exists)
    return found


@triton.jit
def known_values(count: tl.constexpr, moments, row, exists):
    """The first shifts, from memory."""
    found = ()
    for i in tl.static_range(count):
        of_map = moments.shifts + tl.cast(moments.planes, tl.int64) * i
        found = found + (per_plane(of_map, row, exists),)
    return found


@triton.jit
def moments_kernel(
    inputs, gradients, moments, size, cut, KNOWN: tl.constexpr, FORWARD: tl.constexpr
):
    """Sums over one chunk of planes, with gradients unless FORWARD; and shifts, unless KNOWN."""
    first, row, exists, slot, pixels = place(cut)
    channel = row % size.channels
    step = step_of(cut)
    count: tl.constexpr = (inputs.p is not None) + (inputs.prev_weight is not None) + 1
    if KNOWN:
        shifts = known_values(count, moments, row, exists)
    else:
        shifts = middle_values(inputs, moments, first, row, exists, pixels, size, cut)
    of: tl.constexpr = fields(count, gradients, FORWARD)
    totals = zeros(len(of), cut, moments.sums.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        pixel = in_plane(cut, start, pixels)
        x, values = features(inputs, first, offset, inside, pixel, channel, exists, size, step)
        values = deviations(values, shifts, inside)
        totals = added(totals, terms(x, values, gradients, first + offset, inside, FORWARD))
    stride = tl.cast(moments.planes, tl.int64) * tl.cdiv(cut.area, cut.CHUNK)
    for i in tl.static_range(len(of)):
        tl.store(moments.sums + stride * of[i] + slot, tl.sum(totals[i], axis=1), exists)


# --- between the passes: [B, C] -------------------------------------------------------------------


@triton.jit
def double(values, index, inside, missing: tl.constexpr = 0.0):
    """Values, for exact sums over the batch; ``missing`` stands for an array of None."""
    if values is not None:
        return tl.load(values + index, inside, 0.0).to(tl.float64)
    else:
        return tl.where(inside, tl.full(inside.shape, missing, tl.float64), 0.0)


@triton.jit
def of_field(values, planes, field: tl.constexpr, index, inside):
    """One of arrays [B, C], whose size is ``planes``."""
    return double(values + tl.cast(planes, tl.int64) * field, index, inside)


@triton.jit
def coefficients(mixture, index, channel, inside):
    """a, lam d and lam."""
    lam = double(mixture.lam, channel, inside)
    return double(mixture.a, index, inside), lam * double(mixture.d, index, inside), lam


@triton.jit
def mix(values, planes, u: tl.constexpr, p: tl.constexpr, e: tl.constexpr, index, inside, k):
    """The same of o as three fields are of u, p and e."""
    of_u = of_field(values, planes, u, index, inside)
    of_p = of_field(values, planes, p, index, inside)
    return k[0] * of_u + k[1] * of_p + k[2] * of_field(values, planes, e, index, inside)


@triton.jit
def block(start, batch, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Index in a [B, C], channel and mask, [ROWS, CHANNELS]: samples, a program's channels."""
    sample = start + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return sample * channels + channel, channel, (sample < batch) & (channel < channels)


@triton.jit
def statistics_kernel(
    moments, mixture, mean, var, of_maps, batch, channels, area,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of o, for some channels; and what there is to be `OfMaps`."""
    sums, shifts, planes = moments
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        total += mix(shifts, planes, 0, 1, 2, index, inside, k)
        total += mix(sums, planes, U, P, E, index, inside, k) / area
    middle = tl.sum(total, axis=0) / batch
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        mean_of_o = mix(sums, planes, U, P, E, index, inside, k) / area
        products = (
            mix(sums, planes, UU, UP, UE, index, inside, k),
            mix(sums, planes, UP, PP, PE, index, inside, k),
            mix(sums, planes, UE, PE, EE, index, inside, k),
        )
        square = tl.zeros((ROWS, CHANNELS), tl.float64)
        for i in tl.static_range(3):
            of_f = of_field(sums, planes, U + i, index, inside)
            product = products[i] - of_f * mean_of_o
            square += k[i] * product
            mean_of_f = of_field(shifts, planes, i, index, inside) + of_f / area
            rounded = mean_of_f.to(of_maps.rests.dtype.element_ty)
            tl.store(of_maps[i] + index, rounded, inside)
            at = tl.cast(planes, tl.int64) * i + index
            rest = mean_of_f - rounded.to(tl.float64)
            tl.store(of_maps.rests + at, rest.to(rounded.dtype), inside)
            tl.store(of_maps.covariances + at, (product / area).to(rounded.dtype), inside)
        deviation = mix(shifts, planes, 0, 1, 2, index, inside, k) + mean_of_o - middle[None, :]
        spread = tl.where(square < 0, 0.0, square) + deviation * deviation * area
        total += tl.where(inside, spread, 0.0)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(mean + channel, middle.to(mean.dtype.element_ty), channel < channels)
    spread = tl.sum(total, axis=0) / batch / area
    tl.store(var + channel, spread.to(var.dtype.element_ty), channel < channels)


@triton.jit
def channel_gradients_kernel(
    moments, known, mixture, end, of_planes, of_channels, batch, channels, area,
    EPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What follows from the moments of G = dL/dout, for some channels.

    known: `OfMaps` if the gradient passes statistics of the batch; the shifts then are its means.
    of_planes [3, B, C]: da, dd and the factor of the `Rule`. of_channels [6, C]: gradients of lam
    and of the norm's weight and bias; mean, slope and level of the `Rule`.
    """
    sums, shifts, planes = moments
    line = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = line < channels
    rstd = tl.full((CHANNELS,), 1.0, tl.float64)
    if end.var is not None:
        rstd = 1.0 / tl.sqrt(double(end.var, line, exists) + EPS)
    weight = rstd * double(end.weight, line, exists, 1.0)
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    dweight = tl.zeros((ROWS, CHANNELS), tl.float64)
    dbias = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        shift = mix(shifts, planes, 0, 1, 2, index, inside, k)
        scale = double(end.drop_scale, index // channels, inside, 1.0)
        alone = of_field(sums, planes, G, index, inside)
        total += shift
        if known is not None:
            total += mix(known.rests, planes, 0, 1, 2, index, inside, k)
        dbias += scale * alone
        dweight += scale * (mix(sums, planes, GU, GP, GE, index, inside, k) + shift * alone)
    middle = double(end.mean, line, exists)
    if known is not None:
        # Not the one that was rounded: it is multiplied by sums of gradients over whole planes.
        middle = tl.sum(total, axis=0) / batch
    dbias = tl.sum(dbias, axis=0)
    dweight = (tl.sum(dweight, axis=0) - middle * dbias) * rstd
    slope = tl.zeros((CHANNELS,), tl.float64)
    level = tl.zeros((CHANNELS,), tl.float64)
    if known is not None:
        slope = -weight * rstd * dweight / batch / area
        level = -weight * dbias / batch / area
    dlam = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        factor = weight[None, :] * double(end.drop_scale, index // channels, inside, 1.0)
        # Sums over the plane of g, and of g f for f = u, p, e.
        alone = factor * of_field(sums, planes, G, index, inside)
        alone += of_field(sums, planes, D, index, inside)
        through_norm = tl.zeros((ROWS, CHANNELS), tl.float64)
        if known is not None:
            mean_of_o = mix(shifts, planes, 0, 1, 2, index, inside, k)
            mean_of_o += mix(known.rests, planes, 0, 1, 2, index, inside, k)
            through_norm += slope[None, :] * (mean_of_o - middle[None, :]) + level[None, :]
            through_norm *= area
        alone += through_norm
        products = ()
        for i in tl.static_range(3):
            product = factor * of_field(sums, planes, GU + i, index, inside)
            product += of_field(sums, planes, DU + i, index, inside)
            product += of_field(shifts, planes, i, index, inside) * alone
            if known is not None:
                covariance = of_field(known.covariances, planes, i, index, inside)
                product += area * slope[None, :] * covariance
                product += through_norm * of_field(known.rests, planes, i, index, inside)
            products = products + (product,)
        dlam += double(mixture.d, index, inside) * products[1] + products[2]
        found = (products[0], k[2] * products[1], factor)
        for i in tl.static_range(3):
            value = found[i].to(of_planes.dtype.element_ty)
            tl.store(of_planes + tl.cast(planes, tl.int64) * i + index, value, inside)
    found = (tl.sum(dlam, axis=0), dweight, dbias, middle, slope, level)
    for i in tl.static_range(6):
        value = found[i].to(of_channels.dtype.element_ty)
        tl.store(of_channels + i * channels + line, value, exists)


# --- output ---------------------------------------------------------------------------------------


@triton.jit
def output_kernel(
    inputs, mixture, end, out, o, size, cut, EPS: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """One tile of out, and of o if that is not None."""
    first, row, exists, _, pixels = place(cut)
    channel = row % size.channels
    step = step_of(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    pixel = in_plane(cut, 0, pixels)
    x, values = features(inputs, first, offset, inside, pixel, channel, exists, size, step)
    mixture_here = mixed(mixture, row, channel, exists, values)
    if o is not None:
        tl.store(o + first + offset, mixture_here.to(o.dtype.element_ty), inside)
    result = finished(mixture_here, end, x, row, exists, size.channels, EPS, False, RESIDUAL)
    tl.store(out + first + offset, result.to(out.dtype.element_ty), inside)


# --- gradients ------------------------------------------------------------------------------------


@triton.jit
def form_g(inputs, gradients, mixture, rule, first, offset, inside, pixel, row, exists, size, step):
    """g of a tile, see `Rule`."""
    g = tl.zeros_like(offset).to(rule.factor.dtype.element_ty)
    if rule.slope is not None:
        channel = row % size.channels
        _, values = features(inputs, first, offset, inside, pixel, channel, exists, size, step)
        o = mixed(mixture, row, channel, exists, values)
        deviation = o - per_plane(rule.mean, channel, exists)
        slope = per_plane(rule.slope, channel, exists)
        g = slope * deviation + per_plane(rule.level, channel, exists)
    if gradients.out is not None:
        factor = per_plane(rule.factor, row, exists)
        g += factor * tl.load(gradients.out + first + offset, inside, 0.0).to(g.dtype)
    if gradients.o is not None:
        g += tl.load(gradients.o + first + offset, inside, 0.0).to(g.dtype)
    return g


@triton.jit
def gradients_kernel(
    inputs, gradients, mixture, rule, dy, dpooled_p, dx, dp, shares, stride, branch_mean,
    scratch, programs, length, size, cut, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """dx and dp of chunks of planes, and their shares [., plane, chunk] of gradients of weights.

    These are of v_weight (9) and prev_weight (9), as far as they are there; and, where branch_mean
    is not None, sums of the gradient of the normed branch and of its product with the deviation of
    the branch from that mean. dx is then that gradient, or with SCALED the one of the branch
    itself, for a norm with constant statistics.

    g is needed around every pixel: a program first forms it for a whole chunk and what is around
    it, in [PLANES, length] elements of scratch memory that are its own. There are only as many
    programs as run at a time, so all of that stays in the cache. What a thread of a program writes
    there, others read after a barrier, which orders accesses to global memory too (bar.sync).
    """
    dtype: tl.constexpr = rule.factor.dtype.element_ty
    step = step_of(cut)
    own_step = cut.PLANES if cut.CHANNELS_LAST else 1
    scratch += tl.program_id(0).to(tl.int64) * cut.PLANES * length
    for number in range(tl.program_id(0), programs, tl.num_programs(0)):
        first, row, exists, slot, pixels = place_of(cut, number)
        channel = row % size.channels
        count = tl.minimum(pixels, cut.CHUNK)
        lowest = tl.maximum(-size.width - 1, pixels - cut.area)
        end = tl.minimum(count + size.width + 1, pixels)
        first_pixel = cut.area - pixels + lowest
        tl.debug_barrier()  # the chunk before has been read
        for start in range(lowest, end, cut.PIXELS):
            offset, inside = tile(cut, start, end, exists)
            pixel = in_plane(cut, start, pixels)
            g = form_g(
                inputs, gradients, mixture, rule, first, offset, inside, pixel, row, exists, size,
                step,
            )  # fmt: skip
            at = offsets(cut, pixel - first_pixel, cut.PLANES, length)
            tl.store(scratch + at, g, inside)
        tl.debug_barrier()  # all of g is there
        a = per_plane(mixture.a, row, exists)
        lam = per_plane(mixture.lam, channel, exists)
        taps: tl.constexpr = 9 if inputs.prev_weight is None else 18
        totals = zeros(taps if branch_mean is None else taps + 2, cut, dtype)
        for start in tl.range(0, count, cut.PIXELS, disable_licm=True):
            offset, inside = tile(cut, start, pixels, exists)
            pixel = in_plane(cut, start, pixels)
            at = offsets(cut, pixel - first_pixel, cut.PLANES, length)
            p = tl.zeros_like(offset).to(dtype)
            if inputs.p is not None:
                p = read_p(inputs, first + offset, inside)
            x = read_x(inputs, first + offset, inside, channel, exists, p)
            to_x, found = through_filter(
                scratch, inputs.v_weight, a * x, at, inside, pixel, channel, exists, size, own_step
            )
            to_p = tl.zeros_like(x)
            if inputs.prev_weight is not None:
                to_p, with_p = through_filter(
                    scratch, inputs.prev_weight, lam * p, at, inside, pixel, channel, exists, size,
                    own_step,
                )  # fmt: skip
                found = found + with_p
            to_x = a * to_x + per_plane(dy, row, exists) / cut.area
            if RESIDUAL and gradients.out is not None:
                to_x += tl.load(gradients.out + first + offset, inside, 0.0).to(dtype)
            if inputs.shortcut is not None:
                to_x = tl.where(x <= 0, 0.0, to_x)
            if dp is not None:
                to_p += per_plane(mixture.d, row, exists) * tl.load(scratch + at, inside, 0.0)
                to_p *= lam
                if dpooled_p is not None:
                    to_p += per_plane(dpooled_p, row, exists) / cut.area
                if inputs.shortcut is not None:
                    to_p += to_x
                tl.store(dp + first + offset, to_p.to(dp.dtype.element_ty), inside)
            if branch_mean is not None:
                z = tl.load(inputs.x + first + offset, inside, 0.0).to(dtype)
                passed = tl.where(inside, to_x, 0.0)
                found = found + (passed, passed * (z - per_plane(branch_mean, channel, exists)))
            totals = added(totals, found)
            if SCALED:
                to_x *= per_plane(inputs.scale, channel, exists)
            tl.store(dx + first + offset, to_x.to(dx.dtype.element_ty), inside)
        store_sums(totals, shares, stride, slot, exists)
