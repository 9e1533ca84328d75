"""What the adapters of light_attention and base_attention share: arguments, the call."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dla_kernels import native
from dla_kernels.ops._calls import flatten
from dla_kernels.ops.cell.cpp import ACTIVATION_NUMBERS, KINDS
from dla_kernels.ops.cpp_common import DTYPES, NORMS, execution
from dla_kernels.ops.repeat import repeat


class Step(NamedTuple):
    """What a native function is to be called with, and what it will have computed then.

    results: memory that the function fills.
    finish: what is left to do with them; None: nothing.
    """

    function: str
    arguments: dict[str, Any]
    results: Sequence[Tensor | None]
    finish: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]] | None = None

    def run(self, module: ModuleType) -> Sequence[Tensor | None]:
        getattr(module, self.function)(**self.arguments)
        return self.finish(self.results) if self.finish else self.results


class on_cpu:
    """The function of an op that does such a step."""

    def __init__(self, step: Callable[..., Step]) -> None:
        self._step = step

    def __call__(self, *args: Any) -> Sequence[Tensor | None]:
        return self._step(*args).run(native.load())

    def prepare(self, *args: Any) -> Callable[..., Sequence[Tensor | None]] | None:
        """The same for arguments of the form of these, under as many threads; where it can."""
        tensors = [id(value) for value in flatten(args) if isinstance(value, Tensor)]
        if len(set(tensors)) < len(tensors):  # each is to be known by its place
            args = tree_map_only(Tensor, Tensor.detach, args)
        function, arguments, results, finish = self._step(*args)
        return None if finish else repeat(function, arguments, args, results)


def sizes(
    x: Tensor, layout: torch.memory_format, q_weight: Tensor, cell_params: Sequence[Tensor]
) -> dict[str, object]:
    """Those that say what the tensors are."""
    batch, channels, height, width = x.shape
    return {
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "kernel_size": q_weight.numel(),
        "hidden": cell_params[0].shape[0] if cell_params else 0,
        "dtype": DTYPES[x.dtype],
        "channels_last": layout is torch.channels_last,
        **execution(x),
        "scratch": None,
    }


def flags(
    cell: str,
    activation: str,
    gate: str,
    context: str,
    head_dim: int,
    norm: str,
    eps: float,
    residual: bool,
) -> dict[str, object]:
    """The options that both ops have."""
    return {
        "cell": KINDS.get(cell, 0),  # a static layer has no cell parameters and reads no kind
        "activation": ACTIVATION_NUMBERS[activation],
        "sigmoid_gate": gate == "sigmoid",
        "first_sample": context == "first_sample",
        "head_dim": head_dim,
        "norm": NORMS[norm],
        "eps": eps,
        "residual": residual,
    }
