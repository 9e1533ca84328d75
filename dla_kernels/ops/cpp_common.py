"""What the ``cpp.py`` adapters share: tensors to addresses, memory formats, dtype codes."""

import torch
from torch import Tensor

from dla_kernels import native

# DType of csrc/common/args.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def unsupported(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot serve ``x``, or None."""
    if x.device.type != "cpu":
        return f"the compiled kernels run on CPU tensors, x is on {x.device}"
    return native.error()


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense format of ``x``, or the one that a dense copy of it gets."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    """``x`` itself if it is dense in ``layout``, else a dense copy."""
    return None if x is None else x.contiguous(memory_format=layout)


def address(x: Tensor | None) -> int | None:
    """Address of the first element; null for a missing tensor."""
    return None if x is None else x.data_ptr()
