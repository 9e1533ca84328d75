"""base_attention: every backend against the reference, over everything it has switches for."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import dla_kernels
import dla_kernels.ops.base_attention as base_attention
import step_cases
from base_cases import Case
from dla_kernels import use_backend
from dla_kernels.ops.base_attention.deferred import WeightedSum
from op_cases import (
    DTYPES,
    LAYOUTS,
    SAMPLES,
    compare,
    each_backend,
    each_case,
    feature,
    in_float64,
    large,
    random_small,
    reference,
)
from refusals import assert_refused
from step_cases import check, zeros
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NORMS = ["batch", "running", "none"]
ARRIVES = [Case.arrives, ("out",), ("v",), ("keys",), ("gates", "pooled"), ("out", "v"), ("state",)]
WANTS = [
    None, (), ("x",), ("values",), ("x", "values"), ("values.1",), ("state",), ("keys",),
    ("gates",), ("pooled",), ("cell_params",), ("q_weight",), ("key_weights",), ("v_weight",),
    ("norm_weight",), ("x", "cell_params.0", "norm_bias"),
]  # fmt: skip

# [B, C, H, W], head_dim, kernel over the channels, hidden units; with the code path that it is for.
SHAPES = [
    ((1, 1, 1, 1), 1, 1, 1),  # one of everything
    ((3, 5, 1, 1), 5, 3, 2),  # pooled map: only centre taps
    ((2, 20, 2, 3), 4, 3, 5),  # smaller than a vector in width; five heads
    ((2, 33, 7, 7), 11, 3, 8),  # ImageNet's last stage: tails; one channel beyond vectors
    ((2, 64, 8, 8), 32, 3, 16),  # CIFAR's last stage: whole vectors and blocks, two heads
    ((1, 6, 17, 31), 3, 3, 3),  # odd both ways; one sample
    ((1, 5, 33, 40), 1, 5, 2),  # more than 32 columns; heads of one channel
    ((2, 130, 3, 4), 26, 5, 32),  # more channels than one block of them
    ((9, 4, 4, 4), 4, 1, 1),  # more samples than channels
]

AXES: dict[str, Any] = {
    "where": SHAPES,
    "layers": [0, 1, 2, 5],
    "dtype": DTYPES,
    "x_layout": LAYOUTS,
    "value_layout": LAYOUTS,
    "grad_layout": LAYOUTS,
    "cell": ["dsu_split", "dsu", "dia", "lstm", "rnn", "none"],
    "activation": ["sigmoid", "tanh", "relu", "identity"],
    "gate": ["identity", "sigmoid"],
    "context": ["per_sample", "first_sample"],
    "gated": ["projections", "features"],
    "norm": NORMS,
    "affine": [True, False],
    "relu": [True, False],
    "residual": [True, False],
    "return_v": [True, False],
    "drop": ["none", "some", "all"],
    "arrives": ARRIVES,
    "wants": WANTS,
}


@each_case(
    "base_attention",
    AXES,
    lambda axes: Case().with_(**axes).valid,
    interpreted={
        "where": [*SHAPES[1:4], SHAPES[5]],
        "layers": [0, 1, 3, 8],
        "x_layout": LAYOUTS[:3],
        "value_layout": ["nchw", "nhwc"],
        "grad_layout": ["nhwc", "transposed"],
        "cell": ["dsu_split", "dsu", "none"],
        "activation": ["sigmoid"],
        "arrives": ARRIVES[:3],
        "wants": [None, ("x",)],
    },
    ids=lambda axes: str(Case().with_(**axes)),
)
def test_any_combination(backend: str, case: dict[str, Any]) -> None:
    check(backend, Case().with_(**case))


# What the layers really ask for.
PRESETS = {
    "official": Case(),
    "official_dsu": Case(cell="dsu", gate="sigmoid"),
    "official_defect": Case(context="first_sample", drop="some"),
    "paper": Case(cell="dsu", gated="features", drop="some"),
    "first": Case(layers=0),
    "last": Case(layers=5, return_v=False, arrives=("out",)),
    "static": Case(cell="none"),
    "foreign_norm": Case(norm="none", relu=False, residual=False),
    "frozen": Case(norm="running"),
    "inference": Case(norm="running", wants=()),
    "paper_inference": Case(cell="dsu", gated="features", norm="running", wants=()),
}


@each_backend("base_attention", interpreted=False)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.simd
def test_presets_in_every_dtype(backend: str, preset: str, dtype: torch.dtype, layout: str) -> None:
    """One awkward shape, in the full product."""
    case = PRESETS[preset].with_(((2, 33, 9, 11), 11, 3, 8), dtype=dtype)
    check(backend, case.in_layout(layout))


@each_backend("base_attention", interpreted=False)
@pytest.mark.parametrize("wants", WANTS, ids=str)
@pytest.mark.parametrize("gated", ["projections", "features"])
def test_only_some_inputs_are_differentiated(
    backend: str, wants: tuple[str, ...] | None, gated: str
) -> None:
    check(backend, Case(wants=wants, gated=gated))


@each_backend("base_attention", interpreted=False)
@pytest.mark.parametrize("layers", [0, 1, 2, 3, 7, 8, 9, 31, 63])
@pytest.mark.parametrize("gated", ["projections", "features"])
def test_number_of_layers(backend: str, gated: str, layers: int) -> None:
    check(backend, Case(layers=layers, gated=gated))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.simd
def test_cpp_writes_maps_past_the_caches(layout: str, sample: tuple[int, int, int]) -> None:
    check("cpp", Case(large(sample, torch.float32), head_dim=1, layers=1).in_layout(layout))


@each_backend("base_attention", but="reference", interpreted=False)  # which has no blocks
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(1, 2, 11, 300), (1, 2, 40, 56), (1, 72, 37, 9)])
def test_more_pixels_than_a_block_takes(
    backend: str, shape: tuple[int, int, int, int], layout: str
) -> None:
    """Of a row, of a plane, of all channels together."""
    check(backend, Case(shape=shape, head_dim=2, layers=3).in_layout(layout))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    heads, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    sizes = st.integers(1, 18)
    axes = {name: draw(st.sampled_from(values)) for name, values in AXES.items() if name != "where"}
    axes["layers"] = draw(st.integers(0, 9))
    return Case(
        shape=(draw(st.integers(1, 4)), heads * head_dim, draw(sizes), draw(sizes)),
        head_dim=head_dim, kernel=draw(st.sampled_from([1, 3, 5, 7])),
        hidden=draw(st.integers(1, 9)), **axes,
    )  # fmt: skip


@each_backend("base_attention", but="reference", interpreted=False)
@hypothesis.settings(max_examples=100)
@hypothesis.given(case=any_case().filter(lambda case: case.valid))
def test_any_case(backend: str, case: Case) -> None:
    check(backend, case)


# --- meaning --------------------------------------------------------------------------------------


@each_backend("base_attention")
def test_the_first_layer_sees_its_own_value_alone(backend: str, generator: torch.Generator) -> None:
    """Softmax over one key is 1: without norm and residual the branch is v."""
    case = Case(layers=0, norm="none", relu=False, residual=False, dtype=torch.float64)
    with use_backend(backend):
        out, v, *_, scores, _, _, _ = dla_kernels.base_attention(
            *case.inputs(generator).values(), **case.flags()
        )
    assert_close(out, v)
    assert (scores == 1).all()


@each_backend("base_attention")
@pytest.mark.parametrize("gated", ["projections", "features"])
def test_samples_do_not_mix(backend: str, gated: str, generator: torch.Generator) -> None:
    """With running statistics a sample's result is the same alone and in company."""
    case = Case(shape=(3, 6, 5, 4), gated=gated, norm="running", dtype=torch.float64)
    inputs = case.inputs(generator)
    with use_backend(backend):
        together = dla_kernels.base_attention(*inputs.values(), **case.flags())
        for b in range(3):
            one = {**inputs, "x": inputs["x"][b : b + 1]}
            for name in ("values", "pooled"):
                one[name] = [t[b : b + 1] for t in inputs[name]]
            for name in ("state", "keys", "gates"):
                one[name] = inputs[name][:, b : b + 1]
            alone = dla_kernels.base_attention(*one.values(), **case.flags())
            assert_close(alone[0][0], together[0][b], name=f"out of sample {b}")
            assert_close(alone[4][:, 0], together[4][:, b], name=f"gates of sample {b}")


