"""What the ``cpp.py`` adapters share: numbers that stand for words, who is called.

The module of the CUDA kernels has the same structs and functions as that of the CPU kernels. An
adapter takes ``load``, which says which of them it works on: `cuda_common.on_cuda`. The fields of a
struct that are addresses take tensors, which must outlive the native call; it does not keep them.
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
    if x.is_cpu:
        return missing
    elsewhere = f"the compiled kernels run on CPU tensors, x is on {x.device}"
    return f"{elsewhere}; {missing}" if missing else elsewhere


def execution(x: Tensor) -> dict[str, int]:
    """Fields of a native struct that say where the work on ``x`` is done."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return {"threads": torch.get_num_threads(), "stream": stream}
