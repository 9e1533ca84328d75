"""What the tests of all ops share: backends, maps in awkward layouts, covering sets of cases.

Every comparison is against the reference in float64 on the very same (rounded) inputs, so that the
error measured is the tested kernel's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import pkgutil
import random
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dla_kernels
import dla_kernels.ops
from dla_kernels import use_backend
from dla_kernels.backend import BACKENDS
from tolerances import assert_close, assert_gradients_close

ON_GPU = ("cuda", "triton")
# Triton without a GPU: see tests/conftest.py. Slow, hence fewer cases (`each_case`).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# CUDA without a GPU.
EMULATED = os.environ.get("DLA_EMULATE_CUDA") == "1"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Sizes of [C] and [H, W]. Channels: 1 (degenerate), 3 and 5 (less than a vector), 20 (vector of 16
# plus a tail), 33 (odd, tail of one), 64 (whole vectors only). Maps: 1x1 and single rows or columns
# (every stencil row or column is a border), 2x3 and 5x5 (narrower than a vector), 7x7 and 14x14
# (ImageNet's last stages: tails), 8x8 (whole vectors, CIFAR's last stage), 17x31 (odd, rows in
# blocks of eight leave one), 33x40 (rows of several vectors and a tail, in blocks that leave one).
CHANNELS = (1, 3, 5, 20, 33, 64)
MAPS = ((1, 1), (1, 7), (7, 1), (2, 3), (5, 5), (7, 7), (8, 8), (14, 14), (17, 31), (33, 40))

# Layouts of a feature map. All but the first two are no plain dense tensor; every element that is
# not part of the map is NaN, so that a misread shows.
DENSE = ("nchw", "nhwc")
LAYOUTS = (*DENSE, "channel_slice", "width_slice", "nhwc_slice", "transposed", "expanded", "offset")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of everything small beside features of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# [C, H, W] of samples; with the code path of kernels that write large maps past the caches.
SAMPLES = [
    (16, 64, 64),  # rows of whole cache lines
    (33, 53, 51),  # planes that begin and end within one
    (64, 8, 8),  # narrow, transposed: whole vectors
    (33, 7, 7),  # tails
]


def large(
    sample: tuple[int, int, int], dtype: torch.dtype, megabytes: int = 1
) -> tuple[int, int, int, int]:
    """[B, C, H, W] with as few samples as make more than that."""
    channels, height, width = sample
    return (megabytes * 2**20 // (channels * height * width * dtype.itemsize) + 1, *sample)


def backends(op: str) -> list[Any]:
    """The backends an op has, as pytest parameters; each skipped where it cannot run at all."""
    package = importlib.import_module(f"dla_kernels.ops.{op}")
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return [pytest.param(name, marks=skips(name)) for name in BACKENDS if name in found]


def skips(backend: str) -> list[pytest.MarkDecorator]:
    """Marks of tests of a backend."""
    nothing = EMULATED and not sys.platform.startswith("linux")
    no_triton = importlib.util.find_spec("triton") is None
    return {
        "cuda": [pytest.mark.skipif(nothing, reason="needs a CUDA GPU, or Linux to emulate one")],
        "triton": [pytest.mark.skipif(no_triton, reason="needs triton, which runs on Linux")],
    }.get(backend, [])


def each_backend(op: str, but: str = "", interpreted: bool = True) -> pytest.MarkDecorator:
    """Parametrizes a test with ``backend``.

    but: leaves this one out. interpreted: False for a test that is too slow for the interpreter.
    """
    left_out = {but, "triton"} if INTERPRETED and not interpreted else {but}
    chosen = [one for one in backends(op) if one.values[0] not in left_out]
    return pytest.mark.parametrize("backend", chosen)


def each_case(
    op: str,
    axes: Mapping[str, Sequence[Any]],
    valid: Callable[[dict[str, Any]], bool] = lambda case: True,
    *,
    interpreted: Mapping[str, Sequence[Any]],
    ids: Callable[[dict[str, Any]], str] | None = None,
) -> pytest.MarkDecorator:
    """Parametrizes a test with ``backend`` and a covering set of ``case``.

    interpreted: axes with fewer values, for Triton's interpreter.
    """

    def parameters(axes: Mapping[str, Sequence[Any]], backends: list[Any]) -> list[Any]:
        return [
            pytest.param(*one.values, case, marks=one.marks, id=f"{one.values[0]} {name(case)}")
            for case in covering(axes, valid)
            for one in backends
        ]

    name = ids or case_id
    slow = [one for one in backends(op) if one.values == ("triton",) and INTERPRETED]
    fast = [one for one in backends(op) if one not in slow]
    chosen = parameters(axes, fast) + parameters({**axes, **interpreted}, slow)
    return pytest.mark.parametrize(("backend", "case"), chosen)


def reference(op: str) -> Callable[..., Any]:
    """The readable function that defines what ``op`` computes."""
    return getattr(importlib.import_module(f"dla_kernels.ops.{op}.reference"), op)


def op_names() -> list[str]:
    """All ops, by convention packages below ``dla_kernels.ops``."""
    return [m.name for m in pkgutil.iter_modules(dla_kernels.ops.__path__) if m.ispkg]


def device_of(backend: str) -> str:
    """Where a backend's tensors live."""
    return "cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu"


