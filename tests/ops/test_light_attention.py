"""light_attention: every backend against the reference, over everything it has switches for."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import dla_kernels
import naive_dla
import step_cases
from dla_kernels import use_backend
from light_cases import Case
from op_cases import (
    DTYPES,
    LAYOUTS,
    SAMPLES,
    compare,
    covering,
    each_backend,
    each_case,
    feature,
    in_float64,
    large,
    mapped,
    random_small,
    reference,
    run,
)
from refusals import assert_refused
from step_cases import cell_params, check, zeros
from tolerances import assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CELLS = ["dsu_split", "dsu", "dia", "lstm", "rnn", "none"]
ACTIVATIONS = ["sigmoid", "tanh", "relu", "identity"]
CONTEXTS = ["per_sample", "first_sample"]
NORMS = ["batch", "running", "none"]
DROPS = ["none", "some", "all"]
ARRIVES = [("out", "o", "state"), ("out",), ("o",), ("state",), ("out", "state"), ("out", "o")]
WANTS = [
    None, (), ("x",), ("p",), ("x", "p"), ("state",), ("cell_params",), ("q_weight",),
    ("v_weight",), ("prev_weight", "lam"), ("norm_weight",), ("norm_bias",),
    ("x", "cell_params.0", "norm_bias"),
]  # fmt: skip

# [B, C, H, W], head_dim, kernel over the channels, hidden units; with the code path that it is for.
SHAPES = [
    ((1, 1, 1, 1), 1, 1, 1),  # one of everything
    ((3, 1, 7, 1), 1, 1, 1),  # one channel, one column: left and right taps all fall outside
    ((2, 3, 1, 7), 3, 1, 1),  # one row: upper and lower taps all fall outside
    ((3, 5, 1, 1), 5, 3, 2),  # pooled map: only centre taps; odd channels in channels_last
    ((2, 20, 2, 3), 4, 3, 5),  # smaller than a vector in width; five heads
    ((3, 20, 5, 5), 20, 3, 5),  # one head for all channels
    ((2, 33, 7, 7), 11, 3, 8),  # ImageNet's last stage: tails in width; one channel beyond vectors
    ((2, 64, 8, 8), 32, 3, 16),  # CIFAR's last stage: whole vectors and blocks, two heads
    ((1, 64, 8, 8), 32, 5, 16),  # one sample: batch statistics within one plane
    ((2, 16, 14, 14), 16, 3, 4),  # width 14: less than a vector; whole vector of channels
    ((2, 6, 17, 31), 3, 3, 3),  # odd both ways: a row beyond blocks of 8, all tails in width
    ((1, 5, 33, 40), 1, 5, 2),  # rows of several vectors and a tail; heads of one channel
    ((2, 24, 16, 32), 8, 3, 6),  # whole vectors in both directions, of any width
    ((1, 3, 9, 70), 3, 1, 1),  # rows of many vectors
    ((2, 130, 3, 4), 26, 5, 32),  # more channels than one block of them
    ((33, 4, 4, 4), 4, 1, 1),  # more samples than channels
]

AXES: dict[str, Any] = {
    "where": SHAPES,
    "dtype": DTYPES,
    "x_layout": LAYOUTS,
    "p_layout": LAYOUTS,
    "grad_layout": LAYOUTS,
    "cell": CELLS,
    "activation": ACTIVATIONS,
    "gate": ["identity", "sigmoid"],
    "context": CONTEXTS,
    "norm": NORMS,
    "affine": [True, False],
    "residual": [True, False],
    "return_o": [True, False],
    "has_p": [True, False],
    "has_prev": [True, False],
    "drop": DROPS,
    "arrives": ARRIVES,
    "wants": WANTS,
    "join": [False, True],
    "branch_norm": ["none", "batch", "running"],
}


# For Triton's interpreter: every form, on maps of a few hundred values.
INTERPRETED_AXES: dict[str, Any] = {
    "where": [((2, 6, 5, 4), 3, 3, 3), ((3, 1, 1, 7), 1, 1, 1), ((1, 3, 3, 2), 3, 3, 2)],
    "x_layout": ["nchw", "nhwc", "channel_slice"],
    "p_layout": ["nchw", "nhwc"],
    "grad_layout": ["nchw", "nhwc"],
    "cell": ["dsu_split", "dsu", "none"],
    "activation": ["sigmoid"],
    "drop": ["none", "some"],
    "arrives": [("out", "o", "state"), ("out",), ("state",)],
    "wants": [None, ("x",), ("v_weight",)],
}


@each_case(
    "light_attention",
    AXES,
    lambda axes: Case().with_(**axes).valid,
    interpreted=INTERPRETED_AXES,
    ids=lambda axes: str(Case().with_(**axes)),
)
def test_any_combination(backend: str, case: dict[str, Any]) -> None:
    check(backend, Case().with_(**case))


@each_backend("light_attention", but="reference")  # which cuts nothing
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("form", [{}, {"join": True, "branch_norm": "batch"}], ids=str)
def test_planes_cut_in_pieces(backend: str, layout: str, form: dict[str, Any]) -> None:
    """Sums of several programs of a GPU, and pixels whose neighbours are another program's."""
    width = 520 if layout == "nchw" else 60  # the CUDA kernels cut both across
    check(backend, Case(shape=(1, 2, 11, width), head_dim=2, **form).in_layout(layout))


