"""``cell``: one step of a recurrent cell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops._registration import define
from dla_kernels.ops.cell.reference import ACTIVATIONS, CELLS


def cell(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str = "sigmoid"
) -> Tensor:
    """One step of a recurrent cell ("Dyn", Eq. 5); its formulas are in ``reference.py``.

    Args:
        y: input [B, C], float32 or float64, as everything else.
        state: [S, B, C]: (c) for "dsu", (h) for "rnn", (h, c) for the others.
        params: "dsu": [h, 2C] on (act(c), y), then [3C, h] and [3C] for the gates (i, f, c~).
            "dsu_split": [h, C], [h], [3C, h], [3C] on y, then four such on h.
            "dia": as "dsu_split", with 4C for (i, f, c~, o).
            "lstm", "rnn": weight_ih, weight_hh, bias_ih, bias_hh of torch.nn.LSTMCell, RNNCell.
        kind: "dsu", "dsu_split", "dia", "lstm" or "rnn".
        activation: of c on its way into "dsu": "sigmoid", "tanh", "relu" or "identity".

    Returns:
        The new state [S, B, C]. Its slot 0 is the output of the cell.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; or no backend can serve.
    """
    checks.a_list("params", params)
    return _OPERATOR(y, state, params, kind, activation)


def check_params(
    name: str,
    params: Sequence[Tensor],
    kind: str,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises unless ``params`` are those of a cell of this kind and width."""
    hidden = params[0].shape[0] if params and params[0].dim() else 0
    shapes = CELLS[kind].shapes(hidden, channels)
    if len(params) != len(shapes):
        raise ValueError(f"{name}: expected the {len(shapes)} of {kind!r}, got {len(params)}")
    if hidden < 1:
        width, came = shapes[0][1], list(params[0].shape)
        raise ValueError(f"{name}[0]: expected [h, {width}], got {came}")
    for index, (param, shape) in enumerate(zip(params, shapes, strict=True)):
        checks.like(f"{name}[{index}]", param, shape, dtype, device)


def cell_flops(params: Sequence[Tensor], kind: str, batch: int, steps: int = 1) -> int:
    """FLOPs of the matrix products of so many steps of a batch, all from one state [S, B, C].

    The part of the state is computed once.
    """
    weights = sum(param.numel() for param in params if param.dim() == 2)
    # One hidden layer reads y and the state; else each has half of the matrices to itself.
    of_state = (params[0].numel() if CELLS[kind].layers == 1 else weights) // 2
    return 2 * batch * (of_state + steps * (weights - of_state))


def _check(y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str) -> None:
    checks.one_of("kind", kind, CELLS)
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.a_tensor("y", y)
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"y: expected float32 or float64, got {checks.describe(y)}")
    if y.dim() != 2 or y.numel() == 0:
        raise ValueError(f"y: expected a non-empty [B, C], got {checks.describe(y)}")
    batch, channels = y.shape
    checks.like("state", state, (CELLS[kind].slots, batch, channels), y.dtype, y.device)
    check_params("params", params, kind, channels, y.dtype, y.device)


def _check_backward(grad: Tensor, y: Tensor, state: Tensor, *rest: Any) -> None:
    _check(y, state, *rest)
    checks.like("grad", grad, state.shape, state.dtype, state.device)


def _fake(y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str) -> Tensor:
    return state.new_empty(state.shape)


def _fake_backward(
    grad: Tensor, y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (y, state, *params)]


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    y, state, params, *ctx.flags = args
    ctx.save_for_backward(y, state, *params)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | list[Tensor]]:
    y, state, *params = ctx.saved_tensors
    dy, dstate, *dparams = _BACKWARD(grad, y, state, params, *ctx.flags)
    return [dy, dstate, dparams]


def _flops(y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str) -> int:
    return cell_flops(params, kind, y.shape[0])


def _backward_flops(grad: Tensor, *args: Any) -> int:
    return 2 * _flops(*args)  # a product has two gradients


_OPERATOR, _BACKWARD = define(
    "cell",
    "(Tensor y, Tensor state, Tensor[] params, str kind, str activation) -> Tensor",
    "(Tensor grad, Tensor y, Tensor state, Tensor[] params, str kind, str activation) -> Tensor[]",
    check=_check,
    backward_check=_check_backward,
    fake=_fake,
    backward_fake=_fake_backward,
    save=_save,
    gradients=_gradients,
    flops=_flops,
    backward_flops=_backward_flops,
)
