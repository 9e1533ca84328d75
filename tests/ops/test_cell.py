"""cell: every backend against the reference."""

from __future__ import annotations

import bisect
import logging
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import dla_kernels
from base_cases import Case as BaseCase
from dla_kernels import backend as dispatch
from dla_kernels import use_backend
from dla_kernels.backend import implementation
from dla_kernels.ops.base_attention import GRADS
from dla_kernels.ops.cell.reference import CELLS
from light_cases import Case as LightCase
from op_cases import (
    EMULATED,
    assert_shows_nan,
    backends,
    compare,
    each_backend,
    each_case,
    flatten,
    random_small,
    reference,
)
from refusals import assert_refused
from step_cases import SLOTS, StepCase, cell_params

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KINDS = [kind for kind in SLOTS if kind != "none"]
OTHER = "cpp" if EMULATED else "triton"  # that serves the tensors of "cuda", too
ACTIVATIONS = ["sigmoid", "tanh", "relu", "identity"]
AXES = {
    "kind": KINDS,
    "activation": ACTIVATIONS,
    "dtype": [torch.float32, torch.float64],
    "batch": [1, 2, 3, 32],  # one row; rows fewer than a register block; whole blocks
    "channels": [1, 3, 5, 20, 33, 64, 256],
    "hidden": [1, 2, 5, 16, 64],
    "strides": ["dense", "transposed", "sliced", "expanded"],
    "wants": [None, ("y",), ("state",), ("params",), ("params.1", "y")],
}


