"""Channel attention: DIA layers fused and unfused, their equations, SE and ECA gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dla.nn import Cell, DIALayer, DIAStage, DLALayer, DSUCell, DSUSplitCell, ECAGate, SEGate
from refusals import assert_refused
from tolerances import MODELS, assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 6
CELLS = ("dsu", "dsu_split", "dia", "lstm", "rnn")
each_cell = pytest.mark.parametrize("cell", CELLS)
each_fused = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


class Block(nn.Module):
    """The smallest block that keeps branch and shortcut apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.conv(x)), x


def make_stage(cell: str, blocks: int = 3, **options: Any) -> DIAStage:
    torch.manual_seed(0)
    options = {"reduction": 2, "initial_state": "learned"} | options
    return DIAStage([Block() for _ in range(blocks)], CHANNELS, cell, **options).double()


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (3, CHANNELS, 5, 4), generator=generator, dtype=torch.float64)


@each_cell
@each_fused
def test_the_equations(cell: str, fused: bool) -> None:
    stage = make_stage(cell, fused=fused)
    x = images()
    expected, context = x, stage.cell.initial_state(3, x.dtype, x.device)
    for block in stage.blocks:
        u, shortcut = block.parts(expected)
        context = stage.cell(u.mean((2, 3)), context)
        h = torch.sigmoid(context[0]) if cell == "dsu" else context[0]
        expected = torch.relu(u * h[:, :, None, None] + shortcut)
    assert_close(stage(x), expected, table=MODELS)


@each_cell
def test_fused_and_unfused(cell: str) -> None:
    results = []
    fused, unfused = make_stage(cell), make_stage(cell, fused=False)
    for stage in (fused, unfused):
        x = images().requires_grad_()
        out = stage(x)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in stage.named_parameters()}
        results.append((out, gradients | {"x": x.grad}))
    assert fused.state_dict().keys() == unfused.state_dict().keys()
    assert_close(results[0][0], results[1][0], table=MODELS)
    assert_gradients_close(results[0][1], results[1][1], case=torch.float64, table=MODELS)


@each_cell
@each_fused
def test_three_layers_numerically(cell: str, fused: bool) -> None:
    stage = make_stage(cell, fused=fused)
    x = images(2, CHANNELS, 2, 3).requires_grad_()

    def run(x: Tensor, *_: Tensor) -> Tensor:  # gradcheck moves the parameters in place
        return stage(x)

    assert torch.autograd.gradcheck(run, (x, *stage.parameters()))


@each_fused
def test_lone_layers_make_a_stage(fused: bool) -> None:
    stage = make_stage("dsu_split", fused=fused)
    x, state = images(), None
    for block in stage.blocks:
        layer = DIALayer(CHANNELS, "dsu_split", 2, fused=fused).double()
        layer.cell = stage.cell
        x, state = layer(*block.parts(x), state)
    assert_close(x, stage(images()), table=MODELS)
    assert state.context.shape == (2, 3, CHANNELS) and state.values == ()


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    stage = make_stage("dsu_split")
    compiled = torch.compile(copy.deepcopy(stage), fullgraph=True, backend="aot_eager")
    assert_close(compiled(images()), stage(images()), table=MODELS)


@pytest.mark.parametrize("gate", [SEGate(32), ECAGate(32)], ids=["se", "eca"])
def test_gates(gate: nn.Module) -> None:
    y = torch.randn(3, 32)
    h = gate(y)
    assert h.shape == y.shape and ((h > 0) & (h < 1)).all()
    assert copy.deepcopy(gate).bfloat16()(y).dtype == torch.float32
    assert (
        sum(p.numel() for p in gate.parameters())
        == {"SEGate": 128, "ECAGate": 3}[type(gate).__name__]
    )


def layer() -> DIALayer:
    return DIALayer(CHANNELS, "dsu_split", 2).double()


