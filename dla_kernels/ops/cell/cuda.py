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
from dla_kernels.ops.step_checks import STATIC

forward = on_cuda(cpp.forward)


# What every GPU gives a block without being asked.
_ALWAYS_THERE = 48 * 1024
# Every block reads all weights, alone and through one multiprocessor: at 64 bytes a cycle, 10 us.
_MOST_WEIGHTS = 1024 * 1024


def refuses(backward: bool, *args: Any) -> str | None:
    """Why a call of ``cell`` (or ``cell_backward``) cannot be served."""
    *_, state, params, kind, _ = args
    return too_wide(state, params, kind, backward)


def gives_way(backward: bool, *args: Any) -> str | None:
    """Why another backend is to be tried before this one serves such a call."""
    *_, params, _, _ = args
    return has_many_weights(params)


def has_many_weights(params: Sequence[Tensor]) -> str | None:
    """Why products of a cell belong on more than the few multiprocessors that its blocks occupy."""
    size = sum(weights.numel() * weights.element_size() for weights in params)
    if size <= _MOST_WEIGHTS:
        return None
    return f"every block would read {size / 2**20:.1f} MiB of the cell's weights"


def too_wide(state: Tensor, params: Sequence[Tensor], kind: str, backward: bool) -> str | None:
    """Why a cell cannot be evaluated (or differentiated), or None: the values of a sample have to
    fit the shared memory of a block (``Panels`` in cuda.cu). A static step has no cell."""
    if kind == STATIC:
        return None
    channels = state.shape[2]
    hidden = CELLS[kind].layers * params[0].shape[0]
    values = 2 * channels + hidden + params[-1].numel()  # y and context, hidden layers, gates
    if backward:
        values += channels + hidden + 256  # gradients, and a partial sum of every thread
    size = values * state.element_size()
    if size <= _ALWAYS_THERE or size <= _shared_memory(state):
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
