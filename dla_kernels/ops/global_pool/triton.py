"""``global_pool`` in Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import dense, dense_format, features_like
from dla_kernels.ops.triton_common import launch_tiles, place, plane_sums, tile, tiles
from dla_kernels.ops.triton_common import unsupported as unsupported


def forward(x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    (means,) = plane_sums([dense(x, dense_format(x))], x.shape[2] * x.shape[3])
    return means


def backward(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    grad, dx = grad.contiguous(), features_like(grad, shape, dtype, channels_last)
    plan = tiles(dx)
    launch_tiles(plan, _backward_kernel, grad, dx)
    return dx


@triton.jit
def _backward_kernel(grad, dx, cut):
    first, row, exists, _, pixels = place(cut)
    share = tl.load(grad + row, exists) / cut.area
    offset, inside = tile(cut, 0, pixels, exists)
    share = tl.broadcast_to(share[:, None], (cut.PLANES, cut.PIXELS)).to(dx.dtype.element_ty)
    tl.store(dx + first + offset, share, inside)
