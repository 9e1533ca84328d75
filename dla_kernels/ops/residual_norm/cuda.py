"""``residual_norm`` on the compiled CUDA kernels (``csrc/ops/residual_norm/cuda.cu``)."""

from typing import Any

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import compute_dtype, dense_format
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.residual_norm import cpp

# Of a channels_last map, that a block sums up: enough to be worth the sum over its threads.
PIXELS = 256


def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of ``dla_kernels::residual_norm``."""
    return cpp.forward(x, *rest, load=native.load_cuda, **_for_sums(x))


def backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::residual_norm_backward``."""
    return cpp.backward(grad, x, *rest, load=native.load_cuda, **_for_sums(x))


def _for_sums(x: Tensor) -> dict[str, Any]:
    """Working memory, and into how many sums a sample is divided."""
    batch, channels, height, width = x.shape
    pieces = -(-height * width // PIXELS) if dense_format(x) is torch.channels_last else 1
    size = (2 * batch * pieces + 3) * channels
    return {"pieces": pieces, "scratch": x.new_empty(size, dtype=compute_dtype(x.dtype))}
