"""The tail of a residual block with channel attention in plain PyTorch."""

import torch
from torch import Tensor

from dla_kernels.ops.reference_common import dense_as
from dla_kernels.ops.reference_common import unsupported as unsupported
from dla_kernels.ops.step_formulas import scale


def residual_gate(u: Tensor, h: Tensor, shortcut: Tensor) -> Tensor:
    """relu(u * h + shortcut).

    Args:
        u, shortcut: maps [B, C, H, W], any feature dtype.
        h: [B, C] in the compute dtype, in which the formula is evaluated.

    Returns:
        A map in the dtype of ``u``.
    """
    return torch.relu(scale(h, u.to(h.dtype)) + shortcut.to(h.dtype)).to(u.dtype)


def forward(u: Tensor, h: Tensor, shortcut: Tensor) -> Tensor:
    """Arguments and result of ``dla_kernels::residual_gate``."""
    return dense_as(u, residual_gate(u, h, shortcut))


def backward(grad: Tensor, u: Tensor, h: Tensor, out: Tensor) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::residual_gate_backward``: of u, h and shortcut."""
    passed = torch.where(out <= 0, 0, grad)
    wide = passed.to(h.dtype)
    du, dh = scale(h, wide).to(u.dtype), (wide * u.to(h.dtype)).sum(dim=(2, 3))
    return [dense_as(u, du), dh, dense_as(u, passed)]
