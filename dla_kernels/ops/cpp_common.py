"""What the ``cpp.py`` adapters share: numbers that stand for words, who is called.

The module of the CUDA kernels has the same functions as that of the CPU kernels, which want all
their arguments by keyword. An adapter takes ``load``, which says which of them it works on:
`cuda_common.on_cuda`. Arguments that are addresses take tensors, which must live until the call has
returned.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dla_kernels import native

# DType of csrc/common/args.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Norm of csrc/common/args.h.
NORMS = {"none": 0, "batch": 1, "running": 2}


Loader = Callable[[], ModuleType]


def unsupported(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot serve ``x``, or None."""
    missing = native.error()
    return missing if x.is_cpu else misplaced("the compiled kernels run on CPU tensors", x, missing)


def misplaced(kernels: str, x: Tensor, missing: str | None) -> str:
    """Why kernels cannot serve ``x`` where it is; and what, besides, is missing."""
    elsewhere = f"{kernels}; x is on {x.device}"
    return f"{elsewhere}; {missing}" if missing else elsewhere


def execution(x: Tensor) -> dict[str, int]:
    """Arguments of a native function that say where the work on ``x`` is done."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return {"threads": torch.get_num_threads(), "stream": stream}
