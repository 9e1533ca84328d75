"""``residual_norm`` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import compute_dtype, contiguous, dense, dense_format, empty_features
from dla_kernels.ops.norm_triton import (
    channel_norm,
    chunk_moments,
    fold_moments,
    fold_sums,
    new_moments,
    norm_gradient,
    welford,
)
from dla_kernels.ops.triton_common import SMALL_TILE, launch_tiles, new_sums, place, tile, tiles
from dla_kernels.ops.triton_common import unsupported as unsupported


def forward(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of ``dla_kernels::residual_norm``."""
    layout = dense_format(x)
    x, shortcut, out = dense(x, layout), dense(shortcut, layout), empty_features(x)
    if norm == "batch":
        found = used = moments(x)
    else:
        found = tuple(x.new_empty(0, dtype=compute_dtype(x.dtype)) for _ in range(2))
        used = mean_in, var_in
    mean, var = used
    small = contiguous(mean=mean, var=var, weight=weight, bias=bias)
    plan = tiles(x, size=SMALL_TILE)
    launch_tiles(
        plan,
        _forward_kernel,
        *(x, shortcut, out, *small.values(), x.shape[1], eps),
    )
    return out, *found


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of a dense map."""
    plan = tiles(x, summing=True)
    means, squares = new_moments(x, plan)
    launch_tiles(plan, _moments_kernel, x, means, squares)
    return fold_moments(means, squares, plan)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    norm: str,
    eps: float,
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::residual_norm_backward``: of x, shortcut, weight and
    bias."""
    layout = dense_format(x)
    grad, x, out = (dense(t, layout) for t in (grad, x, out))
    small = [*contiguous(mean=mean, var=var, weight=weight).values()]
    dx, dshortcut = empty_features(x), empty_features(x)
    channels, running = x.shape[1], norm == "running"
    plan = tiles(x, summing=True, size=SMALL_TILE)
    sums = new_sums(x, plan), new_sums(x, plan)
    launch_tiles(
        plan,
        _branch_kernel,
        *(grad, x, out, *small, dx, dshortcut, *sums, channels, eps, running),
    )
    dweight, dbias = fold_sums(sums)
    if not running:
        through_norm(dshortcut, x, *small, dweight, dbias, eps, out=dx)
    if weight is None:
        dweight = dbias = None
    return [dx, dshortcut, dweight, dbias]


def through_norm(
    passed: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of x, given that of its norm with the statistics of the batch, and the sums [C] that
    are the gradients of the norm's weight and bias. All maps are dense and of one format; ``out``
    may be ``passed``.
    """
    dx = empty_features(x) if out is None else out
    channels, plan = x.shape[1], tiles(x, size=SMALL_TILE)
    small = contiguous(mean=mean, var=var, weight=weight, dweight=dweight, dbias=dbias).values()
    launch_tiles(
        plan,
        _backward_kernel,
        *(passed, x, *small, dx, channels, x.numel() // channels, eps),
        tuned=dx is not passed,
    )
    return dx


@triton.jit
def _moments_kernel(x, means, squares, cut):
    """Moments of one chunk of planes."""
    first, _, exists, slot, pixels = place(cut)
    mean = tl.zeros((cut.PLANES, cut.PIXELS), squares.dtype.element_ty)
    square = tl.zeros((cut.PLANES, cut.PIXELS), squares.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        value = tl.load(x + first + offset, inside, 0.0).to(mean.dtype)
        mean, square = welford(mean, square, value, inside, start // cut.PIXELS + 1)
    middle, spread = chunk_moments(mean, square, pixels, cut)
    tl.store(means + slot, middle, exists)
    tl.store(squares + slot, spread, exists)


@triton.jit
def _forward_kernel(x, shortcut, out, mean, var, weight, bias, channels, EPS: tl.constexpr, cut):
    """One tile."""
    first, row, exists, _, pixels = place(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    middle, _, factor = channel_norm(mean, var, weight, row, exists, channels, EPS)
    total = (tl.load(x + first + offset, inside, 0.0).to(factor.dtype) - middle) * factor
    if bias is not None:
        total += tl.load(bias + row % channels, exists, 0.0)[:, None]
    total += tl.load(shortcut + first + offset, inside, 0.0).to(factor.dtype)
    positive = tl.where(total < 0, 0.0, total)  # NaN stays NaN, as in torch.relu
    tl.store(out + first + offset, positive.to(out.dtype.element_ty), inside)


@triton.jit
def _branch_kernel(
    grad, x, out, mean, var, weight, dx, dshortcut, dweight, dbias, channels,
    EPS: tl.constexpr, RUNNING: tl.constexpr, cut,
):  # fmt: skip
    """dshortcut of one chunk of planes, what it adds to the sums that are dweight and dbias, and dx
    if that does not depend on these."""
    first, row, exists, slot, pixels = place(cut)
    middle, rstd, factor = channel_norm(mean, var, weight, row, exists, channels, EPS)
    total = tl.zeros((cut.PLANES, cut.PIXELS), dbias.dtype.element_ty)
    product = tl.zeros((cut.PLANES, cut.PIXELS), dbias.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        stopped = tl.load(out + first + offset, inside, 0.0) <= 0
        passed = tl.where(stopped, 0.0, tl.load(grad + first + offset, inside, 0.0))
        tl.store(dshortcut + first + offset, passed, inside)
        passed = passed.to(factor.dtype)
        total += passed
        product += passed * (tl.load(x + first + offset, inside, 0.0).to(factor.dtype) - middle)
        if RUNNING:
            tl.store(dx + first + offset, (passed * factor).to(dx.dtype.element_ty), inside)
    tl.store(dbias + slot, tl.sum(total, axis=1), exists)
    tl.store(dweight + slot, tl.sum(product * rstd, axis=1), exists)


@triton.jit
def _backward_kernel(
    passed, x, mean, var, weight, dweight, dbias, dx, channels, count, EPS: tl.constexpr,
    cut,
):  # fmt: skip
    """dx of one tile, given the gradient of the norm's result and its sums."""
    first, row, exists, _, pixels = place(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    middle, rstd, factor = channel_norm(mean, var, weight, row, exists, channels, EPS)
    deviation = tl.load(x + first + offset, inside, 0.0).to(factor.dtype) - middle
    arriving = tl.load(passed + first + offset, inside, 0.0).to(factor.dtype)
    found = norm_gradient(
        arriving, deviation, rstd, factor, dweight, dbias, row, exists, channels, count
    )
    tl.store(dx + first + offset, found.to(dx.dtype.element_ty), inside)
