"""Recurrent cells ("Dyn", Eq. 5) in plain PyTorch.

A cell is a function ``(y, state, params, activation) -> new state``. Slot 0 of a state is always
the output of the cell. A new kind of cell is one function and one line in ``CELLS``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from dla_kernels.ops.common import without_autocast
from dla_kernels.ops.differentiate import differentiate

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda c: c,
}


def cell(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str = "sigmoid"
) -> Tensor:
    """One step of a recurrent cell.

    Args:
        y: input [B, C].
        state: [S, B, C]; S = 1 (c) for "dsu", S = 2 (h, c) for "dsu_split".
        params: the weights of the cell, in the order of its function below.
        kind: "dsu" or "dsu_split".
        activation: normalisation of c before it enters "dsu" (Table 5); "dsu_split" ignores it.

    Returns:
        The new state [S, B, C]; the output of the cell is its slot 0.
    """
    with without_autocast(y):
        return CELLS[kind](y, state, params, ACTIVATIONS[activation])


def dsu(y: Tensor, state: Tensor, params: Sequence[Tensor], activation: Activation) -> Tensor:
    """Dynamic sharing unit of the paper (Eq. 7-9): both inputs share one hidden layer.

    params: hidden weight [h, 2C] on (act(c), y); gate weight [3C, h] and bias [3C] for (i, f, c~).
    """
    w_hidden, w_gates, b_gates = params
    c = state[0]
    hidden = torch.relu(linear(torch.cat([activation(c), y], dim=1), w_hidden))
    new_c = _update(c, linear(hidden, w_gates, b_gates))
    return new_c.unsqueeze(0)


def dsu_split(y: Tensor, state: Tensor, params: Sequence[Tensor], activation: Activation) -> Tensor:
    """Dynamic sharing unit of the official code: input and output have a hidden layer each.

    params: (w1 [h, C], b1 [h], w2 [3C, h], b2 [3C]) for y, then the same four for h; gates are in
    the order (i, f, c~). The output is h' = sigmoid(c').
    """
    h, c = state.unbind(0)
    new_c = _update(c, _bottleneck(y, *params[:4]) + _bottleneck(h, *params[4:]))
    return torch.stack([torch.sigmoid(new_c), new_c])


def _update(c: Tensor, gates: Tensor) -> Tensor:
    """c' = f c + i c~ from the gates [B, 3C] before their activations."""
    i, f, candidate = gates.chunk(3, dim=1)
    return torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)


def _bottleneck(u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return linear(torch.relu(linear(u, w1, b1)), w2, b2)


CELLS = {"dsu": dsu, "dsu_split": dsu_split}


def unsupported(x: Tensor) -> str | None:
    """The formulas run wherever torch does."""
    return None


def forward(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> Tensor:
    """Arguments and result of ``dla_kernels::cell``."""
    return cell(y, state, params, kind, activation).contiguous()


def backward(
    grad: Tensor, y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::cell_backward``: of y, state and each parameter."""

    def function(y: Tensor, state: Tensor, *params: Tensor) -> Tensor:
        return cell(y, state, params, kind, activation)

    return [t.contiguous() for t in differentiate(function, [y, state, *params], [grad])]