@each_backend("light_attention", but="reference", interpreted=False)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.simd
def test_long_rows(backend: str, layout: str) -> None:
    """Statistics keep their digits. (Gradients of so few planes would be mostly rounding.)"""
    long = Case((1, 15, 3, 20_000), head_dim=3, join=True, branch_norm="batch", wants=())
    check(backend, long.in_layout(layout))


# What the layers really ask for, over all shapes, dtypes and (mixed) layouts.
PRESETS = {
    "official": Case(),
    "official_joined": Case(join=True),
    "official_block": Case(join=True, branch_norm="batch"),
    "official_dsu": Case(cell="dsu", gate="sigmoid"),
    "official_defect": Case(context="first_sample", drop="some"),
    "paper": Case(cell="dsu", has_prev=False, return_o=True, drop="some"),
    "paper_first": Case(cell="dsu", has_p=False, has_prev=False, return_o=True),
    "static": Case(cell="none", has_prev=False),
    "foreign_norm": Case(norm="none", residual=False),
    "frozen": Case(norm="running"),
    "inference": Case(norm="running", wants=()),
    "inference_joined": Case(norm="running", wants=(), join=True),
    "inference_block": Case(norm="running", wants=(), join=True, branch_norm="running"),
    "paper_inference": Case(cell="dsu", has_prev=False, return_o=True, norm="running", wants=()),
    "paper_first_inference": Case(
        cell="dsu", has_p=False, has_prev=False, return_o=True, norm="running", wants=()
    ),
    "foreign_norm_inference": Case(norm="none", residual=False, wants=()),
}
PRESET_AXES = {
    "preset": list(PRESETS),
    "where": SHAPES,
    "dtype": DTYPES,
    "layouts": [
        ("nchw", "nchw", "nchw"),
        ("nhwc", "nhwc", "nhwc"),
        ("nhwc", "nchw", "nhwc"),
        ("nchw", "nhwc", "nhwc"),
        ("nhwc", "nhwc", "nchw"),
        ("offset", "offset", "offset"),
    ],
}


def preset_case(preset: str, layouts: tuple[str, ...], **changes: Any) -> Case:
    x, p, grad = layouts
    return PRESETS[preset].with_(x_layout=x, p_layout=p, grad_layout=grad, **changes)


def preset_cases() -> list[Case]:
    """Every preset meets every shape, and in both all dtypes and layouts occur."""
    axes = covering(PRESET_AXES, lambda a: preset_case(**a).valid)
    return list(dict.fromkeys(preset_case(**a) for a in axes))


@each_backend("light_attention", interpreted=False)
@pytest.mark.parametrize("case", preset_cases(), ids=str)
@pytest.mark.simd
def test_presets(backend: str, case: Case) -> None:
    check(backend, case)


@each_backend("light_attention", interpreted=False)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_presets_in_every_dtype(backend: str, preset: str, dtype: torch.dtype, layout: str) -> None:
    """One awkward shape, in the full product."""
    case = PRESETS[preset].with_(((2, 33, 9, 11), 11, 3, 8), dtype=dtype)
    check(backend, case.in_layout(layout))


