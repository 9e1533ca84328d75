"""Fixtures of the tests of ops."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import build_emulation
from op_cases import EMULATED, INTERPRETED, ON_GPU, device_of

if INTERPRETED and importlib.util.find_spec("triton"):
    import fast_interpreter

    fast_interpreter.hasten()


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test's tensors are made where its ``backend`` works."""
    test = getattr(request.node, "callspec", None)
    backend = test.params.get("backend") if test else None
    if backend not in ON_GPU:
        yield
        return
    if backend == "cuda" and EMULATED:
        build_emulation.build()
    with torch.device(device_of(backend)):
        yield


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """For tests that take most of a GPU's memory: one at a time, and none is kept in store."""
    with FileLock(Path(tempfile.gettempdir(), "dla_kernels_whole_memory.lock")):
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()
