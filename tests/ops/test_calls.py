"""What is remembered of a call serves calls of the same form, and no others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, zeros

import dla_kernels
from dla.nn import DLALayer
from dla_kernels import use_backend
from dla_kernels.ops import _calls
from dla_kernels.ops.repeat import repeat
from tolerances import assert_close

X = zeros(2, 3, 4, 5)
DIFFERENT: dict[str, tuple[list[Any], list[Any]]] = {
    "shape": ([X], [zeros(2, 3, 5, 4)]),
    "dtype": ([X], [X.double()]),
    "half dtype": ([X.half()], [X.bfloat16()]),
    "strides": ([X], [X.contiguous(memory_format=torch.channels_last)]),
    "slice": ([X], [zeros(2, 3, 4, 6)[..., :5]]),
    "missing": ([X, None], [None, X]),
    "length of a list": ([[X], [X, X]], [[X, X], [X]]),
    "list or tensor": ([[X]], [X]),
    "rank": ([zeros(4)], [zeros(4, 1)]),
}


@pytest.fixture(params=["native", "python"])
def form_of(request: pytest.FixtureRequest) -> Callable[[list[Any]], Any]:
    describe = _calls._form_of_tensors() if request.param == "native" else _calls._form_in_python
    return lambda args: describe(tuple(args), len(args))


@pytest.mark.parametrize("what", DIFFERENT)
def test_forms_differ(what: str, form_of: Callable[[list[Any]], Any]) -> None:
    one, other = DIFFERENT[what]
    assert form_of(one) and form_of(other)
    assert form_of(one) != form_of(other)


def test_values_are_no_part_of_a_form(form_of: Callable[[list[Any]], Any]) -> None:
    one, other = ([torch.rand(2, 3), None, [torch.rand(4)]] for _ in range(2))
    assert form_of(one) == form_of(other)
    assert form_of([one[0].requires_grad_()]) == form_of([other[0]])


def test_unusual_arguments_have_no_form(form_of: Callable[[list[Any]], Any]) -> None:
    """None: the dispatcher is asked first. Empty: the op's own check is."""

    class Subclass(Tensor):
        pass

    imaginary = torch.ones(3, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    negative = nn.Parameter(imaginary)
    for value in (X.as_subclass(Subclass), imaginary, negative, 1.0, "x", [None], [imaginary]):
        assert form_of([value]) is None, value
    freed = zeros(3)
    freed.untyped_storage().resize_(0)
    assert form_of([X.to_sparse(), X.as_subclass(Subclass)]) is None
    for value in (X.to_sparse(), X.to_mkldnn(), [X.to_sparse()], X.to("meta"), freed):
        form = form_of([value])
        assert not form and form is not None, value


def arguments(seed: int, **changes: Any) -> dict[str, Any]:
    """Of light_attention: a layer without a cell."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": normal(2, 4, 3, 5),
        "p": normal(2, 4, 3, 5),
        "state": normal(0, 2, 4),
        "cell_params": [],
        "q_weight": normal(1, 1, 3),
        "k_weight": normal(1, 1, 3),
        "v_weight": normal(4, 1, 3, 3),
        "prev_weight": normal(4, 1, 3, 3),
        "lam": normal(4),
        "norm_weight": normal(4),
        "norm_bias": normal(4),
    }
    missing = ("branch_weight", "branch_bias", "mean_in", "var_in", "branch_mean_in")
    missing += ("branch_var_in", "drop_scale")
    return {**tensors, **dict.fromkeys(missing), **changes}


def attend(backend: str, args: dict[str, Any], **changes: Any) -> Tensor:
    flags = {"cell": "none", "head_dim": 2, **changes}
    with use_backend(backend):
        return dla_kernels.light_attention(*args.values(), **flags)[0]


def check(args: dict[str, Any], **changes: Any) -> None:
    """The C++ kernels against the reference."""
    out, expected = (attend(backend, args, **changes) for backend in ("cpp", "reference"))
    assert_close(out, expected, name="out", dtype=torch.float32)


def test_one_tensor_in_two_places() -> None:
    """Which of them a kernel wants where is told apart."""
    both = arguments(0)
    both["p"] = both["x"]
    both["norm_bias"] = both["norm_weight"] = both["lam"]
    check(both)
    check(arguments(1))
    check(both)


def test_dense_copies_are_made_anew() -> None:
    for seed in (0, 1):
        weight = torch.rand(3, 3, 1, 4, generator=torch.Generator().manual_seed(seed)).permute(
            3, 2, 1, 0
        )
        check(arguments(seed, v_weight=weight))


@pytest.mark.parametrize("flag", [{"eps": 0.5}, {"residual": False}, {"head_dim": 4}], ids=str)
def test_flags_are_part_of_a_form(flag: dict[str, Any]) -> None:
    for flags in ({}, flag, {}):
        check(arguments(0), **flags)


@pytest.mark.parametrize("value", [[2], {}, "2"], ids=str)
def test_unusable_flags_are_named(value: Any) -> None:
    with pytest.raises((TypeError, RuntimeError), match="head_dim"):
        attend("cpp", arguments(0), head_dim=value)


def test_number_that_fits_no_float_is_named() -> None:
    with pytest.raises(TypeError, match="eps"):
        attend("cpp", arguments(0), eps=10**400)


def test_freed_tensors_are_refused() -> None:
    """No kernel is given an address of nothing, whether or not the form came before."""
    freed = arguments(0)
    freed["lam"].untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"with memory, got torch.float32 \[4\]"):
            attend("cpp", freed)
        check(arguments(1))


def test_type_of_a_flag_matters() -> None:
    """2.0 is not taken for the 2 that it equals."""
    check(arguments(0), head_dim=2)
    with pytest.raises((TypeError, RuntimeError), match="head_dim"):
        attend("cpp", arguments(0), head_dim=2.0)


def test_replaced_data_is_seen() -> None:
    """``parameter.data = ..`` leaves a parameter the object that it was."""
    layer = DLALayer(4, spec="official", head_dim=2)
    x, p = torch.rand(2, 2, 4, 3, 5).unbind()
    layer(x, prev=p)
    layer.lam.data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"lam: expected .*\[4\].* got .*\[3\]"):
        layer(x, prev=p)
    layer.double()
    with pytest.raises(TypeError, match=r"x: expected torch\.float64"):
        layer(x, prev=p)


def test_threads_share_what_is_known() -> None:
    """Python threads that call an op with tensors of one form at a time."""
    cases = [arguments(seed) for seed in range(4)]
    expected = [attend("cpp", case) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(attend("cpp", cases[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_forms_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "_REMEMBERED", 3)
    calls = _calls.Calls(torch.ops.aten.neg.default._schema, lambda x: None, lambda x: torch.neg)
    for length in range(1, 10):
        x = torch.rand(length)
        assert torch.equal(calls(x), -x)
        assert len(calls._known) <= 3


@pytest.mark.usefixtures("threads")
def test_number_of_threads_is_part_of_a_form() -> None:
    """What a native function is called with has it among its constants."""
    calls = _calls.Calls(torch.ops.aten.neg.default._schema, lambda x: None, lambda x: torch.neg)
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        calls(X)
    assert len(calls._known) == 2


def test_only_what_is_known_is_repeated() -> None:
    x, out = torch.rand(2, 3), torch.zeros(2, 3)
    assert repeat("light_attention_forward", {"x": x.clone()}, (x,), [out]) is None
    with pytest.raises(TypeError, match="missing argument"):
        repeat("light_attention_forward", {"x": x, "out": out}, (x,), [out])
    with pytest.raises(TypeError, match="unknown argument"):
        repeat("light_attention_forward", {"y": x}, (x,), [out])
