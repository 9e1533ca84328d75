"""``cell`` in Triton: products in a scaffold that all kinds share, and a pointwise tail for each.

Gates are sums of products of y and of the context (slot 0 of the state), each on a `Side` of its
own. In a kernel they are a tuple of tiles [TILE, TILE]: as many of i, f, c~, o as the kind has,
before their activations. Tiles of products have at least 16 elements a side, so all is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.cell.reference import CELLS
from dla_kernels.ops.triton_common import launch, pick
from dla_kernels.ops.triton_common import unsupported as unsupported

TILE = tl.constexpr(16)  # side of a tile: the least that a product takes, for many programs
WIDE = tl.constexpr(32)  # side of a tile of weights; terms per step of a long sum
PARTS, PART = 8, 256  # into so many parts it is cut at most, of so many terms at least
# With so many channels at most, whoever needs a hidden layer forms it: one launch less.
SMALL = 128
REGISTERS = 255  # that a thread may use: ptxas by itself stops earlier, and spills some


class Side(NamedTuple):
    """The way of x [B, C] to the gates: w2 ReLU(w1 x + b1) + b2, or w2 x + b2 (no w1).

    "dsu" has one hidden layer for both sides, ReLU(w1 y + w1 f(c)); its w2 is on the side of y.
    """

    x: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any


class Sizes(NamedTuple):
    """B, C and h (0: the kind has no hidden layer)."""

    batch: int
    channels: int
    hidden: int


class Parts(NamedTuple):
    """Hidden layers before the ReLU, or their gradients, as sums: [layers, count, B, h]."""

    sums: Any
    count: int


def forward(
    y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> Tensor:
    """Arguments and result of ``dla_kernels::cell``."""
    cell = _Cell(y, state, params, kind, activation)
    out = torch.empty_like(cell.state)
    launch(_forward_kernel, cell.grid, *cell.inputs(), *_slots(out), cell.sizes, **cell.flags)
    return out


def backward(
    grad: Tensor, y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::cell_backward``."""
    cell = _Cell(y, state, params, kind, activation)
    grad_y, grad_state = torch.empty_like(cell.y), torch.empty_like(cell.state)
    dgates, layers = cell.gate_gradients(grad.contiguous(), grad_state)
    dlayers = cell.input_gradients(dgates, layers, grad_y, grad_state)
    return [grad_y, grad_state, *cell.weight_gradients(dgates, layers, dlayers)]


