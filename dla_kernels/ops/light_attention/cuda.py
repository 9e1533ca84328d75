"""``light_attention`` on the compiled CUDA kernels (``csrc/ops/light_attention/cuda.cu``)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dla_kernels.ops.cell.cuda import has_many_weights, too_wide
from dla_kernels.ops.cuda_common import step_on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported
from dla_kernels.ops.light_attention import cpp
from dla_kernels.ops.light_attention.reference import FLAGS

forward, backward = step_on_cuda(cpp.forward_step), step_on_cuda(cpp.backward_step)


def refuses(backward: bool, *args: Any) -> str | None:
    """Why a call of ``light_attention`` (or its backward op) cannot be served: for its cell."""
    return too_wide(*_cell_of(backward, args), args[-len(FLAGS)], backward)


def gives_way(backward: bool, *args: Any) -> str | None:
    """Why another backend is to be tried before this one serves such a call: for its cell."""
    return has_many_weights(_cell_of(backward, args)[1])


def _cell_of(backward: bool, args: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]]:
    """State and parameters among the arguments of either op."""
    _, _, state, cell_params, *_ = args[3:] if backward else args  # gradients come first
    return state, cell_params
