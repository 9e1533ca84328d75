"""A layer that has found its arguments once uses them again; whatever changes, it notices."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from dla.nn import DLALayer, DLAState, DSUCell
from dla.nn import facts as facts_of_layers
from dla_kernels import native
from tolerances import assert_close

CHANNELS = 8
SHAPE = (3, CHANNELS, 4, 5)
pytestmark = pytest.mark.usefixtures("one_thread")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def fill(module: nn.Module) -> None:
    """Every parameter and buffer with numbers that make a difference."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)


def make_layer(**options: Any) -> tuple[DLALayer, nn.BatchNorm2d]:
    """A layer and the norm of its block's branch."""
    layer = DLALayer(CHANNELS, spec="official", cell="dsu", head_dim=4, **options)
    norm = nn.BatchNorm2d(CHANNELS)
    fill(layer)
    fill(norm)
    return layer, norm


def run(layer: DLALayer, norm: nn.Module, **choices: Any) -> Tensor:
    """One step in the middle of a stage."""
    generator = torch.Generator().manual_seed(1)
    x, prev = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    context = torch.rand(1, *SHAPE[:2], generator=generator)
    state = DLAState(context, None, SHAPE[2:], "dsu")
    torch.manual_seed(2)  # of drop path
    choices = {"join": True, "branch_norm": norm} | choices
    return layer(x, prev, state, **choices)[0]


def run_anew(layer: DLALayer, norm: nn.Module, **choices: Any) -> Tensor:
    layer._recalled = None
    return run(layer, norm, **choices)


