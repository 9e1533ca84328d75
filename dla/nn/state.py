"""What one layer of a stage hands to the next."""

from typing import NamedTuple

import torch
from torch import Tensor

from dla_kernels.ops.common import describe


class DLAState(NamedTuple):
    """Immutable; valid for one stage, batch, size and device.

    Attributes:
        context: the cell's state [S, B, C] in the compute dtype; S = 0 for a static layer.
        output: o of the layer that made this state [B, C, H, W], where the next layer reads it
            (``prev_from="output"``), else None.
        size: (H, W) of the features.
    """

    context: Tensor
    output: Tensor | None
    size: tuple[int, int]


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
