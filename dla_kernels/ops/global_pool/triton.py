"""``global_pool`` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import dense, dense_format, empty_features
from dla_kernels.ops.triton_common import launch_tiles, place, plane_sums, tile, tiles
from dla_kernels.ops.triton_common import unsupported as unsupported


def forward(x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    (means,) = plane_sums([dense(x, dense_format(x))], x.shape[2] * x.shape[3])
    return means


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    grad, dx = grad.contiguous(), empty_features(x)
    plan = tiles(dx)
    launch_tiles(plan, _backward_kernel, grad, dx)
    return dx


@triton.jit
def _backward_kernel(
    grad, dx, cut,
):  # fmt: skip
    first, row, exists, _, pixels = place(cut)
    share = tl.load(grad + row, exists) / cut.area
    offset, inside = tile(cut, 0, pixels, exists)
    share = tl.broadcast_to(share[:, None], (cut.PLANES, cut.PIXELS)).to(dx.dtype.element_ty)
    tl.store(dx + first + offset, share, inside)
