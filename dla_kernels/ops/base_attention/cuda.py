"""``base_attention`` on the compiled CUDA kernels (``csrc/ops/base_attention/cuda.cu``)."""

import functools
from typing import Any

from dla_kernels.ops.base_attention import GRADS, cpp
from dla_kernels.ops.base_attention.reference import FLAGS
from dla_kernels.ops.cell.cuda import too_wide
from dla_kernels.ops.cuda_common import step_on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported

forward = step_on_cuda(cpp.forward_step)
backward = step_on_cuda(functools.partial(cpp.backward_step, memory_for_dv=True))


def refuses(backward: bool, *args: Any) -> str | None:
    """Why a call of ``base_attention`` (or its backward op) cannot be served: for its cell."""
    _, _, state, _, _, _, cell_params, *_ = args[GRADS:] if backward else args
    return too_wide(state, cell_params, args[-len(FLAGS)], backward)
