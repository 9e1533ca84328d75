"""``cell`` on the compiled CPU kernels (``csrc/ops/cell``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.cell.reference import ACTIVATIONS, CELLS
from dla_kernels.ops.cpp_common import DTYPES, Loader, execution
from dla_kernels.ops.cpp_common import unsupported as unsupported

# CellKind and Activation of csrc/ops/cell/op.h.
KINDS = {kind: number for number, kind in enumerate(CELLS)}
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def forward(
    y: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    load: Loader = native.load,
) -> Tensor:
    """Arguments and result of ``dla_kernels::cell``."""
    y, state = y.contiguous(), state.contiguous()
    params = [w.contiguous() for w in params]
    out = torch.empty_like(state)
    load().cell_forward(**_inputs(y, state, params, kind, activation), out=out)
    return out


def backward(
    grad: Tensor,
    y: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    load: Loader = native.load,
    scratch: Tensor | None = None,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::cell_backward``; ``scratch`` is for GPUs."""
    grad, y, state = grad.contiguous(), y.contiguous(), state.contiguous()
    params = [w.contiguous() for w in params]
    grads = [torch.empty_like(t) for t in (y, state, *params)]
    load().cell_backward(
        **_inputs(y, state, params, kind, activation),
        grad_out=grad,
        grad_y=grads[0],
        grad_state=grads[1],
        grad_params=grads[2:],
        scratch=scratch,
    )
    return grads


def _inputs(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> dict[str, object]:
    """The arguments that the two native functions share."""
    batch, channels = y.shape
    return {
        "y": y,
        "state": state,
        "params": params,
        "batch": batch,
        "channels": channels,
        "hidden": params[0].shape[0],
        "kind": KINDS[kind],
        "activation": ACTIVATION_NUMBERS[activation],
        "dtype": DTYPES[y.dtype],
        **execution(y),
    }
