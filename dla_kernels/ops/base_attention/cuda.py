"""``base_attention`` on the compiled CUDA kernels (``csrc/ops/base_attention/cuda.cu``)."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dla_kernels.ops.base_attention import GRADS, cpp
from dla_kernels.ops.base_attention.reference import FLAGS
from dla_kernels.ops.cell.cuda import has_many_weights, too_wide
from dla_kernels.ops.cuda_common import step_on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported

forward = step_on_cuda(cpp.forward_step)
backward = step_on_cuda(functools.partial(cpp.backward_step, memory_for_dv=True))


def refuses(backward: bool, *args: Any) -> str | None:
    """Why a call of ``base_attention`` (or its backward op) cannot be served: for its cell."""
    return too_wide(*_cell_of(backward, args), args[-len(FLAGS)], backward)


def gives_way(backward: bool, *args: Any) -> str | None:
    """Why another backend is to be tried before this one serves such a call: for its cell."""
    return has_many_weights(_cell_of(backward, args)[1])


def _cell_of(backward: bool, args: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
    """State and parameters among the arguments of either op."""
    _, _, state, _, _, _, cell_params, *_ = args[GRADS:] if backward else args
    return state, cell_params
