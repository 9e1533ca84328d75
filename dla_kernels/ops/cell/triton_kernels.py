"""Triton kernels of the cells: one scaffold, and a pointwise tail for each kind.

M inputs y [M, B, C] are evaluated under one context, the state [slots, B, C]; a step is M = 1. Both
go to the gates through weights of their own (`Side`), the context once for all M. Kinds differ
in three ways only: "dsu" has one hidden layer for the sum of both (so its context has no ``w2``),
"lstm" and "rnn" have none (no ``w1``), and each has its tail.

Gates are a tuple of tiles [rows, channels], one for each: i, f, c~, o as far as the kind has them,
before their activations. Rows of y are numbered m B + b. The products want tiles of 16 and more, so
everything is masked.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """B, C and h; how many programs share the M inputs of a sample, with ``length`` each."""

    batch: int
    channels: int
    hidden: int
    chunks: int
    length: int


class Side(NamedTuple):
    """The way from y, or from the context, to the gates: w2 ReLU(w1 x + b1) + b2 or w2 x + b2.

    w1 [h, C] has rows ``stride`` apart. sums: [splits, rows, h], w1 x by `hidden_kernel`.
    """

    w1: Any
    b1: Any
    w2: Any
    b2: Any
    stride: int
    sums: Any
    rows: int


class Trace(NamedTuple):
    """What the first kernel of the backward pass leaves of a side.

    hidden [rows, h]; its gradient before the mask of the ReLU, as a sum of parts, which are
    ``step`` rows apart; dgates [rows, gates C]. The context has B rows for every chunk of inputs.
    """

    rows: int
    hidden: Any
    dhidden: Any
    parts: int
    step: int
    dgates: Any


class Gradients(NamedTuple):
    """Where the gradients of a side's weights go."""

    w1: Any
    b1: Any
    w2: Any
    b2: Any


@dataclass(frozen=True)
class Plan:
    """What is decided when a kernel is compiled. All of it is data: Triton's cache goes by it."""

    kind: str
    gates: int
    slots: int
    activation: str  # of the context, on its way into the hidden layer
    first_sample: bool  # all read row 0 of the context
    splits: int  # of the sums that `hidden_kernel` leaves; 0: the hidden layer is formed in place
    precision: str  # of products of float32
    rows: int  # tile sizes
    channels: int
    units: int
    depth: int


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
def _rows(matrix, row, width):
    """Pointers to where rows begin."""
    return matrix + row.to(tl.int64) * width


@triton.jit
def _load(rows, rows_there, column, columns_there):
    """A tile of a matrix, zeros beyond its ends: [rows, columns]."""
    there = rows_there[:, None] & columns_there[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=there, other=0.0)


@triton.jit
def _load_transposed(rows, rows_there, column, columns_there):
    """The same as [columns, rows]."""
    there = rows_there[None, :] & columns_there[:, None]
    return tl.load(rows[None, :] + column[:, None], mask=there, other=0.0)


@triton.jit
def _store(value, rows, rows_there, column, columns_there):
    there = rows_there[:, None] & columns_there[None, :]
    tl.store(rows[:, None] + column[None, :], value, mask=there)


@triton.jit
def _dot(a, b, acc, plan: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=plan.precision, out_dtype=acc.dtype)


@triton.jit
def _multiply(acc, x, x_there, w, w_there, first, end, activation, plan: tl.constexpr):
    """acc[i, j] + sum over first <= k < end of f(x_i[k]) w_j[k]; x and w point to rows."""
    for block in range(first, end, plan.depth):
        k = block + tl.arange(0, plan.depth)
        a = _activate(_load(x, x_there, k, k < end), activation)
        acc = _dot(a, _load_transposed(w, w_there, k, k < end), acc, plan)
    return acc


@triton.jit
def _add_dots(gates, a, w2, place, k, there_k, width, size, plan: tl.constexpr):
    """gates + a w2^T, where a [rows, k] are the columns k of a matrix so wide."""
    _, _, channel, there_channel = place
    sums = ()
    for gate in tl.static_range(len(gates)):
        rows = _rows(w2, gate * size.channels + channel, width)
        w = _load_transposed(rows, there_channel, k, there_k)
        sums = sums + (_dot(a, w, gates[gate], plan),)
    return sums


