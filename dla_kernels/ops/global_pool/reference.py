"""Global average pooling in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels.ops.common import compute_dtype, features_like
from dla_kernels.ops.reference_common import unsupported as unsupported


def global_pool(x: Tensor) -> Tensor:
    """Mean over height and width.

    Args:
        x: features [B, C, H, W], any feature dtype.

    Returns:
        [B, C] in the compute dtype (float64 for float64 features, else float32).
    """
    return x.mean(dim=(2, 3), dtype=compute_dtype(x.dtype))


def forward(x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    return global_pool(x).contiguous()


def backward(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    share = grad / (shape[2] * shape[3])
    return features_like(grad, shape, dtype, channels_last).copy_(share[:, :, None, None])
