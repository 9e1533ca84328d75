"""``cell`` in Triton: which kernels of ``triton_kernels.py`` are launched, and with which tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dla_kernels.ops.cell.reference import CELLS
from dla_kernels.ops.cell.triton_kernels import (
    Gradients,
    Plan,
    Side,
    Sizes,
    Trace,
    forward_kernel,
    gate_gradients_kernel,
    gradients_kernel,
    hidden_kernel,
)
from dla_kernels.ops.triton_common import launch
from dla_kernels.ops.triton_common import unsupported as unsupported

GATES = {"dsu": 3, "dsu_split": 3, "dia": 4, "lstm": 4, "rnn": 1}
WITHOUT_HIDDEN_LAYER = ("lstm", "rnn")
PROGRAMS = 256  # that keep a GPU busy
PARTS = 8  # terms of a sum that may be left to every program that reads it
# There are fewer programs than a GPU holds: registers are free, while ptxas would rather spill.
REGISTERS = 255


def forward(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> Tensor:
    """Arguments and result of ``dla_kernels::cell``."""
    cell = _Evaluation(y[None], state, params, kind, activation)
    return cell.forward(torch.empty_like(cell.state), output_only=False)


def backward(
    grad: Tensor,
    y: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    *,
    plus_y: Tensor | None = None,
    add_to: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::cell_backward``.

    plus_y: is added to the gradient of y. add_to: those of the parameters are added to these.
    """
    cell = _Evaluation(y[None], state, params, kind, activation)
    grad_y, *rest = cell.backward(grad, output_only=False, plus_y=plus_y, add_to=add_to)
    return [grad_y[0], *rest]


def evaluate(
    inputs: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    first_sample: bool,
) -> Tensor:
    """Outputs [M, B, C] of the cell for inputs [M, B, C] under one state [slots, B, C].

    first_sample: all of them read row 0 of the state.
    """
    cell = _Evaluation(inputs, state, params, kind, activation, first_sample)
    return cell.forward(torch.empty_like(cell.y), output_only=True)