@triton.jit
def _context_rows(slot, sample, size, plan: tl.constexpr):
    """Where samples find their context in a slot of the state."""
    return _rows(slot, sample * 0 if plan.first_sample else sample, size.channels)


@triton.jit
def _partial_sums(side, row, there, unit, there_unit, size, plan: tl.constexpr):
    """w1 x of some rows and units, as `hidden_kernel` left it."""
    splits: tl.constexpr = plan.splits
    total = _load(_rows(side.sums, row, size.hidden), there, unit, there_unit)
    for split in tl.static_range(1, splits):
        rows = _rows(side.sums, split * side.rows + row, size.hidden)
        total += _load(rows, there, unit, there_unit)
    return total


@triton.jit
def _before_relu(x, side, row, there, unit, there_unit, activation, size, plan: tl.constexpr):
    """w1 f(x) + b1 of some rows and units."""
    if plan.splits == 0:
        before = tl.zeros((plan.rows, plan.units), x.dtype.element_ty)
        w = _rows(side.w1, unit, side.stride)
        before = _multiply(before, x, there, w, there_unit, 0, size.channels, activation, plan)
    else:
        before = _partial_sums(side, row, there, unit, there_unit, size, plan)
    if side.b1 is not None:
        before += tl.load(side.b1 + unit, mask=there_unit, other=0.0)[None, :]
    return before


@triton.jit
def _add_gates(gates, x, side, row, joined, kept, place, size, plan: tl.constexpr):
    """gates + what a side adds to them. The hidden layer, which the side ``joined`` may share with
    it, goes to the rows ``kept``."""
    _, there, _, _ = place
    if side.w1 is None:
        for first in range(0, size.channels, plan.units):
            k = first + tl.arange(0, plan.units)
            there_k, width = k < size.channels, size.channels
            a = _load(x, there, k, there_k)
            gates = _add_dots(gates, a, side.w2, place, k, there_k, width, size, plan)
    else:
        for first in range(0, size.hidden, plan.units):
            unit = first + tl.arange(0, plan.units)
            there_unit, width = unit < size.hidden, size.hidden
            before = _before_relu(x, side, row, there, unit, there_unit, "identity", size, plan)
            if joined is not None:
                u, other, other_row = joined
                before += _before_relu(
                    u, other, other_row, there, unit, there_unit, plan.activation, size, plan
                )
            hidden = tl.where(before < 0, 0.0, before)
            if kept is not None:
                if tl.program_id(1) == 0:
                    _store(hidden, kept, there, unit, there_unit)
            gates = _add_dots(gates, hidden, side.w2, place, unit, there_unit, width, size, plan)
    return gates


@triton.jit
def _gates_of_context(context, side_y, side, kept, place, size, plan: tl.constexpr):
    """What the gates of all inputs of a sample have in common: biases, and the context's part."""
    sample, _, channel, there_channel = place
    count: tl.constexpr = plan.gates
    gates = ()
    for gate in tl.static_range(count):
        at = gate * size.channels + channel
        bias = tl.load(side_y.b2 + at, mask=there_channel, other=0.0)
        if side.b2 is not None:
            bias += tl.load(side.b2 + at, mask=there_channel, other=0.0)
        gates = gates + (tl.zeros((plan.rows, 1), bias.dtype) + bias[None, :],)
    if side.w2 is not None:
        gates = _add_gates(gates, context, side, sample, None, kept, place, size, plan)
    return gates


@triton.jit
def _gates_of_y(gates, y, row, side, context, side_context, kept, place, size, plan: tl.constexpr):
    """The gates of the inputs y[row], from what they have in common."""
    x = _rows(y, row, size.channels)
    if plan.kind == "dsu":
        joined = context, side_context, place[0]
        return _add_gates(gates, x, side, row, joined, kept, place, size, plan)
    else:
        return _add_gates(gates, x, side, row, None, kept, place, size, plan)


