"""Triton's cells beyond the op: many inputs under one state, sums of gradients, ways to cut up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dla_kernels.ops.step_formulas import gates_of
from light_cases import SLOTS, cell_params
from op_cases import case_id, covering, device_of, in_float64, random_small, run, skips
from tolerances import assert_close, assert_gradients_close

pytestmark = [*skips("triton"), pytest.mark.usefixtures("poisoned_memory", "gpu_if_any")]
KINDS = [kind for kind in SLOTS if kind != "none"]
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def gpu_if_any() -> Iterator[None]:
    with torch.device(device_of("triton")):
        yield


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, for tests to change how it cuts up cells."""
    module = pytest.importorskip("dla_kernels.ops.cell.triton")
    module._grid.cache_clear()
    yield module
    monkeypatch.undo()
    module._grid.cache_clear()


def arguments(
    kind: str, repeats: int, batch: int, channels: int, hidden: int, dtype: torch.dtype
) -> dict[str, Any]:
    """M inputs, state, parameters, and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(0)
    like: dict[str, Any] = {"generator": generator, "dtype": dtype}
    return {
        "inputs": random_small(repeats, batch, channels, **like),
        "state": random_small(SLOTS[kind], batch, channels, **like),
        "params": cell_params(kind, channels, hidden, **like),
        "grad": random_small(repeats, batch, channels, **like),
    }


def check(
    cells: Any,
    kind: str,
    activation: str = "sigmoid",
    first_sample: bool = False,
    dtype: torch.dtype = torch.float64,
    **sizes: int,
) -> None:
    """Outputs and gradients of ``evaluate`` against the gates of a layer step."""
    given = arguments(kind, dtype=dtype, **sizes)
    grad = given.pop("grad")
    options = kind, activation, first_sample
    outputs = cells.evaluate(*given.values(), *options)
    gradients = cells.evaluate_backward(grad, *given.values(), *options)

    def formulas(inputs: Tensor, state: Tensor, params: list[Tensor]) -> Tensor:
        context = "first_sample" if first_sample else "per_sample"
        return gates_of(inputs, state, params, kind, activation, "identity", context)

    expected, expected_gradients = run(formulas, in_float64(given), {0: grad.double()})
    assert_close(outputs, expected[0], dtype=dtype)
    named = dict(zip(expected_gradients, gradients, strict=True))
    assert_gradients_close(named, expected_gradients, case=dtype)


AXES = {
    "kind": KINDS,
    "activation": ["sigmoid", "tanh", "relu", "identity"],
    "first_sample": [False, True],
    "dtype": [torch.float32, torch.float64],
    "repeats": [1, 2, 5],
    "batch": [1, 3, 17],
    "channels": [5, 20, 32],
    "hidden": [1, 5, 40],
}


@pytest.mark.parametrize("case", covering(AXES), ids=case_id)
def test_many_inputs_under_one_state(cells: Any, case: dict[str, Any]) -> None:
    check(cells, **case)


@EACH_KIND
@pytest.mark.parametrize("first_sample", [False, True])
def test_programs_that_take_several_inputs(
    cells: Any, kind: str, first_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five inputs of a sample in chunks of three, the last of which is not full."""
    monkeypatch.setattr(cells, "PROGRAMS", 8)
    sizes = {"repeats": 5, "batch": 18, "channels": 20, "hidden": 5}
    assert cells._grid(kind, "", False, *sizes.values(), 8, "ieee").sizes[-2:] == (2, 3)
    check(cells, kind, first_sample=first_sample, **sizes)


@pytest.mark.parametrize("kind", ["dsu", "dsu_split", "dia"])
@pytest.mark.parametrize("splits", [0, 1, 4])
def test_any_way_to_the_hidden_layer(
    cells: Any, kind: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formed in place or by its own kernel, whole or in sums, one of which is empty."""
    monkeypatch.setattr(cells, "hidden_splits", lambda *_: splits)
    check(cells, kind, repeats=2, batch=3, channels=40, hidden=20)


@EACH_KIND
def test_more_tiles_of_channels_than_are_left_to_readers(cells: Any, kind: str) -> None:
    check(cells, kind, repeats=1, batch=2, channels=16 * cells.PARTS + 5, hidden=3)


@EACH_KIND
def test_sums_with_other_gradients(cells: Any, kind: str) -> None:
    """What a layer step adds up on the way: of y, of the state, of the parameters."""
    given = arguments(kind, repeats=1, batch=3, channels=20, hidden=5, dtype=torch.float64)
    grad, inputs = given.pop("grad"), given["inputs"]
    state, params = given["state"], given["params"]
    plain = cells.evaluate_backward(grad, inputs, state, params, kind, "tanh", False)
    more = torch.ones_like(state)
    summed = cells.evaluate_backward(
        grad, inputs, state, params, kind, "tanh", False, plus_state=more
    )
    assert_close(summed[1], plain[1] + more)

    step = state, inputs[0], state, params, kind, "tanh"
    plain = cells.backward(*step)
    more = [torch.full_like(g, 2.0) for g in plain]
    kept = more[0].clone()
    summed = cells.backward(*step, plus_y=more[0], add_to=more[2:])
    for got, one, added in zip(summed, plain, [2, 0] + [2] * len(params), strict=True):
        assert_close(got, one + added)
    assert all(a is b for a, b in zip(summed[2:], more[2:], strict=True))
    assert torch.equal(more[0], kept)
