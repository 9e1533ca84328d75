"""Recurrent cells ("Dyn", Eq. 5) in plain PyTorch.

A cell is a function ``(y, state, params, activation) -> new state``. Slot 0 of a state is always
the output of the cell. A new kind of cell is one function and one line in ``CELLS``; a number in
``csrc/ops/cell/op.h`` and a tail with its layout in ``tails.h``; branches of ``_tail`` and of its
gradients in ``triton.py``; a class in ``dla/nn/cells.py``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dla_kernels.ops.common import without_autocast
from dla_kernels.ops.differentiate import differentiate
from dla_kernels.ops.reference_common import unsupported as unsupported

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
        y: input [B, C]; or [M, B, C], of M steps from one state, whose part is computed once.
        state: [S, B, C]; (c) for "dsu", (h) for "rnn", (h, c) for the others.
        params: the weights of the cell, in the order of its function below.
        kind: one of ``CELLS``.
        activation: normalisation of c before it enters "dsu" (Table 5); the others ignore it.

    Returns:
        The new state [S, B, C] or [S, M, B, C]; the output of the cell is its slot 0.
    """
    with without_autocast(y):
        return CELLS[kind].step(y, state, params, ACTIVATIONS[activation])


def dsu(y: Tensor, state: Tensor, params: Sequence[Tensor], activation: Activation) -> Tensor:
    """Dynamic sharing unit of the paper (Eq. 7-9): both inputs share one hidden layer.

    params: hidden weight [h, 2C] on (act(c), y); gate weight [3C, h] and bias [3C] for (i, f, c~).
    """
    w_hidden, w_gates, b_gates = params
    c = state[0]
    w_c, w_y = w_hidden.chunk(2, dim=1)
    hidden = torch.relu(linear(activation(c), w_c) + linear(y, w_y))
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


def dia(y: Tensor, state: Tensor, params: Sequence[Tensor], activation: Activation) -> Tensor:
    """Cell of DIANet: as ``dsu_split``, with a fourth gate o, which the output passes.

    params: as of ``dsu_split``, with gate weights [4C, h] and biases [4C] for (i, f, c~, o). The
    output is h' = sigmoid(o) sigmoid(c').
    """
    h, c = state.unbind(0)
    gates, o = _split_output(_bottleneck(y, *params[:4]) + _bottleneck(h, *params[4:]))
    new_c = _update(c, gates)
    return torch.stack([torch.sigmoid(o) * torch.sigmoid(new_c), new_c])


def lstm(y: Tensor, state: Tensor, params: Sequence[Tensor], activation: Activation) -> Tensor:
    """torch.nn.LSTMCell: h' = sigmoid(o) tanh(c').

    params: its weight_ih and weight_hh [4C, C], bias_ih and bias_hh [4C], for (i, f, c~, o).
    """
    h, c = state.unbind(0)
    gates, o = _split_output(_full_rank(y, h, *params))
    new_c = _update(c, gates)
    return torch.stack([torch.sigmoid(o) * torch.tanh(new_c), new_c])


def rnn(y: Tensor, state: Tensor, params: Sequence[Tensor], activation: Activation) -> Tensor:
    """torch.nn.RNNCell: h' = tanh(W y + b + V h + e).

    params: its weight_ih and weight_hh [C, C], bias_ih and bias_hh [C].
    """
    return torch.tanh(_full_rank(y, state[0], *params)).unsqueeze(0)


def _update(c: Tensor, gates: Tensor) -> Tensor:
    """c' = f c + i c~ from the gates [.., 3C] before their activations."""
    i, f, candidate = gates.chunk(3, dim=-1)
    return torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)


def _split_output(gates: Tensor) -> tuple[Tensor, Tensor]:
    """(i, f, c~) and o of four gates [.., 4C]."""
    channels = gates.shape[-1] // 4
    return gates[..., : 3 * channels], gates[..., 3 * channels :]


def _bottleneck(u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return linear(torch.relu(linear(u, w1, b1)), w2, b2)


def _full_rank(y: Tensor, h: Tensor, w_y: Tensor, w_h: Tensor, b_y: Tensor, b_h: Tensor) -> Tensor:
    return linear(y, w_y, b_y) + linear(h, w_h, b_h)


Shapes = tuple[tuple[int, ...], ...]


class Kind(NamedTuple):
    """A kind of cell; ``shapes(h, C)`` are those of its parameters.

    layers: how many hidden layers it has.
    gates: gates per channel.
    """

    step: Callable[[Tensor, Tensor, Sequence[Tensor], Activation], Tensor]
    slots: int
    layers: int
    gates: int
    shapes: Callable[[int, int], Shapes]


def _two_bottlenecks(gates: int, h: int, c: int) -> Shapes:
    return 2 * ((h, c), (h,), (gates * c, h), (gates * c,))


def _two_matrices(gates: int, c: int) -> Shapes:
    return (gates * c, c), (gates * c, c), (gates * c,), (gates * c,)


# The native kernels number them in this order (CellKind).
CELLS = {
    "dsu": Kind(dsu, 1, 1, 3, lambda h, c: ((h, 2 * c), (3 * c, h), (3 * c,))),
    "dsu_split": Kind(dsu_split, 2, 2, 3, lambda h, c: _two_bottlenecks(3, h, c)),
    "dia": Kind(dia, 2, 2, 4, lambda h, c: _two_bottlenecks(4, h, c)),
    "lstm": Kind(lstm, 2, 0, 4, lambda h, c: _two_matrices(4, c)),
    "rnn": Kind(rnn, 1, 0, 1, lambda h, c: _two_matrices(1, c)),
}


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
