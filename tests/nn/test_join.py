"""Blocks that leave the end of their residual branch, its last norm and the sum, to the stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dla.models import create_model
from dla.nn import DIAStage, DLALayer, DLAStage
from norms import without_bias
from refusals import assert_refused
from tolerances import MODELS, assert_close, assert_gradients_close

CHANNELS = 8


class Block(nn.Module):
    """The smallest such block."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 1), norm

    def raw_parts(self, x: Tensor) -> tuple[Tensor, nn.Module | None, Tensor]:
        return self.conv(x), self.norm, x

    def forward(self, x: Tensor) -> Tensor:
        branch, norm, shortcut = self.raw_parts(x)
        return torch.relu((branch if norm is None else norm(branch)) + shortcut)


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(CHANNELS)
    norm.register_forward_hook(lambda module, inputs, output: output * 2)
    return norm


class OwnNorm(nn.BatchNorm2d):
    """A subclass may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


NORMS = {
    "plain": lambda: nn.BatchNorm2d(CHANNELS),
    "momentum None": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "no bias": lambda: without_bias(CHANNELS),
    "no running statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "eps": lambda: nn.BatchNorm2d(CHANNELS, eps=0.1),
    "none": lambda: None,
    "hooked": hooked,
    "subclass": lambda: OwnNorm(CHANNELS),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
}
FORMS = {
    "light official": {"spec": "official"},
    "light paper": {"spec": "paper"},
    "light, own norm": {"spec": "official", "norm": False},
    "base": {"variant": "base", "spec": "official"},
    "static": {"cell": "none", "spec": "official", "prev_from": "shortcut", "prev_conv": False},
}
each_form = pytest.mark.parametrize("form", FORMS)


def stage(form: str, norm: str, **options: Any) -> DLAStage:
    torch.manual_seed(0)
    blocks = [Block(NORMS[norm]()) for _ in range(3)]
    made = DLAStage(blocks, CHANNELS, head_dim=4, reduction=2, **FORMS[form] | options).double()
    with torch.no_grad():
        for parameter in made.parameters():  # affine norms that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, CHANNELS, 5, 4, generator=generator, dtype=torch.float64)


class Opaque(nn.Module):
    """The same block, all of it its own business."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@each_form
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_if_the_block_did_it(form: str, norm: str, training: bool) -> None:
    """Outputs, gradients and running statistics, over two steps."""
    ours, plain = stage(form, norm), stage(form, norm, fused=False)
    plain.blocks = nn.ModuleList(Opaque(block) for block in plain.blocks)
    results = []
    for model in (ours, plain):
        model.train(training)
        x = images().requires_grad_()
        model(x)
        out = model(x)
        out.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append((out.detach(), [x.grad, *gradients], list(model.buffers())))
    (out, gradients, buffers), (want_out, want_gradients, want_buffers) = results
    assert_close(out, want_out, name="out", table=MODELS)
    names = [str(i) for i in range(len(gradients))]
    assert_gradients_close(
        dict(zip(names, gradients, strict=True)),
        dict(zip(names, want_gradients, strict=True)),
        case=torch.float64,
        table=MODELS,
    )
    for buffer, want in zip(buffers, want_buffers, strict=True):
        assert_close(buffer.double(), want.double(), name="buffer", table=MODELS)


@each_form
def test_a_hook_on_the_block_is_called(form: str) -> None:
    model, calls = stage(form, "plain"), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert len(calls) == 3


class Wrapper(nn.Module):
    """As activation checkpointing and FSDP wrap modules: attributes are passed on."""

    def __init__(self, block: nn.Module, calls: list[int]) -> None:
        super().__init__()
        self.block, self.calls = block, calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, x: Tensor) -> Any:
        self.calls.append(1)
        return self.block(x)


@each_form
def test_wrapped_blocks_are_called(form: str) -> None:
    model, calls = stage(form, "plain"), []
    expected = model(images())
    model.blocks = nn.ModuleList(Wrapper(block, calls) for block in model.blocks)
    assert_close(model(images()), expected, name="out", table=MODELS)
    assert len(calls) == 3


