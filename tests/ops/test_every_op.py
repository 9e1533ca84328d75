"""What every op promises alike: gradients, schema, determinism, torch.compile, autocast."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import dla_kernels
from dla_kernels import use_backend
from dla_kernels.backend import implementation
from dla_kernels.ops import _registration
from dla_kernels.ops.common import dense_format
from op_cases import (
    DENSE,
    EMULATED,
    INTERPRETED,
    ON_GPU,
    backends,
    compare,
    device_of,
    expected_result,
    flatten,
    mapped,
    named_by,
    op_names,
    reference,
    run,
    skips,
)
from op_samples import NAMES, SMALL, Call, sample
from refusals import assert_refused
from tolerances import assert_close, assert_gradients_close

# A layer step is dozens of launches, and takes seconds on Triton's interpreter: one variant there.
# The emulation of CUDA is in between.
SLOW = {"light_attention": "whole_block", "base_attention": "official"}


def taken(op: str, variant: str, backend: Any) -> bool:
    interpreted = INTERPRETED and backend.values == ("triton",)
    return not interpreted or SLOW.get(op, variant) == variant


CASES = [
    (op, variant, backend)
    for op, variant in NAMES
    for backend in backends(op)
    if taken(op, variant, backend)
]


def each(cases: list[tuple[str, str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("op", "variant", "backend"),
        [
            pytest.param(
                op,
                variant,
                *backend.values,
                marks=backend.marks,
                id="-".join(filter(None, (op, variant, *backend.values))),
            )
            for op, variant, backend in cases
        ],
    )


EACH = each(CASES)
# PyTorch does not promise that its own results are the same for any number of threads.
EACH_CPU_KERNEL = each([case for case in CASES if case[2].values == ("cpp",)])
# Interpreted steps would take a minute: test_any_combination compares their gradients, in float64
# too, with the reference's.
EACH_DIFFERENTIATED = each(
    [
        (op, variant, backend)
        for op, variant, backend in CASES
        if not INTERPRETED or backend.values != ("triton",) or op not in SLOW
    ]
)
# The CUDA kernels have the adapter of "cpp", with which all variants are taken.
ADAPTERS = [
    (op, variant, backend)
    for op, variant, backend in CASES
    if not EMULATED or backend.values != ("cuda",) or SLOW.get(op, variant) == variant
]
EACH_ADAPTER = each(ADAPTERS)
# In a graph an op is a single node: which backend serves it makes no difference on a device.
EACH_COMPILED = each([case for case in ADAPTERS if case[2].values != ("reference",)])
ON_GPUS = [(op, variant, b) for op, variant in NAMES for b in backends(op) if b.values[0] in ON_GPU]
EACH_ON_GPU = each(ON_GPUS)
EACH_CUDA_KERNEL = each([case for case in CASES if case[2].values == ("cuda",)])
EACH_REFUSABLE = each(
    [
        (op, variant, backend)
        for op, variant, backend in CASES
        if backend.values == ("cuda",) and hasattr(implementation(op, "cuda"), "refuses")
    ]
)
# C++ serves tensors on the CPU, as CUDA's kernels do where they are emulated.
OTHERS = [pytest.param("triton", marks=skips("triton")), "reference"]
OTHERS += ["cpp"] if EMULATED else []
# Whose samples do not depend on each other, on GPUs.
INDEPENDENT = {"light_attention": "own_norm", "base_attention": "own_norm"}
INDEPENDENT |= {"residual_norm": "running", "gate": "", "residual_gate": "", "global_pool": ""}
EACH_LARGE = each([case for case in ON_GPUS if INDEPENDENT.get(case[0]) == case[1]])
EACH_SAMPLE = pytest.mark.parametrize(("op", "variant"), NAMES)

Result = tuple[list[Tensor], dict[str, Tensor | None]]


# Samples of a batch of more than 2^31 elements, and the shape of one; what each sample has.
LARGE = 10752, (1, 64, 56, 56)
OF_SAMPLES = (
    "x", "p", "u", "h", "shortcut", "features", "gates", "values", "state", "keys", "pooled",
)  # fmt: skip


def enough_memory() -> bool:
    """For a dozen maps of half precision."""
    there = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory
    return there > 75e9


def in_a_batch(one: Tensor) -> Tensor:
    """A map, [1, C] or [., 1, C], as often as there are samples."""
    shape = list(one.shape)
    shape[one.dim() == 3] = LARGE[0]
    layout = dense_format(one) if one.dim() == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=one.dtype, memory_format=layout).copy_(one)


def last_sample(batch: Tensor) -> Tensor:
    return batch.narrow(int(batch.dim() == 3), LARGE[0] - 1, 1)


def call_of(op: str, variant: str, backend: str, dtype: torch.dtype = torch.float32) -> Call:
    """A call with enough work to be cut into blocks, unless the backend is too slow for that."""
    if INTERPRETED and backend == "triton" and op in SLOW:
        return sample(op, variant, SMALL, dtype)
    return sample(op, variant, dtype=dtype)


def run_call(call: Call) -> Result:
    return run(call.function, call.inputs, call.cotangents, **call.options)


def differentiable(call: Call) -> dict[str, Tensor]:
    """The inputs that can be differentiated, made to require gradients."""
    named = flatten(call.inputs).items()
    return {name: t.requires_grad_() for name, t in named if name not in call.constant}


def outputs_of(call: Call) -> list[Tensor]:
    result = call.function(*call.inputs.values(), **call.flags)
    return [result] if isinstance(result, Tensor) else list(result)


def assert_identical(one: Result, other: Result) -> None:
    """Bitwise equality of all outputs and gradients."""
    for i, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        assert torch.equal(a, b), f"output {i} differs"
    assert one[1].keys() == other[1].keys()
    for name, a in one[1].items():
        b = other[1][name]
        assert a is b is None or torch.equal(a, b), f"gradient of {name} differs"


def test_every_op_is_covered() -> None:
    """An op without samples, a test file or a README is unfinished."""
    assert set(op_names()) == {op for op, _ in NAMES}
    here = Path(__file__).parent
    root = Path(dla_kernels.__file__).parent / "ops"
    for op in op_names():
        assert (here / f"test_{op}.py").is_file(), f"{op}: no tests"
        readme = (root / op / "README.md").read_text().lower()
        assert "bytes" in readme and "flop" in readme, f"{op}: README without bytes and flops"


def gradcheck(function: Callable[..., Any], call: Call, fast: bool = False) -> bool:
    """Numerical against analytical gradients of every differentiable output.

    fast: along random directions only.
    """
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in flatten(call.inputs).items()
        if name not in call.constant and tensor.numel()
    }

    def flat_function(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(leaves, values, strict=True))
        inputs = mapped(given.get, call.inputs)
        result = function(*inputs.values(), **call.flags)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        return tuple(outputs[i] for i in call.cotangents)

    return torch.autograd.gradcheck(flat_function, list(leaves.values()), fast_mode=fast)


@EACH_DIFFERENTIATED
def test_gradients_of_the_op_numerically(op: str, variant: str, backend: str) -> None:
    """In all directions one by one where that takes no time, and for the reference below."""
    call = sample(op, variant, SMALL, torch.float64)
    with use_backend(backend):
        assert gradcheck(call.function, call, fast=backend != "cpp")


@EACH_SAMPLE
def test_gradients_of_the_reference_numerically(op: str, variant: str) -> None:
    assert gradcheck(reference(op), sample(op, variant, SMALL, torch.float64))


class Recorder(TorchDispatchMode):
    """Records the calls of this package's ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dla_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@EACH_ADAPTER
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "nchw"), (torch.bfloat16, "nhwc"), (torch.float32, "channel_slice")],
    ids=["float32-nchw", "bfloat16-nhwc", "float32-channel_slice"],
)
def test_schema_fake_and_autograd(
    op: str, variant: str, backend: str, dtype: torch.dtype, layout: str
) -> None:
    """torch.library.opcheck on forward and backward op as the public function calls them."""
    call = sample(op, variant, SMALL, dtype, layout)
    with use_backend(backend), Recorder() as recorder:
        run_call(call)
    recorded = {func.name(): (func, args, kwargs) for func, args, kwargs in recorder.calls}
    assert recorded.keys() == {f"dla_kernels::{op}", f"dla_kernels::{op}_backward"}
    with use_backend(backend):
        for name, (func, args, kwargs) in recorded.items():
            differentiable = not name.endswith("_backward")
            constants = {id(t) for n, t in flatten(call.inputs).items() if n in call.constant}

            def prepare(t: Tensor, differentiable=differentiable, constants=constants) -> Tensor:
                wanted = differentiable and t.is_floating_point() and id(t) not in constants
                return t.detach().requires_grad_(wanted)

            args, kwargs = tree_map_only(Tensor, prepare, (args, kwargs))
            torch.library.opcheck(func, args, kwargs)


