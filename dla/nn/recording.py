"""Where layers put their attention while somebody records it (`dla.viz.record_attention`)."""

from typing import NamedTuple

from torch import Tensor, nn


class AttentionRecord(NamedTuple):
    """What one layer attended to in one call; detached, in the compute dtype.

    Attributes:
        layer: the `DLALayer`.
        scores: [T, B, G] of G heads under ``variant="base"``, where layer t of the T layers so far
            has row t and this one the last; [B, G], attention to the layer itself, under "light".
        gates: what earlier layers are multiplied by: [T, B, C] under "base", the products of all
            gates so far, 1 for this layer; [B, C], the gate of p, under "light". None where there
            is no gate.
    """

    layer: nn.Module
    scores: Tensor
    gates: Tensor | None


# Innermost last. A plain list: layers look at it in every call, also inside compiled graphs.
recordings: list[list[AttentionRecord]] = []


def record(layer: nn.Module, scores: Tensor, gates: Tensor | None) -> None:
    """Adds to all recordings."""
    entry = AttentionRecord(layer, scores.detach(), None if gates is None else gates.detach())
    for recording in recordings:
        recording.append(entry)