class _Cell:
    """The tensors of a call, made contiguous, and the launches that it consists of."""

    def __init__(
        self, y: Tensor, state: Tensor, params: Sequence[Tensor], kind: str, activation: str
    ) -> None:
        self.kind = kind
        self.y, self.state = y.contiguous(), state.contiguous()
        self.params = [w.contiguous() for w in params]
        self.layers = CELLS[kind].layers
        self.sides = self.split(self.params)
        self.sizes = Sizes(*y.shape, params[0].shape[0] if self.layers else 0)
        self.grid = _tiles(*y.shape)
        # Of the context, on its way into the hidden layer.
        self.activation = activation if kind == "dsu" else "identity"
        self.precision = _precision()
        self.flags = {
            "KIND": kind,
            "GATES": CELLS[kind].gates,
            "ACTIVATION": self.activation,
            "PRECISION": self.precision,
            "maxnreg": REGISTERS,
        }

    def split(self, params: Sequence[Tensor]) -> tuple[Side, Side]:
        """The parameters, or what has their shapes, on the sides of y and of the context."""
        y, context = self.y, self.state[0]
        if self.kind == "dsu":
            w1, w2, b2 = params
            w1_context, w1_y = w1.chunk(2, dim=1)
            return Side(y, w1_y, None, w2, b2), Side(context, w1_context, None, None, None)
        if not self.layers:
            w_y, w_h, b_y, b_h = params
            return Side(y, None, None, w_y, b_y), Side(context, None, None, w_h, b_h)
        return Side(y, *params[:4]), Side(context, *params[4:])

    def inputs(self) -> tuple[Any, ...]:
        """What the kernels that make gates read; launches the sums of large hidden layers."""
        parts = None
        if self.layers and self.sizes.channels > SMALL:
            weights = [side.w1 for side in self.sides]
            inputs = [side.x for side in self.sides]
            parts = self.sums(inputs, weights, activation=self.activation, transposed=True)
        return (*self.sides, parts, self.state[-1])

    def sums(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        *,
        activation: str = "identity",
        transposed: bool = False,
    ) -> Parts:
        """Products of inputs [B, n] with weights [n, h], or [h, n] if transposed.

        activation: of the second input.
        """
        depth, (batch, _, hidden) = inputs[0].shape[1], self.sizes
        cuts = min(PARTS, triton.cdiv(depth, PART))
        length = triton.cdiv(depth, cuts * WIDE.value) * WIDE.value
        values = self.y.new_empty((len(inputs) * cuts, batch, hidden))
        launch(
            _sums_kernel,
            (*_tiles(batch, hidden), len(values)),
            *(tuple(inputs), tuple(weights), weights[0].stride(0), values),
            *(depth, cuts, length, self.sizes),
            ACTIVATION=activation,
            TRANSPOSED=transposed,
            PRECISION=self.precision,
        )
        return Parts(values, len(values) // self.layers)

    def gate_gradients(self, grad: Tensor, grad_state: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the gates [B, gates * C], and the hidden layers [layers, B, h].

        Writes to the last slot of ``grad_state`` what comes straight from the new memory.
        """
        batch, channels, hidden = self.sizes
        dgates = self.y.new_empty((batch, CELLS[self.kind].gates * channels))
        layers = self.y.new_empty((self.layers, batch, hidden))
        launch(
            _gate_gradients_kernel,
            self.grid,
            *(*self.inputs(), *_slots(grad), layers, dgates, grad_state[-1], self.sizes),
            **self.flags,
        )
        return dgates, layers

    def input_gradients(
        self, dgates: Tensor, layers: Tensor, grad_y: Tensor, grad_state: Tensor
    ) -> Tensor:
        """Writes the gradients of y and context; returns those of hidden layers before the ReLU."""
        parts, dlayers = None, torch.empty_like(layers)
        if self.layers:
            weights = [side.w2 for side in self.sides][: self.layers]
            parts = self.sums([dgates] * self.layers, weights)
        launch(
            _input_gradients_kernel,
            (*self.grid, 2),
            *(*self.sides, self.params[0].shape[1], dgates, parts, layers, dlayers),
            *(grad_y, grad_state, self.sizes),
            **self.flags,
        )
        return dlayers

    def weight_gradients(self, dgates: Tensor, layers: Tensor, dlayers: Tensor) -> list[Tensor]:
        """Those of the parameters: products over the samples, all in one launch."""
        grads = [torch.empty_like(w) for w in self.params]
        no_bias = self.y.new_empty(self.sizes.hidden)  # written in place of what "dsu" lacks
        products = []
        for number, (x, w1, b1, w2, b2) in enumerate(self.split(grads)):
            if w2 is not None:
                products.append((dgates, layers[number] if self.layers else x, w2, b2))
            if w1 is not None:
                dlayer = dlayers[min(number, self.layers - 1)]
                products.append((dlayer, x, w1, no_bias if b1 is None else b1))
        left, right, weights, biases = zip(*products, strict=True)
        heights, widths = zip(*(w.shape for w in weights), strict=True)
        launch(
            _weight_gradients_kernel,
            (max(math.prod(_tiles(*w.shape, WIDE)) for w in weights), len(products)),
            *(left, right, weights, biases, heights, widths),
            *(tuple(w.stride(0) for w in weights), self.sizes.batch),
            ACTIVATION=self.activation,
            PRECISION=self.precision,
        )
        return grads


def _tiles(rows: int, columns: int, side: tl.constexpr = TILE) -> tuple[int, int]:
    """How many there are of a matrix, along and across."""
    return triton.cdiv(rows, side.value), triton.cdiv(columns, side.value)


def _slots(state: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output and, where it is not the same, the memory of a new state."""
    return state[0], state[1] if len(state) == 2 else None


def _precision() -> str:
    """Of products of float32: TF32 only if the user allowed it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def _sums_kernel(
    inputs, weights, stride, sums, depth, cuts, length, size,
    ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a product: terms [cut length, (cut + 1) length) of the sums over ``depth``.

    Grid: tiles of samples; tiles of units; the parts, those of an input one after the other.
    """
    side, cut = tl.program_id(2) // cuts, tl.program_id(2) % cuts
    x, w = pick(inputs, side), pick(weights, side)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    unit = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), sums.dtype.element_ty)
    for first in range(cut * length, tl.minimum((cut + 1) * length, depth), WIDE):
        k = first + tl.arange(0, WIDE)
        a = _load(x, row, size.batch, k, depth, depth)
        a = tl.where(side == 1, _activate(a, ACTIVATION), a)
        if TRANSPOSED:
            b = tl.trans(_load(w, unit, size.hidden, k, depth, stride))
        else:
            b = _load(w, k, depth, unit, size.hidden, stride)
        total = _dot(a, b, total, PRECISION)
    out = _layer(sums, tl.program_id(2), size)
    _store(total, out, row, size.batch, unit, size.hidden, size.hidden)