def strided(*shape: int, strides: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random numbers in memory order other than the dense one."""
    like: dict[str, Any] = {"generator": generator, "dtype": dtype}
    if strides == "transposed":
        return random_small(*shape[:-2], shape[-1], shape[-2], **like).transpose(-1, -2)
    if strides == "sliced":
        return random_small(*shape[:-1], 2 * shape[-1], **like)[..., ::2]
    if strides == "expanded":
        return random_small(*shape[:-2], 1, shape[-1], **like).expand(shape)
    return random_small(*shape, **like)


def check(
    backend: str,
    kind: str,
    activation: str,
    dtype: torch.dtype,
    batch: int,
    channels: int,
    hidden: int,
    strides: str,
    wants: tuple[str, ...] | None,
) -> None:
    generator = torch.Generator().manual_seed(batch + 100 * channels + hidden)
    like = {"strides": strides, "generator": generator, "dtype": dtype}
    state = (SLOTS[kind], batch, channels)
    inputs = {
        "y": strided(batch, channels, **like),
        "state": strided(*state, **like),
        "params": cell_params(kind, channels, hidden, generator, dtype=dtype),
    }
    outputs, _ = compare(
        "cell",
        backend,
        inputs,
        {0: strided(*state, **like)},
        case=dtype,
        wants=wants,
        kind=kind,
        activation=activation,
    )
    assert outputs[0].dtype == dtype


INTERPRETED = {
    "batch": [1, 20], "channels": [1, 5, 33], "hidden": [1, 20],
    "strides": ["dense", "expanded"], "wants": [None],
}  # fmt: skip


@each_case("cell", AXES, interpreted=INTERPRETED)
@pytest.mark.simd
def test_against_the_reference(backend: str, case: dict) -> None:
    check(backend, **case)


@each_backend("cell", interpreted=False)
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    kind=st.sampled_from(AXES["kind"]), activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(AXES["dtype"]), batch=st.integers(1, 40), channels=st.integers(1, 80),
    hidden=st.integers(1, 40), strides=st.sampled_from(AXES["strides"]),
    wants=st.sampled_from(AXES["wants"]),
)  # fmt: skip
def test_any_shape(backend: str, **case) -> None:
    check(backend, **case)


@each_backend("cell")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.simd
def test_one_channel(backend: str, kind: str, batch: int) -> None:
    """Rows and columns of one element, whose strides tell nothing."""
    for hidden in (1, 3, 17):
        check(backend, kind, "sigmoid", torch.float32, batch, 1, hidden, "dense", None)


@each_backend("cell")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["y", "state"])
def test_not_a_number(backend: str, kind: str, where: str, generator: torch.Generator) -> None:
    like = {"generator": generator, "dtype": torch.float32}
    inputs = {
        "y": random_small(3, 5, **like),
        "state": random_small(SLOTS[kind], 3, 5, **like),
        "params": cell_params(kind, 5, 4, **like),
    }
    flatten(inputs)[where].view(-1)[1] = float("nan")
    cotangents = {0: random_small(SLOTS[kind], 3, 5, **like)}
    assert_shows_nan("cell", backend, inputs, cotangents, kind=kind, activation="relu")


@each_backend("cell")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_saturated_gates(backend: str, kind: str, scale: float, generator: torch.Generator) -> None:
    """Far out on the sigmoid and tanh: no overflow, no NaN, right limits and (zero) gradients."""
    like = {"generator": generator, "dtype": torch.float32}
    inputs = {
        "y": scale * random_small(3, 8, **like),
        "state": scale * random_small(SLOTS[kind], 3, 8, **like),
        "params": cell_params(kind, 8, 4, **like),
    }
    cotangents = {0: random_small(SLOTS[kind], 3, 8, **like)}
    compare(
        "cell", backend, inputs, cotangents, case=torch.float32, kind=kind, activation="sigmoid"
    )


CUDA = pytest.mark.parametrize(
    "backend", [one for one in backends("cell") if one.values == ("cuda",)]
)


def call_of(kind: str, channels: int) -> tuple[Any, ...]:
    """Arguments of the op; of a sample's values nothing but the number matters."""
    params = [torch.full(shape, 0.1) for shape in CELLS[kind].shapes(3, channels)]
    return torch.ones(1, channels), torch.ones(SLOTS[kind], 1, channels), params, kind, "sigmoid"


@CUDA
def test_too_wide_for_any_shared_memory(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused when asked for; the automatic choice goes on and says why, once."""
    call = call_of("dsu", 20_000)
    with use_backend(backend):
        assert_refused(lambda: dla_kernels.cell(*call), "cell", "20000", "shared memory")
    monkeypatch.setattr(dispatch, "_automatic_order", lambda *_: (backend, "reference"))
    with caplog.at_level(logging.DEBUG, "dla_kernels"):
        for _ in range(2):
            assert torch.equal(dla_kernels.cell(*call), reference("cell")(*call))
    assert len([line for line in caplog.messages if "shared memory" in line]) == 1


WEIGHTS = pytest.mark.parametrize(
    ("kind", "channels", "hidden", "many"),
    [
        ("dsu", 512, 32, False),
        ("dsu", 1024, 64, True),
        ("dsu_split", 512, 32, False),
        ("lstm", 128, 1, False),
        ("lstm", 256, 1, True),
        ("rnn", 512, 1, True),
    ],
)


@CUDA
@WEIGHTS
def test_cell_of_many_weights_goes_elsewhere(
    backend: str, kind: str, channels: int, hidden: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, and to another fast backend; on request this one serves it."""
    params = [torch.ones(shape) for shape in CELLS[kind].shapes(hidden, channels)]
    y, state = torch.ones(1, channels), torch.ones(SLOTS[kind], 1, channels)
    call = y, state, params, kind, "sigmoid"

    def chosen(*order: str) -> set[str]:
        monkeypatch.setattr(dispatch, "_automatic_order", lambda *_: order)
        modules = (
            dispatch.select("cell", y, call, False),
            dispatch.select("cell", state, (state, *call), True),
        )
        return {module.__name__.rpartition(".")[2] for module in modules}

    assert chosen(backend, OTHER, "reference") == {OTHER if many else backend}
    assert chosen(backend, "reference") == {backend}
    with use_backend(backend):
        assert chosen(OTHER, "reference") == {backend}


@CUDA
@WEIGHTS
@pytest.mark.parametrize("case", [LightCase, BaseCase], ids=lambda case: case.op)
def test_step_with_a_cell_of_many_weights(
    backend: str,
    case: type[StepCase],
    kind: str,
    channels: int,
    hidden: int,
    many: bool,
    generator: torch.Generator,
) -> None:
    """A step gives way as its cell does alone."""
    step = case(shape=(1, channels, 1, 1), head_dim=1, hidden=hidden, cell=kind)
    inputs = step.inputs(generator).values()
    module = implementation(case.op, backend)
    grads = [None] * {"light_attention": 3, "base_attention": GRADS}[case.op]
    for reason in module.gives_way(False, *inputs), module.gives_way(True, *grads, *inputs):
        assert many == (reason is not None and "MiB of the cell's weights" in reason)


@CUDA
@pytest.mark.parametrize("case", [LightCase, BaseCase], ids=lambda case: case.op)
def test_step_with_a_cell_too_wide(
    backend: str,
    case: type[StepCase],
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A step refuses before anything is launched, as its cell does alone."""
    wide = case(shape=(1, 20_000, 1, 1), head_dim=1, hidden=1, norm="none")
    made = wide.inputs(generator) | wide.flags()
    step = getattr(dla_kernels, case.op)
    with use_backend(backend):
        assert_refused(lambda: step(**made), case.op, "20000", "shared memory")
    monkeypatch.setattr(dispatch, "_automatic_order", lambda *_: (backend, "reference"))
    with caplog.at_level(logging.DEBUG, "dla_kernels"):
        assert torch.equal(step(**made)[0], reference(case.op)(**made)[0])
    assert len([line for line in caplog.messages if "shared memory" in line]) == 1


@CUDA
@pytest.mark.parametrize("kind", ["dsu", "dsu_split", "dia"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_widest_cell_that_fits(backend: str, kind: str, direction: str) -> None:
    """What is refused is what the kernels cannot run."""
    module = implementation("cell", backend)

    def arguments(channels: int) -> tuple[Any, ...]:
        call = call_of(kind, channels)
        return call if direction == "forward" else (call[1], *call)

    def refused(channels: int) -> bool:
        return module.refuses(direction == "backward", *arguments(channels)) is not None

    too_many = bisect.bisect_left(range(20_000), True, lo=1, key=refused)
    run = getattr(module, direction)
    run(*arguments(too_many - 1))
    with pytest.raises(RuntimeError, match="too many channels"):
        run(*arguments(too_many))


@each_backend("cell")
@pytest.mark.parametrize("slot", [0, 1])
def test_gradient_at_one_slot_only(backend: str, slot: int, generator: torch.Generator) -> None:
    """The output (slot 0) and what is carried (slot 1) are differentiated separately."""
    inputs = {
        "y": random_small(2, 6, generator=generator),
        "state": random_small(2, 2, 6, generator=generator),
        "params": cell_params("dsu_split", 6, 3, generator, dtype=torch.float64),
    }
    grad = torch.zeros(2, 2, 6, dtype=torch.float64)
    grad[slot] = random_small(2, 6, generator=generator)
    compare(
        "cell",
        backend,
        inputs,
        {0: grad},
        case=torch.float64,
        kind="dsu_split",
        activation="sigmoid",
    )


@each_backend("cell")
@pytest.mark.parametrize("activation", ["relu", "identity", "tanh"])
def test_zero_state(backend: str, activation: str, generator: torch.Generator) -> None:
    """Every stage starts from c = 0, exactly where relu has its kink: its slope there is 0."""
    inputs = {
        "y": random_small(2, 6, generator=generator),
        "state": torch.zeros(1, 2, 6, dtype=torch.float64),
        "params": cell_params("dsu", 6, 3, generator, dtype=torch.float64),
    }
    grad = random_small(1, 2, 6, generator=generator)
    compare(
        "cell", backend, inputs, {0: grad}, case=torch.float64, kind="dsu", activation=activation
    )


def arguments(of: str = "dsu_split", **changes: Any) -> tuple[Any, ...]:
    """Good arguments (B = 2, C = 4, h = 3) but for the changes; a callable changes the good one."""
    generator = torch.Generator().manual_seed(0)
    good: dict[str, Any] = {
        "y": torch.zeros(2, 4),
        "state": torch.zeros(SLOTS[of], 2, 4),
        "params": cell_params(of, 4, 3, generator, dtype=torch.float32),
        "kind": of,
        "activation": "sigmoid",
    }
    changed = {n: c(good[n]) if callable(c) else c for n, c in changes.items()}
    return tuple((good | changed).values())


def with_param(number: int, value: Tensor) -> Any:
    """Changes one parameter of the list."""
    return lambda params: [*params[:number], value, *params[number + 1 :]]


BAD = {
    "kind": ({"kind": "gru"}, "kind", "dsu_split", "gru"),
    "activation": ({"activation": "softplus"}, "activation", "sigmoid", "softplus"),
    "not a tensor": ({"y": 1.0}, "y", "Tensor", "float"),
    "y missing": ({"y": None}, "y", "Tensor", "None"),
    "rank of y": ({"y": torch.zeros(2, 4, 1, 1)}, "y", "B, C", "2, 4, 1, 1"),
    "no samples": ({"y": torch.zeros(0, 4), "state": torch.zeros(2, 0, 4)}, "y", "0, 4"),
    "integers": ({"y": torch.zeros(2, 4, dtype=torch.int64)}, "y", "float32", "int64"),
    "half": ({"y": torch.zeros(2, 4, dtype=torch.float16)}, "y", "float32", "float16"),
    "slots": ({"state": torch.zeros(1, 2, 4)}, "state", "2, 2, 4", "1, 2, 4"),
    "state's batch": ({"state": torch.zeros(2, 3, 4)}, "state", "2, 2, 4", "2, 3, 4"),
    "state's channels": ({"state": torch.zeros(2, 2, 5)}, "state", "2, 2, 4", "2, 2, 5"),
    "state's rank": ({"state": torch.zeros(2, 4)}, "state", "2, 2, 4", "2, 4"),
    "state's dtype": (
        {"state": torch.zeros(2, 2, 4, dtype=torch.float64)}, "state", "float32", "float64",
    ),
    "state's device": ({"state": lambda s: s.to("meta")}, "state", "cpu", "meta"),
    "number of params": ({"params": lambda p: p[:7]}, "params", "8", "7"),
    "params of dsu": ({"params": lambda p: p[:3]}, "params", "8", "3"),
    "param's shape": ({"params": with_param(2, torch.zeros(8, 3))}, "params", "12, 3", "8, 3"),
    "param's channels": ({"params": with_param(0, torch.zeros(3, 5))}, "params", "4", "3, 5"),
    "bias": ({"params": with_param(1, torch.zeros(4))}, "params", "3", "4"),
    "no hidden units": ({"params": with_param(0, torch.zeros(0, 4))}, "params", "0, 4"),
    "param's dtype": (
        {"params": with_param(3, torch.zeros(12, dtype=torch.float64))},
        "params", "float32", "float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changes, *words = BAD[bad]
    assert_refused(lambda: dla_kernels.cell(*arguments(**changes)), *words)


def test_good_arguments_are_good() -> None:
    """What the refusals start from is accepted."""
    for kind in KINDS:
        assert dla_kernels.cell(*arguments(kind)).shape == (SLOTS[kind], 2, 4)
