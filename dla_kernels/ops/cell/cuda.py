"""``cell`` on the compiled CUDA kernels (``csrc/ops/cell/cuda.cu``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.cell import cpp
from dla_kernels.ops.cell.reference import CELLS
from dla_kernels.ops.cuda_common import on_cuda
from dla_kernels.ops.cuda_common import unsupported as unsupported

forward = on_cuda(cpp.forward)


def refuses(*args: Any) -> str | None:
    """Why a call of ``cell`` or ``cell_backward`` cannot be served: the values of a sample have to
    fit the shared memory of a block (``Panels`` in cuda.cu)."""
    *grad, y, _, params, kind, _ = args
    channels, hidden = y.shape[1], CELLS[kind].layers * params[0].shape[0]
    values = 2 * channels + hidden + params[-1].numel()  # y and context, hidden layers, gates
    if grad:
        values += channels + hidden + 256  # gradients, and a partial sum of every thread
    if values * y.element_size() <= _shared_memory(y):
        return None
    return f"{channels} channels are too many for the shared memory of this GPU"


def _shared_memory(x: Tensor) -> int:
    """Bytes that a block may ask for; of the emulated GPU, as of compute capability 7.5."""
    if native.EMULATE_CUDA:
        return 64 * 1024
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


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
