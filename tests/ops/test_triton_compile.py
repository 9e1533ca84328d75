"""Triton kernels compiled without a GPU: all of them, for three generations, without spills."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dla_kernels.backend import backends_of
from op_cases import op_names, python, skips

OPS = [op for op in op_names() if "triton" in backends_of(op)]
REGISTERS = 65536  # of a multiprocessor, of every generation
SHARED = 48 * 1024  # bytes: several programs fit on a multiprocessor


@pytest.mark.long
@pytest.mark.parametrize("op", [pytest.param(op, marks=skips("triton")) for op in OPS])
def test_kernels_fit(op: str) -> None:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = python([str(Path(__file__).with_name("compile_triton.py")), op], env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not result["forgotten"], "kernels that no sample call launches"
    assert result["compiled"]
    for kernel in result["compiled"]:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] * 32 * kernel["warps"] <= REGISTERS // 2, kernel
        assert kernel["shared"] <= SHARED, kernel
