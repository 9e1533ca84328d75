"""What the adapters of light_attention and base_attention share: arguments, the call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.cell.cpp import ACTIVATION_NUMBERS, KINDS
from dla_kernels.ops.cpp_common import DTYPES, NORMS, execution
from dla_kernels.ops.repeat import Repeat

# Of (module, name of a function, its arguments, a tensor of the compute dtype): working memory.
Prepare = Callable[[Any, str, dict[str, Any], Tensor], Tensor]


class Step(NamedTuple):
    """What a native function is to be called with, and what has been computed then."""

    function: str
    arguments: dict[str, Any]
    results: Sequence[Tensor | None]


def on_cpu(step: Callable[..., Step]) -> Callable[..., Any]:
    """The step's results."""

    def run(*args: Any) -> Any:
        function, arguments, results = step(*args)
        getattr(native.load(), function)(**arguments)
        return results

    def repeatable(*args: Any) -> tuple[Any, Repeat | None]:
        function, arguments, results = step(*args)
        function = getattr(native.load(), function)
        function(**arguments)
        return results, Repeat.of(function, arguments, args, results)

    run.repeatable = repeatable
    return run


def on_gpu(step: Callable[..., Step]) -> Callable[..., Any]:
    """The same by the CUDA kernels, which need working memory; anybody's again after the launch."""

    def run(*args: Any) -> Any:
        function, arguments, results = step(*args)
        module = native.load_cuda()
        size = getattr(module, f"{function}_scratch")(**arguments)
        arguments["scratch"] = arguments["state"].new_empty(size)
        getattr(module, function)(**arguments)
        return results

    return run


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


def run_step(
    module: Any, function: str, like: Tensor, prepare: Prepare | None, **args: Any
) -> None:
    """Calls a native function, on a GPU with the working memory that ``prepare`` allocates."""
    if prepare is not None:
        args["scratch"] = prepare(module, function, args, like)
    getattr(module, function)(**args)