@each_backend("base_attention")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_mean_a_thousand_times_the_deviation(
    backend: str, layout: str, generator: torch.Generator
) -> None:
    """float32 sums of squares would lose the variance altogether."""
    case = Case(shape=(1, 6, 24, 21)).in_layout(layout)
    inputs = case.inputs(generator)
    inputs["values"] = [value + 1e3 for value in inputs["values"]]
    exact = reference("base_attention")(*in_float64(inputs).values(), **case.flags())
    with use_backend(backend):
        got = dla_kernels.base_attention(*inputs.values(), **case.flags())
    mean, var = exact[7], exact[8]
    assert (mean.abs() / var.sqrt()).median() > 100, "the case is not what it is for"
    assert_close(got[7], mean, name="mean", dtype=case.dtype)
    assert_close(got[8], var, name="var", dtype=case.dtype)


@each_backend("base_attention")
def test_saturated_scores(backend: str, generator: torch.Generator) -> None:
    """|q.k| in the thousands: a is 0 or 1, gradients vanish, nothing overflows."""
    case = Case(shape=(2, 6, 4, 4), norm="running", wants=())
    inputs = case.inputs(generator)
    inputs["q_weight"] *= 1e3
    options = {"case": case.dtype, "names": Case.outputs, **case.flags()}
    compare("base_attention", backend, inputs, {}, wants=(), **options)
    inputs["x"].requires_grad_()
    with use_backend(backend):
        dla_kernels.base_attention(*inputs.values(), **case.flags())[0].sum().backward()
    assert inputs["x"].grad.isfinite().all()


