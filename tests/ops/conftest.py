"""Fixtures of the tests of ops."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

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
