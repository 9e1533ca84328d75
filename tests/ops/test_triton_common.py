"""What all Triton kernels go through."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from op_cases import skips

pytestmark = skips("triton")


@pytest.mark.parametrize(("hip", "passed"), [(None, {"maxnreg": 128}), ("6.4", {})])
def test_limit_of_registers_is_nvidias(
    hip: str | None, passed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton for AMD's GPUs raises on options that it does not know."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.version, "hip", hip)
    common = importlib.import_module("dla_kernels.ops.triton_common")
    common.launch({(1,): lambda *args, **options: seen.update(options)}, (1,), maxnreg=128)
    assert {name: seen[name] for name in seen if name == "maxnreg"} == passed