@each_backend("base_attention")
def test_what_is_differentiable(backend: str, generator: torch.Generator) -> None:
    for gated, marked in (
        ("projections", {*Case.outputs[:6]}),
        ("features", {*Case.outputs[:6]} - {"keys"}),
    ):
        case = Case(gated=gated)
        inputs = case.inputs(generator)
        inputs["x"].requires_grad_()
        with use_backend(backend):
            outputs = dla_kernels.base_attention(*inputs.values(), **case.flags())
        assert {n for n, t in zip(Case.outputs, outputs, strict=True) if t.requires_grad} == marked


@each_backend("base_attention")
def test_change_of_an_input_before_backward_is_noticed(
    backend: str, generator: torch.Generator
) -> None:
    """Backward passes recompute o from the values: writing into one must not go unseen."""
    inputs = Case().inputs(generator)
    inputs["v_weight"].requires_grad_()
    with use_backend(backend):
        out = dla_kernels.base_attention(*inputs.values(), **Case().flags())[0]
        inputs["values"][0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# --- three layers in a row: gradients of values across layers -------------------------------------

DEPTH = 3
STAGE = Case(shape=(2, 4, 3, 4), head_dim=2, layers=0, drop="some", dtype=torch.float64)
FORMS = {
    "official": STAGE,
    "official_defect": STAGE.with_(context="first_sample"),
    "paper": STAGE.with_(cell="dsu", gated="features"),
    "static": STAGE.with_(cell="none"),
}


class Stage:
    """Three steps, each after a block x -> tanh(x + noise); the cell is that of the first."""

    def __init__(self, case: Case, generator: torch.Generator, function: Any) -> None:
        self.case, self.function = case, function
        self.layers = [case.inputs(generator) for _ in range(DEPTH)]
        self.noise = [layer.pop("x") for layer in self.layers]
        for layer in self.layers:
            layer["cell_params"] = self.layers[0]["cell_params"]
        self.start = self.layers[0]["state"]
        self.weights = [
            t.requires_grad_()
            for layer in self.layers
            for t in (layer["q_weight"], layer["k_weight"], layer["v_weight"], layer["norm_bias"])
        ] + [w.requires_grad_() for w in self.layers[0]["cell_params"]]

    def __call__(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and values of all layers."""
        features = self.case.gated == "features"
        empty = x.new_empty(0, *x.shape[:2])
        values, pooled, filters, outs = [], [], [], []
        state, keys, gates = self.start, empty, empty
        for layer, noise in zip(self.layers, self.noise, strict=True):
            memory = {"state": state, "keys": keys, "gates": gates, "values": list(values)}
            memory |= {"pooled": list(pooled), "key_weights": list(filters)}
            given = {"x": torch.tanh(x + noise)} | layer | memory
            x, v, state, keys, gates, mean, *_ = self.function(*given.values(), **self.case.flags())
            outs.append(x)
            values.append(v)
            if self.case.cell != "none":
                pooled.append(mean)
            if features:
                filters.append(layer["k_weight"])
        return outs, values


def stage_of(form: str, function: Any = dla_kernels.base_attention) -> Stage:
    return Stage(FORMS[form], torch.Generator().manual_seed(0), function)


def entering() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return feature(STAGE.shape, torch.float64, generator=generator).requires_grad_()


def assert_all_close(got: Any, want: Any) -> None:
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_close(one + 0, other, name=f"gradient {i}", gradient=True, scale=1.0)


@each_backend("base_attention", interpreted=False)
@pytest.mark.parametrize("form", FORMS)
def test_three_layers_numerically(backend: str, form: str) -> None:
    stage = stage_of(form)

    def last(x: Tensor, *_: Tensor) -> Tensor:
        return stage(x)[0][-1]

    with use_backend(backend):
        inputs = entering(), *stage.weights
        assert torch.autograd.gradcheck(last, inputs, fast_mode=backend != "cpp")


@each_backend("base_attention")
@pytest.mark.parametrize("form", FORMS)
def test_losses_one_after_the_other(backend: str, form: str) -> None:
    """retain_graph: what one pass leaves must not enter the next."""
    stage, plain = stage_of(form), stage_of(form, reference("base_attention"))
    x, y = entering(), entering()
    with use_backend(backend):
        outs, _ = stage(x)
        expected, _ = plain(y)
        for layer in (2, 1, 2, 0):
            got = torch.autograd.grad(
                outs[layer].square().sum(), [x, *stage.weights], retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            want = torch.autograd.grad(
                expected[layer].square().sum(), [y, *plain.weights], retain_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            assert_all_close(got, want)


@each_backend("base_attention", interpreted=False)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_values(backend: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be asked for, with or without what lies before, and values may enter a loss."""
    results = []
    for deferred in (True, False):
        if not deferred:
            monkeypatch.setattr(base_attention, "_is_of_a_layer", lambda value: False)
        with use_backend(backend):
            stage, x = stage_of(form), entering()
            outs, values = stage(x)
            loss = (outs[-1] + values[0]).square().sum()
            found = []
            for wanted in ([x], values[:1], values[1:2], [*values[:2], stage.weights[2]]):
                found += torch.autograd.grad(loss, wanted, retain_graph=True)
            results.append(found)
    assert_all_close(*results)


@each_backend("base_attention")
def test_failure_midway(backend: str) -> None:
    """A backward pass that raises between layers leaves nothing to the next."""
    stage, failing = stage_of("official"), [True]
    x = entering()

    def fail(grad: Tensor) -> None:
        if failing[0]:
            raise KeyError("midway")

    with use_backend(backend):
        outs, _ = stage(x)
        outs[1].register_hook(fail)
        with pytest.raises(KeyError, match="midway"):
            outs[2].sum().backward(retain_graph=True)
        failing[0] = False
        for leaf in (x, *stage.weights):
            leaf.grad = None
        outs[2].sum().backward()
        other, again = stage_of("official"), entering()
        other(again)[0][2].sum().backward()
    assert_all_close([x.grad], [again.grad])
    assert_all_close([w.grad for w in stage.weights], [w.grad for w in other.weights])


@each_backend("base_attention")
def test_gradient_of_a_value_changed_in_place(backend: str) -> None:
    """It would be lost; a hook that returns another one is heard."""
    stage = stage_of("official")
    with use_backend(backend):
        outs, values = stage(entering())
        values[0].register_hook(lambda grad: grad.mul_(0))
        with pytest.raises(NotImplementedError, match="in place"):
            outs[2].sum().backward()


@each_backend("base_attention")
def test_leaves_get_plain_gradients(backend: str, generator: torch.Generator) -> None:
    """Only this op's own backward pass is handed deferred sums."""
    inputs = Case().inputs(generator)
    values = [value.requires_grad_() for value in inputs["values"]]
    inputs["values"] = [values[0], values[1] * 1]
    with use_backend(backend):
        dla_kernels.base_attention(*inputs.values(), **Case().flags())[0].sum().backward()
    assert all(type(value.grad) is Tensor for value in values)


def test_weighted_sum(generator: torch.Generator) -> None:
    def term() -> tuple[Tensor, Tensor]:
        w = random_small(2, 3, generator=generator)
        return w, random_small(2, 3, 4, 5, generator=generator)

    def product(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0][:, :, None, None] * pair[1]

    one, two = term(), term()
    joined = WeightedSum([one]) + WeightedSum([two])
    assert type(joined) is WeightedSum and len(joined.terms) == 2
    assert_close(joined.formed(), product(one) + product(two))
    mixed = joined + two[1]
    assert type(mixed) is Tensor
    assert_close(mixed, product(one) + product(two) + two[1])


# --- bad input ------------------------------------------------------------------------------------


def arguments(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Good arguments (B = 2, C = 6, H = 5, W = 4, two layers before) but for the changes."""
    gated = "features" if changes.get("gated") == "features" else "projections"
    return Case(norm="running", drop="some", gated=gated).arguments(**changes)


BAD = step_cases.BAD | {
    "values no list": ({"values": zeros(2, 2, 6, 5, 4)}, "values", "list", "Tensor"),
    "shape of a value": (
        {"values": lambda v: [v[0], zeros(2, 6, 4, 5)]}, "values[1]", "2, 6, 5, 4", "2, 6, 4, 5",
    ),
    "dtype of a value": (
        {"values": lambda v: [v[0].double(), v[1]]}, "values[0]", "float32", "float64",
    ),
    "too many values": ({"values": lambda v: v * 32}, "values", "63", "64"),
    "keys of more layers": ({"keys": zeros(3, 2, 6)}, "keys", "2, 2, 6", "3, 2, 6"),
    "keys' dtype": ({"keys": lambda t: t.double()}, "keys", "float32", "float64"),
    "gates of fewer layers": ({"gates": zeros(1, 2, 6)}, "gates", "2, 2, 6", "1, 2, 6"),
    "means of fewer layers": ({"pooled": lambda p: p[:1]}, "pooled", "2", "1"),
    "a mean's shape": (
        {"pooled": lambda p: [p[0], zeros(2, 5)]}, "pooled[1]", "2, 6", "2, 5",
    ),
    "filters of projections": (
        {"key_weights": lambda _: [zeros(1, 1, 3)]}, "key_weights", "0", "1",
    ),
    "no filters of features": (
        {"gated": "features", "key_weights": lambda _: []}, "key_weights", "2", "0",
    ),
    "another filter's size": (
        {"gated": "features", "key_weights": lambda w: [w[0], zeros(1, 1, 5)]},
        "key_weights[1]", "1, 1, 3", "1, 1, 5",
    ),
    "keys of features": ({"gated": "features", "keys": zeros(2, 2, 6)}, "keys", "0, 2, 6"),
    "gated": ({"gated": "values"}, "gated", "projections", "values"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changes, *words = BAD[bad]
    inputs, flags = arguments(**changes)
    assert_refused(lambda: dla_kernels.base_attention(*inputs, **flags), *words)


def test_static_steps_have_one_form(generator: torch.Generator) -> None:
    case = Case(cell="none")
    inputs, flags = case.inputs(generator), case.flags() | {"gated": "features"}
    assert_refused(
        lambda: dla_kernels.base_attention(*inputs.values(), **flags),
        "gated", "projections", "features",
    )  # fmt: skip


def test_good_arguments_are_good() -> None:
    """What the refusals start from is accepted."""
    for gated in ("projections", "features"):
        inputs, flags = arguments(gated=gated)
        assert dla_kernels.base_attention(*inputs, **flags)[0].shape == (2, 6, 5, 4)
