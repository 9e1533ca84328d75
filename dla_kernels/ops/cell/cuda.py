"""``cell`` on the compiled CUDA kernels (``csrc/ops/cell/cuda.cu``)."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.cell import cpp
from dla_kernels.ops.cuda_common import on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported

forward = on_cuda(cpp.forward)


def backward(
    grad: Tensor, y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::cell_backward``."""
    batch, channels = y.shape
    return cpp.backward(
        *(grad, y, state, params, kind, activation),
        load=native.load_cuda,
        scratch=y.new_empty(batch * (5 * channels + 4 * params[0].shape[0])),
    )
