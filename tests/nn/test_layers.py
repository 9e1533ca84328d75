"""dla.nn: fused and unfused layers are the same layer, in every mode and under every transform."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from dla.nn import DLALayer, DLAStage, DLAState, DropPath, DSUCell, DSUSplitCell, MRLALayer
from norms import without_bias
from refusals import assert_refused
from tolerances import MODELS, OPS, STAGES, assert_close, assert_gradients_close

CHANNELS = 12
SIZE = (5, 6)
FORMS: dict[str, dict[str, Any]] = {
    "paper": {"spec": "paper"},
    "official": {"spec": "official"},
    "static": {"cell": "none"},
    "first_sample": {"spec": "official", "context": "first_sample"},
    "official_dsu": {"spec": "official", "cell": "dsu", "activation": "tanh"},
    "paper_conv": {"prev_conv": True, "gate": "sigmoid", "initial_state": "learned"},
    "random_start": {"spec": "official", "initial_state": "normal"},
    "base_paper": {"variant": "base"},
    "base_official": {"variant": "base", "spec": "official"},
    "base_static": {"variant": "base", "cell": "none"},
    "base_first_sample": {"variant": "base", "spec": "official", "context": "first_sample"},
    "base_paper_first_sample": {"variant": "base", "cell": "dsu_split", "context": "first_sample"},
}
pytestmark = pytest.mark.usefixtures("one_thread")
each_form = pytest.mark.parametrize("form", FORMS)
each_fused = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


class Block(nn.Module):
    """The smallest block with a shortcut of its own."""

    def __init__(self, in_channels: int = CHANNELS) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, CHANNELS, 1)
        self.project = nn.Conv2d(in_channels, CHANNELS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = self.project(x)
        return torch.tanh(self.conv(x)) + shortcut, shortcut


def make_stage(form: str = "official", blocks: int = 4, **options: Any) -> DLAStage:
    torch.manual_seed(0)
    options = {"head_dim": 4, "reduction": 3, "drop_path": 0.3} | FORMS[form] | options
    return DLAStage([Block() for _ in range(blocks)], CHANNELS, **options)


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same module fused and unfused, in float64."""
    fused, unfused = make().double(), make().double()
    for module in unfused.modules():
        if isinstance(module, DLALayer):
            module.fused = False
    return fused, unfused