def evaluate_backward(
    grad: Tensor,
    inputs: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    first_sample: bool,
    *,
    plus_state: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the inputs, of the state (``plus_state`` added), and of each parameter."""
    cell = _Evaluation(inputs, state, params, kind, activation, first_sample)
    return cell.backward(grad, output_only=True, plus_state=plus_state)


def hidden_splits(repeats: int, batch: int, channels: int, hidden: int, itemsize: int) -> int:
    """Into how many sums the hidden layer is cut by a kernel of its own; 0: it has none.

    Then every program that makes gates forms the hidden layer for itself. That spares a launch,
    and costs no time while the layer is small and all programs run at once.
    """
    weights = 2 * channels * hidden * itemsize
    if repeats == 1 and hidden <= 32 and weights <= 64 * 1024 and batch * channels <= 64 * 1024:
        return 0
    return min(8, triton.next_power_of_2(triton.cdiv(channels, 256)))


class _Grid(NamedTuple):
    """How a cell is cut up: for the kernels that make gates, and for `gradients_kernel`."""

    sizes: Sizes
    plan: Plan
    gradient_plan: Plan
    gates: tuple[int, int, int]
    gradients: tuple[int, int, int]


@functools.lru_cache(1024)
def _grid(
    kind: str,
    activation: str,
    first_sample: bool,
    repeats: int,
    batch: int,
    channels: int,
    hidden: int,
    itemsize: int,
    precision: str,
) -> _Grid:
    line = 128 // itemsize  # channels that a program takes
    if channels % line:
        line = 16
    rows = 16
    samples, lines = triton.cdiv(batch, rows), triton.cdiv(channels, line)
    length = triton.cdiv(repeats, max(1, PROGRAMS // (samples * lines)))
    chunks = triton.cdiv(repeats, length)

    def plan(splits: int, channels: int, units: int) -> Plan:
        return Plan(
            kind=kind,
            gates=GATES[kind],
            slots=CELLS[kind].slots,
            activation=activation if kind == "dsu" else "identity",
            first_sample=first_sample,
            splits=splits,
            precision=precision,
            rows=rows,
            channels=channels,
            units=units,
            depth=channels,
        )

    splits = hidden_splits(repeats, batch, channels, hidden, itemsize) if hidden else 0
    wide = plan(splits, 2 * line, 32)
    across = triton.cdiv(channels, wide.channels)
    units = triton.cdiv(hidden, wide.units)
    gate_tiles = triton.cdiv(GATES[kind] * channels, wide.depth)
    tasks = max(triton.cdiv(repeats * batch, rows) * across, gate_tiles * (units or across))
    return _Grid(
        Sizes(batch, channels, hidden, chunks, length),
        plan(splits, line, 16),
        wide,
        (samples, lines, chunks),
        (max(tasks, units * across), 2, 3 if hidden else 2),
    )


class _Evaluation:
    """A cell for M inputs [M, B, C] that share a state [slots, B, C]."""

    def __init__(
        self,
        inputs: Tensor,
        state: Tensor,
        params: Sequence[Tensor],
        kind: str,
        activation: str,
        first_sample: bool = False,
    ) -> None:
        self.kind = kind
        self.y, self.state = inputs.contiguous(), state.contiguous()
        self.params = [w.contiguous() for w in params]
        hidden = 0 if kind in WITHOUT_HIDDEN_LAYER else params[0].shape[0]
        what = kind, activation, first_sample, *inputs.shape, hidden
        self.grid = _grid(*what, inputs.element_size(), _precision())
        self.sizes, self.plan, *_ = self.grid
        self.sides = self._sides()

    def forward(self, out: Tensor, output_only: bool) -> Tensor:
        """``out``: the new state [slots, B, C] (M = 1), or the outputs alone [M, B, C]."""
        launch(
            forward_kernel,
            self.grid.gates,
            *(self.y, self.state, out, *self.sides, self.sizes),
            output_only=output_only,
            plan=self.plan,
            maxnreg=REGISTERS,
        )
        return out

    def backward(
        self,
        grad: Tensor,
        output_only: bool,
        plus_y: Tensor | None = None,
        plus_state: Tensor | None = None,
        add_to: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Gradients of inputs, state and parameters from that of `forward`'s result."""
        grad_y, grad_state = torch.empty_like(self.y), torch.empty_like(self.state)
        grad_params = [torch.empty_like(w) for w in self.params] if add_to is None else add_to
        to_y, to_context = (Gradients(*weights) for weights in _split(self.kind, grad_params))
        *traces, grad_memory = self._trace(grad.contiguous(), output_only)
        launch(
            gradients_kernel,
            self.grid.gradients,
            *(self.y, self.state, grad_y, grad_state, plus_y, plus_state, grad_memory),
            *(*self.sides, *traces, to_y, to_context, self.sizes),
            add=add_to is not None,
            plan=self.grid.gradient_plan,
            maxnreg=REGISTERS,
        )
        return [grad_y, grad_state, *grad_params]

    def _sides(self) -> tuple[Side, Side]:
        """The weights of y and of the context, and the hidden layer if it has its own kernel."""
        batch, channels, hidden, *_ = self.sizes
        rows, splits = (len(self.y) * batch, batch), self.plan.splits
        stride = self.params[0].shape[1]
        weights = _split(self.kind, self.params)
        sums = [self._empty(splits, n, hidden) if splits else None for n in rows]
        y, context = (Side(*weights[i], stride, sums[i], rows[i]) for i in (0, 1))
        if splits:
            blocks = triton.cdiv(channels, self.plan.depth)
            length = triton.cdiv(blocks, splits) * self.plan.depth
            tiles = sum(triton.cdiv(n, self.plan.rows) for n in rows)
            launch(
                hidden_kernel,
                (tiles, triton.cdiv(hidden, self.plan.units), splits),
                *(self.y, self.state, y, context, self.sizes, length),
                plan=self.plan,
            )
        return y, context

    def _trace(self, grad: Tensor, output_only: bool) -> tuple[Trace, Trace, Tensor | None]:
        """Gradients of gates and hidden layers on both sides, and that of the old memory."""
        batch, channels, hidden, chunks, length = self.sizes
        gates, parts = self.plan.gates * channels, self.grid.gates[1]
        rows, own_rows = len(self.y) * batch, chunks * batch
        joint = self.kind == "dsu"  # both sides end in one hidden layer
        step = rows if joint else rows + own_rows
        dhidden = self._empty(parts, step, hidden) if hidden else None
        y = Trace(
            rows,
            self._empty(rows, hidden) if hidden else None,
            dhidden,
            parts,
            step,
            self._empty(rows, gates),
        )
        context = Trace(
            own_rows,
            self._empty(own_rows, hidden) if hidden and not joint else None,
            dhidden[:, rows:] if hidden and not joint else None,
            parts,
            step,
            None if joint or length == 1 else self._empty(own_rows, gates),
        )
        memory = None if self.kind == "rnn" else self._empty(chunks, batch, channels)
        launch(
            gate_gradients_kernel,
            self.grid.gates,
            *(grad, self.y, self.state, *self.sides, y, context, memory, self.sizes),
            output_only=output_only,
            plan=self.plan,
            maxnreg=REGISTERS,
        )
        if hidden and parts > PARTS:
            dhidden = dhidden.sum(0, keepdim=True)
            y = y._replace(dhidden=dhidden, parts=1)
            context = context._replace(dhidden=None if joint else dhidden[:, rows:], parts=1)
        if joint:
            return y, y, memory
        if length == 1:  # then every input has its own sum over inputs
            context = context._replace(dgates=y.dgates)
        return y, context, memory

    def _empty(self, *shape: int) -> Tensor:
        return self.y.new_empty(shape)


_Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _split(kind: str, params: Sequence[Tensor]) -> tuple[_Weights, _Weights]:
    """The parameters as w1, b1, w2, b2 (see `Side`) of y and of the context."""
    if kind == "dsu":
        w_hidden, w_gates, b_gates = params
        channels = w_hidden.shape[1] // 2
        y, context = w_hidden[:, channels:], w_hidden[:, :channels]
        return (y, None, w_gates, b_gates), (context, None, None, None)
    if kind in WITHOUT_HIDDEN_LAYER:
        w_y, w_h, b_y, b_h = params
        return (None, None, w_y, b_y), (None, None, w_h, b_h)
    return tuple(params[:4]), tuple(params[4:])


def _precision() -> str:
    """Of products of float32: TF32 only if the user allowed it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