@triton.jit
def hidden_kernel(y, state, of_y, of_context, size, length, plan: tl.constexpr):
    """w1 f(x) of both sides in parts: channels [split length, (split + 1) length) each.

    Grid: tiles of the rows of y and then of the context; tiles of units; splits.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    unit = tl.program_id(1) * plan.units + tl.arange(0, plan.units)
    tiles_y = tl.cdiv(of_y.rows, plan.rows)
    if tile < tiles_y:
        row = tile * plan.rows + tl.arange(0, plan.rows)
        x = _rows(y, row, size.channels)
        _partial_product(x, of_y, row, unit, split, length, "identity", size, plan)
    else:
        row = (tile - tiles_y) * plan.rows + tl.arange(0, plan.rows)
        x = _context_rows(state, row, size, plan)
        _partial_product(x, of_context, row, unit, split, length, plan.activation, size, plan)


@triton.jit
def _partial_product(x, side, row, unit, split, length, activation, size, plan: tl.constexpr):
    there, there_unit = row < side.rows, unit < size.hidden
    first = split * length
    end = tl.minimum(first + length, size.channels)
    w = _rows(side.w1, unit, side.stride)
    total = tl.zeros((plan.rows, plan.units), x.dtype.element_ty)
    total = _multiply(total, x, there, w, there_unit, first, end, activation, plan)
    rows = _rows(side.sums, split * side.rows + row, size.hidden)
    _store(total, rows, there, unit, there_unit)


@triton.jit
def forward_kernel(
    y, state, out, of_y, of_context, size, output_only: tl.constexpr, plan: tl.constexpr
):
    """New states [slots, B, C] (M = 1), or the outputs alone [M, B, C].

    Grid: tiles of samples; tiles of channels; chunks of inputs.
    """
    place = _place(size, plan)
    sample, there, channel, there_channel = place
    context = _context_rows(state, sample, size, plan)
    memory = _load_memory(state, place, size, plan)
    common = _gates_of_context(context, of_y, of_context, None, place, size, plan)
    for i in range(size.length):
        row = (tl.program_id(2) * size.length + i) * size.batch + sample
        there_row = there & (row < of_y.rows)
        at = sample, there_row, channel, there_channel
        gates = _gates_of_y(common, y, row, of_y, context, of_context, None, at, size, plan)
        output, new = _tail(gates, memory, plan.kind)
        _store(output, _rows(out, row, size.channels), there_row, channel, there_channel)
        if plan.slots == 2 and not output_only:
            rows = _rows(out, size.batch + row, size.channels)
            _store(new, rows, there_row, channel, there_channel)


@triton.jit
def _place(size, plan: tl.constexpr):
    """The samples and channels of a program that makes gates, and which of them there are."""
    sample = tl.program_id(0) * plan.rows + tl.arange(0, plan.rows)
    channel = tl.program_id(1) * plan.channels + tl.arange(0, plan.channels)
    return sample, sample < size.batch, channel, channel < size.channels


@triton.jit
def _load_memory(state, place, size, plan: tl.constexpr):
    """What the tail updates: the last slot of the state."""
    sample, there, channel, there_channel = place
    slot = state + (plan.slots - 1) * size.batch * size.channels
    return _load(_context_rows(slot, sample, size, plan), there, channel, there_channel)


@triton.jit
def gate_gradients_kernel(
    grad,
    y,
    state,
    of_y,
    of_context,
    trace_y,
    trace_context,
    grad_memory,
    size,
    output_only: tl.constexpr,
    plan: tl.constexpr,
):
    """From the gradients of new states or outputs to those of gates and hidden layers (`Trace`),
    and of the old memory [chunks, B, C] as far as it comes straight from the new one.

    Grid: as of `forward_kernel`.
    """
    place = _place(size, plan)
    sample, there, channel, there_channel = place
    chunk = tl.program_id(2)
    own_row = chunk * size.batch + sample  # in the trace of the context
    context = _context_rows(state, sample, size, plan)
    memory = _load_memory(state, place, size, plan)
    own_hidden = _kept(trace_context, own_row, size)
    common = _gates_of_context(context, of_y, of_context, own_hidden, place, size, plan)
    sum_memory, sum_gates = tl.zeros_like(memory), ()
    for _gate in tl.static_range(len(common)):
        sum_gates = sum_gates + (tl.zeros_like(memory),)
    for i in range(size.length):
        row = (tl.program_id(2) * size.length + i) * size.batch + sample
        there_row = there & (row < of_y.rows)
        at = sample, there_row, channel, there_channel
        hidden = _kept(trace_y, row, size)
        gates = _gates_of_y(common, y, row, of_y, context, of_context, hidden, at, size, plan)
        grad_output = _load(_rows(grad, row, size.channels), there_row, channel, there_channel)
        grad_new = tl.zeros_like(memory)
        if plan.slots == 2 and not output_only:
            rows = _rows(grad, size.batch + row, size.channels)
            grad_new = _load(rows, there_row, channel, there_channel)
        dgates, dmemory = _tail_gradients(grad_output, grad_new, gates, memory, plan.kind)
        _trace_gates(dgates, of_y, trace_y, row, at, size, plan)
        sum_gates = _add(sum_gates, dgates)
        sum_memory += dmemory
    if of_context.w2 is not None:
        _trace_gates(sum_gates, of_context, trace_context, own_row, place, size, plan)
    if grad_memory is not None:
        rows = _rows(grad_memory, own_row, size.channels)
        _store(sum_memory, rows, there, channel, there_channel)


@triton.jit
def _kept(trace, row, size):
    """Where the hidden layers of rows go, if the kind has any."""
    if trace.hidden is None:
        return None
    else:
        return _rows(trace.hidden, row, size.hidden)


@triton.jit
def _add(one, other):
    sums = ()
    for i in tl.static_range(len(one)):
        sums = sums + (one[i] + other[i],)
    return sums


@triton.jit
def _trace_gates(dgates, side, trace, row, place, size, plan: tl.constexpr):
    """Writes the gradients of gates, and what these channels give to that of the hidden layer."""
    _, there, channel, there_channel = place
    if trace.dgates is not None:
        rows = _rows(trace.dgates, row, plan.gates * size.channels)
        for gate in tl.static_range(len(dgates)):
            at = gate * size.channels + channel
            _store(dgates[gate], rows, there, at, there_channel)
    if side.w1 is not None:
        for first in range(0, size.hidden, plan.units):
            unit = first + tl.arange(0, plan.units)
            there_unit = unit < size.hidden
            part = tl.zeros((plan.rows, plan.units), trace.dhidden.dtype.element_ty)
            for gate in tl.static_range(len(dgates)):
                rows = _rows(side.w2, gate * size.channels + channel, size.hidden)
                part = _dot(dgates[gate], _load(rows, there_channel, unit, there_unit), part, plan)
            rows = _rows(trace.dhidden, tl.program_id(1) * trace.step + row, size.hidden)
            _store(part, rows, there, unit, there_unit)


@triton.jit
def gradients_kernel(
    y,
    state,
    grad_y,
    grad_state,
    plus_y,
    plus_state,
    grad_memory,
    of_y,
    of_context,
    trace_y,
    trace_context,
    to_y,
    to_context,
    size,
    add: tl.constexpr,
    plan: tl.constexpr,
):
    """Gradients of y, of the state and of all weights.

    Grid: tiles of the largest result; side (y, context); result (input, w2, w1).
    """
    task, result = tl.program_id(0), tl.program_id(2)
    if tl.program_id(1) == 0:
        if result == 0:
            _grad_y(grad_y, plus_y, of_y, trace_y, task, size, plan)
        elif result == 1:
            _grad_w2(y, to_y, trace_y, task, False, size, add, plan)
        else:
            _grad_w1(y, to_y, of_y.stride, trace_y, task, False, size, add, plan)
    else:
        if result == 0:
            _grad_state(
                state,
                grad_state,
                plus_state,
                grad_memory,
                of_context,
                trace_context,
                task,
                size,
                plan,
            )
        elif result == 1:
            _grad_w2(state, to_context, trace_context, task, True, size, add, plan)
        else:
            _grad_w1(
                state, to_context, of_context.stride, trace_context, task, True, size, add, plan
            )


@triton.jit
def _tiles(task, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and first column of a tile of a matrix so wide."""
    across = tl.cdiv(columns, COLUMNS)
    return task // across * ROWS, task % across * COLUMNS


