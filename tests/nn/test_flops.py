"""FlopCounterMode counts the same whether layers are fused or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dla_kernels
from dla.models import create_model
from dla.nn import DLALayer, DLAStage

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 8


def convolution_backward_flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
    out_shape: Any,
) -> int:
    """Per wanted gradient what the convolution itself costs. torch's formula for that of the weight
    knows no groups: of a depthwise convolution it counts C times too many."""
    wanted = rest[-1]
    return 2 * prod(grad_shape) * prod(weight_shape[1:]) * sum(wanted[:2])


def flops(run: Callable[[], Any]) -> int:
    corrected = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        run()
    return counter.get_total_flops()


def training_step(module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    module(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("cell", ["dsu", "dsu_split", "dia", "lstm", "rnn", "none"])
@pytest.mark.parametrize("spec", ["paper", "official"])
@pytest.mark.parametrize("variant", ["light", "base"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_stages(variant: str, spec: str, cell: str, blocks: int) -> None:
    """The initial state is learned: its gradient, which fused steps always count, is wanted."""

    def stage(fused: bool) -> DLAStage:
        convs = [nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(blocks)]
        options = {"initial_state": "learned", "fused": fused}
        return DLAStage(convs, CHANNELS, variant, spec, cell=cell, **options)

    fused, unfused = stage(True), stage(False)
    x = torch.randn(3, CHANNELS, 5, 6)
    assert flops(lambda: training_step(fused, x)) == flops(lambda: training_step(unfused, x))
    fused.eval()
    unfused.eval()
    forward = flops(lambda: fused(x))
    with torch.no_grad():
        assert forward == flops(lambda: fused(x)) == flops(lambda: unfused(x))


@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b", "resnet20_dia"])
@torch.no_grad()
def test_models(name: str) -> None:
    fused, unfused = (create_model(name, fused=fused).eval() for fused in (True, False))
    x = torch.randn(2, 3, 16, 16)
    assert flops(lambda: fused(x)) == flops(lambda: unfused(x)) > 0


def test_of_one_layer_by_hand() -> None:
    """Two depthwise convolutions; two runs of a cell with two bottlenecks, of hidden width 2."""
    layer = DLALayer(CHANNELS, spec="official", cell="dsu_split", reduction=4)
    x = torch.randn(3, CHANNELS, 5, 6)
    convolutions = 2 * (2 * 9 * 3 * 8 * 5 * 6)
    cell = 2 * (2 * 3 * (8 * 2 + 2 * 24))
    forward = convolutions + 2 * cell
    assert flops(lambda: layer(x, prev=x)) == forward
    assert flops(lambda: training_step(lambda x: layer(x, prev=x)[0], x)) == 3 * forward


def test_of_one_cell_by_hand() -> None:
    y, state = torch.randn(3, 8), torch.randn(1, 3, 8)
    params = torch.randn(2, 16), torch.randn(24, 2), torch.randn(24)
    forward = 2 * 3 * (2 * 16 + 24 * 2)
    assert flops(lambda: dla_kernels.cell(y, state, params, "dsu")) == forward
    step = functools.partial(dla_kernels.cell, state=state, params=params, kind="dsu")
    assert flops(lambda: training_step(step, y)) == 3 * forward
