"""The tail of a residual block in plain PyTorch."""

import torch
from torch import Tensor

from dla_kernels.ops.common import compute_dtype, without_autocast
from dla_kernels.ops.differentiate import differentiate
from dla_kernels.ops.reference_common import dense_as
from dla_kernels.ops.reference_common import unsupported as unsupported
from dla_kernels.ops.step_formulas import normalise


def residual_norm(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None = None,
    var_in: Tensor | None = None,
    *,
    norm: str = "batch",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) + shortcut); arguments and results of ``dla_kernels.residual_norm``.

    Computed in the compute dtype; only ``out`` is rounded back. The statistics come detached.
    """
    dtype = compute_dtype(x.dtype)
    with without_autocast(x):
        normed, mean, var = normalise(x.to(dtype), norm, weight, bias, mean_in, var_in, eps)
        return torch.relu(normed + shortcut.to(dtype)).to(x.dtype), mean, var


def forward(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of ``dla_kernels::residual_norm``."""
    out, mean, var = residual_norm(x, shortcut, weight, bias, mean_in, var_in, norm=norm, eps=eps)
    return dense_as(x, out), mean, var


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    norm: str,
    eps: float,
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::residual_norm_backward``: of x, shortcut, weight and
    bias."""
    dtype = compute_dtype(x.dtype)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        return [normalise(x.to(dtype), norm, weight, bias, mean, var, eps)[0]]

    passed = torch.where(out <= 0, 0, grad)
    dx, *dweights = differentiate(function, [x, weight, bias], [passed.to(dtype)])
    return [dense_as(x, dx), dense_as(x, passed), *dweights]
