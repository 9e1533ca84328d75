"""``light_attention`` on the compiled CUDA kernels (``csrc/ops/light_attention/cuda.cu``)."""

from typing import Any

from dla_kernels.ops.cell.cuda import too_wide
from dla_kernels.ops.cuda_common import step_on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.light_attention import cpp
from dla_kernels.ops.light_attention.reference import FLAGS

forward, backward = step_on_cuda(cpp.forward_step), step_on_cuda(cpp.backward_step)


def refuses(backward: bool, *args: Any) -> str | None:
    """Why a call of ``light_attention`` (or its backward op) cannot be served: for its cell."""
    _, _, state, cell_params, *_ = args[3:] if backward else args  # gradients come first
    return too_wide(state, cell_params, args[-len(FLAGS)], backward)