@EACH_CPU_KERNEL
def test_shortcut_around_the_dispatcher(
    op: str, variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken when nobody listens, with the same results; whoever listens sees both ops."""
    taken: list[bool] = []
    is_plain = _registration._dispatches_plainly
    monkeypatch.setattr(
        _registration, "_dispatches_plainly", lambda *a: taken.append(is_plain(*a)) or taken[-1]
    )
    call = call_of(op, variant, backend)
    with use_backend(backend):
        direct = run_call(call)
        assert taken == [True, True]
        with Recorder() as recorder:
            assert_identical(run_call(call), direct)
        assert len(recorder.calls) == 2
        with torch.profiler.profile() as profiler:
            assert_identical(run_call(call), direct)
    names = {event.key for event in profiler.key_averages()}
    assert {f"dla_kernels::{op}", f"dla_kernels::{op}_backward"} <= names
    assert taken == [True, True, False, False, False, False]


@EACH_CPU_KERNEL
def test_calls_of_one_form(op: str, variant: str, backend: str) -> None:
    """What is remembered of the first serves the others, with their own tensors."""
    calls = [sample(op, variant, seed=seed) for seed in (0, 1, 2, 0)]
    results = [
        compare(op, backend, call.inputs, call.cotangents, case=torch.float32, **call.options)
        for call in calls
    ]
    assert_identical(results[0], results[-1])


@EACH
def test_repeats_bitwise(op: str, variant: str, backend: str) -> None:
    call = call_of(op, variant, backend)
    with use_backend(backend):
        assert_identical(run_call(call), run_call(call))


@EACH_CPU_KERNEL
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(3, 33, 17, 19), (2, 64, 8, 8), (1, 5, 40, 33)], ids=str)
@pytest.mark.usefixtures("threads")
def test_thread_count_does_not_matter(
    op: str, variant: str, backend: str, layout: str, shape: tuple[int, int, int, int]
) -> None:
    """Fixed blocks of work and fixed orders of summation: bitwise equality for 1 to 4 threads."""
    if shape[1] == 5 and op in ("light_attention", "base_attention"):
        shape = (1, 6, *shape[2:])  # heads of two or three
    call = sample(op, variant, shape, layout=layout)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        with use_backend(backend):
            results.append(run_call(call))
    for other in results[1:]:
        assert_identical(results[0], other)


@EACH_CUDA_KERNEL
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.skipif(not EMULATED, reason="needs a machine without a GPU: the emulation's orders")
def test_order_of_gpu_threads_does_not_matter(
    op: str, variant: str, backend: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and threads in any order: bitwise equality."""
    call = sample(op, variant, layout=layout)
    results = []
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("DLA_EMULATION_SEED", seed)
        with use_backend(backend):
            results.append(run_call(call))
    for other in results[1:]:
        assert_identical(results[0], other)


@EACH_COMPILED
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(op: str, variant: str, backend: str, dynamic: bool) -> None:
    """Same numbers under torch.compile(fullgraph=True), shapes fixed or symbolic, two sizes."""
    torch.compiler.reset()
    compiled = torch.compile(
        sample(op, variant).function, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for shape in ((2, 4, 3, 5), (3, 6, 5, 4)):
        call = sample(op, variant, shape, layout="nhwc")
        with use_backend(backend):
            result = run(compiled, call.inputs, call.cotangents, **call.options)
            assert_identical(result, run_call(call))


@EACH
def test_autocast_changes_nothing(op: str, variant: str, backend: str) -> None:
    """Precision is the op's own business, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        call = call_of(op, variant, backend, dtype)
        with use_backend(backend):
            outside = run_call(call)
            with torch.autocast(device_of(backend), dtype=torch.bfloat16):
                inside = run_call(call)
        assert_identical(inside, outside)


@EACH_SAMPLE
def test_autocast_changes_nothing_in_the_reference(op: str, variant: str) -> None:
    """Outputs: plain PyTorch runs a backward pass in the autocast state that it is called in."""
    call = sample(op, variant)
    call.function = reference(op)
    outside, _ = run_call(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = run_call(call)
    assert_identical((inside, {}), (outside, {}))


@EACH
def test_graph_can_be_kept_and_used_again(op: str, variant: str, backend: str) -> None:
    """retain_graph: the second backward pass gives the same gradients as the first."""
    call = call_of(op, variant, backend)
    leaves = list(differentiable(call).values())
    with use_backend(backend):
        outputs = outputs_of(call)
        reached = [outputs[i] for i in call.cotangents]
        grads = list(call.cotangents.values())

        def backward(retain: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                reached, leaves, grads, retain_graph=retain, allow_unused=True
            )

        for one, two in zip(backward(True), backward(False), strict=True):
            assert one is two is None or torch.equal(one, two)


@EACH_CPU_KERNEL
def test_bad_argument_of_backward(
    op: str, variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are kept for backward may have changed since: nothing is computed from one that
    does not fit the others."""
    package = importlib.import_module(f"dla_kernels.ops.{op}")
    backward, calls = package._BACKWARD, []

    def spy(*args: Any) -> Any:
        calls.append(args)
        return backward(*args)

    monkeypatch.setattr(package, "_BACKWARD", spy)
    run_call(sample(op, variant, SMALL))
    (args,) = calls
    tensors = 0
    for place, value in enumerate(args):
        for index in range(len(value)) if isinstance(value, list | tuple) else [None]:
            good = value if index is None else value[index]
            if not isinstance(good, Tensor):
                continue
            tensors += 1
            wider = good.new_ones(*good.shape[:-1], good.shape[-1] + 1)
            for bad in (wider, good.to(torch.float16)):
                changed = bad if index is None else [*value[:index], bad, *value[index + 1 :]]
                with use_backend(backend), pytest.raises((TypeError, ValueError), match="expected"):
                    backward(*args[:place], changed, *args[place + 1 :])
    assert tensors > 0


@EACH_REFUSABLE
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "nchw"), (torch.bfloat16, "nhwc")],
    ids=["float32-nchw", "bfloat16-nhwc"],
)
def test_backward_on_another_backend(
    op: str, variant: str, backend: str, other: str, dtype: torch.dtype, layout: str
) -> None:
    """As where CUDA's kernels serve the forward pass of a call, but refuse its backward."""
    call = sample(op, variant, SMALL, dtype, layout)
    leaves = differentiable(call)
    with use_backend(backend):
        outputs = outputs_of(call)
    with use_backend(other):
        gradients = torch.autograd.grad(
            [outputs[i] for i in call.cotangents],
            list(leaves.values()),
            list(call.cotangents.values()),
            allow_unused=True,
        )
    _, expected = expected_result(op, call.inputs, call.cotangents, None, **call.options)
    got = dict(zip(leaves, gradients, strict=True))
    dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
    assert_gradients_close(got, expected, case=dtype, dtypes=dtypes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@EACH_ON_GPU
def test_captured_in_a_cuda_graph(op: str, variant: str, backend: str) -> None:
    """Forward and backward: nothing waits for the GPU or comes from the host's memory."""
    call = call_of(op, variant, backend)
    with use_backend(backend):
        expected = run_call(call)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_call(call)
    outputs, gradients = captured
    for tensor in (*outputs, *gradients.values()):
        if tensor is not None and tensor.is_cuda:
            tensor.fill_(float("nan"))
    graph.replay()
    assert_identical(captured, expected)


@pytest.mark.skipif(not enough_memory(), reason="needs a GPU with 80 GB")
@pytest.mark.usefixtures("whole_memory")
@pytest.mark.parametrize("layout", DENSE)
@EACH_LARGE
def test_more_elements_than_32_bits_count(op: str, variant: str, backend: str, layout: str) -> None:
    """Forward and backward: the last sample of a huge batch has the results of a batch of one."""
    call = sample(op, variant, LARGE[1], torch.bfloat16, layout)
    with use_backend(backend):
        expected, expected_gradients = run_call(call)
        call.inputs = mapped(
            lambda name, t: in_a_batch(t) if named_by(OF_SAMPLES, name) else t, call.inputs
        )
        call.cotangents = {i: in_a_batch(grad) for i, grad in call.cotangents.items()}
        outputs, gradients = run_call(call)
    for i in call.cotangents:
        assert_close(last_sample(outputs[i]), expected[i], name=f"output {i}")
    found = {name: grad for name, grad in gradients.items() if named_by(OF_SAMPLES, name)}
    last = {name: grad if grad is None else last_sample(grad) for name, grad in found.items()}
    assert_gradients_close(
        last, {name: expected_gradients[name] for name in last}, case=torch.bfloat16
    )


@EACH_CPU_KERNEL
def test_saved_tensors_are_unpacked_once(op: str, variant: str, backend: str) -> None:
    """Non-reentrant checkpointing allows no second look, and hooks that fetch them take time."""
    unpacked = []

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        unpacked.append(packed[0])
        return packed[1]

    call, numbers = call_of(op, variant, backend, torch.float32), itertools.count()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (next(numbers), t), unpack)
    with use_backend(backend), hooks:
        run_call(call)
    assert sorted(unpacked) == list(range(next(numbers)))


