"""Backward passes of the reference implementations: autograd of their formulas."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor

from dla_kernels.ops.common import dense_format, without_autocast


def dense_as(x: Tensor, result: Tensor) -> Tensor:
    """``result`` dense in the format of ``x``, as results of the ops are."""
    return result.contiguous(memory_format=dense_format(x))


def differentiate(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` for ``grads`` arriving at its leading outputs.

    Returns:
        One per input: zeros where nothing arrives, None for an input of None.
    """
    # Operators run below autograd's level of the dispatcher: let this one see it again. Products in
    # backward passes follow the autocast state of the moment, so that is off as in the forward.
    device_of = next(t for t in inputs if t is not None)
    with (
        torch.enable_grad(),
        without_autocast(device_of),
        _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False),
    ):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        result = function(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        reached = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=False)
            if grad is not None and output.requires_grad
        ]
        present = [leaf for leaf in leaves if leaf is not None]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in reached],
                present,
                [grad for _, grad in reached],
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return [None if leaf is None else next(found) for leaf in leaves]
