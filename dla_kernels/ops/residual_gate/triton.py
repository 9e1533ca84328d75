"""``residual_gate`` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import dense, dense_format, empty_features
from dla_kernels.ops.triton_common import finish, launch_tiles, new_sums, place, tile, tiles
from dla_kernels.ops.triton_common import unsupported as unsupported


def forward(u: Tensor, h: Tensor, shortcut: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::residual_gate``."""
    layout = dense_format(u)
    u, shortcut, h = dense(u, layout), dense(shortcut, layout), h.contiguous()
    out = empty_features(u)
    plan = tiles(u)
    # ptxas alone stops at 64 registers per thread, and spills.
    launch_tiles(plan, _forward_kernel, u, h, shortcut, out, maxnreg=80)
    return out


def backward(grad: Tensor, u: Tensor, h: Tensor, out: Tensor) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::residual_gate_backward``: of u, h and shortcut."""
    layout = dense_format(u)
    grad, u, out = (dense(t, layout) for t in (grad, u, out))
    h = h.contiguous()
    du, dshortcut = empty_features(u), empty_features(u)
    plan = tiles(u, summing=True)
    sums = new_sums(u, plan)
    tensors = (grad, u, h, out, du, dshortcut, sums)
    launch_tiles(plan, _backward_kernel, *tensors)
    (dh,) = finish([sums])
    return [du, dh, dshortcut]


@triton.jit
def _forward_kernel(u, h, shortcut, out, cut):
    """One tile."""
    first, row, exists, _, pixels = place(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    factor = tl.load(h + row, exists)[:, None]
    branch = tl.load(u + first + offset, inside).to(factor.dtype) * factor
    total = branch + tl.load(shortcut + first + offset, inside).to(factor.dtype)
    positive = tl.where(total < 0, 0.0, total)  # NaN stays NaN, as in torch.relu
    tl.store(out + first + offset, positive.to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(grad, u, h, out, du, dshortcut, sums, cut):
    """du and dshortcut of one chunk of planes, and what it adds to dh."""
    first, row, exists, slot, pixels = place(cut)
    factor = tl.load(h + row, exists)[:, None]
    total = tl.zeros((cut.PLANES, cut.PIXELS), sums.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        stopped = tl.load(out + first + offset, inside, 0.0) <= 0
        passed = tl.where(stopped, 0.0, tl.load(grad + first + offset, inside, 0.0))
        tl.store(dshortcut + first + offset, passed, inside)
        passed = passed.to(factor.dtype)
        total += passed * tl.load(u + first + offset, inside, 0.0).to(factor.dtype)
        tl.store(du + first + offset, (passed * factor).to(du.dtype.element_ty), inside)
    tl.store(sums + slot, tl.sum(total, axis=1), exists)