@pytest.fixture(params=["native", "python"], autouse=True)
def unchanged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compare."""
    if request.param == "native":
        monkeypatch.setattr(facts_of_layers, "_unchanged", lambda: native.load().unchanged)
    else:
        in_python = facts_of_layers._unchanged_in_python
        monkeypatch.setattr(facts_of_layers, "_unchanged", lambda: in_python)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[DLALayer]:
    """The layers that looked for arguments, call by call."""
    seen: list[DLALayer] = []
    find = DLALayer._light_arguments

    def spy(self: DLALayer, *args: Any) -> Any:
        seen.append(self)
        return find(self, *args)

    monkeypatch.setattr(DLALayer, "_light_arguments", spy)
    return seen


def doubled(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(2 * parameter.detach())


def double(module: nn.Module, name: str) -> None:
    setattr(module, name, doubled(getattr(module, name)))


def replace(layer: DLALayer, name: str) -> None:
    other = copy.deepcopy(getattr(layer, name))
    for parameter in other.parameters():
        parameter.data *= 2
    setattr(layer, name, other)


Change = Callable[[DLALayer, nn.BatchNorm2d], object]
CHANGES: dict[str, Change] = {
    "context": lambda layer, _: setattr(layer, "context", "first_sample"),
    "head_dim": lambda layer, _: setattr(layer, "head_dim", 2),
    "gate": lambda layer, _: setattr(layer, "form", layer.form._replace(gate="identity")),
    "activation": lambda layer, _: setattr(layer.cell, "activation", "tanh"),
    "eps": lambda layer, _: setattr(layer.norm, "eps", 0.5),
    "eps of the branch": lambda _, norm: setattr(norm, "eps", 0.5),
    "mode of the norm": lambda layer, _: layer.norm.train(not layer.norm.training),
    "mode of the branch's norm": lambda _, norm: norm.train(not norm.training),
    "lam": lambda layer, _: double(layer, "lam"),
    "type of the norm": lambda layer, _: setattr(layer.norm, "__class__", DoubledNorm),
    "type of the branch's norm": lambda _, norm: setattr(norm, "__class__", DoubledNorm),
    "norm": lambda layer, _: setattr(layer, "norm", Doubled()),
    "parameters": lambda layer, _: vars(layer.v_conv).update(
        _parameters={"weight": doubled(layer.v_conv.weight)}
    ),
    "no norm": lambda layer, _: setattr(layer, "norm", None),
    "drop_path": lambda layer, _: setattr(layer, "drop_path", Doubled()),
    "hook": lambda layer, _: layer.norm.register_forward_hook(lambda *a: 2 * a[-1]),
    "hook before": lambda layer, _: layer.norm.register_forward_pre_hook(lambda _, a: 2 * a[0]),
    "hook of the branch": lambda _, norm: norm.register_forward_hook(lambda *a: 2 * a[-1]),
    "hook of drop path": lambda layer, _: layer.drop_path.register_forward_hook(
        lambda *a: 2 * a[-1]
    ),
    "forward of the norm": lambda layer, _: setattr(layer.norm, "forward", lambda x: 2 * x),
    "forward of drop path": lambda layer, _: setattr(layer.drop_path, "forward", lambda x: 2 * x),
    "pruned": lambda layer, _: prune.l1_unstructured(layer.v_conv, "weight", 0.5),
    "parametrized": lambda layer, _: parametrize.register_parametrization(
        layer.v_conv, "weight", Doubled()
    ),
    "parametrized itself": lambda layer, _: parametrize.register_parametrization(
        layer, "lam", Doubled()
    ),
    **{
        f"{module}.{name}": lambda layer, _, module=module, name=name: double(
            getattr(layer, module), name
        )
        for module in ("q_conv", "k_conv", "v_conv", "prev_conv", "norm")
        for name in ("weight", "bias")
        if module == "norm" or name == "weight"
    },
    **{
        name: lambda layer, _, name=name: replace(layer, name)
        for name in ("q_conv", "k_conv", "v_conv", "prev_conv", "cell", "norm")
    },
    **{
        f"cell.{name}": lambda layer, _, name=name: double(layer.cell, name)
        for name in ("w_hidden", "w_gates", "b_gates")
    },
    **{
        f"{name} of the branch": lambda _, norm, name=name: double(norm, name)
        for name in ("weight", "bias")
    },
}
BUFFERS: dict[str, Change] = {
    f"{name} {whose}": lambda layer, norm, name=name, whose=whose: setattr(
        layer.norm if whose == "of the norm" else norm,
        name,
        torch.full((CHANNELS,), 3.0),
    )
    for name in ("running_mean", "running_var")
    for whose in ("of the norm", "of the branch")
} | {
    "buffers": lambda layer, _: vars(layer.norm).update(
        _buffers={name: 3.0 * buffer for name, buffer in layer.norm._buffers.items()}
    )
}
DTYPES: dict[str, Change] = {
    "cell": lambda layer, _: layer.cell.double(),
    "q_conv": lambda layer, _: layer.q_conv.double(),
    "prev_conv": lambda layer, _: layer.prev_conv.double(),
    "lam": lambda layer, _: setattr(layer.lam, "data", layer.lam.data.double()),
    "norm": lambda layer, _: layer.norm.double(),
    "norm of the branch": lambda _, norm: norm.double(),
}


def assert_noticed(
    layer: DLALayer, norm: nn.BatchNorm2d, change: Change, searches: list[DLALayer]
) -> None:
    before = [run(layer, norm) for _ in range(2)][-1]
    assert searches == [layer]  # the second call had no need to
    change(layer, norm)
    after = run(layer, norm)
    assert not torch.allclose(before, after)
    assert searches == 2 * [layer]
    assert torch.equal(after, run_anew(layer, norm))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: str, training: bool, searches: list[DLALayer]) -> None:
    layer, norm = make_layer()
    assert_noticed(layer.train(training), norm.train(training), CHANGES[change], searches)


@pytest.mark.parametrize("change", BUFFERS)
def test_changed_buffers(change: str, searches: list[DLALayer]) -> None:
    layer, norm = make_layer()
    assert_noticed(layer.eval(), norm.eval(), BUFFERS[change], searches)


def test_changed_rate(searches: list[DLALayer]) -> None:
    layer, norm = make_layer()
    assert_noticed(layer, norm, lambda layer, _: setattr(layer.drop_path, "rate", 0.7), searches)


def test_changed_mode_of_drop_path(searches: list[DLALayer]) -> None:
    layer, norm = make_layer(drop_path=0.7)
    layer.drop_path.eval()
    assert_noticed(layer, norm, lambda layer, _: layer.drop_path.train(), searches)


def test_unfused(searches: list[DLALayer]) -> None:
    layer, norm = make_layer()
    layer.eval(), norm.eval()
    fused = [run(layer, norm) for _ in range(2)][-1]
    layer.fused = False
    assert_close(run(layer, norm), fused)
    assert searches == 2 * [layer]


def test_choices(searches: list[DLALayer]) -> None:
    """Other modules and flags in a call are looked at anew."""
    layer, norm = make_layer()
    layer.eval(), norm.eval()
    cell = DSUCell(CHANNELS)
    for choices in ({}, {"cell": cell}, {"join": False, "branch_norm": None}):
        searches.clear()
        outs = [run(layer, norm, **choices) for _ in range(2)]
        assert searches == [layer]
        assert torch.equal(*outs)
        assert torch.equal(outs[0], run_anew(layer, norm, **choices))


def test_values_in_place(searches: list[DLALayer]) -> None:
    """What an optimizer does to parameters needs no notice."""
    layer, norm = make_layer()
    layer.eval(), norm.eval()
    before = [run(layer, norm) for _ in range(2)][-1]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    layer.norm.weight.data = layer.norm.weight.data + 1
    after = run(layer, norm)
    assert searches == [layer]
    assert not torch.allclose(before, after)
    assert torch.equal(after, run_anew(layer, norm))


def test_wrong_dtype() -> None:
    """A message in the layer's words, whatever was right before."""
    layer, norm = make_layer()
    for _ in range(2):
        run(layer, norm)
    layer.double()
    with pytest.raises(TypeError, match=r"x: expected torch.float64 as the layer's parameters"):
        run(layer, norm)