def test_bad_input() -> None:
    u, other = images(), DLALayer(CHANNELS, spec="official", head_dim=3, reduction=3)
    assert_refused(lambda: layer()([1.0], u), "u", "Tensor", "list")
    assert_refused(lambda: layer()(images(2, 5, 5, 4), u), "u", "6", "2, 5, 5, 4")
    assert_refused(lambda: layer()(u.float(), u), "u", "float64", "float32")
    assert_refused(lambda: layer()(u, images(3, CHANNELS, 4, 5)), "shortcut", "3, 6, 5, 4")
    assert_refused(lambda: layer()(u, u.float()), "shortcut", "float64", "float32")
    assert_refused(lambda: layer()(u, 1.0), "shortcut", "Tensor", "float 1.0")
    assert_refused(lambda: layer()(u, u, u), "state", "DLAState", "Tensor")
    lstm = DIALayer(CHANNELS, "lstm").double()(u, u)[1]
    assert_refused(lambda: layer()(u, u, lstm), "state", "dsu_split", "lstm")
    wrong = other(u.float(), u.float())[1]
    assert_refused(lambda: layer()(u, u, wrong), "state", "float64", "float32")
    assert_refused(lambda: layer()(u, u, cell=DSUCell(CHANNELS)), "cell", "dsu_split", "'dsu'")
    lone = DIALayer(CHANNELS, "dsu_split", shared=True)
    assert_refused(lambda: lone(u, u), "cell", "shared=True", "'none'")
    ours, theirs = (DSUSplitCell(CHANNELS, 2).double() for _ in range(2))
    middle = lone(u, u, lone(u, u, cell=theirs)[1], cell=theirs)[1]
    assert_refused(lambda: lone(u, u, middle, cell=ours), "state", "another cell", "state=None")


@pytest.mark.parametrize("kind", ["lstm", "rnn"])
def test_cells_without_a_hidden_layer_have_no_reduction(kind: str) -> None:
    cell = DIALayer(CHANNELS, kind, reduction=7).cell
    assert "hidden" not in repr(cell)


def test_replica_of_data_parallel() -> None:
    """It has its parameters as plain attributes."""
    layer = DIALayer(CHANNELS, "dsu_split").double()
    replica = layer._replicate_for_data_parallel()
    replica.cell = layer.cell._replicate_for_data_parallel()
    for name, parameter in layer.cell.named_parameters():
        replica.cell.__dict__[name] = parameter.clone()
    u = images()
    assert torch.equal(replica(u, u)[0], layer(u, u)[0])


def test_bad_options() -> None:
    assert_refused(lambda: DIALayer(CHANNELS, "gru"), "cell", "dsu_split", "gru")
    assert_refused(lambda: DIALayer(CHANNELS, "dsu", 7), "reduction", "6", "7")
    assert_refused(lambda: DIALayer(0, "dsu"), "channels", "1", "0")
    assert_refused(lambda: DIALayer(CHANNELS, ["dsu"]), "cell", "dsu_split", "['dsu']")
    assert_refused(lambda: DIALayer(CHANNELS, fused=1), "fused", "True or False", "int 1")
    assert_refused(lambda: DIALayer(CHANNELS, shared=1), "shared", "True or False", "int 1")
    assert_refused(lambda: DIAStage([], CHANNELS, "dsu"), "blocks", "one", "none")
    assert_refused(lambda: DIAStage([None], CHANNELS), "blocks[0]", "Module", "NoneType")
    assert_refused(lambda: DIAStage([nn.ReLU()], CHANNELS), "blocks[0]", "parts(x)", "ReLU")
    assert_refused(lambda: SEGate(8), "reduction", "8", "16")
    assert_refused(lambda: ECAGate(0), "channels", "1", "0")
    for gate in (SEGate(32), ECAGate(32)):
        assert_refused(lambda gate=gate: gate(torch.ones(2, 32, 1, 1)), "y", "[B, 32]", "1, 1]")
        assert_refused(lambda gate=gate: gate(torch.ones(2, 32).int()), "y", "floating", "int32")
    assert_refused(lambda: Cell(32), "Cell", "DSUCell")
