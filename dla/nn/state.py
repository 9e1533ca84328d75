"""What one layer of a stage hands to the next."""

from typing import NamedTuple

import torch
from torch import Tensor

from dla_kernels.ops.common import describe


class DLAState(NamedTuple):
    """Immutable; valid for one stage, batch, size and device.

    All but features are of the compute dtype: float64 for float64 features, else float32.

    Attributes:
        context: the cell's state [S, B, C]; S = 0 for a static layer.
        output: o of the layer that made this state [B, C, H, W], where the next layer reads it
            (``variant="light"``, ``prev_from="output"``), else None.
        size: (H, W) of the features.
        values, keys, gates, pooled, key_weights: memory of the T layers so far, under
            ``variant="base"``; the arguments of these names of ``dla_kernels.base_attention``.
            ``keys`` is None where there is none.
    """

    context: Tensor
    output: Tensor | None
    size: tuple[int, int]
    values: tuple[Tensor, ...] = ()
    keys: Tensor | None = None
    gates: Tensor | None = None
    pooled: tuple[Tensor, ...] = ()
    key_weights: tuple[Tensor, ...] = ()


def check_state(state: object, slots: int, x: Tensor, dtype: torch.dtype) -> DLAState:
    """``state`` if it fits features ``x`` and a cell of ``slots`` slots, else an error."""
    if not isinstance(state, DLAState):
        raise TypeError(f"state: expected a DLAState or None, got {type(state).__name__}")
    batch, channels, height, width = x.shape
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
            f"state: expected one of a stage with maps of {height}x{width} as in x, "
            f"got one of {state.size[0]}x{state.size[1]}: a new stage starts with state=None"
        )
    return state


def check_memory(state: DLAState, variant: str, static: bool, gated: str | None) -> None:
    """Raises unless ``state`` has the memory that layers of this form make, or none for "light"."""
    if (state.keys is None) != (variant == "light"):
        found = "no memory" if state.keys is None else f"the memory of {len(state.values)} layers"
        raise ValueError(
            f"state: expected one of a layer of variant={variant!r}, got one with {found}: it is "
            "from another variant, or from a layer called with keep_output=False"
        )
    layers = len(state.values)
    filters = layers if gated == "features" else 0
    if (len(state.pooled), len(state.key_weights)) != (0 if static else layers, filters):
        raise ValueError(
            f"state: expected the memory of layers with gated={gated!r} and "
            f"{'no' if static else 'a'} cell, got {len(state.pooled)} means and "
            f"{len(state.key_weights)} filters of {layers} layers"
        )
