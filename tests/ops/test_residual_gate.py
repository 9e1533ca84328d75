"""residual_gate: every backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dla_kernels
from op_cases import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    MAPS,
    assert_dense,
    assert_shows_nan,
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
    "batch": [1, 2, 5],
    "channels": CHANNELS,
    "size": MAPS,
    "dtype": DTYPES,
    "u_layout": LAYOUTS,
    "shortcut_layout": LAYOUTS,
    "grad_layout": LAYOUTS,
    "wants": [None, ("u",), ("h",), ("shortcut",), ("h", "shortcut")],
}


@each_case("residual_gate", AXES, interpreted={"channels": (1, 20, 33), "size": MAPS[:9]})
@pytest.mark.simd
def test_any_combination(backend: str, case: dict[str, Any]) -> None:
    check(backend, (case["batch"], case["channels"], *case["size"]), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.simd
def test_cpp_writes_maps_past_the_caches(layout: str, dtype: torch.dtype) -> None:
    layouts = dict.fromkeys(("u_layout", "shortcut_layout", "grad_layout"), layout)
    shape = large((16, 64, 64), dtype, megabytes=16)
    check("cpp", shape, {"dtype": dtype, "wants": None, **layouts})


@each_backend("residual_gate")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("where", ["u", "h", "shortcut"])
def test_not_a_number(backend: str, where: str, layout: str, generator: torch.Generator) -> None:
    like = {"generator": generator, "dtype": torch.float32}
    u, shortcut, grad = (
        feature((2, 3, 5, 4), torch.float32, layout, generator=generator) for _ in range(3)
    )
    inputs = {"u": u, "h": random_small(2, 3, **like), "shortcut": shortcut}
    inputs[where][1, 2] = float("nan")
    assert_shows_nan("residual_gate", backend, inputs, {0: grad})


def check(backend: str, shape: tuple[int, ...], case: dict[str, Any]) -> None:
    generator, dtype = torch.Generator().manual_seed(0), case["dtype"]

    def map_(name: str) -> Tensor:
        return feature(shape, dtype, case[f"{name}_layout"], generator=generator)

    h = random_small(*shape[:2], generator=generator, dtype=compute_dtype(dtype))
    inputs = {"u": map_("u"), "h": h, "shortcut": map_("shortcut")}
    (out,), gradients = compare(
        "residual_gate", backend, inputs, {0: map_("grad")}, case=dtype, wants=case["wants"]
    )
    assert_dense(out, case["u_layout"], "out")
    for name in ("u", "shortcut"):
        if name in gradients:
            assert_dense(gradients[name], case["u_layout"], f"gradient of {name}")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "u missing": ({"u": None}, "u", "Tensor", "None"),
    "u's rank": ({"u": zeros(2, 3, 4)}, "u", "B, C, H, W", "2, 3, 4"),
    "u of integers": ({"u": zeros(2, 3, 4, 5, dtype=torch.int64)}, "u", "float", "int64"),
    "h's shape": ({"h": zeros(2, 3, 1, 1)}, "h", "2, 3", "2, 3, 1, 1"),
    "h's dtype": ({"h": zeros(2, 3).double()}, "h", "float32", "float64"),
    "shortcut's shape": ({"shortcut": zeros(2, 3, 5, 4)}, "shortcut", "2, 3, 4, 5", "2, 3, 5, 4"),
    "shortcut's dtype": ({"shortcut": zeros(2, 3, 4, 5).half()}, "shortcut", "float32", "float16"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changes, *words = BAD[bad]
    good = {"u": zeros(2, 3, 4, 5), "h": zeros(2, 3), "shortcut": zeros(2, 3, 4, 5)}
    assert_refused(lambda: dla_kernels.residual_gate(**good | changes), *words)
