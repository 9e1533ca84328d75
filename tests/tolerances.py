"""The one table of tolerances and the one comparison used by every test.

Measure: ``||a - b|| <= tol * max(||b||, 1e-6 * scale)`` with Euclidean norms over the whole tensor,
where ``scale`` is the largest gradient norm of the case: some gradients are zero in exact
arithmetic (the bias of a batch norm before a 1x1 convolution and another batch norm), and a
relative error of rounding noise means nothing. For the same reason a gradient may be wrong by one
rounding (half an epsilon of the compute dtype) of the largest. NaN never passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Relative tolerances of one feature dtype."""

    forward: float
    gradient: float


# Ops and layers against their reference. Half dtypes: against the reference in higher precision on
# the same rounded inputs.
OPS = {
    torch.float64: Tolerance(forward=1e-12, gradient=1e-12),
    torch.float32: Tolerance(forward=1e-5, gradient=3e-5),
    torch.float16: Tolerance(forward=2e-3, gradient=4e-3),
    torch.bfloat16: Tolerance(forward=1e-2, gradient=2e-2),
}

# Whole networks: recorded values of the authors' models, and fused against unfused training.
MODELS = {
    torch.float64: Tolerance(forward=1e-9, gradient=1e-9),
    torch.float32: Tolerance(forward=1e-5, gradient=1e-4),
}

# A stage in half dtypes against float64 on the same rounded numbers: its blocks and layers round
# several times each.
STAGES = {
    dtype: Tolerance(forward=3e-2, gradient=3e-2) for dtype in (torch.float16, torch.bfloat16)
}

# A whole network in half dtypes against float32 on numbers that were not rounded.
ROUNDED_MODELS = {
    dtype: Tolerance(forward=1e-1, gradient=1e-1) for dtype in (torch.float16, torch.bfloat16)
}

FLOOR = 1e-6


def norm(x: Tensor) -> float:
    """Euclidean norm in float64."""
    return x.detach().double().norm().item()


def largest_norm(tensors: Mapping[str, Tensor | None]) -> float:
    """``scale`` of a case: the largest norm among its gradients."""
    return max((norm(t) for t in tensors.values() if t is not None), default=0.0)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    name: str = "tensor",
    gradient: bool = False,
    scale: float = 0.0,
    dtype: torch.dtype | None = None,
    case: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    table: Mapping[torch.dtype, Tolerance] = OPS,
) -> None:
    """Asserts shape, dtype, format and values.

    gradient: take the gradient column of the table.
    scale: largest gradient norm of the case (see ``largest_norm``).
    dtype: what ``actual`` must have; default: the dtype of ``expected``.
    case: feature dtype of the case, which selects the row; default: ``dtype``. (A float32 weight
        gradient of a bfloat16 case has dtype float32 and case bfloat16.)
    memory_format: ``actual`` must be dense in it.
    """
    dtype = dtype or expected.dtype
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    assert actual.device == expected.device, f"{name}: on {actual.device}, not {expected.device}"
    if memory_format is not None:
        assert actual.is_contiguous(memory_format=memory_format), (
            f"{name}: strides {actual.stride()} of shape {tuple(actual.shape)}, not {memory_format}"
        )
    assert not expected.isnan().any(), f"{name}: NaN in the expected values: the test is at fault"
    nans = int(actual.isnan().sum())
    assert nans == 0, f"{name}: {nans} NaN among {actual.numel()} values"
    row = table[case or dtype]
    tol = row.gradient if gradient else row.forward
    error = norm(actual.detach().double() - expected.detach().double())
    size = max(norm(expected), FLOOR * scale)
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2 * scale
    assert error <= max(tol * size, rounding), (
        f"{name}: relative error {error / size if size else float('inf'):.3g} > {tol:g} "
        f"(error {error:.3g}, size {size:.3g}, shape {tuple(actual.shape)})"
    )


def assert_gradients_close(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    case: torch.dtype,
    dtypes: Mapping[str, torch.dtype] | None = None,
    table: Mapping[torch.dtype, Tolerance] = OPS,
) -> None:
    """Compares all gradients of a case; None stands for zeros. The scale is theirs together.

    dtypes: what each gradient must have, if that is to be checked.
    """
    assert actual.keys() == expected.keys()
    scale = largest_norm(expected)
    for name, want in expected.items():
        got = actual[name]
        if got is None and want is None:
            continue
        got = torch.zeros_like(want) if got is None else got
        want = torch.zeros_like(got) if want is None else want
        dtype = dtypes[name] if dtypes and actual[name] is not None else got.dtype
        assert_close(
            got,
            want,
            name=f"gradient of {name}",
            gradient=True,
            scale=scale,
            dtype=dtype,
            case=case,
            table=table,
        )
