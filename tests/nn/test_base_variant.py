"""DLA-B stages: against a model that rewrites every value, their memory, their states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dla.nn import DLALayer, DLAStage, DLAState, MRLALayer
from refusals import assert_refused
from tolerances import MODELS, assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 6
FORMS: dict[str, dict[str, Any]] = {
    "paper": {"spec": "paper"},
    "official": {"spec": "official"},
    "paper_first_sample": {"spec": "paper", "context": "first_sample"},
    "official_first_sample": {"spec": "official", "context": "first_sample"},
    "official_dsu": {"spec": "official", "cell": "dsu"},
    "paper_sigmoid": {"spec": "paper", "gate": "sigmoid", "initial_state": "learned"},
    "static": {"cell": "none"},
}
each_form = pytest.mark.parametrize("form", FORMS)
each_fused = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


def make_stage(form: str, layers: int, channels: int = CHANNELS, **options: Any) -> DLAStage:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Tanh()) for _ in range(layers)]
    options = {"head_dim": channels // 2, "reduction": 2} | FORMS[form] | options
    return DLAStage(blocks, channels, "base", **options).double()


def images(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (3, CHANNELS, 5, 4), generator=generator, dtype=torch.float64)


# --- the equations, literally ---------------------------------------------------------------------


class Rewriting(nn.Module):
    """Eq. 2, 5 and 6 as they stand: every step rewrites the features of all earlier layers."""

    def __init__(self, stage: DLAStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        stage, form = self.stage, self.stage.layers[0].form
        step = self.of_features if form.gated == "features" else self.of_projections
        context = None
        if stage.cell is not None:
            context = stage.cell.initial_state(len(x), x.dtype, x.device)
        memory: list[Any] = []
        for block, layer in zip(stage.blocks, stage.layers, strict=True):
            x = block(x)
            if stage.cell is not None:
                context = stage.cell(x.mean((2, 3)), context)
            pairs = step(layer, x, context, memory)
            o = self.attention(layer, over_channels(layer.q_conv, x.mean((2, 3))), pairs)
            x = x + layer.drop_path(torch.relu(layer.norm(o)))
        return x

    def of_projections(
        self, layer: DLALayer, x: Tensor, context: Tensor, memory: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers; those of earlier layers are gated, each on its own."""
        memory[:] = [
            (
                k * self.gate(layer, k, context),
                v * self.gate(layer, v.mean((2, 3)), context)[:, :, None, None],
            )
            for k, v in memory
        ]
        memory.append((over_channels(layer.k_conv, x.mean((2, 3))), layer.v_conv(x)))
        return memory

    def of_features(
        self, layer: DLALayer, x: Tensor, context: Tensor, memory: list[tuple[Tensor, DLALayer]]
    ) -> list[tuple[Tensor, Tensor]]:
        """As above, but made anew from gated features."""
        memory[:] = [
            (u * self.gate(layer, u.mean((2, 3)), context)[:, :, None, None], owner)
            for u, owner in memory
        ]
        memory.append((x, layer))
        return [
            (over_channels(owner.k_conv, u.mean((2, 3))), owner.v_conv(u)) for u, owner in memory
        ]

    def gate(self, layer: DLALayer, u: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            return torch.ones_like(u)
        if layer.context == "first_sample":
            context = context[:, :1].expand_as(context)
        d = self.stage.cell(u, context)[0]
        return torch.sigmoid(d) if layer.form.gate == "sigmoid" else d

    def attention(self, layer: DLALayer, q: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        o = []
        for head in torch.arange(CHANNELS).split(layer.head_dim):
            scores = [(q[:, head] * k[:, head]).sum(1) / layer.head_dim**0.5 for k, _ in pairs]
            a = torch.softmax(torch.stack(scores), 0)
            values = [v[:, head] for _, v in pairs]
            o.append(sum(w[:, None, None, None] * v for w, v in zip(a, values, strict=True)))
        return torch.cat(o, dim=1)


def over_channels(conv: nn.Conv1d, y: Tensor) -> Tensor:
    return conv(y.unsqueeze(1)).squeeze(1)


@each_fused
@each_form
def test_five_layers_against_rewriting(form: str, fused: bool) -> None:
    """Training with drop path: outputs, gradients, running statistics; then evaluation."""
    stage = make_stage(form, 5, drop_path=0.3, fused=fused)
    naive = Rewriting(copy.deepcopy(stage))
    results = []
    for module in (stage, naive):
        torch.manual_seed(2)
        for step in range(3):
            x = images(seed=step).requires_grad_()
            module.zero_grad()
            out = module(x)
            out.square().sum().backward()
        gradients = {n.removeprefix("stage."): p.grad for n, p in module.named_parameters()}
        buffers = {n.removeprefix("stage."): b for n, b in module.named_buffers()}
        results.append((out, gradients | {"x": x.grad}, buffers, module.eval()(images())))
    (out, gradients, buffers, last), (naive_out, naive_gradients, naive_buffers, naive_last) = (
        results
    )
    assert_close(out, naive_out, name="training", table=MODELS)
    assert_close(last, naive_last, name="evaluation", table=MODELS)
    assert_gradients_close(gradients, naive_gradients, case=torch.float64, table=MODELS)
    for name, buffer in naive_buffers.items():
        if buffer.is_floating_point():
            assert_close(buffers[name], buffer, name=name, table=MODELS)


# --- memory ---------------------------------------------------------------------------------------


def saved_bytes(stage: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages kept for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = stage(x)  # alive, and with it every storage: no address is used twice
    del out
    return sum(kept.values())


@pytest.mark.parametrize("form", ["paper", "official", "static"])
def test_memory_grows_linearly_with_depth(form: str) -> None:
    """Every further layer costs the same, however many there are."""
    x = images(1, CHANNELS, 32, 32)
    depths = (2, 8, 32)
    kept = [saved_bytes(make_stage(form, depth), x) for depth in depths]
    early, late = ((kept[i + 1] - kept[i]) / (depths[i + 1] - depths[i]) for i in (0, 1))
    assert late == pytest.approx(early, rel=0.05)


def test_what_a_layer_keeps() -> None:
    """x alone; v is kept by the layers that read it."""
    x = images(1, CHANNELS, 32, 32).requires_grad_()
    size = x.numel() * x.element_size()
    for keep_output in (True, False):
        layer = DLALayer(CHANNELS, "base", head_dim=3).double()

        class Step(nn.Module):
            def forward(self, x: Tensor, layer=layer, keep_output=keep_output) -> Any:
                return layer(x, keep_output=keep_output)

        assert size <= saved_bytes(Step(), x) < 1.2 * size


# --- states ---------------------------------------------------------------------------------------


def test_layers_chain_into_a_stage() -> None:
    """What a user of lone layers does; any state serves any number of later layers."""
    stage = make_stage("official", 3)
    x, state = images(), None
    for block, layer in zip(stage.blocks, stage.layers, strict=True):
        x, state = layer(block(x), None, state, cell=stage.cell)
    assert isinstance(state, DLAState) and len(state.values) == 3
    assert state.keys.shape == state.gates.shape == (3, 3, CHANNELS)
    assert_close(x, stage(images()), table=MODELS)
    again, _ = stage.layers[2](stage.blocks[2](x), None, state, cell=stage.cell)
    assert again.shape == x.shape and len(state.values) == 3


def test_static_state() -> None:
    layer = MRLALayer(CHANNELS, "base", head_dim=3).double()
    _, state = layer(images())
    assert state.context.shape == state.gates.shape == (0, 3, CHANNELS)
    assert state.keys.shape == (1, 3, CHANNELS) and state.pooled == state.key_weights == ()


def base(**options: Any) -> DLALayer:
    return DLALayer(CHANNELS, "base", head_dim=3, **options).double()


def state_of(layer: DLALayer, **options: Any) -> DLAState:
    return layer(images(), **options)[1]


def test_bad_states() -> None:
    x = images()
    light = DLALayer(CHANNELS, head_dim=3).double()
    assert_refused(lambda: base()(x, x), "prev", "None", "torch.float64")
    assert_refused(lambda: base()(x, state=state_of(light)), "state", "base", "no memory")
    assert_refused(lambda: light(x, state=state_of(base())), "state", "light", "1 layers")
    lost = state_of(base(), keep_output=False)
    assert_refused(lambda: base()(x, state=lost), "state", "keep_output=False")
    other = state_of(base(gated="projections"))
    assert_refused(lambda: base()(x, state=other), "state", "features", "0 filters of 1 layers")
    assert_refused(lambda: base()(images(2, CHANNELS, 5, 4), state=state_of(base())), "state", "2")


BAD_MEMORY: dict[str, tuple[dict[str, Any], str, str]] = {
    "values no tuple": ({"values": None}, "state.values", "tuple"),
    "pooled no tuple": ({"pooled": 3}, "state.pooled", "tuple"),
    "filters no tuple": ({"key_weights": images()}, "state.key_weights", "tuple"),
    "value no tensor": ({"values": (None,)}, "values", "Tensor"),
    "shape of a value": ({"values": (images(3, CHANNELS, 4, 5),)}, "values[0]", "3, 6, 5, 4"),
    "mean no tensor": ({"pooled": (2.0,)}, "pooled", "Tensor"),
    "shape of a mean": ({"pooled": (images(3, 5),)}, "pooled[0]", "3, 6"),
    "shape of a filter": ({"key_weights": (images(3),)}, "key_weights[0]", "1, 1"),
    "keys no tensor": ({"keys": 3}, "keys", "Tensor"),
    "keys": ({"keys": images(1, 3, CHANNELS)}, "keys", "0, 3, 6"),
    "gates no tensor": ({"gates": 3}, "gates", "Tensor"),
    "gates of more layers": ({"gates": images(2, 3, CHANNELS)}, "gates", "1, 3, 6"),
    "dtype of gates": ({"gates": images(1, 3, CHANNELS).float()}, "gates", "float64"),
}


@each_fused
@pytest.mark.parametrize("bad", BAD_MEMORY)
def test_bad_memory(bad: str, fused: bool) -> None:
    """Of states made by hand. Fused, it is the op that names the argument."""
    changes, *words = BAD_MEMORY[bad]
    layer = base(fused=fused)
    state = state_of(layer)._replace(**changes)
    assert_refused(lambda: layer(images(), state=state), *words)


def test_bad_options() -> None:
    assert_refused(lambda: base(gated="values"), "gated", "features", "values")
    assert_refused(lambda: base(gated="features", cell="none"), "gated", "projections", "features")
    assert_refused(lambda: base(prev_conv=True), "prev_conv", "None", "base", "True")
    assert_refused(lambda: base(prev_from="output"), "prev_from", "None", "base", "output")
    assert_refused(lambda: DLALayer(CHANNELS, gated="features"), "gated", "None", "light")


def test_too_many_layers() -> None:
    state = state_of(base())
    many = state._replace(
        values=state.values * 64,
        pooled=state.pooled * 64,
        key_weights=state.key_weights * 64,
        gates=state.gates.repeat(64, 1, 1),
    )
    assert_refused(lambda: base()(images(), state=many), "values", "63", "64")
    blocks = [nn.Identity()] * 65
    assert_refused(
        lambda: DLAStage(blocks, CHANNELS, "base", head_dim=3), "blocks", "64", "fused=False", "65"
    )
    assert len(DLAStage(blocks, CHANNELS, "base", head_dim=3, fused=False).layers) == 65
    assert len(DLAStage(blocks[:64], CHANNELS, "base", head_dim=3).layers) == 64