def features(count: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHANNELS, *SIZE, generator=generator, dtype=dtype)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """Same keys, dtypes and values of all parameters and buffers."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        if a[name].is_floating_point():
            assert_close(a[name], b[name], name=name, case=torch.float64, table=MODELS)
        else:
            assert torch.equal(a[name], b[name]), name


def train(module: nn.Module, steps: int, call: Callable[..., Tensor] | None = None) -> list[float]:
    """SGD with momentum and weight decay on changing data; the losses."""
    call = module if call is None else call
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    for step in range(steps):
        out = call(features(3 + step % 2, seed=step))
        loss = (out - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(torch.rand(1).item())  # the random numbers that were used
    return losses


def assert_losses_close(actual: list[float], expected: list[float]) -> None:
    pair = (torch.tensor(losses, dtype=torch.float64) for losses in (actual, expected))
    assert_close(*pair, name="losses", table=MODELS)


# --- fused against unfused ------------------------------------------------------------------------


@each_form
def test_twenty_steps_fused_and_unfused(form: str) -> None:
    """Parameters, running statistics, losses and use of random numbers; then evaluation."""
    fused, unfused = both(lambda: make_stage(form))
    assert_same_state(fused, unfused)
    one, two = train(fused, 20), train(unfused, 20)
    assert_losses_close(one, two)
    assert_same_state(fused, unfused)
    fused.eval(), unfused.eval()
    torch.manual_seed(9)
    out = fused(features())
    torch.manual_seed(9)
    assert_close(out, unfused(features()), table=MODELS)


NORMS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "cumulative": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "no momentum": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.0),
    "batch statistics always": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "no parameters": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "no bias": lambda: without_bias(CHANNELS),
    "large eps": lambda: nn.BatchNorm2d(CHANNELS, eps=0.3),
    "group": lambda: nn.GroupNorm(3, CHANNELS),
    "identity": lambda: nn.Identity(),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["paper", "official", "base_paper", "base_official"])
def test_norms(form: str, norm: str) -> None:
    """Every mode of BatchNorm2d, and modules that are none; training, then evaluation."""

    def make() -> DLAStage:
        stage = make_stage(form, blocks=2)
        for layer in stage.layers:
            layer.norm = NORMS[norm]()
        return stage

    fused, unfused = both(make)
    assert_losses_close(train(fused, 6), train(unfused, 6))
    assert_same_state(fused, unfused)
    assert_close(fused.eval()(features()), unfused.eval()(features()), table=MODELS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_with_the_norm_in_evaluation_mode(training: bool) -> None:
    """The norm frozen in a training model, as detection does it, and a model wholly frozen."""
    gradients = []
    for stage in both(lambda: make_stage(drop_path=0.0)):
        train(stage, 2)
        stage.train(training)
        for layer in stage.layers:
            layer.norm.eval()
        before = copy.deepcopy(stage.state_dict())
        stage.zero_grad()
        stage(features()).square().sum().backward()
        assert all(torch.equal(before[n], v) for n, v in stage.state_dict().items())
        gradients.append({name: p.grad for name, p in stage.named_parameters()})
    assert_gradients_close(*gradients, case=torch.float64, table=MODELS)


def test_one_norm_at_both_ends() -> None:
    """Its running statistics see the branch first."""

    def make() -> DLALayer:
        torch.manual_seed(0)
        return DLALayer(CHANNELS, spec="official", head_dim=4)

    fused, unfused = both(make)
    for layer in (fused, unfused):
        layer(features(), features(seed=2), join=True, branch_norm=layer.norm)
    assert_same_state(fused, unfused)


class Counted(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


@each_fused
@pytest.mark.parametrize("variant", ["light", "base"])
def test_a_parametrized_weight_is_computed_once(variant: str, fused: bool) -> None:
    layer = DLALayer(CHANNELS, variant, "official", head_dim=4, fused=fused)
    counted = {name: Counted() for name in ("q_conv", "k_conv", "v_conv")}
    for name, parametrization in counted.items():
        register_parametrization(getattr(layer, name), "weight", parametrization, unsafe=True)
    before = [parametrization.calls for parametrization in counted.values()]
    x = torch.randn(2, CHANNELS, *SIZE)
    layer(x, x if variant == "light" else None)
    after = [parametrization.calls for parametrization in counted.values()]
    assert after == [calls + 1 for calls in before]


class FrozenBatchNorm2d(nn.Module):
    """Constant statistics and parameters as buffers, as torchvision and detectron2 have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, 1.0 + torch.rand(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Doubled(nn.BatchNorm2d):
    """A subclass may do anything, so its forward must run."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.register_forward_hook(lambda module, args, out: 2 * out)
    return norm


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: FrozenBatchNorm2d(CHANNELS),
    "subclass": lambda: Doubled(CHANNELS),
    "hook": lambda: hooked(nn.BatchNorm2d(CHANNELS)),
}


@pytest.mark.parametrize("norm", FOREIGN)
@pytest.mark.parametrize("form", ["paper", "official", "base_paper", "base_official"])
def test_other_norms_run_themselves(form: str, norm: str) -> None:
    calls = []

    def make() -> DLAStage:
        stage = make_stage(form, blocks=2)
        for layer in stage.layers:
            layer.norm = FOREIGN[norm]()
            layer.norm.register_forward_pre_hook(lambda *_: calls.append(1))
        return stage

    fused, unfused = both(make)
    assert_losses_close(train(fused, 3), train(unfused, 3))
    assert len(calls) == 2 * 2 * 3
    assert_same_state(fused, unfused)


def test_sync_batch_norm() -> None:
    """Converted by torch's own function; it takes CPU features in evaluation mode only."""
    stage = make_stage().double()
    train(stage, 3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stage)).eval()
    assert type(converted.layers[0].norm) is nn.SyncBatchNorm
    assert_close(converted(features()), stage.eval()(features()), table=MODELS)


