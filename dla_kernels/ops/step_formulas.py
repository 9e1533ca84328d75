"""Formulas in plain PyTorch that the references of the layer steps share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, pad

from dla_kernels.ops.cell import cell_flops
from dla_kernels.ops.cell.reference import cell as cell_step
from dla_kernels.ops.step_checks import STATIC


def forward_path(
    y: Tensor, state: Tensor, params: Sequence[Tensor], cell: str, activation: str
) -> Tensor:
    """c^l = Dyn(y, c^{l-1}) (Eq. 4-5); the static layer has an empty state [0, B, C]."""
    if cell == STATIC:
        return torch.empty_like(state)
    return cell_step(y, state, params, cell, activation)


def context_of(state: Tensor, context: str) -> Tensor:
    """The state [S, B, C] that gates read."""
    if context == "first_sample":
        # The defect of the official code: sample 0 lends its context to all.
        return state[:, :1].expand_as(state)
    return state


def gates_of(
    features: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    cell: str,
    activation: str,
    gate: str,
    context: str,
) -> Tensor:
    """d = gate(Dyn(u, state^l)) (Eq. 6) of many pooled features u [M, B, C] under one context.

    The states that these steps make are thrown away.
    """
    output = cell_step(features, context_of(state, context), params, cell, activation)[0]
    return torch.sigmoid(output) if gate == "sigmoid" else output


def filter_channels(y: Tensor, weight: Tensor) -> Tensor:
    """One filter [1, 1, k] along the channels of y [..., C]: queries and keys.

    Not as a convolution, which GPUs may compute in TF32.
    """
    taps = weight.shape[-1]
    return (pad(y, (taps // 2, taps // 2)).unfold(-1, taps, 1) * weight.flatten()).sum(-1)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C, H, W] with a 3x3 filter per channel [C, 1, 3, 3], zeros beyond the borders."""
    return conv2d(x, weight, padding=1, groups=x.shape[1])


def step_flops(
    x: Tensor, convolutions: int, params: Sequence[Tensor], cell: str, runs: Sequence[int]
) -> int:
    """FLOPs of depthwise convolutions of maps like x [B, C, H, W], and of runs of the cell of so
    many steps each (none of a static layer). All else is pointwise, `filter_channels` too."""
    of_cell = 0
    if cell != STATIC:
        of_cell = sum(cell_flops(params, cell, x.shape[0], steps) for steps in runs)
    return convolutions * 2 * 9 * x.numel() + of_cell


def scale(factor: Tensor, x: Tensor) -> Tensor:
    """[B, C] times [B, C, H, W]."""
    return factor[:, :, None, None] * x


def normalise(
    o: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation; mean and (biased) variance are those of the batch or empty."""
    if norm == "none":
        return o, o.new_empty(0), o.new_empty(0)
    if norm == "running":
        constants = mean_in.detach(), var_in.detach()
        out = batch_norm(o, *constants, weight, bias, training=False, eps=eps)
        return out, o.new_empty(0), o.new_empty(0)
    channels = o.shape[1]
    count = o.numel() // channels
    # Momentum 1: the running statistics are those of this batch. torch.var_mean would be slower.
    mean, unbiased = o.new_zeros(channels), o.new_zeros(channels)
    out = batch_norm(o, mean, unbiased, weight, bias, training=True, momentum=1.0, eps=eps)
    return out, mean, unbiased * ((count - 1) / count)


def add_branch(x: Tensor, branch: Tensor, drop_scale: Tensor | None, residual: bool) -> Tensor:
    """[x +] drop_scale * branch, with a constant factor per sample [B]."""
    if drop_scale is not None:
        branch = branch * drop_scale.detach()[:, None, None, None]
    return x + branch if residual else branch
