"""``cell`` in Triton: what is launched, and with which tiles (``triton_kernels.py``)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

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


class Form(NamedTuple):
    """Gates per channel, slots of the state, hidden layer or not."""

    gates: int
    slots: int
    hidden: bool


FORMS = {
    "dsu": Form(3, 1, True),
    "dsu_split": Form(3, 2, True),
    "dia": Form(4, 2, True),
    "lstm": Form(4, 2, False),
    "rnn": Form(1, 1, False),
}

ROWS, CHANNELS, UNITS, DEPTH = 16, 32, 32, 32  # tiles of the kernels that make gates
GRADIENT_TILES = {"rows": 32, "channels": 64, "units": 32, "depth": 64}
PARTS = 8  # of a sum that is left to those who read it
PROGRAMS = 256  # that keep a GPU busy


def unsupported(x: Tensor) -> str | None:
    return None


def forward(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> Tensor:
    """Arguments and result of ``dla_kernels::cell``."""
    out = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    Evaluation(y.unsqueeze(0), state, params, kind, activation).forward(out, output_only=False)
    return out


def backward(
    grad: Tensor,
    y: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::cell_backward``."""
    evaluation = Evaluation(y.unsqueeze(0), state, params, kind, activation)
    grad_y, *rest = evaluation.backward(grad, output_only=False)
    return [grad_y.squeeze(0), *rest]


def evaluate(
    inputs: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    first_sample: bool,
) -> Tensor:
    """Outputs [M, B, C] of the cell for inputs [M, B, C] under the same state [slots, B, C].

    first_sample: all rows read row 0 of the state.
    """
    out = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    Evaluation(inputs, state, params, kind, activation, first_sample).forward(out, output_only=True)
    return out