@pytest.mark.parametrize("fused", [True, False])
def test_one_value_per_channel(fused: bool) -> None:
    """The words of nn.BatchNorm2d."""
    layer = MRLALayer(CHANNELS, head_dim=4, fused=fused)
    one = torch.randn(1, CHANNELS, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(one, one)
    assert layer.eval()(one, one)[0].shape == one.shape


def test_drop_path_is_that_of_whole_samples() -> None:
    layer = MRLALayer(CHANNELS, head_dim=4, drop_path=0.5)
    x = features(64, dtype=torch.float32)
    torch.manual_seed(3)
    branch = layer(x, x)[0] - x
    torch.manual_seed(3)
    scale = torch.floor(0.5 + torch.rand(64, 1, 1, 1)) / 0.5
    layer.drop_path = DropPath(0.0)
    expected = (layer(x, x)[0] - x) * scale
    assert_close(branch, expected)
    assert 10 < (scale == 0).sum() < 54


# --- meaning --------------------------------------------------------------------------------------


@each_fused
def test_samples_do_not_depend_on_each_other(fused: bool) -> None:
    """The correct context: one by one or in a batch, the predictions are the same."""
    stage = make_stage(fused=fused).double().eval()
    together = stage(features())
    alone = torch.cat([stage(x[None]) for x in features()])
    assert_close(together, alone)
    defective = make_stage("first_sample", fused=fused).double().eval()
    assert_close(defective(features())[:1], alone[:1])
    assert not torch.allclose(defective(features())[1:], alone[1:])


def test_layer_is_a_stage_of_one() -> None:
    """A lone layer owns its cell; chained with a shared one it makes a stage."""
    for form in ("paper", "official"):
        stage = make_stage(form, drop_path=0.0)
        options = {"head_dim": 4, "reduction": 3} | FORMS[form]
        layers = [DLALayer(CHANNELS, **options) for _ in stage.layers]
        for layer, shared in zip(layers, stage.layers, strict=True):
            layer.load_state_dict(shared.state_dict(), strict=False)
            layer.cell, layer.prev_conv = stage.cell, stage.prev_conv
        x, state = features(dtype=torch.float32), None
        expected = stage(x)
        for block, layer in zip(stage.blocks, layers, strict=True):
            out, shortcut = block(x)
            x, state = layer(out, shortcut if form == "official" else None, state)
        assert torch.equal(x, expected)


def test_static_layer_is_the_gateless_one() -> None:
    x, p = features(dtype=torch.float32), features(seed=2, dtype=torch.float32)
    layer = MRLALayer(CHANNELS, head_dim=4, norm=False)
    out, state = layer(x, p)
    y = x.mean((2, 3))
    q, k = (conv(y[:, None]).view(3, 3, 4) for conv in (layer.q_conv, layer.k_conv))
    a = torch.sigmoid((q * k).sum(-1) / 2).repeat_interleave(4, 1)[..., None, None]
    assert_close(out, x + a * layer.v_conv(x) + layer.lam[:, None, None] * p)
    assert state.context.shape == (0, 3, CHANNELS) and state.output is None


def test_output_is_kept_where_the_next_layer_reads_it() -> None:
    x = features(dtype=torch.float32)
    paper = DLALayer(CHANNELS, head_dim=4)
    out, state = paper(x)
    assert state.output is not None and state.output.shape == x.shape and state.size == SIZE
    assert torch.equal(paper(x, keep_output=False)[0], out)
    assert paper(x, keep_output=False)[1].output is None
    assert DLALayer(CHANNELS, spec="official", head_dim=4)(x, x)[1].output is None


def test_parameters_of_the_cells() -> None:
    for channels, reduction in ((64, 4), (20, 3)):
        c, h = channels, channels // reduction
        counts = {DSUCell: 5 * c * h + 3 * c, DSUSplitCell: 2 * (4 * c * h + h + 3 * c)}
        for kind, count in counts.items():
            assert sum(p.numel() for p in kind(channels, reduction).parameters()) == count


@pytest.mark.parametrize("kind", [DSUCell, DSUSplitCell])
def test_cell_alone(kind: type) -> None:
    cell = kind(CHANNELS, 3, initial_state="learned")
    y = torch.randn(2, CHANNELS)
    state = cell(y, cell(y))
    assert state.shape == (kind.slots, 2, CHANNELS)
    state.sum().backward()
    assert all(p.grad is not None for p in cell.parameters())


def test_initialisation() -> None:
    """Depthwise weights by their own fan, or by the authors' rule; lam from N(0, 1)."""
    torch.manual_seed(0)
    paper, official = (DLALayer(512, spec=spec, prev_conv=True) for spec in ("paper", "official"))
    for conv in (paper.v_conv, paper.prev_conv):
        assert conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    for conv in (official.v_conv, official.prev_conv):
        assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.1)
    assert paper.lam.std().item() == pytest.approx(1, rel=0.2)
    assert paper.q_conv.kernel_size == (5,) and DLALayer(64).q_conv.kernel_size == (3,)


