"""Triton kernels of ``light_attention``: passes over maps, and what lies between them.

With u = DW_v(x) and e = DW_prev(p), both formed wherever they are needed and never stored:

    moments             per plane: sums of x, u, p, e, of their products with each other and with
                        the gradients that arrive
    statistics          mean and variance of o = a u + lam (d p + e) from these
    output              out = [x +] drop_scale * norm(o)
    channel gradients   of norm, lam, a and d, from the moments
    gradients           g = dL/do, and from it dx, dp and the correlations that are the filters'
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dla_kernels.ops.triton_common import place, place_of, tile


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
    """Coefficients of o: a and d are the last two of summary [4, B, C], lam is [C]."""

    summary: Any
    lam: Any
    planes: int  # B * C


class Norm(NamedTuple):
    """Mean and variance [C], or None without a norm; weight and bias [C] or None."""

    mean: Any
    var: Any
    weight: Any
    bias: Any


# Numbers of a plane that `moments_kernel` leaves: sums of x; of u, p, e; of their products with
# each other; of the gradient of out and its products with u, p, e; likewise of that of o. All u, p
# and e are less their values at the middle pixel, which come last.
FIELDS = tl.constexpr(21)
X, U, P, E, UU, UP, UE, PP, PE, EE, G, GU, GP, GE, D, DU, DP, DE, U0, P0, E0 = (
    tl.constexpr(i) for i in range(FIELDS.value)
)

# --- maps -----------------------------------------------------------------------------------------


@triton.jit
def neighbour(tap: tl.constexpr, offset, inside, row, column, size, step):
    """Offset of the pixel under a tap of a 3x3 filter, and whether there is one."""
    if tap < 3:
        inside = inside & (row > 0)
    if tap >= 6:
        inside = inside & (row < size.height - 1)
    if tap % 3 == 0:
        inside = inside & (column > 0)
    if tap % 3 == 2:
        inside = inside & (column < size.width - 1)
    return offset + ((tap // 3 - 1) * size.width + (tap % 3 - 1)) * step, inside


@triton.jit
def per_plane(values, index, exists):
    """[PLANES, 1] from an array."""
    return tl.load(values + index, exists, 0.0)[:, None]


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
    row = pixel // size.width
    column = pixel - row * size.width
    dtype: tl.constexpr = inputs.v_weight.dtype.element_ty
    u = tl.zeros_like(offset).to(dtype)
    e = tl.zeros_like(offset).to(dtype)
    p = tl.zeros_like(offset).to(dtype)
    # A loop: of nine taps at once the compiler would load everything first, into many registers.
    for i in range(3):
        known = inside & (row + i > 0) & (row + i <= size.height)
        for j in tl.static_range(3):
            there = known & (column + j > 0) & (column + j <= size.width)
            at = first + offset + ((i - 1) * size.width + j - 1) * step
            if inputs.prev_weight is not None or inputs.shortcut is not None:
                p = read_p(inputs, at, there)
            x = read_x(inputs, at, there, channel, exists, p)
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
    """o = a u + lam (d p + e) from those of u, p, e that there are."""
    o = per_plane(mixture.summary + 2 * mixture.planes, row, exists) * values[0]
    if len(values) > 1:
        rest = per_plane(mixture.summary + 3 * mixture.planes, row, exists) * values[1]
        if len(values) > 2:
            rest += values[2]
        o += per_plane(mixture.lam, channel, exists) * rest
    return o


@triton.jit
def means_kernel(
    inputs, of_x, of_p, channels, planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Sums of a joined x and of p over one chunk of planes."""
    first, row, exists, slot, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    total_x = tl.zeros((PLANES, PIXELS), of_x.dtype.element_ty)
    total_p = tl.zeros((PLANES, PIXELS), of_x.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, CHUNK), PIXELS):
        offset, inside = tile(
            start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
        )
        p = read_p(inputs, first + offset, inside)
        total_p += p
        total_x += read_x(inputs, first + offset, inside, row % channels, exists, p)
    tl.store(of_x + slot, tl.sum(total_x, axis=1), exists)
    tl.store(of_p + slot, tl.sum(total_p, axis=1), exists)


# --- moments --------------------------------------------------------------------------------------


