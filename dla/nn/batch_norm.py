"""Batch norms of modules whose work fused ops take over."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dla_kernels
from dla.nn.checks import match_autocast
from dla_kernels.ops.common import compute_dtype


class BatchNormArguments(NamedTuple):
    """A BatchNorm2d as the ops take it; ``mode`` is their ``norm``."""

    mode: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def batch_norm_arguments(
    norm: nn.BatchNorm2d | None, x: Tensor, dtype: torch.dtype
) -> BatchNormArguments:
    """The norm as it would act on features like ``x``, its tensors in ``dtype``."""
    if norm is None:
        return BatchNormArguments("none", 0.0, None, None, None, None)
    weight, bias = cast(norm.weight, dtype), cast(norm.bias, dtype)
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        mean, var = cast(norm.running_mean, dtype), cast(norm.running_var, dtype)
        return BatchNormArguments("running", norm.eps, weight, bias, mean, var)
    if x.numel() == x.shape[1]:
        # The words of torch.nn.functional.batch_norm.
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    return BatchNormArguments("batch", norm.eps, weight, bias, None, None)


def track_statistics(norm: nn.BatchNorm2d | None, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """Updates running statistics as BatchNorm2d does: the variance unbiased, the mean of all
    batches so far under ``momentum=None``.

    Args:
        norm: None, or not in need of updates: nothing is done.
        mean, var: of the batch, [C], the variance biased; empty if an op took none.
        x: features of the shape that they were taken over.
    """
    if norm is None or not mean.numel():
        return
    if not (norm.training and norm.track_running_stats and norm.running_mean is not None):
        return
    factor: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    norm.running_mean.lerp_(cast(mean, norm.running_mean.dtype), factor)
    count = x.numel() // x.shape[1]
    unbiased = var * (count / (count - 1))
    norm.running_var.lerp_(cast(unbiased, norm.running_var.dtype), factor)


def is_plain(norm: nn.Module | None) -> bool:
    """Whether an op can do what calling this norm would do."""
    return type(norm) is nn.BatchNorm2d and is_unhooked(norm)


def join(branch: Tensor, norm: nn.Module | None, shortcut: Tensor, fused: bool) -> Tensor:
    """relu(norm(branch) + shortcut), all [B, C, H, W]: the end of a residual block."""
    if not (fused and is_plain(norm)):
        return torch.relu((branch if norm is None else norm(branch)) + shortcut)
    shortcut = match_autocast(shortcut, branch)
    mode, eps, *tensors = batch_norm_arguments(norm, branch, compute_dtype(branch.dtype))
    out, mean, var = dla_kernels.residual_norm(branch, shortcut, *tensors, norm=mode, eps=eps)
    track_statistics(norm, mean, var, branch)
    return out


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does no more than its class's forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` in ``dtype``, without a call where it is already."""
    return x if x is None or x.dtype == dtype else x.to(dtype)