@pytest.mark.parametrize("spec", ["paper", "official"])
def test_parameters_drawn_anew_are_like_fresh_ones(spec: str) -> None:
    """As after the meta device: ``to_empty``, then ``reset_parameters`` of every module."""
    options = {"spec": spec, "reduction": 1, "initial_state": "learned"}
    with torch.device("meta"):
        stage = DLAStage([nn.Identity()], 512, **options)
    stage.to_empty(device="cpu")
    for tensor in (*stage.parameters(), *stage.buffers()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 7)
    stage.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    fresh = DLAStage([nn.Identity()], 512, **options).state_dict()
    for name, tensor in stage.state_dict().items():
        if tensor.numel() < 500:  # of q_conv and k_conv
            assert tensor.isfinite().all(), name
        else:
            for statistic in (torch.mean, torch.std):
                expected = statistic(fresh[name])
                assert torch.allclose(statistic(tensor), expected, rtol=0.2, atol=0.1), name


def test_one_layer_of_the_paper_form_uses_all_that_it_can() -> None:
    """lam of a first layer has a gradient, zero: DistributedDataParallel waits for one."""
    for fused in (True, False):
        stage = make_stage("paper", fused=fused)
        stage(features(dtype=torch.float32)).sum().backward()
        assert all(p.grad is not None for p in stage.parameters())
        assert not stage.layers[0].lam.grad.any() and stage.layers[1].lam.grad.any()


# --- transforms -----------------------------------------------------------------------------------


@each_fused
@each_form
def test_deepcopy_and_pickle(form: str, fused: bool) -> None:
    stage = make_stage(form, fused=fused)
    stage(features(dtype=torch.float32)).sum().backward()
    buffer = io.BytesIO()
    torch.save(stage, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(stage),
        pickle.loads(pickle.dumps(stage)),
        torch.load(buffer, weights_only=False),
    ]
    results = []
    for module in (stage, *copies):
        torch.manual_seed(2)
        results.append(module(features(dtype=torch.float32)))
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert repr(copies[0]) == repr(stage)


@each_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_form
def test_model_in_another_dtype(form: str, dtype: torch.dtype, fused: bool) -> None:
    """model.to(dtype): everything follows; half types against float32 on the same numbers."""
    stage = make_stage(form, blocks=2, fused=fused, drop_path=0.0, initial_state="zeros").to(dtype)
    wide = copy.deepcopy(stage).to(torch.float64)
    x = features(4, dtype=dtype)
    out = stage(x)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in stage.parameters() if p.grad is not None)
    table = STAGES if dtype in STAGES else OPS
    assert_close(out, wide(x.double()), dtype=dtype, table=table)


