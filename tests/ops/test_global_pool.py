"""global_pool: every backend against the reference."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import dla_kernels
from dla_kernels import native, use_backend
from dla_kernels.ops.cpp_common import DTYPES as DTYPE_CODES
from dla_kernels.ops.cpp_common import execution
from op_cases import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    MAPS,
    assert_dense,
    backends,
    compare,
    compute_dtype,
    device_of,
    each_backend,
    each_case,
    feature,
    memory_format,
    random_small,
    skips,
)
from refusals import assert_refused
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

AXES = {
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "batch": [1, 2, 3],
    "channels": CHANNELS,
    "size": MAPS,
    "grad": ["dense", "transposed", "expanded"],
}


def gradient(
    batch: int, channels: int, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """A gradient [B, C]; autograd hands over expanded and transposed ones, too."""
    if layout == "expanded":  # what .sum().backward() sends
        return random_small(1, 1, generator=generator, dtype=dtype).expand(batch, channels)
    if layout == "transposed":
        return random_small(channels, batch, generator=generator, dtype=dtype).t()
    return random_small(batch, channels, generator=generator, dtype=dtype)


def check(
    backend: str,
    dtype: torch.dtype,
    layout: str,
    batch: int,
    channels: int,
    size: tuple[int, int],
    grad: str,
) -> None:
    generator = torch.Generator().manual_seed(batch + 10 * channels + 1000 * size[1])
    x = feature((batch, channels, *size), dtype, layout, generator=generator)
    cotangent = gradient(batch, channels, grad, compute_dtype(dtype), generator)
    outputs, gradients = compare("global_pool", backend, {"x": x}, {0: cotangent}, case=dtype)
    assert outputs[0].dtype == compute_dtype(dtype)
    assert_dense(gradients["x"], layout, "gradient of x")


@each_case("global_pool", AXES, interpreted={"channels": (1, 20, 33)})
@pytest.mark.simd
def test_against_the_reference(backend: str, case: dict) -> None:
    check(backend, **case)


@each_backend("global_pool", interpreted=False)
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), batch=st.integers(1, 4),
    channels=st.integers(1, 70), size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    grad=st.sampled_from(AXES["grad"]),
)  # fmt: skip
def test_any_shape(backend: str, **case) -> None:
    check(backend, **case)


@each_backend("global_pool")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_map(backend: str, layout: str, dtype: torch.dtype) -> None:
    """112x112 after ImageNet's stem: a running float32 sum would lose digits, blocks do not."""
    check(backend, dtype, layout, 1, 20, (112, 112), "dense")


@each_backend("global_pool", interpreted=False)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_long_sum_of_one_sign(backend: str, layout: str, generator: torch.Generator) -> None:
    """A million values near 1: naive float32 accumulation is off by 1e-4 to 1e-2."""
    x = 1 + 0.01 * random_small(1, 2, 1024, 1024, generator=generator).sin()
    x = x.float().contiguous(memory_format=memory_format(layout))
    with use_backend(backend):
        got = dla_kernels.global_pool(x)
    assert_close(got, x.double().mean((2, 3)), dtype=torch.float32)


@each_backend("global_pool")
def test_half_sums_beyond_the_range_of_half(backend: str) -> None:
    """The sum of a float16 plane may exceed 65504; its mean does not."""
    x = torch.full((1, 3, 40, 40), 60000.0, dtype=torch.float16)
    with use_backend(backend):
        got = dla_kernels.global_pool(x)
    assert_close(got, x.double().mean((2, 3)), dtype=torch.float32)


@each_backend("global_pool")
def test_features_may_be_changed_afterwards(backend: str, generator: torch.Generator) -> None:
    """Nothing of them is kept for backward."""
    x = feature((2, 3, 4, 5), torch.float32, "nhwc", generator=generator).requires_grad_()
    h, kept = 2 * x, []
    with use_backend(backend), saved_tensors_hooks(kept.append, lambda t: t):
        y = dla_kernels.global_pool(h)
    h.zero_()
    y.sum().backward()
    assert not kept
    assert_close(x.grad, torch.full_like(x, 2 / 20))


# The reference takes minutes: nothing of it is ours.
@each_backend("global_pool", but="reference", interpreted=False)
@pytest.mark.usefixtures("whole_memory")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_elements_than_32_bits_count(backend: str, layout: str) -> None:
    """Memory that was never written costs nothing: the operating system maps pages of zeros."""
    batch, channels, size = 128, 64, (520, 520)
    values = torch.from_numpy(np.zeros(batch * channels * size[0] * size[1], dtype=np.int16))
    values = values.to(device_of(backend)).view(torch.bfloat16)
    assert values.numel() > 2**31
    shape = (batch, *size, channels) if layout == "nhwc" else (batch, channels, *size)
    x = values.view(shape).permute(0, 3, 1, 2) if layout == "nhwc" else values.view(shape)
    x[-1, -1, -1, -1] = x[-1, 0, 0, 0] = 3e7
    want = torch.zeros(batch, channels)
    want[-1, -1] = want[-1, 0] = x[-1, 0, 0, 0].item() / (size[0] * size[1])
    with use_backend(backend):
        assert_close(dla_kernels.global_pool(x), want)


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=skips("cuda"))])
def test_more_blocks_than_a_launch_has(backend: str) -> None:
    """Said before anything is read: no machine has memory for that many samples."""
    x, out = torch.ones(1, 1, 1, 1), torch.ones(1, 1)
    sizes = {"batch": 2**31, "channels": 1, "area": 1, "channels_last": True}
    words = r"global_pool on \[batch 2147483648, channels 1, area 1\]: too large.*split the batch"
    with pytest.raises(RuntimeError, match=words):
        native.load_cuda().global_pool_forward(
            x=x, out=out, dtype=DTYPE_CODES[x.dtype], **sizes, **execution(x)
        )


BAD = {
    "not a tensor": (lambda: [[1.0]], "x", "Tensor", "list"),
    "nothing": (lambda: None, "x", "Tensor", "None"),
    "rank": (lambda: torch.zeros(2, 3, 4), "x", "B, C, H, W", "2, 3, 4"),
    "integers": (lambda: torch.zeros(1, 2, 3, 3, dtype=torch.int64), "x", "float", "int64"),
    "complex": (lambda: torch.zeros(1, 2, 3, 3, dtype=torch.complex64), "x", "float", "complex64"),
    "no samples": (lambda: torch.zeros(0, 2, 3, 3), "x", "0, 2, 3, 3"),
    "no channels": (lambda: torch.zeros(2, 0, 3, 3), "x", "2, 0, 3, 3"),
    "no pixels": (lambda: torch.zeros(2, 3, 0, 3), "x", "2, 3, 0, 3"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    make, *words = BAD[bad]
    assert_refused(lambda: dla_kernels.global_pool(make()), *words)


def test_all_backends_are_found() -> None:
    assert {p.values[0] for p in backends("global_pool")} >= {"cpp", "reference"}
