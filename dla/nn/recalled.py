"""Arguments that a light layer found in one call, for calls to which they apply, too."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dla.nn.cells import Cell
from dla.nn.facts import Facts
from dla.nn.state import DLAState, stage_of

if TYPE_CHECKING:
    from dla.nn.layer import DLALayer


class LightArguments(NamedTuple):
    """What a layer passes to light_attention beside features and state, and what is left to it.

    tensors: those from q_weight to drop_scale.
    finishes: whether the op goes on from o to the end.
    keep_output: whether the next state has o.
    gated: whether there are gates.
    branch_norm: the module that the op stands for, if any.
    """

    cell_params: list[Tensor]
    tensors: tuple[Tensor | None, ...]
    flags: dict[str, Any]
    finishes: bool
    keep_output: bool
    gated: bool
    branch_norm: nn.BatchNorm2d | None


class Recalled(NamedTuple):
    """A layer's arguments and when they apply. To check and to find arguments takes as long as a
    small map: a call that recalls them leaves all checks to the op.

    choices: of the call, by identity.
    facts: what the arguments follow from.
    dtype: of features.
    reads_output: whether p is the output in the state, unless it is given.
    rest: of the state, from ``cell`` on.
    """

    choices: tuple[Any, ...]
    arguments: LightArguments
    facts: Facts
    dtype: torch.dtype
    reads_output: bool
    rest: tuple[Any, ...]

    def attend(
        self,
        layer: DLALayer,
        x: Tensor,
        prev: Tensor | None,
        state: DLAState | None,
        choices: tuple[Any, ...],
    ) -> tuple[Tensor, ...] | None:
        """The op's results, or None: the layer has to look for arguments, or to find what is wrong
        with those of the call, which may be anything."""
        try:
            p = self._previous(layer, x, prev, state, choices)
            return None if p is None else layer.attend(x, p, state, self.arguments)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None

    def _previous(
        self,
        layer: DLALayer,
        x: Tensor,
        prev: Tensor | None,
        state: DLAState | None,
        choices: tuple[Any, ...],
    ) -> Tensor | None:
        """p of the call; None where the arguments do not apply."""
        if type(state) is not DLAState or not all(map(is_, choices, self.choices)):
            return None
        p = state.output if prev is None and self.reads_output else prev
        applies = (
            isinstance(x, Tensor)
            and isinstance(p, Tensor)
            and isinstance(state.context, Tensor)
            and x.dtype == p.dtype == self.dtype
            and x.shape[2:] == state.size
            and state[3:] == self.rest
            and self.facts.hold(layer)
        )
        return p if applies else None


def recall(
    layer: DLALayer,
    x: Tensor,
    prev: Tensor | None,
    cell: Cell | None,
    prev_conv: nn.Conv2d | None,
    choices: tuple[Any, ...],
    arguments: LightArguments,
) -> Recalled | None:
    """What spares the next call to find these arguments again; None where it has to."""
    *_, join, branch_norm = choices
    if (
        not (layer.fused and arguments.finishes and arguments.flags["join"] is join)
        or prev is None
        or arguments.tensors[0].dtype != x.dtype
    ):
        return None
    facts = Facts()
    facts.own(layer, "fused", "variant", "form", "context", "head_dim")
    facts.own(layer, "_modules", "_parameters")
    facts.items(layer._modules, "cell", "prev_conv", "q_conv", "k_conv", "v_conv")
    facts.items(layer._modules, "norm", "drop_path")
    facts.items(layer._parameters, "lam")
    for conv in (layer.q_conv, layer.k_conv, layer.v_conv, prev_conv):
        if conv is not None:
            facts.parameters(conv, "weight")
    if cell is not None:
        facts.attributes(cell, "activation")
        facts.parameters(cell, *cell._bounds)
    for norm in (layer.norm, branch_norm):
        if norm is not None:
            facts.plain(norm)
            facts.attributes(norm, "training", "eps")
            facts.parameters(norm, "weight", "bias")
            facts.buffers(norm, "running_mean", "running_var")
    facts.plain(layer.drop_path)
    facts.attributes(layer.drop_path, "training", "rate")
    if not facts.cover([*arguments.cell_params, *arguments.tensors]):
        return None
    reads_output = layer.form.prev_from == "output"
    rest = DLAState(x, None, (), layer.form.cell, stage_of(layer.cell, cell))[3:]
    return Recalled(choices, arguments, facts, x.dtype, reads_output, rest)