@each_fused
@each_form
def test_autocast(form: str, fused: bool) -> None:
    """bfloat16 convolutions around, float32 inside: no error, close to float32, trains."""
    stage = make_stage(form, fused=fused, drop_path=0.0, initial_state="zeros")
    x = features(dtype=torch.float32)
    exact = stage(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stage(x)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in stage.parameters() if p.grad is not None)
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_autocast_brings_prev_to_the_dtype_of_x() -> None:
    layer = MRLALayer(CHANNELS, head_dim=4)
    x = features(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16(), x)[0].dtype == torch.bfloat16
        assert layer(x, x.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("variant", ["light", "base"])
@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double])
def test_dtype_changed_between_forward_and_backward(
    variant: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    layer = DLALayer(32, variant)
    x = torch.randn(2, 32, 4, 4, requires_grad=True)
    out, _ = layer(x)
    change(layer)
    with pytest.raises(TypeError, match=r"expected torch.float32 .*, got"):
        out.sum().backward()


@each_fused
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(fused: bool, reentrant: bool) -> None:
    """The same gradients with activations recomputed, drop path's random numbers included."""
    results = []
    for use in (False, True):
        stage = make_stage(fused=fused, drop_path=0.3).double()
        x = features().requires_grad_()
        torch.manual_seed(4)
        out = checkpoint(stage, x, use_reentrant=reentrant) if use else stage(x)
        out.square().sum().backward()
        results.append([x.grad, *(p.grad for p in stage.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("form", "fused"),
    [
        *((form, True) for form in FORMS if form.endswith(("paper", "official", "static"))),
        ("official", False),
        ("base_official", False),
    ],
)
def test_compiles_in_one_graph(form: str, fused: bool) -> None:
    torch.compiler.reset()
    stage = make_stage(form, blocks=2, fused=fused, drop_path=0.3).double()
    other = copy.deepcopy(stage)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    assert_losses_close(train(stage, 2, compiled), train(other, 2))
    assert_same_state(stage, other)
    assert_close(compiled.eval()(features()), other.eval()(features()), table=MODELS)


def test_layer_compiles_with_its_state() -> None:
    """DLAState passes in and out of a graph; cumulative statistics do not break it."""
    torch.compiler.reset()
    layer = DLALayer(CHANNELS, head_dim=4, momentum=None).double()
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, other):
        x, state = features(), None
        for _ in range(3):
            x, state = function(x, None, state)
        assert isinstance(state, DLAState)
        results.append((x, state.context, state.output))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    assert_same_state(layer, other)


@pytest.mark.parametrize("variant", ["light", "base"])
def test_second_derivatives(variant: str) -> None:
    """Of the unfused path alone."""
    layer = DLALayer(2, variant, head_dim=2, reduction=2).double()
    x = features(2)[:, :2, :2, :3].contiguous().requires_grad_()
    with pytest.raises(NotImplementedError, match="fused=False"):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    layer.fused = False
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


@pytest.mark.parametrize("variant", ["light", "base"])
def test_torch_func(variant: str) -> None:
    """Of the unfused path alone."""
    layer = DLALayer(CHANNELS, variant, head_dim=4).double().eval()
    x = features().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return layer(x)[0].square().sum()

    with pytest.raises(NotImplementedError, match="fused=False"):
        torch.func.grad(loss)(x.detach())
    layer.fused = False
    assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


# --- bad input ------------------------------------------------------------------------------------


def official() -> DLALayer:
    return DLALayer(CHANNELS, spec="official", head_dim=4)


def state_of(layer: DLALayer, x: Tensor) -> DLAState:
    return layer(x, x)[1]


def map_(*shape: int, **like: Any) -> Tensor:
    return torch.zeros(shape or (2, CHANNELS, *SIZE), **like)


BAD_CALLS: dict[str, tuple[Callable[[DLALayer], Any], ...]] = {
    "no tensor": (lambda layer: layer([1.0], map_()), "x", "Tensor", "list"),
    "rank of x": (lambda layer: layer(map_(2, 12, 5), map_()), "x", "B, 12, H, W", "2, 12, 5"),
    "channels of x": (lambda layer: layer(map_(2, 8, 5, 6), None), "x", "12", "2, 8, 5, 6"),
    "no samples": (lambda layer: layer(map_(0, 12, 5, 6), None), "x", "0, 12, 5, 6"),
    "no pixels": (lambda layer: layer(map_(2, 12, 0, 6), None), "x", "2, 12, 0, 6"),
    "integers": (lambda layer: layer(map_(dtype=torch.int64), None), "x", "float32", "int64"),
    "dtype of x": (lambda layer: layer(map_().double(), None), "x", "float32", "float64"),
    "device of x": (lambda layer: layer(map_(device="meta"), None), "x", "cpu", "meta"),
    "no prev": (lambda layer: layer(map_()), "prev", "shortcut", "None", "DLAStage"),
    "prev no tensor": (lambda layer: layer(map_(), 1.0), "prev", "Tensor", "float"),
    "shape of prev": (
        lambda layer: layer(map_(), map_(2, 12, 6, 5)), "prev", "2, 12, 5, 6", "2, 12, 6, 5",
    ),
    "dtype of prev": (lambda layer: layer(map_(), map_().double()), "prev", "float32", "float64"),
    "device of prev": (lambda layer: layer(map_(), map_().to("meta")), "prev", "cpu", "meta"),
    "no state": (lambda layer: layer(map_(), map_(), map_()), "state", "DLAState", "Tensor"),
    "batch of state": (
        lambda layer: layer(map_(), map_(), state_of(layer, map_(3, 12, 5, 6))),
        "state", "2, 2, 12", "2, 3, 12",
    ),
    "state of another stage": (
        lambda layer: layer(map_(), map_(), state_of(layer, map_(2, 12, 10, 12))),
        "state", "(5, 6)", "(10, 12)",
    ),
    "state of more channels": (
        lambda layer: layer(
            map_(), map_(),
            DLALayer(24, spec="official", head_dim=4)(map_(2, 24, 5, 6), map_(2, 24, 5, 6))[1],
        ),
        "state", "2, 2, 12", "2, 2, 24",
    ),
    "state of another cell": (
        lambda layer: layer(
            map_(), map_(), DLALayer(CHANNELS, head_dim=4)(map_())[1]
        ),
        "state", "2 slots", "1, 2, 12",
    ),
    "state of another kind of cell": (
        lambda layer: layer(
            map_(), map_(), state_of(DLALayer(CHANNELS, cell="lstm", head_dim=4), map_())
        ),
        "state", "dsu_split", "lstm",
    ),
    "size of a state by hand": (
        lambda layer: layer(map_(), map_(), state_of(layer, map_())._replace(size=())),
        "state", "(5, 6)", "()",
    ),
    "context of a state by hand": (
        lambda layer: layer(map_(), map_(), state_of(layer, map_())._replace(context=1)),
        "state", "2, 2, 12", "int 1",
    ),
    "dtype of state": (
        lambda layer: layer(
            map_(), map_(), state_of(copy.deepcopy(layer).double(), map_().double())
        ),
        "state", "float32", "float64",
    ),
    "values in state": (
        lambda layer: layer(map_(), map_(), state_of(layer, map_())._replace(values=(map_(),))),
        "state", "memory", "1 layers",
    ),
    "device of state": (
        lambda layer: layer(
            map_(), map_(), state_of(copy.deepcopy(layer).to("meta"), map_(device="meta"))
        ),
        "state", "cpu", "meta",
    ),
    "cell": (
        lambda layer: layer(map_(), map_(), cell=DSUCell(CHANNELS)), "cell", "dsu_split", "'dsu'",
    ),
    "norm": (
        lambda layer: (setattr(layer, "norm", nn.BatchNorm2d(5)), layer(map_(), map_())),
        "norm_weight", "12", "5",
    ),
}  # fmt: skip


@each_fused
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_norm_with_one_of_its_statistics(missing: str, training: bool, fused: bool) -> None:
    """An error, as in torch; neither the statistics of the batch nor half an update."""
    layer = DLALayer(CHANNELS, head_dim=4, fused=fused).train(training)
    setattr(layer.norm, missing, None)
    before = copy.deepcopy(layer.norm.state_dict())
    del before["num_batches_tracked"]  # which torch has counted by then
    with pytest.raises((ValueError, RuntimeError), match=r"mean|var"):
        layer(map_())
    assert all(torch.equal(layer.norm.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("variant", ["light", "base"])
def test_a_static_layer_has_no_gate(variant: str) -> None:
    assert_refused(lambda: DLALayer(8, variant, cell="none", gate="sigmoid"), "gate", "None", "sig")


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_input(bad: str) -> None:
    call, *words = BAD_CALLS[bad]
    assert_refused(lambda: call(official()), *words)


def bad_calls_in_a_stage() -> dict[str, dict[str, Any]]:
    """Of a layer that is not the first: what the op finds, the layer says."""
    state = state_of(official(), map_())
    good = {"x": map_(), "prev": map_(), "state": state}
    return {
        "x": good | {"x": map_(3, *map_().shape[1:])},
        "prev": good | {"prev": map_(1, *map_().shape[1:])},
        "state": good | {"state": state._replace(context=state.context[:1])},
    }


@pytest.mark.parametrize("name", bad_calls_in_a_stage())
def test_refused_call_has_no_effect(name: str) -> None:
    layer = official()
    branch_norm = nn.BatchNorm2d(CHANNELS)
    branch_norm.register_forward_hook(lambda *_: None)  # then it is called on its own
    bad = bad_calls_in_a_stage()[name]
    before = torch.get_rng_state()
    for layer.drop_path.rate, more in (
        (0.5, {}),
        (0.0, {"join": True, "branch_norm": branch_norm}),
    ):
        with pytest.raises(ValueError, match=name) as info:
            layer(**bad, **more)
        assert info.value.__context__ is None
    assert torch.equal(torch.get_rng_state(), before)
    assert branch_norm.num_batches_tracked == layer.norm.num_batches_tracked == 0


@pytest.mark.parametrize("name", bad_calls_in_a_stage())
def test_refused_when_compiled(name: str) -> None:
    compiled = torch.compile(official(), backend="eager")
    with pytest.raises(ValueError, match=name):
        compiled(**bad_calls_in_a_stage()[name])


def test_missing_part_is_named() -> None:
    """And is not taken for one that the layer was made without."""
    for name in ("norm", "q_conv"):
        layer = official()
        delattr(layer, name)
        with pytest.raises(AttributeError, match=name):
            layer(map_(), map_())


@each_fused
def test_bad_output_in_a_state(fused: bool) -> None:
    """Of a state made by hand, or by a layer whose output nobody was to read."""
    layer = DLALayer(CHANNELS, head_dim=4, fused=fused)
    state = layer(map_())[1]
    for output, *words in ((1.0, "float"), (map_(2, 12, 6, 5), "2, 12, 5, 6", "2, 12, 6, 5")):
        bad = state._replace(output=output)
        assert_refused(lambda bad=bad: layer(map_(), state=bad), "state.output", *words)
    lost = layer(map_(), keep_output=False)[1]
    assert_refused(lambda: layer(map_(), state=lost), "state", "output", "keep_output=False")
    assert layer(map_(), map_(), lost)[0].shape == (2, CHANNELS, *SIZE)


def test_shared_layer_needs_its_owners_parts() -> None:
    layer = DLALayer(CHANNELS, spec="official", head_dim=4, shared=True)
    assert_refused(lambda: layer(map_(), map_()), "cell", "dsu_split", "shared=True")
    cell = DSUSplitCell(CHANNELS)
    assert_refused(lambda: layer(map_(), map_(), cell=cell), "prev_conv", "True", "NoneType")
    wide = DSUSplitCell(2 * CHANNELS)
    assert_refused(lambda: layer(map_(), map_(), cell=wide), "cell", str(CHANNELS), "24")
    assert_refused(lambda: cell(map_()[:, :5, 0, 0]), "y", f"[B, {CHANNELS}]", "[2, 5]")


@each_fused
@pytest.mark.parametrize("variant", ["light", "base"])
def test_state_of_an_equal_stage(variant: str, fused: bool) -> None:
    """Told by its cell, in the middle of a stage and by a layer that remembers its last call, too.
    Nothing tells the stages of layers that have cells of their own."""
    layer = DLALayer(CHANNELS, variant, head_dim=4, fused=fused, shared=True)
    x, ours, theirs = map_(), DSUCell(CHANNELS), DSUCell(CHANNELS)
    first, foreign = (layer(x, cell=cell)[1] for cell in (ours, theirs))
    _, middle = layer(x, None, first, cell=ours)
    for state, cell in ((foreign, ours), (first, theirs), (middle, theirs)):
        wrong = functools.partial(layer, x, None, state, cell=cell)
        assert_refused(wrong, "state", "another cell", "state=None")
    alone = DLALayer(CHANNELS, variant, head_dim=4, fused=fused)
    alone(x, None, first)
    layer(x, None, alone(x)[1], cell=ours)


@each_fused
def test_shared_layer_takes_the_cells_activation(fused: bool) -> None:
    layer = DLALayer(CHANNELS, head_dim=4, activation="identity", fused=fused)
    shared = DLALayer(CHANNELS, head_dim=4, shared=True, fused=fused)
    shared.load_state_dict(layer.state_dict(), strict=False)
    x = map_()
    assert torch.equal(shared(x, cell=layer.cell)[1].context, layer(x)[1].context)


@each_fused
def test_pruned_convolution(fused: bool) -> None:
    """Its weight is made by a hook, anew in every call, though nobody calls the convolution."""
    layer = DLALayer(CHANNELS, head_dim=4, norm=False, fused=fused)
    prune.l1_unstructured(layer.v_conv, "weight", amount=0.5)
    x, outputs = torch.randn(2, CHANNELS, *SIZE), []
    for _ in range(2):
        outputs.append(layer(x)[0])
        outputs[-1].sum().backward()
        with torch.no_grad():
            layer.v_conv.weight_orig.mul_(2)
    assert not torch.equal(*outputs)


@each_fused
def test_pruned_convolution_in_another_dtype(fused: bool) -> None:
    """What the hook made in the old dtype is no part of the module."""
    layer = DLALayer(CHANNELS, head_dim=4, fused=fused)
    prune.l1_unstructured(layer.v_conv, "weight", amount=0.5)
    layer.double()
    assert layer(map_(dtype=torch.float64))[0].dtype == torch.float64


def test_bad_shortcut_of_a_block() -> None:
    """A block that changes the resolution has to return its shortcut."""
    stage = DLAStage([nn.Conv2d(8, CHANNELS, 1)], CHANNELS, spec="official", head_dim=4)
    assert_refused(lambda: stage(map_(2, 8, 5, 6)), "prev", "2, 12, 5, 6", "2, 8, 5, 6")


BAD_OPTIONS = {
    "variant": ({"variant": "heavy"}, "variant", "light", "heavy"),
    "spec": ({"spec": "theirs"}, "spec", "official", "theirs"),
    "cell": ({"cell": "gru"}, "cell", "dsu_split", "gru"),
    "gate": ({"gate": "tanh"}, "gate", "identity", "tanh"),
    "context": ({"context": "last"}, "context", "first_sample", "last"),
    "activation": ({"activation": "gelu"}, "activation", "sigmoid", "gelu"),
    "initial_state": ({"initial_state": "ones"}, "initial_state", "learned", "ones"),
    "prev_from": ({"prev_from": "input"}, "prev_from", "shortcut", "input"),
    "heads": ({"head_dim": 5}, "head_dim", "12", "5"),
    "no heads": ({"head_dim": 0}, "head_dim", "0"),
    "reduction": ({"reduction": 13}, "reduction", "12", "13"),
    "no reduction": ({"reduction": 0}, "reduction", "0"),
    "fraction": ({"reduction": 2.0}, "reduction", "integer", "2.0"),
    "no words": ({"spec": 1}, "spec", "paper", "1"),
    "drop_path": ({"drop_path": 1.0}, "drop_path", "[0, 1)", "1.0"),
    "drop_path below 0": ({"drop_path": -0.1}, "drop_path", "[0, 1)", "-0.1"),
    "drop_path NaN": ({"drop_path": math.nan}, "drop_path", "[0, 1)", "nan"),
    "drop_path no number": ({"drop_path": "a"}, "drop_path", "number", "str 'a'"),
    "norm": ({"norm": 3}, "norm", "True or False", "int 3"),
    "fused": ({"fused": "no"}, "fused", "True or False", "str 'no'"),
    "prev_conv": ({"prev_conv": 1}, "prev_conv", "True or False", "int 1"),
    "eps": ({"eps": -1e-5}, "eps", "at least 0", "-1e-05"),
    "eps NaN": ({"eps": math.nan}, "eps", "at least 0", "nan"),
    "eps infinite": ({"eps": math.inf}, "eps", "finite", "inf"),
    "eps no number": ({"eps": "a"}, "eps", "number", "str 'a'"),
    "momentum": ({"momentum": 1.5}, "momentum", "[0, 1]", "1.5"),
    "momentum NaN": ({"momentum": math.nan}, "momentum", "[0, 1]", "nan"),
    "momentum no number": ({"momentum": "a"}, "momentum", "number", "str 'a'"),
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options(bad: str) -> None:
    options, *words = BAD_OPTIONS[bad]
    assert_refused(lambda: DLALayer(CHANNELS, **options), *words)
    assert_refused(lambda: DLAStage([nn.Identity()], CHANNELS, **options), *words)


def test_bad_options_of_a_stage() -> None:
    block = nn.Identity()
    assert_refused(lambda: DLAStage([], CHANNELS), "blocks", "one", "none")
    assert_refused(lambda: DLAStage([block, None], CHANNELS), "blocks[1]", "Module", "NoneType")
    assert_refused(lambda: DLAStage(block, CHANNELS), "blocks", "list", "Identity")
    assert_refused(lambda: DLAStage([block], CHANNELS, shared=False), "shared")
    assert_refused(lambda: DLAStage([block], CHANNELS, drop_path=[0.1, 0.2]), "drop_path", "1", "2")
    assert_refused(lambda: DLAStage([block], CHANNELS, drop_path="x"), "drop_path", "number", "x")
    assert_refused(lambda: DLALayer(0), "channels", "1", "0")
    assert_refused(lambda: DLALayer(12, shared=2), "shared", "True or False", "int 2")
    assert_refused(lambda: DLALayer(12.0), "channels", "integer", "12.0")
