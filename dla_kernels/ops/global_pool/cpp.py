"""``global_pool`` on the compiled CPU kernels (``csrc/ops/global_pool``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import compute_dtype, dense, dense_format, features_like
from dla_kernels.ops.cpp_common import DTYPES, Loader, execution
from dla_kernels.ops.cpp_common import unsupported as unsupported


def forward(x: Tensor, load: Loader = native.load) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    x = dense(x, dense_format(x))
    out = x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))
    load().global_pool_forward(x=x, out=out, **_sizes(x))
    return out


def backward(
    grad: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    load: Loader = native.load,
) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    grad, dx = grad.contiguous(), features_like(grad, shape, dtype, channels_last)
    load().global_pool_backward(grad=grad, dx=dx, **_sizes(dx))
    return dx


def _sizes(x: Tensor) -> dict[str, object]:
    """The arguments that the two native functions share."""
    batch, channels, height, width = x.shape
    return {
        "batch": batch,
        "channels": channels,
        "area": height * width,
        "dtype": DTYPES[x.dtype],
        "channels_last": dense_format(x) is torch.channels_last,
        **execution(x),
    }