@triton.jit
def _hidden_gradient(trace, row, there, unit, there_unit, size):
    """Gradient of the hidden layer before its ReLU: [rows, units]."""
    rows = _rows(trace.dhidden, row, size.hidden)
    total = _load(rows, there, unit, there_unit)
    for part in range(1, trace.parts):
        rows = _rows(trace.dhidden, part * trace.step + row, size.hidden)
        total += _load(rows, there, unit, there_unit)
    hidden = _load(_rows(trace.hidden, row, size.hidden), there, unit, there_unit)
    return tl.where(hidden <= 0, 0.0, total)


@triton.jit
def _back_through(
    acc, side, trace, row, step, count, there, channel, there_channel, size, plan: tl.constexpr
):
    """acc + the gradient of what a side read, summed over ``count`` rows ``step`` apart."""
    if side.w1 is None:
        gates = plan.gates * size.channels
        for first in range(0, gates, plan.depth):
            gate = first + tl.arange(0, plan.depth)
            there_gate = gate < gates
            grad = tl.zeros((plan.rows, plan.depth), acc.dtype)
            for i in range(count):
                grad += _load(_rows(trace.dgates, i * step + row, gates), there, gate, there_gate)
            w = _load(_rows(side.w2, gate, size.channels), there_gate, channel, there_channel)
            acc = _dot(grad, w, acc, plan)
    else:
        for first in range(0, size.hidden, plan.units):
            unit = first + tl.arange(0, plan.units)
            there_unit = unit < size.hidden
            grad = tl.zeros((plan.rows, plan.units), acc.dtype)
            for i in range(count):
                grad += _hidden_gradient(trace, i * step + row, there, unit, there_unit, size)
            w = _load(_rows(side.w1, unit, side.stride), there_unit, channel, there_channel)
            acc = _dot(grad, w, acc, plan)
    return acc