@pytest.mark.parametrize("change", DTYPES)
def test_parts_of_another_dtype(change: str, searches: list[DLALayer]) -> None:
    """They are cast in every call, as by a layer that never saw them in another dtype."""
    layer, norm = make_layer()
    layer.eval(), norm.eval()
    before = [run(layer, norm) for _ in range(2)][-1]
    DTYPES[change](layer, norm)
    assert_close(run(layer, norm), before)
    assert len(searches) == 2


def test_copies(searches: list[DLALayer]) -> None:
    """A shallow copy has the modules, but not the attributes, in common."""
    layer, norm = make_layer()
    layer.eval(), norm.eval()
    for _ in range(2):
        run(layer, norm)
    shallow = copy.copy(layer)
    shallow.context = "first_sample"
    assert not torch.allclose(run(shallow, norm), run(layer, norm))
    assert searches == [layer, shallow]


def test_replica() -> None:
    """nn.DataParallel makes modules with dicts of their own and all attributes of the first."""
    layer, norm = make_layer()
    for _ in range(2):
        run(layer, norm)
    replica = layer._replicate_for_data_parallel()
    assert layer._recalled.facts.hold(layer)
    assert not replica._recalled.facts.hold(replica)


def test_freed_at_once() -> None:
    """No cycle of references keeps a layer alive until the garbage collector runs."""
    layer, norm = make_layer()
    for _ in range(2):
        run(layer, norm)
    assert layer._recalled is not None
    found = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert found() is None
    finally:
        gc.enable()


def test_results_of_functions() -> None:
    """Weights that were computed for one call are not kept, nor is their graph."""
    layer, _ = make_layer()
    weights = {name: 2 * parameter for name, parameter in layer.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    x, prev = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    state = DLAState(torch.rand(1, *SHAPE[:2], generator=generator), None, SHAPE[2:], "dsu")
    torch.func.functional_call(layer, weights, (x, prev, state))
    assert layer._recalled is None