@each_backend("light_attention", interpreted=False)
@pytest.mark.parametrize("wants", WANTS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_only_some_inputs_are_differentiated(
    backend: str, wants: tuple[str, ...] | None, norm: str
) -> None:
    check(backend, Case(wants=wants, norm=norm, return_o=True))


@each_backend("light_attention", interpreted=False)
@pytest.mark.parametrize("arrives", ARRIVES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradients_arrive_anywhere(
    backend: str, arrives: tuple[str, ...], norm: str, layout: str
) -> None:
    """At out, at o (the next layer's p), at the state (the next layer's cell), in any mixture."""
    for cell in CELLS:
        case = Case(cell=cell, arrives=arrives, norm=norm, return_o=True)
        check(backend, case.in_layout(layout))


@each_backend("light_attention", interpreted=False)
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [True, False])
def test_drop_path(backend: str, drop: str, norm: str, residual: bool) -> None:
    """Dropped samples still count in the batch statistics and still move the state."""
    check(backend, Case(shape=(4, 6, 5, 4), drop=drop, norm=norm, residual=residual))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    heads, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    sizes = st.integers(1, 18)
    axes = {name: draw(st.sampled_from(values)) for name, values in AXES.items() if name != "where"}
    axes["has_prev"] &= axes["has_p"]
    axes["branch_norm"] = axes["branch_norm"] if axes["join"] else "none"
    return Case(
        shape=(draw(st.integers(1, 4)), heads * head_dim, draw(sizes), draw(sizes)),
        head_dim=head_dim, kernel=draw(st.sampled_from([1, 3, 5, 7])),
        hidden=draw(st.integers(1, 9)), **axes,
    )  # fmt: skip


@each_backend("light_attention", interpreted=False)
@hypothesis.settings(max_examples=150)
@hypothesis.given(case=any_case().filter(lambda case: case.valid))
def test_any_case(backend: str, case: Case) -> None:
    check(backend, case)


@each_backend("light_attention")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("cell", ["none", "dsu"])
@pytest.mark.parametrize("batch", [1, 3])
def test_mean_a_thousand_times_the_deviation(
    backend: str, layout: str, cell: str, batch: int, generator: torch.Generator
) -> None:
    """float32 sums of squares would lose the variance altogether (23% error)."""
    case = Case(shape=(batch, 6, 24, 21), cell=cell, has_prev=False, return_o=True)
    case = case.in_layout(layout)
    inputs = case.inputs(generator)
    inputs["p"] += 1e3  # o = a DW(x) + d lam p, with a deviation of about d lam
    inputs["lam"] = torch.ones(6) + inputs["lam"].abs()
    exact = in_float64(list(inputs.values()))
    want_out, want_o, _, want_mean, want_var, *_ = reference("light_attention")(
        *exact, **case.flags()
    )
    with use_backend(backend):
        out, o, _, mean, var, *_ = dla_kernels.light_attention(*inputs.values(), **case.flags())
    ratio = want_o.mean((2, 3)).abs() / want_o.std((2, 3))
    assert ratio.median() > 100, "the case is not what it is for"
    assert_close(o, want_o, name="o", dtype=case.dtype)
    assert_close(mean, want_mean, name="mean", dtype=case.dtype)
    assert_close(var, want_var, name="var", dtype=case.dtype)

    # The normalised values can be no better than o in float32: undo the normalisation to compare.
    def undone(values: Tensor) -> Tensor:
        n = (values.double() - exact[0] - per_channel(exact[10])) / per_channel(exact[9])
        return n * per_channel((want_var + case.eps).sqrt()) + per_channel(want_mean)

    assert_close(undone(out), undone(want_out), name="out", case=case.dtype)


@each_backend("light_attention", but="reference")  # which in float32 cannot do it
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradients_where_everything_has_a_mean(
    backend: str, layout: str, generator: torch.Generator
) -> None:
    """A norm by statistics of the batch takes the mean out of gradients: no rounding may be left of
    it when u and p have one as well."""
    case = Case((4, 6, 28, 28), cell="none", has_prev=False, arrives=("out",))
    case = case.in_layout(layout)
    inputs = case.inputs(generator)
    inputs["x"], inputs["p"] = inputs["x"] + 100, inputs["p"] + 100
    (grad,) = case.cotangents(generator).values()
    names = "p", "lam", "norm_weight"

    def gradients(function: Any, arguments: list[Any], grad: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, arguments, strict=True))
        wanted = [named[name].requires_grad_() for name in names]
        out = function(*named.values(), **case.flags())[0]
        return torch.autograd.grad(out, wanted, grad)

    exact = in_float64([*inputs.values(), grad + 10])
    expected = gradients(reference("light_attention"), exact[:-1], exact[-1])
    with use_backend(backend):
        found = gradients(dla_kernels.light_attention, list(inputs.values()), grad + 10)
    for name, one, want in zip(names, found, expected, strict=True):
        assert_close(one, want, name=name, dtype=case.dtype, gradient=True)


