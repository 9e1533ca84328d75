"""``global_pool`` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import dense, dense_format, empty_features
from dla_kernels.ops.triton_common import launch, place, plane_sums, tile, tiles
from dla_kernels.ops.triton_common import unsupported as unsupported


def forward(x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    (means,) = plane_sums([dense(x, dense_format(x))], x.shape[2] * x.shape[3])
    return means


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    grad, dx = grad.contiguous(), empty_features(x)
    plan = tiles(dx)
    launch(_backward_kernel, (plan.programs,), grad, dx, **plan.sizes)
    return dx


@triton.jit
def _backward_kernel(
    grad, dx, planes, area,
    PLANES: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    first, row, exists, _, pixels = place(planes, area, PLANES, CHUNK, ALIGN, CHANNELS_LAST)
    share = tl.load(grad + row, exists) / area
    offset, inside = tile(0, pixels, exists, planes, area, PLANES, PIXELS, ALIGN, CHANNELS_LAST)
    share = tl.broadcast_to(share[:, None], (PLANES, PIXELS)).to(dx.dtype.element_ty)
    tl.store(dx + first + offset, share, inside)
