"""Global average pooling in plain PyTorch."""

from torch import Tensor

from dla_kernels.ops.common import compute_dtype
from dla_kernels.ops.differentiate import dense_as, differentiate


def global_pool(x: Tensor) -> Tensor:
    """Mean over height and width.

    Args:
        x: features [B, C, H, W], any feature dtype.

    Returns:
        [B, C] in the compute dtype (float64 for float64 features, else float32).
    """
    return x.mean(dim=(2, 3), dtype=compute_dtype(x.dtype))


def unsupported(x: Tensor) -> str | None:
    """The formulas run wherever torch does."""
    return None


def forward(x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool``."""
    return global_pool(x).contiguous()


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::global_pool_backward``."""
    (dx,) = differentiate(global_pool, [x], [grad])
    return dense_as(x, dx)