@EACH
def test_forward_and_backward_on_different_backends(op: str, variant: str, backend: str) -> None:
    """What forward saves serves every backend's backward: same schema, same meaning."""
    call = call_of(op, variant, backend, torch.float64)
    with use_backend(backend):
        _, expected = run_call(call)
    leaves = differentiable(call)
    with use_backend(backend):
        outputs = outputs_of(call)
    with use_backend("reference"):
        gradients = torch.autograd.grad(
            [outputs[i] for i in call.cotangents],
            list(leaves.values()),
            list(call.cotangents.values()),
            allow_unused=True,
        )
    got = dict(zip(leaves, gradients, strict=True))
    assert_gradients_close(got, expected, case=torch.float64)


@EACH
def test_second_derivatives_are_refused(op: str, variant: str, backend: str) -> None:
    """There are none, and silence would be a wrong answer: also where no gradient that arrives
    depends on anything, so that what leaves would pass for a constant."""
    call = sample(op, variant, SMALL)
    first = next(iter(flatten(call.inputs).values()))
    first.requires_grad_()
    with use_backend(backend):
        loss = outputs_of(call)[0].sum()
        with pytest.raises(NotImplementedError, match=f"{op} .*create_graph=True.*fused=False"):
            torch.autograd.grad(loss, first, create_graph=True)


