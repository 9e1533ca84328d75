"""``cell`` on the compiled CUDA kernels (``csrc/ops/cell/cuda.cu``)."""

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
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


def refuses(*args: Any) -> str | None:
    """Why a call of ``cell`` or ``cell_backward`` cannot be served."""
    *grad, y, _, params, kind, _ = args
    return too_wide(y, y.shape[1], params, kind, bool(grad))


def too_wide(
    like: Tensor, channels: int, params: Sequence[Tensor], kind: str, backward: bool
) -> str | None:
    """Why a cell cannot be evaluated (or differentiated) on tensors as ``like``, or None: the
    values of a sample have to fit the shared memory of a block (``Panels`` in cuda.cu)."""
    hidden = CELLS[kind].layers * params[0].shape[0]
    values = 2 * channels + hidden + params[-1].numel()  # y and context, hidden layers, gates
    if backward:
        values += channels + hidden + 256  # gradients, and a partial sum of every thread
    size = values * like.element_size()
    if size <= _ALWAYS_THERE or size <= _shared_memory(like):
        return None
    return f"{channels} channels are too many for the shared memory of this GPU"


def refuses_step(adapter: ModuleType) -> Callable[..., str | None]:
    """``refuses`` of an attention step, for its cell's sake; ``adapter``: the op's ``cpp.py``."""
    places = {}  # of arguments, by the number of these: it tells the op from its backward
    for function in (adapter.forward, adapter.backward):
        *names, _, _ = inspect.signature(function).parameters  # without `load` and `prepare`
        places[len(names)] = [names.index(name) for name in ("state", "cell_params", "cell")]
    of_backward = max(places)

    def refuses(*args: Any) -> str | None:
        state, params, kind = (args[i] for i in places[len(args)])
        if kind == STATIC:
            return None
        return too_wide(state, state.shape[2], params, kind, len(args) == of_backward)

    return refuses


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