@triton.jit
def fields(count: tl.constexpr, gradients):
    """The fields of `terms`, in the same order, where ``count`` of u, p and e are there."""
    found = (X,)
    for i in tl.static_range(count):
        found = found + (U + i,)
    for i in tl.static_range(count):
        for j in tl.static_range(i, count):
            found = found + (UU + i * (5 - i) // 2 + j,)
    if gradients.out is not None:
        for i in tl.static_range(count + 1):
            found = found + (G + i,)
    if gradients.o is not None:
        for i in tl.static_range(count + 1):
            found = found + (D + i,)
    return found


@triton.jit
def terms(x, values, gradients, offset, inside):
    """What is summed up over the pixels of planes."""
    found = (x,) + values
    for i in tl.static_range(len(values)):
        for j in tl.static_range(i, len(values)):
            found = found + (values[i] * values[j],)
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
def deviations(values, centres, inside):
    """The values less their centres; zeros outside."""
    found = ()
    for i in tl.static_range(len(values)):
        found = found + (tl.where(inside, values[i] - centres[i], 0.0),)
    return found


@triton.jit
def zeros(count: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, dtype: tl.constexpr):
    """A tuple of tiles."""
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros((rows, columns), dtype),)
    return found


@triton.jit
def added(totals, values):
    """Sums of two tuples, member by member."""
    found = ()
    for i in tl.static_range(len(totals)):
        found = found + (totals[i] + values[i],)
    return found


