"""What the reference implementations share."""

from torch import Tensor

from dla_kernels.ops.common import dense_format


def unsupported(x: Tensor) -> str | None:
    """The formulas run wherever torch does."""
    return None


def dense_as(x: Tensor, result: Tensor) -> Tensor:
    """``result`` dense in the format of ``x``, as results of the ops are."""
    return result.contiguous(memory_format=dense_format(x))
