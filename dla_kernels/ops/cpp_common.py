"""What the ``cpp.py`` adapters share: tensors to addresses, dtype codes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dla_kernels import native

# DType of csrc/common/args.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Norm of csrc/common/args.h.
NORMS = {"none": 0, "batch": 1, "running": 2}


def unsupported(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot serve ``x``, or None."""
    if not x.is_cpu:
        return f"the compiled kernels run on CPU tensors, x is on {x.device}"
    return native.error()


def address(x: Tensor | None) -> int | None:
    """Address of the first element; null for a missing tensor."""
    return None if x is None else x.data_ptr()


def addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    """Fields of a native struct that hold these tensors; they must outlive the native call."""
    return {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