@triton.jit
def moments_kernel(
    inputs, gradients, sums, stride, size, planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """sums[field, plane, chunk] for one chunk of planes; ``stride`` is that of a field."""
    first, row, exists, slot, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    channel = row % size.channels
    step = planes if CHANNELS_LAST else 1
    begin = area - pixels
    # All chunks of a plane subtract the same, so that their sums can be added. A value inside the
    # map is close enough to the mean: float32 squares of large numbers would lose the variance.
    middle = area // 2
    at, known = tile(middle - begin, pixels, exists, planes, area, PLANES, 1, ALIGN, CHANNELS_LAST)
    middle = tl.full((1, 1), middle, tl.int32)
    _, centres = features(inputs, first, at, known, middle, channel, exists, size, step)
    of: tl.constexpr = fields(len(centres), gradients)
    totals = zeros(len(of), PLANES, PIXELS, centres[0].dtype)
    for start in range(0, tl.minimum(pixels, CHUNK), PIXELS):
        offset, inside = tile(
            start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
        )
        pixel = begin + start + tl.arange(0, PIXELS)[None, :]
        x, values = features(inputs, first, offset, inside, pixel, channel, exists, size, step)
        values = deviations(values, centres, inside)
        totals = added(totals, terms(x, values, gradients, first + offset, inside))
    for i in tl.static_range(len(of)):
        tl.store(sums + of[i] * stride + slot, tl.sum(totals[i], axis=1), exists)
    # They are added up over chunks as all the others.
    for i in tl.static_range(len(centres)):
        centre = tl.where(begin == 0, tl.sum(centres[i], axis=1), 0.0)
        tl.store(sums + (U0 + i) * stride + slot, centre, exists)


# --- between the passes: [B, C] -------------------------------------------------------------------


@triton.jit
def of_field(sums, field: tl.constexpr, index, inside, mixture):
    """One number of each plane, in double: sums over the batch in float are not accurate enough."""
    return tl.load(sums + field * mixture.planes + index, inside, 0.0).to(tl.float64)


@triton.jit
def coefficients(mixture, index, channel, inside):
    """a, lam d and lam in double."""
    a = of_field(mixture.summary, 2, index, inside, mixture)
    d = of_field(mixture.summary, 3, index, inside, mixture)
    lam = tl.load(mixture.lam + channel, inside, 0.0).to(tl.float64)
    return a, lam * d, lam


@triton.jit
def mix(
    sums, of_u: tl.constexpr, of_p: tl.constexpr, of_e: tl.constexpr, index, inside, mixture, k
):
    """The same of o as three fields are of u, p and e."""
    u = of_field(sums, of_u, index, inside, mixture)
    p = of_field(sums, of_p, index, inside, mixture)
    return k[0] * u + k[1] * p + k[2] * of_field(sums, of_e, index, inside, mixture)


@triton.jit
def block(start, batch, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Index in a [B, C], channel and mask, [ROWS, CHANNELS]: samples, a program's channels."""
    sample = start + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return sample * channels + channel, channel, (sample < batch) & (channel < channels)


@triton.jit
def mean_of(sums, mixture, batch, channels, area, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean [CHANNELS] of o over batch and space."""
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        total += mix(sums, U0, P0, E0, index, inside, mixture, k)
        total += mix(sums, U, P, E, index, inside, mixture, k) / area
    return tl.sum(total, axis=0) / batch


@triton.jit
def statistics_kernel(
    sums, mixture, mean, var, batch, channels, area, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and biased variance of o, for some channels."""
    middle = mean_of(sums, mixture, batch, channels, area, ROWS, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        square = k[0] * mix(sums, UU, UP, UE, index, inside, mixture, k)
        square += k[1] * mix(sums, UP, PP, PE, index, inside, mixture, k)
        square += k[2] * mix(sums, UE, PE, EE, index, inside, mixture, k)
        alone = mix(sums, U, P, E, index, inside, mixture, k)
        centred = square - alone * alone / area
        deviation = (
            mix(sums, U0, P0, E0, index, inside, mixture, k) + alone / area - middle[None, :]
        )
        spread = tl.where(centred > 0, centred, 0.0) + deviation * deviation * area
        total += tl.where(inside, spread, 0.0)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(mean + channel, middle.to(mean.dtype.element_ty), channel < channels)
    spread = tl.sum(total, axis=0) / batch / area
    tl.store(var + channel, spread.to(var.dtype.element_ty), channel < channels)


@triton.jit
def loaded(values, index, inside, missing: tl.constexpr):
    """Values in double; ``missing`` stands for an array of None."""
    if values is not None:
        return tl.load(values + index, inside, 0.0).to(tl.float64)
    else:
        return tl.where(inside, tl.full(inside.shape, missing, tl.float64), 0.0)


@triton.jit
def channel_gradients_kernel(
    sums, mixture, norm, drop_scale, of_planes, of_channels, batch, channels, area,
    EPS: tl.constexpr, THROUGH_NORM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What follows from the moments of G = dL/dout, for some channels.

    of_planes [3, B, C]: da, dd and the factor of G in g. of_channels [6, C]: gradients of lam and
    of the norm's weight and bias; mean, slope and level in g = factor G + slope (o - mean) + level
    [+ gradient of o].
    """
    line = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = line < channels
    middle = loaded(norm.mean, line, exists, 0.0)
    if THROUGH_NORM:
        # Not the one that was rounded: it is multiplied by sums of gradients over whole planes.
        middle = mean_of(sums, mixture, batch, channels, area, ROWS, CHANNELS)
    rstd = tl.full((CHANNELS,), 1.0, tl.float64)
    if norm.var is not None:
        rstd = 1.0 / tl.sqrt(loaded(norm.var, line, exists, 1.0) + EPS)
    weight = rstd * loaded(norm.weight, line, exists, 1.0)
    dweight = tl.zeros((ROWS, CHANNELS), tl.float64)
    dbias = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        centre = mix(sums, U0, P0, E0, index, inside, mixture, k) - middle[None, :]
        scale = loaded(drop_scale, index // channels, inside, 1.0)
        alone = of_field(sums, G, index, inside, mixture)
        dbias += scale * alone
        dweight += scale * (mix(sums, GU, GP, GE, index, inside, mixture, k) + centre * alone)
    dbias = tl.sum(dbias, axis=0)
    dweight = tl.sum(dweight, axis=0) * rstd
    slope = tl.zeros((CHANNELS,), tl.float64)
    level = tl.zeros((CHANNELS,), tl.float64)
    if THROUGH_NORM:
        slope = -weight * rstd * dweight / batch / area
        level = -weight * dbias / batch / area
    dlam = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, batch, ROWS):
        index, channel, inside = block(start, batch, channels, ROWS, CHANNELS)
        k = coefficients(mixture, index, channel, inside)
        centre = mix(sums, U0, P0, E0, index, inside, mixture, k) - middle[None, :]
        factor = weight[None, :] * loaded(drop_scale, index // channels, inside, 1.0)
        # Sums over the plane of g and of g f for f = u, p, e.
        alone = mix(sums, U, P, E, index, inside, mixture, k) + centre * area
        g = factor * of_field(sums, G, index, inside, mixture) + slope[None, :] * alone
        g += level[None, :] * area + of_field(sums, D, index, inside, mixture)
        known = (sums, g, factor, slope, level, centre, index, inside, mixture, k)
        gu = with_g(U, U0, UU, UP, UE, GU, DU, known)
        gp = with_g(P, P0, UP, PP, PE, GP, DP, known)
        ge = with_g(E, E0, UE, PE, EE, GE, DE, known)
        dlam += of_field(mixture.summary, 3, index, inside, mixture) * gp + ge
        found = (gu, k[2] * gp, factor)
        for i in tl.static_range(3):
            value = found[i].to(of_planes.dtype.element_ty)
            tl.store(of_planes + i * mixture.planes + index, value, inside)
    found = (tl.sum(dlam, axis=0), dweight, dbias, middle, slope, level)
    for i in tl.static_range(6):
        value = found[i].to(of_channels.dtype.element_ty)
        tl.store(of_channels + i * channels + line, value, exists)


@triton.jit
def with_g(
    alone: tl.constexpr, shift: tl.constexpr, with_u: tl.constexpr, with_p: tl.constexpr,
    with_e: tl.constexpr, with_out: tl.constexpr, with_o: tl.constexpr, known,
):  # fmt: skip
    """Sum over each plane of g f, from the fields of f = u, p or e."""
    sums, g, factor, slope, level, centre, index, inside, mixture, k = known
    of_f = of_field(sums, alone, index, inside, mixture)
    found = factor * of_field(sums, with_out, index, inside, mixture)
    o = mix(sums, with_u, with_p, with_e, index, inside, mixture, k) + centre * of_f
    found += slope[None, :] * o + level[None, :] * of_f
    found += of_field(sums, with_o, index, inside, mixture)
    return found + of_field(sums, shift, index, inside, mixture) * g


# --- output ---------------------------------------------------------------------------------------


@triton.jit
def output_kernel(
    inputs, mixture, norm, drop_scale, out, o, size,
    EPS: tl.constexpr, RESIDUAL: tl.constexpr,
    planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One tile of out, and of o if that is not None."""
    first, row, exists, _, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    channel = row % size.channels
    step = planes if CHANNELS_LAST else 1
    offset, inside = tile(0, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST)
    pixel = area - pixels + tl.arange(0, PIXELS)[None, :]
    x, values = features(inputs, first, offset, inside, pixel, channel, exists, size, step)
    branch = mixed(mixture, row, channel, exists, values)
    if o is not None:
        tl.store(o + first + offset, branch.to(o.dtype.element_ty), inside)
    if norm.mean is not None:
        factor = 1.0 / tl.sqrt(per_plane(norm.var, channel, exists) + EPS)
        if norm.weight is not None:
            factor *= per_plane(norm.weight, channel, exists)
        branch = (branch - per_plane(norm.mean, channel, exists)) * factor
        if norm.bias is not None:
            branch += per_plane(norm.bias, channel, exists)
    if drop_scale is not None:
        branch *= per_plane(drop_scale, row // size.channels, exists)
    if RESIDUAL:
        branch += x
    tl.store(out + first + offset, branch.to(out.dtype.element_ty), inside)


# --- gradients ------------------------------------------------------------------------------------


@triton.jit
def form_g(
    inputs, gradients, mixture, of_planes, of_channels, first, offset, inside, pixel, row, exists,
    size, step, THROUGH_NORM: tl.constexpr,
):  # fmt: skip
    """g = dL/do on a tile (see `channel_gradients_kernel`)."""
    channel = row % size.channels
    g = tl.zeros_like(offset).to(of_planes.dtype.element_ty)
    if THROUGH_NORM:
        _, values = features(inputs, first, offset, inside, pixel, channel, exists, size, step)
        o = mixed(mixture, row, channel, exists, values)
        mean = per_plane(of_channels + 3 * size.channels, channel, exists)
        slope = per_plane(of_channels + 4 * size.channels, channel, exists)
        g = slope * (o - mean) + per_plane(of_channels + 5 * size.channels, channel, exists)
    if gradients.out is not None:
        factor = per_plane(of_planes + 2 * mixture.planes, row, exists)
        g += factor * tl.load(gradients.out + first + offset, inside, 0.0).to(g.dtype)
    if gradients.o is not None:
        g += tl.load(gradients.o + first + offset, inside, 0.0).to(g.dtype)
    return g


@triton.jit
def gradients_kernel(
    inputs, gradients, mixture, of_planes, of_channels, dy, dpooled_p, dx, dp, filters, stride,
    branch_mean, scratch, programs, length, size,
    THROUGH_NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx and dp of chunks of planes, and their shares of filters [20, plane, chunk].

    These are the correlations of a g with x (9) and of g with p (9); and, where branch_mean is not
    None, sums of the gradient of the normed branch and of its product with the deviation of the
    branch from that mean. dx is then that gradient, or with SCALED the one of the branch itself,
    for a norm with constant statistics.

    g is needed around every pixel: a program first forms it for a whole chunk and what is around
    it, in [PLANES, length] elements of scratch memory that are its own. There are only as many
    programs as run at a time, so all of that stays in the cache.
    """
    dtype: tl.constexpr = of_planes.dtype.element_ty
    step = planes if CHANNELS_LAST else 1
    own_step = PLANES if CHANNELS_LAST else 1
    scratch += tl.program_id(0).to(tl.int64) * PLANES * length
    for number in range(tl.program_id(0), programs, tl.num_programs(0)):
        first, row, exists, slot, pixels = place_of(
            number, planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST
        )
        channel = row % size.channels
        begin = area - pixels
        count = tl.minimum(pixels, CHUNK)
        lowest = tl.maximum(-size.width - 1, -begin)
        end = tl.minimum(count + size.width + 1, pixels)
        tl.debug_barrier()  # the chunk before has been read
        for start in range(lowest, end, PIXELS):
            offset, inside = tile(
                start, end, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
            )
            pixel = begin + start + tl.arange(0, PIXELS)[None, :]
            g = form_g(
                inputs, gradients, mixture, of_planes, of_channels, first, offset, inside, pixel,
                row, exists, size, step, THROUGH_NORM,
            )  # fmt: skip
            at, _ = tile(
                start - lowest, end, exists, PLANES, length, PLANES, PIXELS, 1, CHANNELS_LAST
            )
            tl.store(scratch + at, g, inside)
        tl.debug_barrier()  # all of g is there
        a = per_plane(mixture.summary + 2 * mixture.planes, row, exists)
        d = per_plane(mixture.summary + 3 * mixture.planes, row, exists)
        lam = per_plane(mixture.lam, channel, exists)
        filtered: tl.constexpr = 9 if inputs.prev_weight is None else 18
        sums: tl.constexpr = filtered if branch_mean is None else filtered + 2
        totals = zeros(sums, PLANES, PIXELS, dtype)
        for start in range(0, count, PIXELS):
            offset, inside = tile(
                start, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST
            )
            at, _ = tile(
                start - lowest, end, exists, PLANES, length, PLANES, PIXELS, 1, CHANNELS_LAST
            )
            pixel = begin + start + tl.arange(0, PIXELS)[None, :]
            row_of = pixel // size.width
            column = pixel - row_of * size.width
            p = tl.zeros_like(offset).to(dtype)
            if inputs.p is not None:
                p = read_p(inputs, first + offset, inside)
            x = read_x(inputs, first + offset, inside, channel, exists, p)
            to_x = tl.zeros_like(x)
            to_p = d * tl.load(scratch + at, inside, 0.0)
            for i in range(3):
                around = inside & (row_of + i > 0) & (row_of + i <= size.height)
                for j in tl.static_range(3):
                    there = around & (column + j > 0) & (column + j <= size.width)
                    here = at + ((i - 1) * size.width + j - 1) * own_step
                    g = tl.load(scratch + here, there, 0.0)
                    # This pixel lies under the tap on the other side of its neighbour's centre.
                    tap = channel * 9 + 8 - 3 * i - j
                    to_x += per_plane(inputs.v_weight, tap, exists) * g
                    if inputs.prev_weight is not None:
                        to_p += per_plane(inputs.prev_weight, tap, exists) * g
            to_x = a * to_x + per_plane(dy, row, exists) / area
            if RESIDUAL and gradients.out is not None:
                to_x += tl.load(gradients.out + first + offset, inside, 0.0).to(dtype)
            if inputs.shortcut is not None:
                to_x = tl.where(x <= 0, 0.0, to_x)
            passed = to_x
            if SCALED:
                passed *= per_plane(inputs.scale, channel, exists)
            tl.store(dx + first + offset, passed.to(dx.dtype.element_ty), inside)
            if dp is not None:
                to_p *= lam
                if dpooled_p is not None:
                    to_p += per_plane(dpooled_p, row, exists) / area
                if inputs.shortcut is not None:
                    to_p += to_x
                tl.store(dp + first + offset, to_p.to(dp.dtype.element_ty), inside)
            found = ()
            of_p = ()
            for tap in tl.static_range(9):
                here, there = neighbour(8 - tap, at, inside, row_of, column, size, own_step)
                g = tl.load(scratch + here, there, 0.0)
                found = found + (x * g,)
                if inputs.prev_weight is not None:
                    of_p = of_p + (p * g,)
            found = found + of_p
            if branch_mean is not None:
                z = tl.load(inputs.x + first + offset, inside, 0.0).to(dtype)
                to_x = tl.where(inside, to_x, 0.0)
                found = found + (to_x, to_x * (z - per_plane(branch_mean, channel, exists)))
            totals = added(totals, found)
        a = tl.sum(a, axis=1)
        for i in tl.static_range(sums):
            value = tl.sum(totals[i], axis=1)
            if i < 9:
                value *= a
            field = i if i < filtered else 18 + i - filtered
            tl.store(filters + field * stride + slot, value, exists)
