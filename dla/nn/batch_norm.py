"""Batch norms of modules whose work fused ops take over."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dla_kernels
from dla.nn.checks import match_autocast, number
from dla.nn.tensors import cast, parameter
from dla_kernels.ops.checks import at_least_zero, like
from dla_kernels.ops.common import compute_dtype, describe


class BatchNormArguments(NamedTuple):
    """A BatchNorm2d as the ops take it; ``mode`` is their ``norm``."""

    mode: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


# Where a module keeps the hooks that run when it is called.
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
NO_NORM = BatchNormArguments("none", 0.0, None, None, None, None)


def batch_norm(channels: int, eps: float, momentum: float | None) -> nn.BatchNorm2d:
    """A fresh norm; TypeError or ValueError where torch's would fail late or not at all."""
    at_least_zero("eps", number("eps", eps))
    if momentum is not None and not 0.0 <= number("momentum", momentum) <= 1.0:
        raise ValueError(f"momentum: expected None or a number in [0, 1], got {momentum!r}")
    return nn.BatchNorm2d(channels, eps, momentum)


def batch_norm_arguments(
    norm: nn.BatchNorm2d | None, x: Tensor, dtype: torch.dtype
) -> BatchNormArguments:
    """The norm as it would act on features like ``x``, its tensors in ``dtype``."""
    if norm is None:
        return NO_NORM
    weight, bias = parameter(norm, "weight", dtype), parameter(norm, "bias", dtype)
    if weight is not None and bias is None:  # BatchNorm2d(bias=False)
        bias = torch.zeros_like(weight)
    elif bias is not None and weight is None:
        weight = torch.ones_like(bias)
    if not norm.training or norm.track_running_stats:
        mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
        if (mean is None) != (var is None):
            # The words of torch.nn.functional.batch_norm, here and below.
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None"
            )
        if mean is not None and not norm.training:
            statistics = cast(mean, dtype), cast(var, dtype)
            return BatchNormArguments("running", norm.eps, weight, bias, *statistics)
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    return BatchNormArguments("batch", norm.eps, weight, bias, None, None)


def track_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """Updates running statistics as BatchNorm2d does: the variance unbiased, the mean of all
    batches so far under ``momentum=None``.

    Args:
        norm: that took statistics of the batch. If it does not keep any, nothing is done.
        mean, var: these, [C], the variance biased.
        x: features of the shape that they were taken over.
    """
    if not (norm.training and norm.track_running_stats):
        return
    buffers = norm._buffers  # an attribute of a module takes a search
    running_mean, running_var = buffers.get("running_mean"), buffers.get("running_var")
    tracked = buffers.get("num_batches_tracked")
    if running_mean is None:
        return
    factor: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if tracked is not None:
        tracked.add_(1)
        if norm.momentum is None:
            factor = tracked.to(running_mean.dtype).reciprocal()
    running_mean.lerp_(cast(mean, running_mean.dtype), factor)
    count = x.numel() // x.shape[1]
    # var * count / (count - 1). In a product, torch makes a tensor of the number first.
    unbiased = var.add(var, alpha=1 / (count - 1))
    running_var.lerp_(cast(unbiased, running_var.dtype), factor)


def is_plain(norm: nn.Module | None) -> bool:
    """Whether an op can do what calling this norm would do."""
    return type(norm) is nn.BatchNorm2d and is_unhooked(norm)


def join(branch: Tensor, norm: nn.Module | None, shortcut: Tensor, fused: bool) -> Tensor:
    """relu(norm(branch) + shortcut), all [B, C, H, W]: the end of a residual block."""
    shortcut = match_autocast(shortcut, branch)
    if not (fused and is_plain(norm)):
        like("shortcut", shortcut, branch.shape, branch.dtype, branch.device)
        if norm is not None and not isinstance(norm, nn.Module):
            raise TypeError(f"branch_norm: expected a Module or None, got {describe(norm)}")
        return torch.relu((branch if norm is None else norm(branch)) + shortcut)
    mode, eps, *tensors = batch_norm_arguments(norm, branch, compute_dtype(branch.dtype))
    out, mean, var = dla_kernels.residual_norm(branch, shortcut, *tensors, norm=mode, eps=eps)
    if mode == "batch":
        track_statistics(norm, mean, var, branch)
    return out


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does what its class's forward does, hooks of all modules aside
    (``register_module_forward_hook``)."""
    held = vars(module)
    return not any(held[name] for name in HOOKS) and "forward" not in held
