"""Flags of light_attention and base_attention, the steps of a layer, and the checks they share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dla_kernels.ops import checks
from dla_kernels.ops.cell import ACTIVATIONS, CELLS, check_params
from dla_kernels.ops.common import describe

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
    checks.at_least_zero("eps", eps)


def check_map(x: Tensor, head_dim: int, *norms: str) -> None:
    """Raises unless ``x`` is a feature map that these heads and norms can work on."""
    checks.features("x", x)
    channels = x.shape[1]
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"head_dim: expected a divisor of {channels} channels, got {head_dim}")
    if "batch" in norms:
        checks.more_than_one_per_channel("x", x)


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


def check_norm(
    name: str,
    norm: str,
    affine: Mapping[str, Tensor | None],
    statistics: Mapping[str, Tensor | None],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises unless the tensors [C] of the norm that is given as ``name`` fit: weight and bias both
    or neither (no norm has none), the statistics if they are what it takes."""
    given = [key for key, value in affine.items() if value is not None]
    if given and norm == "none":
        raise ValueError(
            f"{given[0]}: expected None for {name}='none', got {describe(affine[given[0]])}"
        )
    if given and len(given) < len(affine):
        missing = next(key for key, value in affine.items() if value is None)
        raise ValueError(f"{missing}: expected both {' and '.join(affine)}, or neither; got None")
    checks.like_if_given(affine, (channels,), dtype, device)
    for key, value in statistics.items():
        if norm != "running":
            if value is not None:
                raise ValueError(f"{key}: expected None for {name}={norm!r}, got {describe(value)}")
            continue
        if value is None:
            raise ValueError(f"{key}: expected [{channels}] for {name}='running', got None")
        checks.like(key, value, (channels,), dtype, device)


def check_drop(
    drop_scale: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises unless there is a factor for every sample, or none at all."""
    checks.like_if_given({"drop_scale": drop_scale}, (batch,), dtype, device)