def per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


@each_backend("light_attention", but="reference")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_constant_map(backend: str, layout: str, generator: torch.Generator) -> None:
    """No variance at all: rstd = 1 / sqrt(eps), never the root of a negative number.

    Not of the reference, whose statistics are torch's: in channels_last these add plain float32
    numbers one after the other, and take the square of the mean's rounding error for variance.
    """
    case = Case(shape=(2, 6, 8, 8), cell="none", has_prev=False).in_layout(layout)
    inputs = case.inputs(generator)
    inputs["v_weight"].zero_()
    inputs["p"].fill_(1e3)
    with use_backend(backend):
        out, _, _, mean, var, *_ = dla_kernels.light_attention(*inputs.values(), **case.flags())
    rounding = torch.finfo(mean.dtype).eps * mean.abs().max()
    assert (var >= 0).all() and (var <= rounding**2).all()
    assert out.isfinite().all()
    assert_close(mean, 1e3 * inputs["lam"], name="mean")


@each_backend("light_attention")
def test_saturated_scores(backend: str, generator: torch.Generator) -> None:
    """|q.k| in the thousands: a is 0 or 1, gradients vanish, nothing overflows."""
    case = Case(shape=(2, 6, 4, 4), norm="running")
    inputs = case.inputs(generator)
    inputs["q_weight"] *= 1e3
    compare(
        "light_attention",
        backend,
        inputs,
        case.cotangents(generator),
        case=case.dtype,
        names=Case.outputs,
        constant=Case.constant,
        **case.flags(),
    )


@each_backend("light_attention")
def test_samples_do_not_mix(backend: str, generator: torch.Generator) -> None:
    """With running statistics a sample's result is the same alone and in company."""
    case = Case(shape=(3, 6, 5, 4), norm="running", return_o=True, dtype=torch.float64)
    inputs = case.inputs(generator)
    with use_backend(backend):
        together = dla_kernels.light_attention(*inputs.values(), **case.flags())
        for b in range(3):
            one = {**inputs, "x": inputs["x"][b : b + 1], "p": inputs["p"][b : b + 1]}
            one["state"] = inputs["state"][:, b : b + 1]
            alone = dla_kernels.light_attention(*one.values(), **case.flags())
            assert_close(alone[0][0], together[0][b], name=f"out of sample {b}")
            assert_close(alone[2][:, 0], together[2][:, b], name=f"state of sample {b}")


@each_backend("light_attention")
def test_first_sample_mixes_them_and_says_so(backend: str, generator: torch.Generator) -> None:
    """The official defect on request: row 0's context gates all, and row 0 gets their gradients."""
    case = Case(norm="running", context="first_sample", dtype=torch.float64)
    inputs = case.inputs(generator)
    state = inputs["state"].requires_grad_()
    with use_backend(backend):
        out = dla_kernels.light_attention(*inputs.values(), **case.flags())[0]
        (gradient,) = torch.autograd.grad(out[1].sum(), state)
    assert gradient[:, 0].abs().min() > 0
    assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.simd
