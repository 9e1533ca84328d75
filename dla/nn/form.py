"""The choices that make one layer of the family out of another, and the presets of them."""

import math
from typing import Any, NamedTuple

from torch import nn

from dla.nn.cells import CELLS, INITIAL_STATES, Cell
from dla.nn.checks import boolean
from dla_kernels.ops.base_attention import GATED
from dla_kernels.ops.cell import ACTIVATIONS
from dla_kernels.ops.checks import one_of
from dla_kernels.ops.common import describe
from dla_kernels.ops.step_checks import GATES, STATIC

VARIANTS = ("light", "base")
SPECS = ("paper", "official")
SOURCES = ("output", "shortcut")


class Form(NamedTuple):
    """The choices that a spec presets, each open to an argument of its own.

    None where the variant has no such choice.
    """

    cell: str
    gate: str
    prev_conv: bool | None = None
    prev_from: str | None = None
    gated: str | None = None


def resolve_form(
    variant: str,
    spec: str,
    cell: str | None,
    gate: str | None,
    prev_conv: bool | None,
    prev_from: str | None,
    gated: str | None,
) -> Form:
    """The preset of ``spec`` where an argument is None, else the argument."""
    one_of("variant", variant, VARIANTS)
    paper = one_of("spec", spec, SPECS) == "paper"
    if cell is None:
        cell = "dsu" if paper else "dsu_split"
    static = one_of("cell", cell, (*CELLS, STATIC)) == STATIC
    if static and gate is not None:
        raise ValueError(f"gate: expected None under cell={STATIC!r}, which has none, got {gate!r}")
    if gate is None:
        gate = "identity" if paper or static else CELLS[cell].official_gate
    one_of("gate", gate, GATES)
    if variant == "base":
        _refuse(variant, prev_conv=prev_conv, prev_from=prev_from)
        if gated is None:
            gated = "features" if paper and not static else "projections"
        return Form(cell, gate, gated=one_of("gated", gated, GATED[:1] if static else GATED))
    _refuse(variant, gated=gated)
    if prev_conv is None:
        prev_conv = not (paper or static)
    if prev_from is None:
        prev_from = "output" if paper and not static else "shortcut"
    boolean("prev_conv", prev_conv)
    return Form(cell, gate, prev_conv, one_of("prev_from", prev_from, SOURCES))


def _refuse(variant: str, **choices: Any) -> None:
    for name, value in choices.items():
        if value is not None:
            raise ValueError(f"{name}: expected None under variant={variant!r}, got {value!r}")


def check_kind(cell: Cell | None, kind: str, channels: int) -> None:
    """Raises unless ``cell`` is what the layer was made for; None is of the kind "none"."""
    if cell is not None and not isinstance(cell, Cell):
        raise TypeError(f"cell: expected a Cell or None, got {describe(cell)}")
    found = STATIC if cell is None else cell.kind
    if found != kind:
        raise ValueError(
            f"cell: expected one of kind {kind!r}, got {found!r}; a layer made with shared=True "
            "takes it from its caller"
        )
    if cell is not None and cell.channels != channels:
        raise ValueError(f"cell: expected one of {channels} channels, got one of {cell.channels}")


def channel_kernel_size(channels: int) -> int:
    """ks(C): the odd size of the convolutions over the channel axis."""
    size = int(abs((math.log2(channels) + 1) / 2))
    return size if size % 2 else size + 1


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 convolution without bias; weights from N(0, 2 / 9), its fan being 9.

    ``spec="official"`` takes their N(0, 2 / (9 C)), the rule for dense convolutions.
    """

    def __init__(self, channels: int, spec: str) -> None:
        self._fan = 9 * channels if spec == "official" else 9  # Conv2d resets the parameters
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / self._fan))


def shared_parts(
    channels: int,
    form: Form,
    spec: str,
    reduction: int,
    activation: str,
    initial_state: str,
) -> tuple[Cell | None, nn.Conv2d | None]:
    """What the layers of a stage share: the cell and prev_conv, as far as ``form`` has them."""
    one_of("activation", activation, ACTIVATIONS)
    one_of("initial_state", initial_state, INITIAL_STATES)
    cell = None
    if form.cell != STATIC:
        cell = CELLS[form.cell](channels, reduction, activation, initial_state)
    return cell, DepthwiseConv(channels, spec) if form.prev_conv else None