def of_one_tensor(call: Call) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A call's first output as a function of one of its inputs, and that input."""
    name, tensor = next((n, t) for n, t in flatten(call.inputs).items() if n not in call.constant)

    def function(tensor: Tensor) -> Tensor:
        inputs = mapped(lambda key, given: tensor if key == name else given, call.inputs)
        result = call.function(*inputs.values(), **call.flags)
        return result if isinstance(result, Tensor) else result[0]

    return function, tensor


@EACH_CPU_KERNEL
def test_forward_mode_is_refused(op: str, variant: str, backend: str) -> None:
    """Not taken for a constant."""
    function, tensor = of_one_tensor(sample(op, variant, SMALL))
    with use_backend(backend), pytest.raises(NotImplementedError, match=op):
        torch.func.jvp(function, (tensor,), (tensor,))


@EACH_CPU_KERNEL
def test_torch_func_is_refused_with_the_remedy(op: str, variant: str, backend: str) -> None:
    """In the words of the op; vmap serves where torch finds a way of its own."""
    function, tensor = of_one_tensor(sample(op, variant, SMALL))
    refused = pytest.raises(NotImplementedError, match=rf"{op}(?s:.*)fused=False")
    with use_backend(backend):
        with refused:
            torch.func.grad(lambda t: function(t).sum())(tensor)
        try:
            many = torch.vmap(function)(torch.stack([tensor, tensor]))
        except NotImplementedError as error:
            assert op in str(error) and "fused=False" in str(error)
        else:
            assert all(torch.equal(one, function(tensor)) for one in many)


@EACH_CPU_KERNEL
def test_tensors_without_strides_are_refused(op: str, variant: str, backend: str) -> None:
    """By name, whichever it is."""
    with use_backend(backend):
        for name in flatten(sample(op, variant, SMALL).inputs):
            call = sample(op, variant, SMALL)
            call.inputs = mapped(
                lambda key, t, name=name: t.to_sparse() if key == name else t, call.inputs
            )
            assert_refused(lambda call=call: run_call(call), name.split(".")[0], "dense", "sparse")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4, 4)])
    assert_refused(lambda: dla_kernels.global_pool(nested), "x", "dense", "nested")


@EACH_CPU_KERNEL
def test_tensors_that_stand_for_their_negative(op: str, variant: str, backend: str) -> None:
    """As ``z.conj().imag`` does: forward and backward see the values, not the memory."""
    call = sample(op, variant, SMALL)
    with use_backend(backend):
        expected = run_call(call)
        call.inputs = mapped(lambda _, t: torch._neg_view(-t), call.inputs)
        call.cotangents = {i: torch._neg_view(-t) for i, t in call.cotangents.items()}
        assert_identical(run_call(call), expected)