@each_form
def test_a_more_derived_forward_is_called(form: str) -> None:
    calls = []

    class Own(Block):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    model = stage(form, "plain")
    model.blocks[1] = Own(NORMS["plain"]()).double()
    model(images())
    assert len(calls) == 1


@each_form
def test_compiled_blocks_are_called(form: str) -> None:
    model, calls = stage(form, "plain"), []
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=lambda graph, _: calls.append(1) or graph.forward)
    model(images())
    assert calls


@pytest.mark.parametrize("variant", ["dia", "se", "eca"])
def test_wrapped_blocks_that_cannot_be_called_are_refused(variant: str) -> None:
    model = create_model(f"resnet20_{variant}")
    blocks = model.stages[0].blocks
    blocks[1] = Wrapper(blocks[1], [])
    assert_refused(lambda: model(torch.randn(1, 3, 8, 8)), "blocks[1]", "parts(x)", "Wrapper")


@each_form
def test_under_autocast(form: str) -> None:
    """The branch comes in bfloat16, the shortcut of a first block in float32."""
    model = stage(form, "plain").float()
    x = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def handing(method: str, parts: Callable[[Tensor], Any]) -> nn.Module:
    """A block whose method hands over anything."""
    return type("Handing", (nn.Module,), {method: staticmethod(parts)})()


NORM = nn.BatchNorm2d(CHANNELS)
BAD_PARTS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "no tuple": (lambda x: x, "blocks", "branch, norm, shortcut", "(Tensor)"),
    "two parts": (lambda x: (x, x), "blocks", "branch, norm, shortcut", "(Tensor, Tensor)"),
    "branch": (lambda x: (1.0, NORM, x), "blocks", "tensors", "(float, BatchNorm2d, Tensor)"),
    "norm": (lambda x: (x, torch.relu, x), "blocks", "Module or None", "builtin"),
    "shortcut": (lambda x: (x, None, 1.0), "blocks", "tensors", "(Tensor, NoneType, float)"),
    "shortcut that broadcasts": (lambda x: (x, NORM, x[:1]), "prev", "3, 8, 5, 4", "1, 8, 5, 4"),
    "dtype": (lambda x: (x, None, x.half()), "prev", "float32", "float16"),
}


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("form", ["light official", "base"])
@pytest.mark.parametrize("bad", BAD_PARTS)
def test_bad_parts(bad: str, form: str, fused: bool) -> None:
    parts, name, *words = BAD_PARTS[bad]
    model = DLAStage(
        [handing("raw_parts", parts)], CHANNELS, head_dim=4, fused=fused, **FORMS[form]
    )
    name = "shortcut" if (name, form) == ("prev", "base") else name
    assert_refused(lambda: model(images().float()), name, *words)


def test_bad_results_of_blocks() -> None:
    x = images().float()
    light = DLAStage([handing("forward", lambda x: (x, x, x))], CHANNELS, head_dim=4)
    assert_refused(lambda: light(x), "blocks", "(output, shortcut)", "(Tensor, Tensor, Tensor)")
    dia = DIAStage([handing("parts", lambda x: (x, 1.0))], CHANNELS)
    assert_refused(lambda: dia(x), "blocks", "Handing.parts", "(Tensor, float)")
    layer = DLALayer(CHANNELS, spec="official", head_dim=4)
    assert_refused(lambda: layer(x, x, join=True, branch_norm=3), "branch_norm", "Module", "int 3")


def test_layers_refuse_what_they_cannot_join() -> None:
    """The shortcut of a block is not what the state has of the layer before."""
    light, base = (DLALayer(CHANNELS, variant).double() for variant in ("light", "base"))
    x = images()
    _, state = light(x)
    assert_refused(lambda: light(x, state=state, join=True), "prev", "shortcut", "None")
    assert_refused(lambda: light(x, branch_norm=nn.Identity()), "branch_norm", "None", "Identity")
    assert_refused(lambda: base(x, branch_norm=nn.Identity()), "branch_norm", "None", "Identity")
    assert_refused(lambda: base(x, join=True), "join", "False", "base")
    assert_refused(lambda: base(x, x), "prev", "None", "base")


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stage("base", "plain")(images()[:1, :, :1, :1])
