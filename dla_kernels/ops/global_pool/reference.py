"""Global average pooling in plain PyTorch."""

from torch import Tensor

from dla_kernels.ops.common import compute_dtype


def global_pool(x: Tensor) -> Tensor:
    """Mean over height and width.

    Args:
        x: features [B, C, H, W], any feature dtype.

    Returns:
        [B, C] in the compute dtype (float64 for float64 features, else float32).
    """
    return x.mean(dim=(2, 3), dtype=compute_dtype(x.dtype))
