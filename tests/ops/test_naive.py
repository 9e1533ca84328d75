"""The references themselves, against loops written independently from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import naive_dla
from light_cases import Case
from op_cases import covering, flatten, in_float64, mapped, random_small, reference
from step_cases import SLOTS, cell_params
from tolerances import assert_close

KINDS = [kind for kind in SLOTS if kind != "none"]

AXES = {
    "shape": [(1, 4, 1, 1), (2, 6, 3, 2), (3, 6, 1, 4), (2, 4, 5, 3)],
    "head_dim": [1, 2, 3],
    "kernel": [1, 3, 5],
    "cell": list(SLOTS),
    "activation": ["sigmoid", "tanh", "relu", "identity"],
    "gate": ["identity", "sigmoid"],
    "context": ["per_sample", "first_sample"],
    "norm": ["batch", "running", "none"],
    "affine": [True, False],
    "residual": [True, False],
    "join": [True, False],
    "branch_norm": ["none", "batch", "running"],
    "return_o": [True, False],
    "has_p": [True, False],
    "has_prev": [True, False],
    "drop": ["none", "some"],
}
CASES = [Case(dtype=torch.float64, **c) for c in covering(AXES, lambda c: Case(**c).valid)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_light_attention(case: Case, generator: torch.Generator) -> None:
    inputs = case.inputs(generator)
    got = reference("light_attention")(*inputs.values(), **case.flags())
    want = naive_dla.light_attention(
        *mapped(lambda _, t: t.numpy(), inputs).values(), **case.flags()
    )
    for name, actual, expected in zip(Case.outputs, got, want, strict=True):
        assert_close(actual, torch.from_numpy(np.array(expected)), name=name)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "identity"])
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind: str, activation: str, generator: torch.Generator) -> None:
    y = random_small(3, 5, generator=generator)
    state = random_small(SLOTS[kind], 3, 5, generator=generator)
    params = cell_params(kind, 5, 2, generator, dtype=torch.float64)
    got = reference("cell")(y, state, params, kind, activation)
    want = naive_dla.cell(kind, y.numpy(), state.numpy(), [w.numpy() for w in params], activation)
    assert_close(got, torch.from_numpy(want))


@pytest.mark.parametrize("kind", ["lstm", "rnn"])
def test_full_rank_cells_are_those_of_torch(kind: str, generator: torch.Generator) -> None:
    theirs = {"lstm": torch.nn.LSTMCell, "rnn": torch.nn.RNNCell}[kind](5, 5).double()
    y = random_small(3, 5, generator=generator)
    state = random_small(SLOTS[kind], 3, 5, generator=generator)
    got = reference("cell")(y, state, list(theirs.parameters()), kind)
    want = theirs(y, tuple(state)) if kind == "lstm" else [theirs(y, state[0])]
    assert_close(got, torch.stack(list(want)))


def test_official_cell_starts_from_zero_not_from_one_half() -> None:
    """h = 0 in the first step although h' = sigmoid(c') would be 0.5 at c = 0."""
    params = [torch.ones(s).double() for s in [(1, 2), (1,), (6, 1), (6,)] * 2]
    first = reference("cell")(
        torch.zeros(1, 2).double(), torch.zeros(2, 1, 2).double(), params, "dsu_split"
    )
    gate = torch.tensor(4.0).double()  # 2 biased bottlenecks of zero input: 2 * (1 * 1 + 1)
    c = torch.sigmoid(gate) * torch.tanh(gate)
    assert_close(first, torch.stack([torch.sigmoid(c), c]).view(2, 1, 1).expand(2, 1, 2))


def test_global_pool_and_gate(generator: torch.Generator) -> None:
    x = random_small(2, 3, 4, 5, generator=generator)
    d = random_small(2, 3, generator=generator)
    pooled, gated = np.zeros((2, 3)), np.zeros((2, 3, 4, 5))
    for b in range(2):
        for c in range(3):
            pooled[b, c] = sum(x[b, c].flatten().tolist()) / 20
            gated[b, c] = x[b, c].numpy() * d[b, c].item()
    assert_close(reference("global_pool")(x), torch.from_numpy(pooled))
    (got,) = reference("gate")([x], [d])
    assert_close(got, torch.from_numpy(gated))


def test_first_sample_is_the_context_of_row_zero(generator: torch.Generator) -> None:
    """With one sample both contexts agree; with more, only row 0 agrees."""
    case = Case(dtype=torch.float64, norm="none")
    inputs = case.inputs(generator)
    per_sample = reference("light_attention")(*inputs.values(), **case.flags())[0]
    first = reference("light_attention")(
        *inputs.values(), **case.with_(context="first_sample").flags()
    )[0]
    assert torch.equal(per_sample[0], first[0])
    assert not torch.allclose(per_sample[1], first[1])


def test_inputs_are_named_alike() -> None:
    """``Case.inputs`` follows the order of the reference's arguments."""
    code = reference("light_attention").__code__
    generator = torch.Generator().manual_seed(0)
    names = list(Case().inputs(generator))
    assert list(code.co_varnames[: code.co_argcount]) == names
    assert set(Case.constant) < set(names)
    assert flatten(in_float64(Case().inputs(generator))).keys() >= {"x", "cell_params.7"}