def _storage_view(shape: Sequence[int], layout: str, **like: Any) -> Tensor:
    """A view of ``shape`` in a buffer of NaN, with the strides that ``layout`` names."""
    b, c, h, w = shape
    nan = float("nan")
    if layout == "channel_slice":
        return torch.full((b, 2 * c, h, w), nan, **like)[:, ::2]
    if layout == "width_slice":
        return torch.full((b, c, h, w + 1), nan, **like)[..., 1:]
    if layout == "nhwc_slice":
        return torch.full((b, h, w, 2 * c), nan, **like)[..., :c].permute(0, 3, 1, 2)
    if layout == "transposed":
        return torch.full((b, c, w, h), nan, **like).transpose(2, 3)
    if layout == "nhwc":
        return torch.full((b, h, w, c), nan, **like).permute(0, 3, 1, 2)
    if layout == "offset":  # dense, but not aligned to more than one element
        numel = b * c * h * w
        return torch.full((numel + 130,), nan, **like)[65 : 65 + numel].view(b, c, h, w)
    assert layout == "nchw", layout
    return torch.full((b, c, h, w), nan, **like)


def feature(
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str = "nchw",
    *,
    generator: torch.Generator,
) -> Tensor:
    """Random [B, C, H, W]: noise around a random mean per plane (so that pooled values matter)."""
    b, c, h, w = shape
    rows = 1 if layout == "expanded" else b
    like = {"generator": generator, "dtype": torch.float64}
    values = random_small(rows, c, h, w, **like) + random_small(rows, c, 1, 1, **like)
    if layout == "expanded":
        return values.to(dtype).expand(b, c, h, w)
    return _storage_view(shape, layout, dtype=dtype).copy_(values)


def memory_format(layout: str) -> torch.memory_format | None:
    """The format that results take after an input of this layout; None: any dense one."""
    dense = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    return {**dense, "offset": torch.contiguous_format}.get(layout)


def assert_dense(x: Tensor, layout: str, name: str) -> None:
    """``x`` [B, C, H, W] must be dense, in the format that an input of ``layout`` asks for."""
    formats = (torch.contiguous_format, torch.channels_last)
    wanted = memory_format(layout)
    assert any(x.is_contiguous(memory_format=f) for f in formats if wanted in (None, f)), (
        f"{name}: strides {x.stride()} of shape {tuple(x.shape)} after an input in {layout}"
    )


def random_small(
    *shape: int, generator: torch.Generator, scale: float = 1.0, **like: Any
) -> Tensor:
    """Random numbers for parameters and states, the same on every device."""
    values = scale * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device()).to(**like)


Result = tuple[list[Tensor], dict[str, Tensor | None]]


