"""``global_pool`` on the compiled CPU kernels (``csrc/ops/global_pool``)."""

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import compute_dtype, dense, dense_format, empty_features
from dla_kernels.ops.cpp_common import DTYPES, Loader, execution
from dla_kernels.ops.cpp_common import unsupported as unsupported


def forward(x: Tensor, load: Loader = native.load) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    x = dense(x, dense_format(x))
    out = x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))
    module = load()
    module.global_pool_forward(module.GlobalPoolForward(x=x, out=out, **_sizes(x)))
    return out


def backward(grad: Tensor, x: Tensor, load: Loader = native.load) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    grad, dx = grad.contiguous(), empty_features(x)
    module = load()
    module.global_pool_backward(module.GlobalPoolBackward(grad=grad, dx=dx, **_sizes(dx)))
    return dx


def _sizes(x: Tensor) -> dict[str, object]:
    """The fields that the two native structs share."""
    batch, channels, height, width = x.shape
    return {
        "batch": batch,
        "channels": channels,
        "area": height * width,
        "dtype": DTYPES[x.dtype],
        "channels_last": dense_format(x) is torch.channels_last,
        **execution(x),
    }
