"""What is Triton's own about cells: sums that are cut into parts, and the precision of products."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import test_cell
from op_cases import skips

pytestmark = [*skips("triton"), pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture
def cells() -> Any:
    return importlib.import_module("dla_kernels.ops.cell.triton")


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("kind", ["dsu", "dsu_split", "dia"])
def test_sums_in_parts(
    cells: Any, backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden layers of three parts and their gradients of eight, of which some are empty."""
    monkeypatch.setattr(cells, "SMALL", 0)
    monkeypatch.setattr(cells, "PART", 16)
    case = {"batch": 3, "channels": 40, "hidden": 5}
    test_cell.check(backend, kind, "tanh", torch.float64, **case, strides="dense", wants=None)


def test_tf32_only_if_allowed(cells: Any) -> None:
    matmul = torch.backends.cuda.matmul
    assert cells._precision() == "ieee"
    matmul.allow_tf32 = True
    try:
        assert cells._precision() == "tf32"
    finally:
        matmul.allow_tf32 = False