@triton.jit
def _grad_y(grad_y, plus, side, trace, task, size, plan: tl.constexpr):
    """A tile of the gradient of the inputs."""
    first, first_channel = _tiles(task, size.channels, plan.rows, plan.channels)
    if first < trace.rows:
        row = first + tl.arange(0, plan.rows)
        channel = first_channel + tl.arange(0, plan.channels)
        there, there_channel = row < trace.rows, channel < size.channels
        grad = tl.zeros((plan.rows, plan.channels), grad_y.dtype.element_ty)
        grad = _back_through(
            grad, side, trace, row, 0, 1, there, channel, there_channel, size, plan
        )
        _store_sum(grad, grad_y, plus, row, there, channel, there_channel, size)


@triton.jit
def _store_sum(value, to, plus, row, there, channel, there_channel, size):
    """to = value + plus."""
    if plus is not None:
        value += _load(_rows(plus, row, size.channels), there, channel, there_channel)
    _store(value, _rows(to, row, size.channels), there, channel, there_channel)


@triton.jit
def _grad_state(state, grad_state, plus, grad_memory, side, trace, task, size, plan: tl.constexpr):
    """A tile of the gradient of slot 0, and of the memory where that is another slot."""
    first, first_channel = _tiles(task, size.channels, plan.rows, plan.channels)
    if first < size.batch:
        row = first + tl.arange(0, plan.rows)
        channel = first_channel + tl.arange(0, plan.channels)
        there, there_channel = row < size.batch, channel < size.channels
        grad = tl.zeros((plan.rows, plan.channels), grad_state.dtype.element_ty)
        memory = grad
        end = first + plan.rows
        if plan.first_sample:  # the program of row 0 sums up all rows, the others none
            end = tl.where(first == 0, size.batch, first)
        for sample_tile in range(first, end, plan.rows):
            sample = sample_tile + tl.arange(0, plan.rows)
            there_sample = sample < size.batch
            grad = _back_through(
                grad,
                side,
                trace,
                sample,
                size.batch,
                trace.rows // size.batch,
                there_sample,
                channel,
                there_channel,
                size,
                plan,
            )
            if grad_memory is not None:
                for chunk in range(size.chunks):
                    rows = _rows(grad_memory, chunk * size.batch + sample, size.channels)
                    memory += _load(rows, there_sample, channel, there_channel)
        if plan.kind == "dsu":
            context = _context_rows(state, row, size, plan)
            a = _activate(_load(context, there, channel, there_channel), plan.activation)
            grad *= _slope(a, plan.activation)
        if plan.first_sample:
            in_row_0 = (row == 0)[:, None]
            grad = tl.where(in_row_0, tl.sum(grad, axis=0)[None, :], 0.0)
            memory = tl.where(in_row_0, tl.sum(memory, axis=0)[None, :], 0.0)
        if plan.slots == 1:
            grad += memory
        else:
            carried = size.batch + row
            _store_sum(memory, grad_state, plus, carried, there, channel, there_channel, size)
        _store_sum(grad, grad_state, plus, row, there, channel, there_channel, size)


