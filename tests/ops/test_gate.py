"""gate: every backend against the reference."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import dla_kernels
from dla_kernels import use_backend
from op_cases import (
    CHANNELS,
    DENSE,
    DTYPES,
    LAYOUTS,
    MAPS,
    assert_dense,
    compare,
    compute_dtype,
    each_backend,
    each_case,
    feature,
    large,
    random_small,
)
from refusals import assert_refused

pytestmark = pytest.mark.usefixtures("poisoned_memory")

AXES = {
    "dtype": DTYPES,
    "layout": LAYOUTS,  # of the first feature; the others take the following ones
    "grad": LAYOUTS,
    "batch": [1, 2, 3],
    "channels": CHANNELS,
    "size": MAPS,
    "count": [1, 2, 5],
    "wants": [None, ("features",), ("gates",), ("features.0",)],
}


def check(
    backend: str,
    dtype: torch.dtype,
    layout: str,
    grad: str,
    batch: int,
    channels: int,
    size: tuple[int, int],
    count: int,
    wants: tuple[str, ...] | None,
) -> None:
    generator = torch.Generator().manual_seed(channels + 100 * count)
    start = LAYOUTS.index(layout)
    layouts = [LAYOUTS[(start + i) % len(LAYOUTS)] for i in range(count)]
    # Every feature has its own shape: nothing says that they agree.
    shapes = [(batch, channels + i % 2, size[0] + i, size[1]) for i in range(count)]
    features = [
        feature(shape, dtype, name, generator=generator)
        for shape, name in zip(shapes, layouts, strict=True)
    ]
    gates = [random_small(*s[:2], generator=generator, dtype=compute_dtype(dtype)) for s in shapes]
    cotangents = {
        i: feature(shape, dtype, grad, generator=generator) for i, shape in enumerate(shapes)
    }
    outputs, gradients = compare(
        "gate",
        backend,
        {"features": features, "gates": gates},
        cotangents,
        case=dtype,
        wants=wants,
    )
    for i, (out, name) in enumerate(zip(outputs, layouts, strict=True)):
        assert out.dtype == dtype
        assert_dense(out, name, f"output {i}")
        if f"features.{i}" in gradients:
            assert_dense(gradients[f"features.{i}"], name, f"gradient of features.{i}")


@each_case("gate", AXES, interpreted={"channels": (1, 20, 33), "size": MAPS[:7], "batch": (1, 3)})
@pytest.mark.simd
def test_against_the_reference(backend: str, case: dict) -> None:
    check(backend, **case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.simd
def test_cpp_writes_maps_past_the_caches(layout: str, dtype: torch.dtype) -> None:
    batch, channels, *size = large((16, 64, 64), dtype, megabytes=16)
    check("cpp", dtype, layout, layout, batch, channels, tuple(size), count=1, wants=None)


@each_backend("gate", interpreted=False)
@hypothesis.settings(max_examples=30)
@hypothesis.given(
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), grad=st.sampled_from(LAYOUTS),
    batch=st.integers(1, 3), channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)), count=st.integers(1, 9),
    wants=st.sampled_from(AXES["wants"]),
)  # fmt: skip
def test_any_shape(backend: str, **case) -> None:
    check(backend, **case)


@each_backend("gate")
@pytest.mark.parametrize("layout", DENSE)
def test_transposed_and_expanded_gates(
    backend: str, layout: str, generator: torch.Generator
) -> None:
    """Gates come as slices of a state or as one row for all samples."""
    features = [feature((3, 4, 5, 5), torch.float32, layout, generator=generator) for _ in range(3)]
    like = {"generator": generator, "dtype": torch.float32}
    gates = [
        random_small(4, 3, **like).t(),
        random_small(1, 4, **like).expand(3, 4),
        random_small(3, 8, **like)[:, ::2],
    ]
    cotangents = dict(enumerate(features[::-1]))
    compare(
        "gate",
        backend,
        {"features": features, "gates": gates},
        cotangents,
        case=torch.float32,
    )


@each_backend("gate")
@pytest.mark.parametrize("layout", DENSE)
def test_long_list(backend: str, layout: str, generator: torch.Generator) -> None:
    """More features of one shape than one launch of a GPU kernel takes, and of many shapes."""
    shapes = 34 * [(2, 3, 2, 4)] + [(2, 3 + i % 4, 1 + i % 5, 4) for i in range(20)]
    features = [feature(s, torch.float32, layout, generator=generator) for s in shapes]
    gates = [random_small(*s[:2], generator=generator, dtype=torch.float32) for s in shapes]
    inputs = {"features": features, "gates": gates}
    compare("gate", backend, inputs, dict(enumerate(features)), case=torch.float32)


@each_backend("gate")
def test_same_feature_twice(backend: str, generator: torch.Generator) -> None:
    """Gradients of one tensor that is gated twice add up."""
    x = feature((2, 3, 4, 4), torch.float64, "nchw", generator=generator).requires_grad_()
    one, two = (random_small(2, 3, generator=generator) for _ in range(2))
    with use_backend(backend):
        sum(out.sum() for out in dla_kernels.gate([x, x], [one, two])).backward()
    assert torch.equal(x.grad, (one + two)[:, :, None, None].expand_as(x))


@each_backend("gate")
def test_one_output_unused(backend: str, generator: torch.Generator) -> None:
    """Outputs that nobody uses send no gradient: theirs is zero, not garbage."""
    features = [feature((2, 3, 4, 4), torch.float32, "nchw", generator=generator) for _ in range(2)]
    gates = [random_small(2, 3, generator=generator, dtype=torch.float32) for _ in range(2)]
    compare(
        "gate",
        backend,
        {"features": features, "gates": gates},
        {1: features[0]},
        case=torch.float32,
    )


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 3, 4, 4), dtype=dtype)


def gates(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 3), dtype=dtype)


BAD = {
    "not a list": (lambda: (maps(), gates()), "features", "list", "Tensor"),
    "nothing": (lambda: ([], []), "features"),
    "fewer gates": (lambda: ([maps(), maps()], [gates()]), "gates", "2", "1"),
    "not a tensor": (lambda: ([maps()], [1.0]), "gates", "Tensor", "[1.0]"),
    "None": (lambda: ([None], [gates()]), "features", "Tensor", "None"),
    "rank": (lambda: ([maps(2, 3, 4)], [gates()]), "features", "B, C, H, W", "2, 3, 4"),
    "gate's rank": (lambda: ([maps()], [maps(2, 3, 1, 1)]), "gates", "2, 3", "2, 3, 1, 1"),
    "gate's batch": (lambda: ([maps()], [gates(1, 3)]), "gates", "2, 3", "1, 3"),
    "gate's channels": (lambda: ([maps()], [gates(2, 4)]), "gates", "2, 3", "2, 4"),
    "integers": (lambda: ([maps(dtype=torch.int32)], [gates()]), "features", "float", "int32"),
    "gate's dtype": (
        lambda: ([maps()], [gates(dtype=torch.float64)]), "gates", "float32", "float64",
    ),
    "half gate": (
        lambda: ([maps(dtype=torch.bfloat16)], [gates(dtype=torch.bfloat16)]),
        "gates", "float32", "bfloat16",
    ),
    "mixed dtypes": (
        lambda: ([maps(), maps(dtype=torch.float16)], [gates(), gates()]),
        "features", "float32", "float16",
    ),
    "no samples": (lambda: ([maps(0, 3, 4, 4)], [gates(0, 3)]), "features", "0, 3, 4, 4"),
    "device": (lambda: ([maps()], [gates().to("meta")]), "gates", "cpu", "meta"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    make, *words = BAD[bad]
    assert_refused(lambda: dla_kernels.gate(*make()), *words)
