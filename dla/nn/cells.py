"""Recurrent cells that a stage's layers share ("Dyn", Eq. 5 of the paper).

In the formulas y is the input, h and c are slots of the state, h' and c' of the new one, i, f, o
gates and g the candidate, all [B, C]; s is the logistic sigmoid, r the hidden width. Where the
state has a c, c' = s(f) c + s(i) tanh(g).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

import dla_kernels
from dla.nn.checks import check_rows, hidden_width, positive_int
from dla.nn.tensors import parameter
from dla_kernels.ops.cell import ACTIVATIONS
from dla_kernels.ops.checks import one_of
from dla_kernels.ops.common import compute_dtype

INITIAL_STATES = ("zeros", "normal", "learned")


class Cell(nn.Module):
    """A recurrent cell and the state it starts from; subclasses are the kinds of cell.

    Parameters start as those of torch.nn.Linear do: uniform within 1 / sqrt(fan-in).

    Args:
        channels: C, of input and state.
        reduction: the hidden width is C // reduction; "lstm" and "rnn" have no hidden layer.
        activation: what normalises c on its way into a ``dsu`` cell: "sigmoid", "tanh", "relu"
            or "identity". Ignored by other kinds.
        initial_state: "zeros"; "normal", drawn anew from N(0, 1) for every stage and batch; or
            "learned", a parameter [S, C] that starts at zero.

    Raises:
        ValueError, TypeError: an argument out of its range or of the wrong type.
    """

    kind: ClassVar[str]
    slots: ClassVar[int]
    has_hidden: ClassVar[bool] = True
    # The gate that the official model puts on the output, which must come to lie in (0, 1).
    official_gate: ClassVar[str]

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        activation: str = "sigmoid",
        initial_state: str = "zeros",
    ) -> None:
        super().__init__()
        if not hasattr(self, "kind"):
            raise TypeError(f"{type(self).__name__}: expected a kind of cell, such as DSUCell")
        self.channels = positive_int("channels", channels)
        self.hidden = hidden_width(channels, reduction) if self.has_hidden else None
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.start = one_of("initial_state", initial_state, INITIAL_STATES)
        self._bounds: dict[str, float] = {}
        learned = nn.Parameter(torch.empty(self.slots, channels))
        self.initial = learned if initial_state == "learned" else None
        self._add_weights(channels, self.hidden)
        self.reset_parameters()

    def _add_weights(self, channels: int, hidden: int | None) -> None:
        """Calls ``_add_weight`` for every parameter of the kind; hidden: None if it has no such."""
        raise NotImplementedError

    def _add_weight(self, name: str, *shape: int, fan_in: int) -> None:
        """The order of the calls is the order in which the op takes the weights."""
        setattr(self, name, nn.Parameter(torch.empty(shape)))
        self._bounds[name] = 1.0 / math.sqrt(fan_in)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for name, bound in self._bounds.items():
            nn.init.uniform_(getattr(self, name), -bound, bound)
        if self.initial is not None:
            nn.init.zeros_(self.initial)

    def weights(self, dtype: torch.dtype | None) -> list[Tensor]:
        """The parameters in the order that ``dla_kernels.cell`` takes them, in ``dtype`` (None:
        their own)."""
        return [parameter(self, name, dtype) for name in self._bounds]

    def initial_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """State [S, B, C] before the first layer of a stage."""
        shape = (self.slots, batch, self.channels)
        if self.initial is not None:
            return self.initial.to(dtype).unsqueeze(1).expand(shape)
        if self.start == "normal":
            return torch.randn(shape, dtype=dtype, device=device)
        return torch.zeros(shape, dtype=dtype, device=device)

    def forward(self, y: Tensor, state: Tensor | None = None) -> Tensor:
        """One step: input [B, C] and state [S, B, C] (None: the initial one) to the new state.

        Both are of the compute dtype (float64 or float32). Slot 0 of a state is the cell's output.
        """
        check_rows("y", y, self.channels)
        if state is None:
            state = self.initial_state(y.shape[0], compute_dtype(y.dtype), y.device)
        return dla_kernels.cell(y, state, self.weights(y.dtype), self.kind, self.activation)

    def extra_repr(self) -> str:
        hidden = f", hidden={self.hidden}" if self.has_hidden else ""
        text = f"{self.channels}{hidden}, initial_state={self.start!r}"
        return text + (f", activation={self.activation!r}" if self.kind == "dsu" else "")


class DSUCell(Cell):
    """Dynamic sharing unit of the paper (Eq. 7-9): (i, f, g) = W2 relu(W1 [act(c), y]) + b2.

    W1 is [r, 2 C], W2 [3 C, r]. State: (c), which is the output; 5 C r + 3 C parameters.
    """

    kind = "dsu"
    slots = 1
    official_gate = "sigmoid"

    def _add_weights(self, channels: int, hidden: int) -> None:
        self._add_weight("w_hidden", hidden, 2 * channels, fan_in=2 * channels)
        self._add_weight("w_gates", 3 * channels, hidden, fan_in=hidden)
        self._add_weight("b_gates", 3 * channels, fan_in=hidden)


class DSUSplitCell(Cell):
    """Dynamic sharing unit of the official code::

        F(u)      = W2 relu(W1 u + b1) + b2     one for y, one for h
        (i, f, g) = F_y(y) + F_h(h)
        h'        = s(c')

    W1 is [r, C], W2 [3 C, r]. State: (h, c); 2 (4 C r + r + 3 C) parameters.
    """

    kind = "dsu_split"
    slots = 2
    official_gate = "identity"  # h' = sigmoid(c') is in (0, 1) already
    gates: ClassVar[int] = 3

    def _add_weights(self, channels: int, hidden: int) -> None:
        gates = self.gates * channels
        for side in ("y", "h"):
            self._add_weight(f"{side}_w1", hidden, channels, fan_in=channels)
            self._add_weight(f"{side}_b1", hidden, fan_in=channels)
            self._add_weight(f"{side}_w2", gates, hidden, fan_in=hidden)
            self._add_weight(f"{side}_b2", gates, fan_in=hidden)


class DIACell(DSUSplitCell):
    """Cell of DIANet: `DSUSplitCell` with (i, f, g, o), and h' = s(o) s(c').

    W1 is [r, C], W2 [4 C, r]. State: (h, c); 2 (5 C r + r + 4 C) parameters.
    """

    kind = "dia"
    gates = 4


class LSTMCell(Cell):
    """torch.nn.LSTMCell with its parameters' names::

        (i, f, g, o) = W_ih y + b_ih + W_hh h + b_hh
        h'           = s(o) tanh(c')

    W_ih and W_hh are [4 C, C]. State: (h, c); 8 C^2 + 8 C parameters.
    """

    kind = "lstm"
    slots = 2
    has_hidden = False
    official_gate = "sigmoid"
    gates: ClassVar[int] = 4

    def _add_weights(self, channels: int, hidden: int | None) -> None:
        gates = self.gates * channels
        self._add_weight("weight_ih", gates, channels, fan_in=channels)
        self._add_weight("weight_hh", gates, channels, fan_in=channels)
        self._add_weight("bias_ih", gates, fan_in=channels)
        self._add_weight("bias_hh", gates, fan_in=channels)


class RNNCell(LSTMCell):
    """torch.nn.RNNCell with its parameters' names: h' = tanh(W_ih y + b_ih + W_hh h + b_hh).

    W_ih and W_hh are [C, C]. State: (h); 2 C^2 + 2 C parameters.
    """

    kind = "rnn"
    slots = 1
    gates = 1


CELLS: dict[str, type[Cell]] = {
    cell.kind: cell for cell in (DSUCell, DSUSplitCell, DIACell, LSTMCell, RNNCell)
}
