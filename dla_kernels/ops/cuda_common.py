"""What the ``cuda.py`` adapters share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.cpp_common import misplaced
from dla_kernels.ops.global_pool import cpp as global_pool
from dla_kernels.ops.step_cpp import Step


def unsupported(x: Tensor) -> str | None:
    """Why the compiled CUDA kernels cannot serve ``x``, or None."""
    if torch.version.hip:
        return "the compiled CUDA kernels are for NVIDIA GPUs; this torch is for AMD's"
    missing = native.cuda_error()
    if x.is_cuda or (native.EMULATE_CUDA and x.is_cpu):
        return missing or _unusable(x.device)
    return misplaced("the compiled CUDA kernels run on NVIDIA GPUs", x, missing)


@functools.cache
def _unusable(device: torch.device) -> str | None:
    """Why no kernel starts on a device although the module loads, or None. One launch shows it: the
    driver may be too old for the compiler, or the kernels built for other GPUs."""
    x = torch.ones((1, 1, 1, 1), device=device)
    try:
        with torch.cuda.device(device) if x.is_cuda else nullcontext():
            global_pool.forward(x, load=native.load_cuda)
    except RuntimeError as error:
        return str(error)
    return None


def on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` or ``backward`` of a ``cpp.py`` with the functions of the CUDA module."""
    return functools.partial(function, load=native.load_cuda)


def step_on_cuda(step: Callable[..., Step]) -> Callable[..., Sequence[Tensor | None]]:
    """The function of an op that does such a step by the CUDA kernels, which need working memory;
    anybody's again after the last launch."""

    def run(*args: Any) -> Sequence[Tensor | None]:
        described, module = step(*args), native.load_cuda()
        arguments = described.arguments
        scratch = getattr(module, f"{described.function}_scratch")(**arguments)
        arguments["scratch"] = arguments["state"].new_empty(scratch)
        return described.run(module)

    return run