@triton.jit
def _input_rows(x, row, of_context: tl.constexpr, size, plan: tl.constexpr):
    """What rows of a trace read: y, or their sample's context."""
    if of_context:
        return _context_rows(x, row % size.batch, size, plan)
    else:
        return _rows(x, row, size.channels)


@triton.jit
def _store_weights(value, rows, rows_there, column, there_column, add: tl.constexpr):
    """Writes a tile, or adds to what is there."""
    if add:
        value += _load(rows, rows_there, column, there_column)
    _store(value, rows, rows_there, column, there_column)


@triton.jit
def _store_bias(rows_of_grads, to, place, there, add: tl.constexpr):
    """Writes the sums of [values, rows] over the rows, or adds them to what is there."""
    value = tl.sum(rows_of_grads, axis=1)
    if add:
        value += tl.load(to + place, mask=there, other=0.0)
    tl.store(to + place, value, mask=there)


@triton.jit
def _grad_w2(
    x, to, trace, task, of_context: tl.constexpr, size, add: tl.constexpr, plan: tl.constexpr
):
    """A tile of dgates^T hidden or dgates^T x, and of the bias with the first of its row."""
    if to.w2 is not None:
        hidden: tl.constexpr = trace.hidden is not None
        inputs = size.hidden if hidden else size.channels
        width: tl.constexpr = plan.units if hidden else plan.channels
        gates = plan.gates * size.channels
        first_gate, first_input = _tiles(task, inputs, plan.depth, width)
        if first_gate < gates:
            gate = first_gate + tl.arange(0, plan.depth)
            k = first_input + tl.arange(0, width)
            there_gate, there_k = gate < gates, k < inputs
            grad = tl.zeros((plan.depth, width), x.dtype.element_ty)
            bias = tl.zeros((plan.depth, plan.rows), x.dtype.element_ty)
            for first in range(0, trace.rows, plan.rows):
                row = first + tl.arange(0, plan.rows)
                there = row < trace.rows
                if hidden:
                    rows = _rows(trace.hidden, row, inputs)
                else:
                    rows = _input_rows(x, row, of_context, size, plan)
                dgates = _load_transposed(_rows(trace.dgates, row, gates), there, gate, there_gate)
                grad = _dot(dgates, _load(rows, there, k, there_k), grad, plan)
                bias += dgates
            _store_weights(grad, _rows(to.w2, gate, inputs), there_gate, k, there_k, add)
            if first_input == 0:
                _store_bias(bias, to.b2, gate, there_gate, add)


@triton.jit
def _grad_w1(
    x,
    to,
    stride,
    trace,
    task,
    of_context: tl.constexpr,
    size,
    add: tl.constexpr,
    plan: tl.constexpr,
):
    """A tile of dhidden^T f(x), and of the bias with the first of its row."""
    if to.w1 is not None:
        first, first_channel = _tiles(task, size.channels, plan.units, plan.channels)
        if first < size.hidden:
            unit = first + tl.arange(0, plan.units)
            channel = first_channel + tl.arange(0, plan.channels)
            there_unit, there_channel = unit < size.hidden, channel < size.channels
            grad = tl.zeros((plan.units, plan.channels), x.dtype.element_ty)
            bias = tl.zeros((plan.units, plan.rows), x.dtype.element_ty)
            for first_row in range(0, trace.rows, plan.rows):
                row = first_row + tl.arange(0, plan.rows)
                there = row < trace.rows
                dhidden = tl.trans(_hidden_gradient(trace, row, there, unit, there_unit, size))
                rows = _input_rows(x, row, of_context, size, plan)
                inputs = _load(rows, there, channel, there_channel)
                if of_context:
                    inputs = _activate(inputs, plan.activation)
                grad = _dot(dhidden, inputs, grad, plan)
                bias += dhidden
            _store_weights(
                grad, _rows(to.w1, unit, stride), there_unit, channel, there_channel, add
            )
            if to.b1 is not None:
                if first_channel == 0:
                    _store_bias(bias, to.b1, unit, there_unit, add)