def evaluate_backward(
    grad: Tensor,
    inputs: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    kind: str,
    activation: str,
    first_sample: bool,
    plus_state: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the inputs, the state (``plus_state`` added) and each parameter."""
    evaluation = Evaluation(inputs, state, params, kind, activation, first_sample)
    return evaluation.backward(grad, output_only=True, plus_state=plus_state)


def hidden_splits(sizes: Sizes, itemsize: int) -> int:
    """Into how many parts the hidden layer is cut for a kernel of its own; 0: there is none.

    Without it every program that makes gates forms the hidden layer for itself. That spares a
    launch, and costs nothing as long as it is small and there are fewer programs than the GPU
    can run at once.
    """
    weights = 2 * sizes.channels * sizes.hidden * itemsize
    rows = sizes.repeats * sizes.batch
    in_place = sizes.repeats == 1 and sizes.hidden <= 64 and weights <= 128 * 1024
    if in_place and rows * sizes.channels <= PROGRAMS * ROWS * CHANNELS:
        return 0
    return min(8, triton.next_power_of_2(triton.cdiv(sizes.channels, 256)))


class Evaluation:
    """A cell, its M inputs [M, B, C] and the state [slots, B, C] that they share."""

    def __init__(
        self,
        inputs: Tensor,
        state: Tensor,
        params: Sequence[Tensor],
        kind: str,
        activation: str,
        first_sample: bool = False,
    ) -> None:
        self.y, self.state = inputs.contiguous(), state.contiguous()
        self.params = [w.contiguous() for w in params]
        self.kind, self.form = kind, FORMS[kind]
        repeats, batch, channels = inputs.shape
        tiles = triton.cdiv(batch, ROWS) * triton.cdiv(channels, CHANNELS)
        length = triton.cdiv(repeats, max(1, PROGRAMS // tiles))
        hidden = self.params[0].shape[0] if self.form.hidden else 0
        chunks = triton.cdiv(repeats, length)
        self.sizes = Sizes(repeats, batch, channels, hidden, chunks, length)
        splits = hidden_splits(self.sizes, state.element_size()) if hidden else 0
        self.plan = Plan(
            kind=kind,
            gates=self.form.gates,
            slots=self.form.slots,
            activation=activation if kind == "dsu" else "identity",
            first_sample=first_sample,
            splits=splits,
            precision=precision(),
            rows=ROWS,
            channels=CHANNELS,
            units=UNITS,
            depth=DEPTH,
        )
        self.grid = triton.cdiv(batch, ROWS), triton.cdiv(channels, CHANNELS), chunks

    def forward(self, out: Tensor, output_only: bool) -> None:
        """Writes the new state [slots, B, C] (M = 1), or the outputs alone [M, B, C]."""
        sides = self._sides()
        forward_kernel[self.grid](
            self.y, self.state, out, *sides, self.sizes, output_only=output_only, plan=self.plan
        )

    def backward(
        self, grad: Tensor, output_only: bool, plus_state: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients of inputs, state and parameters from that of what `forward` writes."""
        sides = self._sides()
        traces, grad_memory = self._trace(grad.contiguous(), sides, output_only)
        grads = [torch.empty_like(t) for t in (self.y, self.state, *self.params)]
        grad_y, grad_state, *grad_params = grads
        to_y, to_context = (Gradients(*weights) for weights in split_params(self.kind, grad_params))
        plan = replace(self.plan, **GRADIENT_TILES)
        gradients_kernel[self._gradients_grid(traces, plan)](
            self.y,
            self.state,
            grad_y,
            grad_state,
            None,
            plus_state,
            grad_memory,
            *sides,
            *traces,
            to_y,
            to_context,
            self.sizes,
            add=False,
            plan=plan,
        )
        return grads

    def _sides(self) -> tuple[Side, Side]:
        """The weights of both sides, and what `hidden_kernel` makes with the first of them."""
        y, context = split_params(self.kind, self.params)
        rows = self.sizes.repeats * self.sizes.batch, self.sizes.batch
        stride = y[0].stride(0) if self.form.hidden else 0
        splits, hidden = self.plan.splits, self.sizes.hidden
        if splits == 0:
            sums = None, None
        else:
            sums = tuple(self._empty(splits, n, hidden) for n in rows)
        sides = Side(*y, stride, sums[0], rows[0]), Side(*context, stride, sums[1], rows[1])
        if splits:
            length = triton.cdiv(triton.cdiv(self.sizes.channels, splits), DEPTH) * DEPTH
            tiles = sum(triton.cdiv(n, ROWS) for n in rows)
            hidden_kernel[tiles, triton.cdiv(hidden, self.plan.units), splits](
                self.y, self.state, *sides, self.sizes, length, plan=self.plan
            )
        return sides

    def _trace(
        self, grad: Tensor, sides: tuple[Side, Side], output_only: bool
    ) -> tuple[tuple[Trace, Trace], Tensor | None]:
        """Gradients of gates, hidden layers and old memory."""
        repeats, batch, channels, hidden, chunks, length = self.sizes
        rows, own = repeats * batch, chunks * batch
        joint = self.kind == "dsu"
        dgates = self._empty(rows, self.form.gates * channels)
        shared = joint or length == 1  # the gradients of gates are the same for both sides
        own_dgates = None if shared else self._empty(own, self.form.gates * channels)
        grad_memory = None if self.kind == "rnn" else self._empty(chunks, batch, channels)
        parts = self.grid[1]
        step = rows if joint else rows + own
        y_hidden = own_hidden = dhidden = own_dhidden = None
        if hidden:
            y_hidden, dhidden = self._empty(rows, hidden), self._empty(parts, step, hidden)
            if not joint:
                own_hidden, own_dhidden = self._empty(own, hidden), dhidden[:, rows:]
        y = Trace(rows, y_hidden, dhidden, parts, step, dgates)
        context = Trace(own, own_hidden, own_dhidden, parts, step, own_dgates)
        gate_gradients_kernel[self.grid](
            grad,
            self.y,
            self.state,
            *sides,
            y,
            context,
            grad_memory,
            self.sizes,
            output_only=output_only,
            plan=self.plan,
        )
        if hidden and parts > PARTS:
            dhidden = dhidden.sum(0, keepdim=True)
            y = y._replace(dhidden=dhidden, parts=1)
            if not joint:
                context = context._replace(dhidden=dhidden[:, rows:], parts=1)
        if joint:
            context = y
        elif shared:
            context = context._replace(dgates=dgates)
        return (y, context), grad_memory

    def _gradients_grid(self, traces: tuple[Trace, Trace], plan: Plan) -> tuple[int, int, int]:
        """Tiles of the largest result, sides, results of a side; see `gradients_kernel`."""
        _, batch, channels, hidden, *_ = self.sizes
        columns = triton.cdiv(channels, plan.channels)
        rows = max(traces[0].rows, batch)
        inputs = triton.cdiv(hidden, plan.units) if hidden else columns
        tasks = max(
            triton.cdiv(rows, plan.rows) * columns,
            triton.cdiv(plan.gates * channels, plan.depth) * inputs,
            triton.cdiv(hidden, plan.units) * columns,
        )
        return tasks, 2, 3 if hidden else 2

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.y.dtype, device=self.y.device)


Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def split_params(kind: str, params: Sequence[Tensor]) -> tuple[Weights, Weights]:
    """w1, b1, w2, b2 (`Side`) of y and of the context."""
    if kind == "dsu":
        w_hidden, w_gates, b_gates = params
        channels = w_hidden.shape[1] // 2
        return (
            (w_hidden[:, channels:], None, w_gates, b_gates),
            (w_hidden[:, :channels], None, None, None),
        )
    if FORMS[kind].hidden:
        return tuple(params[:4]), tuple(params[4:])
    w_y, w_h, b_y, b_h = params
    return (None, None, w_y, b_y), (None, None, w_h, b_h)


def precision() -> str:
    """How products of float32 are formed: in TF32 only if the user allowed that."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