def mapped(function: Callable[[str, Tensor], Any], value: Any, name: str = "") -> Any:
    """``function(name, tensor)`` for every tensor in dicts and lists: ``x``, ``params.0``, ..."""
    if isinstance(value, Tensor):
        return function(name, value)
    prefix = f"{name}." if name else ""
    if isinstance(value, list):
        return [mapped(function, v, f"{prefix}{i}") for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {key: mapped(function, v, f"{prefix}{key}") for key, v in value.items()}
    return value


def in_float64(value: Any) -> Any:
    """Tensors (also in lists and dicts) as detached float64 copies."""
    return mapped(lambda _, t: t.detach().to(torch.float64, copy=True), value)


def flatten(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the inputs by name; None and flags are left out."""
    flat: dict[str, Tensor] = {}
    mapped(flat.__setitem__, inputs)
    return flat


def named_by(names: Iterable[str], name: str) -> bool:
    """Whether ``name`` or a part of it (``params`` in ``params.0``) is among the names."""
    return not {name, *name.split(".")}.isdisjoint(names)


def run(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    cotangents: dict[int, Tensor],
    /,
    *,
    constant: Iterable[str] = (),
    wants: Iterable[str] | None = None,
    **flags: Any,
) -> Result:
    """Calls ``function(*inputs, **flags)`` and differentiates it.

    cotangents: per number of an output the gradient that arrives there; outputs that do not depend
        on what is wanted are passed over.
    constant: inputs that are never differentiated. wants: only these are (None: all).
    Returns the detached outputs and the gradient of every wanted input.
    """

    def prepare(name: str, tensor: Tensor) -> Tensor:
        wanted = (wants is None or named_by(wants, name)) and not named_by(constant, name)
        return tensor.detach().requires_grad_(wanted)

    prepared = mapped(prepare, inputs)
    result = function(*prepared.values(), **flags)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    leaves = {n: t for n, t in flatten(prepared).items() if t.requires_grad}
    reached = {i: g for i, g in cotangents.items() if outputs[i].requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if reached and leaves:
        gradients = torch.autograd.grad(
            [outputs[i] for i in reached], list(leaves.values()), list(reached.values()),
            allow_unused=True,
        )  # fmt: skip
    return [t.detach() for t in outputs], dict(zip(leaves, gradients, strict=True))


_last_expected: dict[Hashable, Result] = {}


def expected_result(
    op: str,
    inputs: dict[str, Any],
    cotangents: dict[int, Tensor],
    key: Hashable,
    **options: Any,
) -> Result:
    """``run`` of the reference in float64; computed once for consecutive tests of one ``key``."""
    key = key and (key, torch.get_default_device())
    if key is None or key not in _last_expected:
        _last_expected.clear()
        _last_expected[key] = run(
            reference(op), in_float64(inputs), in_float64(cotangents), **options
        )
    return _last_expected[key]


def compare(
    op: str,
    backend: str,
    inputs: dict[str, Any],
    cotangents: dict[int, Tensor],
    *,
    case: torch.dtype,
    names: Sequence[str] | None = None,
    key: Hashable = None,
    **options: Any,
) -> Result:
    """Forward and every gradient of ``op`` on ``backend`` against the float64 reference.

    case: the feature dtype. names: of the outputs. options: as for ``run``. key: stands for the
    whole case when its backends are tested one after the other.
    Returns outputs and gradients for further checks (formats, dtypes).
    """
    with use_backend(backend):
        outputs, gradients = run(getattr(dla_kernels, op), inputs, cotangents, **options)
    expected, expected_gradients = expected_result(op, inputs, cotangents, key, **options)
    assert len(outputs) == len(expected)
    for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        name = names[i] if names else f"output {i}"
        dtype = case if want.dim() == 4 else compute_dtype(case)  # maps; all else
        assert_close(got, want, name=name, dtype=dtype if want.numel() else got.dtype)
    dtypes = {name: tensor.dtype for name, tensor in flatten(inputs).items()}
    assert_gradients_close(gradients, expected_gradients, case=case, dtypes=dtypes)
    return outputs, gradients


def assert_shows_nan(
    op: str, backend: str, inputs: dict[str, Any], cotangents: dict[int, Tensor], **options: Any
) -> None:
    """NaN among the inputs shows in outputs and gradients wherever it does in the reference's."""
    with use_backend(backend):
        outputs, gradients = run(getattr(dla_kernels, op), inputs, cotangents, **options)
    expected, expected_gradients = run(reference(op), inputs, cotangents, **options)
    results = {f"output {i}": pair for i, pair in enumerate(zip(outputs, expected, strict=True))}
    results |= {name: (gradients[name], want) for name, want in expected_gradients.items()}
    assert any(want.isnan().any() for _, want in results.values())
    for name, (got, want) in results.items():
        assert got[want.isnan()].isnan().all(), name


def covering(
    axes: Mapping[str, Sequence[Any]],
    valid: Callable[[dict[str, Any]], bool] = lambda case: True,
    seed: int = 0,
    meet: Callable[[str, str], bool] = lambda one, other: True,
) -> list[dict[str, Any]]:
    """Few cases in which every (valid) pair of values of any two axes occurs; always the same ones.

    Greedy: each case is the best of some random candidates that contain a pair still missing.

    meet: whether it matters that the values of two axes occur together, the first one named first.
    """
    rng = random.Random(seed)

    def pairs(case: dict[str, Any]) -> set[tuple[tuple[str, int], ...]]:
        indices = [(name, axes[name].index(value)) for name, value in case.items()]
        return set(itertools.combinations(indices, 2))

    def candidate(pair: tuple[tuple[str, int], ...]) -> dict[str, Any]:
        fixed = {name: axes[name][index] for name, index in pair}
        return {name: fixed.get(name, rng.choice(values)) for name, values in axes.items()}

    numbered = [[(name, i) for i in range(len(values))] for name, values in axes.items()]
    missing = {
        pair
        for one, two in itertools.combinations(numbered, 2)
        if meet(one[0][0], two[0][0])
        for pair in itertools.product(one, two)
    }
    cases = []
    while missing:
        pair = min(missing)
        candidates = [c for c in (candidate(pair) for _ in range(40)) if valid(c)]
        if not candidates:  # the pair itself is invalid
            missing.discard(pair)
            continue
        best = max(candidates, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


def label(name: str, value: Any) -> str:
    """Short text for the name of a test."""
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) if name != "wants" else f"wants({'+'.join(value)})"
    if isinstance(value, str | torch.dtype):
        return str(value).removeprefix("torch.")
    return f"{name}={value}"


def case_id(axes: Mapping[str, Any]) -> str:
    """Name of a case made by ``covering``."""
    return " ".join(label(name, value) for name, value in axes.items())


def python(
    code_or_args: str | Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Any = None
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -c code`` or ``python *args`` in a fresh process and returns what it said.

    Triton is not interpreted there, nor CUDA emulated.
    """
    args = ["-c", code_or_args] if isinstance(code_or_args, str) else list(code_or_args)
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "TRITON_INTERPRET": "0", "DLA_EMULATE_CUDA": "0", **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
