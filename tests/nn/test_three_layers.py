"""Gradients through three chained layers against finite differences, in every form there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dla.nn import DLAStage
from dla.nn.cells import CELLS

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 4


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("context", ["per_sample", "first_sample"])
@pytest.mark.parametrize("cell", [*CELLS, "none"])
@pytest.mark.parametrize("spec", ["paper", "official"])
@pytest.mark.parametrize("variant", ["light", "base"])
def test_gradients(variant: str, spec: str, cell: str, context: str, fused: bool) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Tanh()) for _ in range(3)]
    stage = DLAStage(
        blocks, CHANNELS, variant, spec, cell=cell, context=context, head_dim=2, reduction=2,
        initial_state="zeros" if cell == "none" else "learned", fused=fused,
    ).double()  # fmt: skip
    x = torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:  # gradcheck moves the parameters in place
        return stage(x)

    assert torch.autograd.gradcheck(run, (x, *stage.parameters()), fast_mode=True)
