"""What one layer of a stage hands to the next."""

from typing import NamedTuple

import torch
from torch import Tensor

from dla.nn.cells import Cell
from dla.nn.checks import match_autocast
from dla.nn.form import channel_kernel_size
from dla_kernels.ops.checks import like
from dla_kernels.ops.common import describe
from dla_kernels.ops.step_checks import STATIC


class DLAState(NamedTuple):
    """Immutable; valid for one stage, batch, size and device.

    All but features are of the compute dtype: float64 for float64 features, else float32.

    Attributes:
        context: the cell's state [S, B, C]; S = 0 for a static layer.
        output: o of the layer that made this state [B, C, H, W], where the next layer reads it
            (``variant="light"``, ``prev_from="output"``), else None.
        size: (H, W) of the features.
        cell: the kind of cell that ``context`` is the state of, or "none".
        stage: `stage_of` the layers that made it.
        values, keys, gates, pooled, key_weights: memory of the T layers so far, under
            ``variant="base"``; the arguments of these names of ``dla_kernels.base_attention``.
            ``keys`` is None where there is none.
    """

    context: Tensor
    output: Tensor | None
    size: tuple[int, int]
    cell: str
    stage: int | None = None
    values: tuple[Tensor, ...] = ()
    keys: Tensor | None = None
    gates: Tensor | None = None
    pooled: tuple[Tensor, ...] = ()
    key_weights: tuple[Tensor, ...] = ()


def stage_of(own: Cell | None, cell: Cell | None) -> int | None:
    """What tells one stage from others: the cell that its layers share. Layers with cells of their
    ``own`` may form stages as they like, and compiled code does not look: both give None."""
    shared = own is None and cell is not None and not torch.compiler.is_compiling()
    return id(cell) if shared else None


def check_state(
    state: object, cell: Cell | None, stage: int | None, x: Tensor, dtype: torch.dtype
) -> None:
    """Raises unless ``state`` fits features ``x``, the cell and its stage."""
    if not isinstance(state, DLAState):
        raise TypeError(f"state: expected a DLAState or None, got {type(state).__name__}")
    batch, channels, height, width = x.shape
    slots, kind = (cell.slots, cell.kind) if cell else (0, STATIC)
    context = state.context
    if not isinstance(context, Tensor) or context.shape != (slots, batch, channels):
        raise ValueError(
            f"state: expected the context of {slots} slots, batch {batch} and {channels} channels, "
            f"[{slots}, {batch}, {channels}], got {describe(context)}: a state serves only the "
            "stage and the batch that it was made in"
        )
    if context.dtype != dtype or context.device != x.device:
        raise ValueError(
            f"state: expected a context of {dtype} on {x.device} beside x of {x.dtype}, "
            f"got {describe(context)}"
        )
    if state.size != (height, width):
        raise ValueError(
            f"state: expected the size {(height, width)} of x, got {state.size!r}: a new stage "
            "starts with state=None"
        )
    if state.cell != kind:
        raise ValueError(f"state: expected that of a cell of kind {kind!r}, got {state.cell!r}")
    if None not in (stage, state.stage) and state.stage != stage:
        raise ValueError(
            "state: expected one made with the cell of this call, got one of a stage with another "
            "cell: a new stage starts with state=None"
        )


def check_memory(state: DLAState, variant: str, static: bool, gated: str | None) -> None:
    """Raises unless ``state`` has the memory that layers of this form make, or none for "light"."""
    if (state.keys is None) != (variant == "light"):
        found = "no memory" if state.keys is None else f"the memory of {len(state.values)} layers"
        raise ValueError(
            f"state: expected one of a layer of variant={variant!r}, got one with {found}: it is "
            "from another variant, or from a layer called with keep_output=False"
        )
    for name, tensors in (
        ("values", state.values),
        ("pooled", state.pooled),
        ("key_weights", state.key_weights),
    ):
        if not isinstance(tensors, tuple):
            raise TypeError(f"state.{name}: expected a tuple of tensors, got {describe(tensors)}")
    layers = len(state.values)
    filters = layers if gated == "features" else 0
    if (len(state.pooled), len(state.key_weights)) != (0 if static else layers, filters):
        raise ValueError(
            f"state: expected the memory of layers with gated={gated!r} and "
            f"{'no' if static else 'a'} cell, got {len(state.pooled)} means and "
            f"{len(state.key_weights)} filters of {layers} layers"
        )


def check_tensors(state: DLAState, x: Tensor, gated: str | None) -> None:
    """Raises unless the memory in ``state``, which `check_memory` has passed, is of such tensors as
    layers make of ``x``. The fused ops look for themselves."""
    if state.keys is None:
        return
    dtype, layers = state.context.dtype, len(state.values)
    for index, value in enumerate(state.values):
        matched = match_autocast(value, x)
        like(f"state.values[{index}]", matched, x.shape, x.dtype, x.device)
    for index, mean in enumerate(state.pooled):
        like(f"state.pooled[{index}]", mean, x.shape[:2], dtype, x.device)
    filters = (1, 1, channel_kernel_size(x.shape[1]))
    for index, weight in enumerate(state.key_weights):
        like(f"state.key_weights[{index}]", weight, filters, dtype, x.device)
    counts = {"keys": 0 if gated == "features" else layers, "gates": len(state.pooled)}
    for name, count in counts.items():
        shape = (count, *x.shape[:2])
        like(f"state.{name}", getattr(state, name), shape, dtype, x.device)