@triton.jit
def _forward_kernel(
    of_y, of_context, parts, memory, out, out_memory, size,
    ACTIVATION: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the new state. Grid: tiles of samples; tiles of channels."""
    row, channel = _place()
    gates = _gates(
        of_y, of_context, parts, None, row, channel, size, ACTIVATION, GATES, PRECISION
    )  # fmt: skip
    old = _load(memory, row, size.batch, channel, size.channels, size.channels)
    output, new = _tail(gates, old, KIND)
    _store(output, out, row, size.batch, channel, size.channels, size.channels)
    if out_memory is not None:
        _store(new, out_memory, row, size.batch, channel, size.channels, size.channels)


@triton.jit
def _gate_gradients_kernel(
    of_y, of_context, parts, memory, grad, grad_memory, layers, dgates, dmemory, size,
    ACTIVATION: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of the new state to a tile of those of the gates and of the old memory.

    Also leaves the hidden layers. Grid: tiles of samples; tiles of channels.
    """
    row, channel = _place()
    gates = _gates(
        of_y, of_context, parts, layers, row, channel, size, ACTIVATION, GATES, PRECISION
    )  # fmt: skip
    old = _load(memory, row, size.batch, channel, size.channels, size.channels)
    grad_output = _load(grad, row, size.batch, channel, size.channels, size.channels)
    grad_new = tl.zeros_like(old)
    if grad_memory is not None:
        grad_new = _load(grad_memory, row, size.batch, channel, size.channels, size.channels)
    found, grad_old = _tail_gradients(grad_output, grad_new, gates, old, KIND)
    for gate in tl.static_range(GATES):
        to = dgates + gate * size.channels
        _store(found[gate], to, row, size.batch, channel, size.channels, GATES * size.channels)
    if KIND != "rnn":
        _store(grad_old, dmemory, row, size.batch, channel, size.channels, size.channels)


@triton.jit
def _input_gradients_kernel(
    of_y, of_context, stride, dgates, parts, layers, dlayers, grad_y, grad_context, size,
    ACTIVATION: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of y or of the context; also leaves those before the ReLU.

    ``stride``: of the rows of the weights. Grid: tiles of samples; tiles of channels; sides.
    """
    row, channel = _place()
    side = tl.program_id(2)
    layer = 0 if KIND == "dsu" else side
    grad = tl.zeros((TILE, TILE), grad_y.dtype.element_ty)
    if parts is None:
        w = pick((of_y.w2, of_context.w2), side)
        depth = GATES * size.channels
    else:
        w = pick((of_y.w1, of_context.w1), side)
        depth = size.hidden
    for first in range(0, depth, TILE):
        k = first + tl.arange(0, TILE)
        if parts is None:
            a = _load(dgates, row, size.batch, k, depth, depth)
        else:
            hidden = _load(_layer(layers, layer, size), row, size.batch, k, depth, depth)
            a = tl.where(hidden <= 0, 0.0, _sum(parts, layer, row, k, size))
            if (tl.program_id(1) == 0) & (side == layer):
                _store(a, _layer(dlayers, layer, size), row, size.batch, k, depth, depth)
        b = _load(w, k, depth, channel, size.channels, stride)
        grad = _dot(a, b, grad, PRECISION)
    if side == 0:
        _store(grad, grad_y, row, size.batch, channel, size.channels, size.channels)
    else:
        if KIND == "dsu":
            x = _load(of_context.x, row, size.batch, channel, size.channels, size.channels)
            grad *= _slope(_activate(x, ACTIVATION), ACTIVATION)
            # The context is the memory too.
            grad += _load(grad_context, row, size.batch, channel, size.channels, size.channels)
        _store(grad, grad_context, row, size.batch, channel, size.channels, size.channels)


@triton.jit
def _weight_gradients_kernel(
    left, right, weights, biases, heights, widths, strides, batch,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient left^T right of a weight; sums of ``left`` for the bias.

    The activation is that of the last product. Grid: tiles of the largest weight; products.
    """
    number = tl.program_id(1)
    height, width, stride = pick(heights, number), pick(widths, number), pick(strides, number)
    tiles = tl.cdiv(width, WIDE)
    first_out = tl.program_id(0) // tiles * WIDE
    first_in = tl.program_id(0) % tiles * WIDE
    if first_out < height:
        unit = first_out + tl.arange(0, WIDE)
        k = first_in + tl.arange(0, WIDE)
        grad = tl.zeros((WIDE, WIDE), weights[0].dtype.element_ty)
        bias = tl.zeros((WIDE,), grad.dtype)
        for first in range(0, batch, TILE):
            row = first + tl.arange(0, TILE)
            a = _load(pick(left, number), row, batch, unit, height, height)
            b = _load(pick(right, number), row, batch, k, width, width)
            b = tl.where(number == len(weights) - 1, _activate(b, ACTIVATION), b)
            grad = _dot(tl.trans(a), b, grad, PRECISION)
            bias += tl.sum(a, axis=0)
        _store(grad, pick(weights, number), unit, height, k, width, stride)
        if first_in == 0:
            tl.store(pick(biases, number) + unit, bias, unit < height)


@triton.jit
def _place():
    """The samples and channels of a program that makes a tile of a state."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    return row, channel


@triton.jit
def _gates(
    of_y, of_context, parts, layers, row, channel, size,
    ACTIVATION: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gates of a tile. The hidden layers of its samples go to ``layers``."""
    gates = ()
    for gate in tl.static_range(GATES):
        at = gate * size.channels + channel
        bias = tl.load(of_y.b2 + at, channel < size.channels, 0.0)
        if of_context.b2 is not None:
            bias += tl.load(of_context.b2 + at, channel < size.channels, 0.0)
        gates = gates + (tl.zeros((TILE, 1), bias.dtype) + bias[None, :],)
    sides = of_y, of_context
    gates = _add_side(
        gates, sides, 0, parts, layers, row, channel, size, ACTIVATION, PRECISION
    )  # fmt: skip
    if of_context.w2 is not None:
        gates = _add_side(
            gates, sides, 1, parts, layers, row, channel, size, ACTIVATION, PRECISION
        )  # fmt: skip
    return gates


@triton.jit
def _add_side(
    gates, sides, layer: tl.constexpr, parts, layers, row, channel, size,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gates + what a side adds to them."""
    side = sides[layer]
    depth = size.channels if side.w1 is None else size.hidden
    for first in range(0, depth, TILE):
        k = first + tl.arange(0, TILE)
        if side.w1 is None:
            a = _load(side.x, row, size.batch, k, depth, depth)
        else:
            a = _hidden(sides, layer, parts, row, k, size, ACTIVATION, PRECISION)
            if side.b1 is not None:
                a += tl.load(side.b1 + k, k < depth, 0.0)[None, :]
            a = tl.where(a < 0, 0.0, a)
            if layers is not None:
                if tl.program_id(1) == 0:
                    _store(a, _layer(layers, layer, size), row, size.batch, k, depth, depth)
        sums = ()
        for gate in tl.static_range(len(gates)):
            w = side.w2 + tl.cast(size.channels, tl.int64) * depth * gate
            b = tl.trans(_load(w, channel, size.channels, k, depth, depth))
            sums = sums + (_dot(a, b, gates[gate], PRECISION),)
        gates = sums
    return gates


@triton.jit
def _hidden(
    sides, layer: tl.constexpr, parts, row, unit, size,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a hidden layer before its bias: from its parts, or without them formed here."""
    if parts is not None:
        return _sum(parts, layer, row, unit, size)
    else:
        total = tl.zeros((TILE, TILE), sides[0].x.dtype.element_ty)
        if sides[1].w2 is None:  # "dsu": one layer, whose weights of y and context are in one row
            stride = 2 * size.channels
            total = _through(sides[0], total, row, unit, stride, size, "identity", PRECISION)
            return _through(sides[1], total, row, unit, stride, size, ACTIVATION, PRECISION)
        else:
            stride = size.channels
            return _through(sides[layer], total, row, unit, stride, size, "identity", PRECISION)


@triton.jit
def _through(
    side, total, row, unit, stride, size, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr
):
    """total + w1 act(x) of a side."""
    for first in range(0, size.channels, WIDE):
        k = first + tl.arange(0, WIDE)
        a = _load(side.x, row, size.batch, k, size.channels, size.channels)
        b = tl.trans(_load(side.w1, unit, size.hidden, k, size.channels, stride))
        total = _dot(_activate(a, ACTIVATION), b, total, PRECISION)
    return total


@triton.jit
def _sum(parts, layer, row, k, size):
    """A tile of a hidden layer (or its gradient) from its parts."""
    total = tl.zeros((TILE, TILE), parts.sums.dtype.element_ty)
    for part in range(layer * parts.count, (layer + 1) * parts.count):
        one = _layer(parts.sums, part, size)
        total += _load(one, row, size.batch, k, size.hidden, size.hidden)
    return total


@triton.jit
def _layer(matrices, number, size):
    """Where one of many [B, h] begins."""
    return matrices + tl.cast(size.batch, tl.int64) * size.hidden * number


@triton.jit
def _load(matrix, row, rows, column, columns, stride):
    """A tile of a matrix [rows, columns] whose rows are ``stride`` apart; zeros beyond its ends."""
    there = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], there, 0.0)


@triton.jit
def _store(value, matrix, row, rows, column, columns, stride):
    """Writes a tile of such a matrix."""
    there = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], value, there)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _tail(gates, memory, kind: tl.constexpr):
    """Output and new memory."""
    if kind == "rnn":
        output = _tanh(gates[0])
        return output, output
    else:
        new = _sigmoid(gates[1]) * memory + _sigmoid(gates[0]) * _tanh(gates[2])
        return _output(new, gates, kind), new


