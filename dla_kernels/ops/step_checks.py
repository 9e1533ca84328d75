"""Flags of light_attention and base_attention, the steps of a layer, and the checks they share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops.cell import ACTIVATIONS, CELLS, check_params

STATIC = "none"
GATES = ("identity", "sigmoid")
CONTEXTS = ("per_sample", "first_sample")
NORMS = ("batch", "running", "none")


def check_flags(cell: str, activation: str, gate: str, context: str, norm: str, eps: float) -> None:
    """Raises ValueError unless each is one of its words, and eps at least 0."""
    checks.one_of("cell", cell, (*CELLS, STATIC))
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("gate", gate, GATES)
    checks.one_of("context", context, CONTEXTS)
    checks.one_of("norm", norm, NORMS)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")


def check_map(x: Tensor, head_dim: int, norm: str) -> None:
    """Raises unless ``x`` is a feature map that these heads and this norm can work on."""
    checks.features("x", x)
    channels = x.shape[1]
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"head_dim: expected a divisor of {channels} channels, got {head_dim}")
    if norm == "batch" and x.numel() == channels:
        raise ValueError(
            f"x: expected more than one value per channel for norm='batch', got {list(x.shape)}"
        )


def check_cell(
    state: Tensor,
    cell_params: Sequence[Tensor],
    cell: str,
    batch: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises unless state and parameters are those of such a cell; of none, if it is static."""
    slots = 0 if cell == STATIC else CELLS[cell].slots
    checks.like("state", state, (slots, batch, channels), dtype, device)
    if cell != STATIC:
        check_params("cell_params", cell_params, cell, channels, dtype, device)
    elif cell_params:
        raise ValueError(f"cell_params: expected 0 for cell='none', got {len(cell_params)}")


def check_convolutions(
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises unless q and k have filters [1, 1, k] with k odd, and v has [C, 1, 3, 3]."""
    checks.a_tensor("q_weight", q_weight)
    size = q_weight.shape[-1] if q_weight.dim() else 0
    if size % 2 == 0:
        raise ValueError(f"q_weight: expected [1, 1, k] with k odd, got {list(q_weight.shape)}")
    checks.like("q_weight", q_weight, (1, 1, size), dtype, device)
    checks.like("k_weight", k_weight, (1, 1, size), dtype, device)
    checks.like("v_weight", v_weight, (channels, 1, 3, 3), dtype, device)


def check_norm_and_drop(
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    drop_scale: Tensor | None,
    batch: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises unless the tensors of the norm [C] and of the drop path [B] fit."""
    vector = (channels,)
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing}: expected norm_weight and norm_bias both or neither, got None")
    if norm_weight is not None and norm_bias is not None:
        checks.like("norm_weight", norm_weight, vector, dtype, device)
        checks.like("norm_bias", norm_bias, vector, dtype, device)
    if norm == "running":
        for name, value in (("mean_in", mean_in), ("var_in", var_in)):
            if value is None:
                raise ValueError(f"{name}: expected [{channels}] for norm='running', got None")
            checks.like(name, value, vector, dtype, device)
    if drop_scale is not None:
        checks.like("drop_scale", drop_scale, (batch,), dtype, device)