def test_cpp_writes_maps_past_the_caches(
    joined: bool, layout: str, dtype: torch.dtype, sample: tuple[int, int, int]
) -> None:
    case = Case(large(sample, dtype), head_dim=1, dtype=dtype, arrives=("out",))
    changes = {"join": True, "branch_norm": "batch"} if joined else {"return_o": True}
    check("cpp", case.with_(**changes).in_layout(layout))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["gated", "first", "joined"])
def test_cpp_takes_large_maps_in_parts(
    form: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """C++ kernels pass some samples at a time through the whole step, so many that their maps stay
    in the cache: the results are those of all at once, bit by bit."""
    changes: dict[str, dict[str, Any]] = {
        "gated": {"return_o": True},
        "first": {"has_p": False, "has_prev": False},
        "joined": {"join": True, "branch_norm": "running", "x_layout": "nhwc", "p_layout": "nhwc"},
    }
    case = Case((7, 24, 96, 256), head_dim=4, dtype=dtype, norm="running", drop="some")
    case = case.with_(**changes[form])
    arguments, found = case.inputs(generator).values(), {}
    for count in (1, 4, 32):  # parts of 1 sample; of 3, or 7 in bfloat16 or without p; of all
        torch.set_num_threads(count)
        with use_backend("cpp"):
            found[count] = dla_kernels.light_attention(*arguments, **case.flags())
    with use_backend("reference"):
        expected = dla_kernels.light_attention(*arguments, **case.flags())
    for name, one, two, all_, want in zip(Case.outputs, *found.values(), expected, strict=True):
        assert torch.equal(one, two) and torch.equal(one, all_), name
        assert_close(one, want, name=name)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("cell", CELLS)
def test_cpp_parts_of_many_samples_are_as_all_at_once(
    cell: str, generator: torch.Generator
) -> None:
    """The cell takes the samples of a part together, in groups whose size depends on theirs."""
    case = Case((40, 24, 52, 52), head_dim=4, cell=cell, norm="running")
    arguments, found = case.inputs(generator).values(), []
    for count in (1, 4, 32):  # parts of 8, of 32, of all
        torch.set_num_threads(count)
        with use_backend("cpp"):
            found.append(dla_kernels.light_attention(*arguments, **case.flags()))
    for name, one, two, all_ in zip(Case.outputs, *found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, all_), name


@each_backend("light_attention")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("width", [4, 17])
def test_without_prev_conv_pixels_of_p_stay_apart(
    backend: str, width: int, layout: str, generator: torch.Generator
) -> None:
    """No filter of zeros may make NaN of the neighbours of what is infinite."""
    case = Case((1, 6, 5, width), cell="none", norm="running", has_prev=False).in_layout(layout)
    inputs = case.inputs(generator)
    infinite = torch.zeros(case.shape, dtype=torch.bool)
    infinite[0, 2, 3, 1] = True
    arriving = torch.ones(case.shape).masked_fill(infinite, float("inf"))
    p = inputs["p"].requires_grad_()
    with use_backend(backend):
        out = dla_kernels.light_attention(*inputs.values(), **case.flags())[0]
        (gradient,) = torch.autograd.grad(out, p, arriving)
        p.data.masked_fill_(infinite, float("inf"))
        out = dla_kernels.light_attention(*inputs.values(), **case.flags())[0]
    for name, found in {"out": out, "dp": gradient}.items():
        assert torch.equal(found.isfinite(), ~infinite), name


@each_backend("light_attention")
def test_statistics_are_not_differentiable(backend: str, generator: torch.Generator) -> None:
    inputs = Case().inputs(generator)
    inputs["x"].requires_grad_()
    with use_backend(backend):
        outputs = dla_kernels.light_attention(*inputs.values(), **Case().flags())
    marked = {name for name, t in zip(Case.outputs, outputs, strict=True) if t.requires_grad}
    assert marked == {"out", "state"}


@each_backend("light_attention")
def test_change_of_an_input_before_backward_is_noticed(
    backend: str, generator: torch.Generator
) -> None:
    """The kernels recompute o from x and p: writing into them in between must not go unseen."""
    for name in ("x", "p", "v_weight"):
        inputs = Case().inputs(generator)
        inputs["lam"].requires_grad_()
        inputs["x"].requires_grad_(name != "x")
        with use_backend(backend):
            out = dla_kernels.light_attention(*inputs.values(), **Case().flags())[0]
            inputs[name].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


# --- four layers in a row -------------------------------------------------------------------------

DEPTH = 4
STAGE = Case(shape=(3, 6, 5, 4), drop="some", dtype=torch.float64)
SPECS = {
    "paper": STAGE.with_(cell="dsu", has_prev=False, return_o=True),
    "official": STAGE,
}


def stage_inputs(case: Case, generator: torch.Generator) -> list[dict[str, Any]]:
    """Inputs per layer; the cell and DW_e are those of the first layer (a stage shares them)."""
    layers = [case.inputs(generator) for _ in range(DEPTH)]
    shared = {name: layers[0][name] for name in ("cell_params", "prev_weight")}
    return [layer | shared for layer in layers]


def stage(
    layers: list[dict[str, Any]], function: Any, tanh: Any, spec: str, **flags: Any
) -> tuple[Any, Any]:
    """Four layers, each after a block x -> tanh(x + noise). Returns the last output and state.

    The first layer's ``x`` enters the stage, every layer's ``p`` serves as its block's noise.
    """
    x, state, o = layers[0]["x"], layers[0]["state"], None
    for layer in layers:
        shortcut, x = x, tanh(x + layer["p"])
        p = shortcut if spec == "official" else o
        given = layer | {"x": x, "p": p, "state": state}
        x, o, state = function(*given.values(), **flags)[:3]
    return x, state


@each_backend("light_attention")
@pytest.mark.parametrize("spec", SPECS)
def test_four_layers_against_numpy(backend: str, spec: str, generator: torch.Generator) -> None:
    case = SPECS[spec]
    layers = stage_inputs(case, generator)
    options = {"spec": spec, **case.flags()}
    with use_backend(backend):
        got = stage(layers, dla_kernels.light_attention, torch.tanh, **options)
    arrays = mapped(lambda _, t: t.numpy(force=True), layers)
    want = stage(arrays, naive_dla.light_attention, np.tanh, **options)
    for name, actual, expected in zip(("out", "state"), got, want, strict=True):
        assert_close(actual.cpu(), torch.from_numpy(expected), name=name)


@each_backend("light_attention", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("spec", SPECS)
def test_four_layers_train_like_the_reference(
    backend: str, spec: str, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Gradients through the state and (paper) through o, across four layers."""
    case = SPECS[spec].with_(dtype=dtype).in_layout(layout)
    inputs = {"layers": stage_inputs(case, generator)}
    cotangents = {
        0: feature(case.shape, dtype, layout, generator=generator),
        1: random_small(*inputs["layers"][0]["state"].shape, generator=generator, dtype=dtype),
    }
    options = {"tanh": torch.tanh, "spec": spec, "constant": Case.constant, **case.flags()}
    with use_backend(backend):
        got = run(stage, inputs, cotangents, function=dla_kernels.light_attention, **options)
    want = run(
        stage, in_float64(inputs), in_float64(cotangents),
        function=reference("light_attention"), **options,
    )  # fmt: skip
    for name, actual, expected in zip(("out", "state"), got[0], want[0], strict=True):
        assert_close(actual, expected, name=name, dtype=dtype)
    assert_gradients_close(got[1], want[1], case=dtype)


# --- bad input ------------------------------------------------------------------------------------


def arguments(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Good arguments (B = 2, C = 6, H = 5, W = 4, heads of 3) but for the changes."""
    return Case(norm="running", drop="some").arguments(**changes)


def double(t: Tensor) -> Tensor:
    return t.double()


def elsewhere(t: Tensor) -> Tensor:
    return t.to("meta")


BAD = step_cases.BAD | {
    "x is a list": ({"x": [1.0]}, "x", "Tensor", "list"),
    "x of integers": ({"x": zeros(2, 6, 5, 4, dtype=torch.int64)}, "x", "float", "int64"),
    "no samples": ({"x": zeros(0, 6, 5, 4), "p": zeros(0, 6, 5, 4)}, "x", "0, 6, 5, 4"),
    "no pixels": ({"x": zeros(2, 6, 0, 4), "p": zeros(2, 6, 0, 4)}, "x", "2, 6, 0, 4"),
    "p's shape": ({"p": zeros(2, 6, 5, 5)}, "p", "2, 6, 5, 4", "2, 6, 5, 5"),
    "p's batch": ({"p": zeros(1, 6, 5, 4)}, "p", "2, 6, 5, 4", "1, 6, 5, 4"),
    "p's dtype": ({"p": double}, "p", "float32", "float64"),
    "p's device": ({"p": elsewhere}, "p", "cpu", "meta"),
    "p missing": ({"p": None}, "prev_weight", "p"),
    "state's batch": ({"state": zeros(2, 3, 6)}, "state", "2, 2, 6", "2, 3, 6"),
    "state's channels": ({"state": zeros(2, 2, 5)}, "state", "2, 2, 6", "2, 2, 5"),
    "state's dtype": ({"state": double}, "state", "float32", "float64"),
    "state's device": ({"state": elsewhere}, "state", "cpu", "meta"),
    "state missing": ({"state": None}, "state", "Tensor", "None"),
    "param's shape": (
        {"cell_params": lambda p: [zeros(3, 7), *p[1:]]}, "cell_params", "6", "3, 7",
    ),
    "params without a cell": ({"cell": "none", "state": zeros(0, 2, 6)}, "cell_params", "0", "8"),
    "state without a cell": ({"cell": "none", "cell_params": []}, "state", "0, 2, 6", "2, 2, 6"),
    "q missing": ({"q_weight": None}, "q_weight", "Tensor", "None"),
    "q's shape": ({"q_weight": zeros(3)}, "q_weight", "1, 1", "3"),
    "v's dtype": ({"v_weight": double}, "v_weight", "float32", "float64"),
    "prev's shape": ({"prev_weight": zeros(6, 1, 5, 5)}, "prev_weight", "6, 1, 3, 3", "6, 1, 5, 5"),
    "lam's shape": ({"lam": zeros(1, 6, 1, 1)}, "lam", "6", "1, 6, 1, 1"),
    "lam in half": ({"lam": lambda t: t.half()}, "lam", "float32", "float16"),
    "weight's shape": ({"norm_weight": zeros(5)}, "norm_weight", "6", "5"),
    "weight without branch_norm": (
        {"branch_weight": zeros(6), "branch_bias": zeros(6)}, "branch_weight", "None", "[6]",
    ),
    "bias's dtype": ({"norm_bias": double}, "norm_bias", "float32", "float64"),
    "no running variance": ({"var_in": None}, "var_in", "running"),
    "mean's shape": ({"mean_in": zeros(7)}, "mean_in", "6", "7"),
    "drop path's shape": ({"drop_scale": zeros(2, 1, 1, 1)}, "drop_scale", "2", "2, 1, 1, 1"),
    "no heads": ({"head_dim": 0}, "head_dim", "0"),
    "activation": ({"activation": "gelu"}, "activation", "sigmoid", "gelu"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changes, *words = BAD[bad]
    inputs, flags = arguments(**changes)
    assert_refused(lambda: dla_kernels.light_attention(*inputs, **flags), *words)


def test_good_arguments_are_good() -> None:
    """What the refusals start from is accepted."""
    inputs, flags = arguments()
    assert dla_kernels.light_attention(*inputs, **flags)[0].shape == (2, 6, 5, 4)


def test_one_value_per_channel_has_no_batch_statistics() -> None:
    """As torch's batch_norm: an error that names the shape, not a silent division by zero."""
    case = Case(shape=(1, 6, 1, 1))
    inputs = case.inputs(torch.Generator().manual_seed(0))
    assert_refused(
        lambda: dla_kernels.light_attention(*inputs.values(), **case.flags()), "x", "1, 6, 1, 1"
    )


def test_dsu_needs_one_slot(generator: torch.Generator) -> None:
    case = Case(cell="dsu")
    inputs = case.inputs(generator)
    inputs["cell_params"] = cell_params("dsu", 6, 2, generator, dtype=torch.float32)
    inputs["state"] = zeros(2, 2, 6)
    assert_refused(
        lambda: dla_kernels.light_attention(*inputs.values(), **case.flags()),
        "state", "1, 2, 6", "2, 2, 6",
    )  # fmt: skip
