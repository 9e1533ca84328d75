"""Backward passes of the reference implementations: autograd of their formulas."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import _C, Tensor

from dla_kernels.ops.common import without_autocast


class Recorded:
    """``function(*inputs)``, evaluated once, and its gradients when those of the outputs are known.

    Attributes:
        outputs: detached.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
        self._device_of = next(t for t in inputs if t is not None)
        with _recording(self._device_of):
            self._leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
            result = function(*self._leaves)
        self._outputs = [result] if isinstance(result, Tensor) else list(result)
        self.outputs = [output.detach() for output in self._outputs]

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs for ``grads`` arriving at the leading outputs; only once.

        Returns:
            One per input: zeros where nothing arrives, None for an input of None.
        """
        reached = [
            (output, grad)
            for output, grad in zip(self._outputs, grads, strict=False)
            if grad is not None and output.requires_grad
        ]
        present = [leaf for leaf in self._leaves if leaf is not None]
        if not reached:
            return [None if leaf is None else torch.zeros_like(leaf) for leaf in self._leaves]
        with _recording(self._device_of):
            found = iter(
                torch.autograd.grad(
                    [output for output, _ in reached],
                    present,
                    [grad for _, grad in reached],
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        # Detached: zeros that torch 2.9 puts in for missing gradients require gradients themselves.
        return [None if leaf is None else next(found).detach() for leaf in self._leaves]


def differentiate(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` for ``grads`` arriving at its leading outputs.

    Returns:
        One per input: zeros where nothing arrives, None for an input of None.
    """
    return Recorded(function, inputs).gradients(grads)


@contextmanager
def _recording(x: Tensor) -> Iterator[None]:
    # Operators run below autograd's level of the dispatcher: let this one see it again. Products in
    # backward passes follow the autocast state of the moment, so that is off as in the forward.
    with (
        torch.enable_grad(),
        without_autocast(x),
        _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False),
    ):
        yield
