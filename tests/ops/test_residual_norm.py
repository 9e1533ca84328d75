"""residual_norm: every backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dla_kernels
from dla_kernels import use_backend
from op_cases import (
    DTYPES,
    LAYOUTS,
    SAMPLES,
    assert_dense,
    assert_shows_nan,
    compare,
    compute_dtype,
    each_backend,
    each_case,
    feature,
    large,
    random_small,
    reference,
)
from refusals import assert_refused
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# [B, C, H, W]; with the code path that it is for.
SHAPES = [
    (3, 1, 1, 1),  # pooled map of one channel
    (5, 33, 1, 7),  # one row; one channel beyond vectors
    (2, 20, 5, 5),  # narrow maps, transposed
    (3, 64, 8, 8),  # whole vectors
    (4, 130, 2, 3),  # more channels than one block of them
    (2, 33, 14, 14),  # many units with whole batches
    (1, 6, 17, 31),  # one sample; odd sizes
    (2, 3, 33, 130),  # several strips
]
AXES = {
    "shape": SHAPES,
    "dtype": DTYPES,
    "x_layout": LAYOUTS,
    "shortcut_layout": LAYOUTS,
    "grad_layout": LAYOUTS,
    "norm": ["batch", "running"],
    "affine": [True, False],
    "wants": [None, ("x",), ("shortcut",), ("weight", "bias"), ()],
}
CONSTANT = ("mean_in", "var_in")


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    norm: str,
    affine: bool,
    layouts: tuple[str, str],
    generator: torch.Generator,
) -> dict[str, Tensor | None]:
    like = {"generator": generator, "dtype": compute_dtype(dtype)}
    channels, running = shape[1], norm == "running"
    x, shortcut = (feature(shape, dtype, layout, generator=generator) for layout in layouts)
    return {
        "x": x,
        "shortcut": shortcut,
        "weight": 1.0 + random_small(channels, scale=0.3, **like) if affine else None,
        "bias": random_small(channels, **like) if affine else None,
        "mean_in": random_small(channels, **like) if running else None,
        "var_in": random_small(channels, **like).abs() + 0.5 if running else None,
    }


@each_case(
    "residual_norm",
    AXES,
    interpreted={"shape": SHAPES[:7], "shortcut_layout": LAYOUTS[:4], "grad_layout": LAYOUTS[:5]},
)
@pytest.mark.simd
def test_any_combination(backend: str, case: dict[str, Any]) -> None:
    check(backend, case)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.simd
def test_cpp_writes_maps_past_the_caches(layout: str, sample: tuple[int, int, int]) -> None:
    layouts = dict.fromkeys(("x_layout", "shortcut_layout", "grad_layout"), layout)
    shape = large(sample, torch.float32)
    others = {"dtype": torch.float32, "norm": "batch", "affine": True, "wants": None}
    check("cpp", {"shape": shape, **layouts, **others})


def check(backend: str, case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, dtype, norm = case["shape"], case["dtype"], case["norm"]
    layouts = case["x_layout"], case["shortcut_layout"]
    inputs = make_inputs(shape, dtype, norm, case["affine"], layouts, generator)
    grad = feature(shape, dtype, case["grad_layout"], generator=generator)
    (out, mean, var), gradients = compare(
        "residual_norm",
        backend,
        inputs,
        {0: grad},
        case=dtype,
        names=("out", "mean", "var"),
        constant=CONSTANT,
        wants=case["wants"],
        norm=norm,
        eps=0.1,  # a few values may be next to equal
    )
    assert_dense(out, case["x_layout"], "out")
    assert mean.dtype == var.dtype == compute_dtype(dtype)
    for name in ("x", "shortcut"):
        if gradients.get(name) is not None:
            assert_dense(gradients[name], case["x_layout"], f"gradient of {name}")


@each_backend("residual_norm")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_mean_a_thousand_times_the_deviation(
    backend: str, layout: str, generator: torch.Generator
) -> None:
    """Raw float32 sums of squares would lose the variance."""
    inputs = make_inputs((3, 6, 24, 21), torch.float32, "batch", True, (layout,) * 2, generator)
    inputs["x"] += 1e3
    exact = [t if t is None else t.double() for t in inputs.values()]
    _, want_mean, want_var = reference("residual_norm")(*exact)
    with use_backend(backend):
        _, mean, var = dla_kernels.residual_norm(*inputs.values())
    assert_close(mean, want_mean, name="mean", dtype=torch.float32)
    assert_close(var, want_var, name="var", dtype=torch.float32)


@each_backend("residual_norm")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("where", ["x", "shortcut"])
@pytest.mark.parametrize("norm", ["batch", "running"])
def test_not_a_number(
    backend: str, norm: str, where: str, layout: str, generator: torch.Generator
) -> None:
    inputs = make_inputs((2, 3, 5, 4), torch.float32, norm, True, (layout,) * 2, generator)
    inputs[where][1, 2, 3, 1] = float("nan")
    grad = feature((2, 3, 5, 4), torch.float32, layout, generator=generator)
    assert_shows_nan(
        "residual_norm", backend, inputs, {0: grad}, constant=CONSTANT, norm=norm, eps=0.1
    )


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "x missing": ({"x": None}, "x", "Tensor", "None"),
    "x's rank": ({"x": zeros(2, 3, 4)}, "x", "B, C, H, W", "2, 3, 4"),
    "one value": ({"x": zeros(1, 3, 1, 1)}, "x", "more than one", "1, 3, 1, 1"),
    "shortcut's shape": ({"shortcut": zeros(2, 3, 5, 4)}, "shortcut", "2, 3, 4, 5", "2, 3, 5, 4"),
    "shortcut's dtype": ({"shortcut": zeros(2, 3, 4, 5).half()}, "shortcut", "float32", "float16"),
    "weight's shape": ({"weight": zeros(4)}, "weight", "3", "4"),
    "bias missing": ({"bias": None}, "bias", "weight and bias", "None"),
    "norm": ({"norm": "none"}, "norm", "batch, running", "none"),
    "eps": ({"eps": -1.0}, "eps", "at least 0", "-1.0"),
    "mean missing": ({"norm": "running"}, "mean_in", "3", "None"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changes, *words = BAD[bad]
    good = {"x": zeros(2, 3, 4, 5), "shortcut": zeros(2, 3, 4, 5)}
    good |= {"weight": zeros(3), "bias": zeros(3)}
    assert_refused(lambda: dla_kernels.residual_norm(**good | changes), *words)