@triton.jit
def _tail_gradients(grad, grad_memory, gates, memory, kind: tl.constexpr):
    """Gradients of the gates and of the old memory, from those of output and new memory."""
    if kind == "rnn":
        return (grad * _slope(_tanh(gates[0]), "tanh"),), tl.zeros_like(memory)
    else:
        i, f, candidate = _sigmoid(gates[0]), _sigmoid(gates[1]), _tanh(gates[2])
        through, grad_o = _output_gradients(grad, f * memory + i * candidate, gates, kind)
        new = grad_memory + through
        grad_i = new * candidate * _slope(i, "sigmoid")
        grad_f = new * memory * _slope(f, "sigmoid")
        grad_candidate = new * i * _slope(candidate, "tanh")
        return (grad_i, grad_f, grad_candidate) + grad_o, new * f


@triton.jit
def _output(memory, gates, kind: tl.constexpr):
    """The output of a cell with a memory."""
    if kind == "dsu":
        return memory
    elif kind == "dsu_split":
        return _sigmoid(memory)
    elif kind == "dia":
        return _sigmoid(gates[3]) * _sigmoid(memory)
    else:
        return _sigmoid(gates[3]) * _tanh(memory)


@triton.jit
def _output_gradients(grad, memory, gates, kind: tl.constexpr):
    """Gradients of the memory and, in a tuple, of the gates that the output passes."""
    if kind == "dsu":
        return grad, ()
    elif kind == "dsu_split":
        return grad * _slope(_sigmoid(memory), "sigmoid"), ()
    else:
        squash: tl.constexpr = "sigmoid" if kind == "dia" else "tanh"
        o, squashed = _sigmoid(gates[3]), _activate(memory, squash)
        grad_o = grad * squashed * _slope(o, "sigmoid")
        return grad * o * _slope(squashed, squash), (grad_o,)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(x):
    """By its series near 0, where the difference of exponentials would cancel."""
    square = x * x
    series = 62 / 2835 - square * (1382 / 155925)
    series = -17 / 315 + square * series
    series = 2 / 15 + square * series
    series = -1 / 3 + square * series
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.01, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def _activate(x, activation: tl.constexpr):
    if activation == "sigmoid":
        return _sigmoid(x)
    elif activation == "tanh":
        return _tanh(x)
    elif activation == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def _slope(a, activation: tl.constexpr):
    """Derivative of the activation where its value is a."""
    if activation == "sigmoid":
        return a * (1.0 - a)
    elif activation == "tanh":
        return 1.0 - a * a
    elif activation == "relu":
        return tl.where(a <= 0, 0.0, 1.0)
    else:
        return 1.0
