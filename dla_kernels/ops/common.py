"""Small rules shared by all ops: precision, memory format, wording of errors."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {torch.contiguous_format: "nchw", torch.channels_last: "nhwc"}


def compute_dtype(feature_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which everything small is kept: float64 for float64 features, else float32."""
    return torch.float64 if feature_dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which autocast leaves the reference formulas in their own precision."""
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x) else nullcontext()


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; the meta device has none."""
    # Not by torch.amp.is_autocast_available, which torch.compile does not know before torch 2.12.
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def dense_format(x: Tensor) -> torch.memory_format:
    """The dense format of ``x``, or the one that a dense copy of it gets: contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


# The most pixels (channels of a [B, C]) of a shape class; beyond is one more class.
CLASS_SIZES = (64, 256, 1024)


def shape_class(x: Tensor) -> str:
    """What choices by measurement depend on: the format and pixels per plane of a map, or the width
    of a [B, C], roughly; such as "nhwc_256". Never the batch."""
    if x.dim() != 4:
        return class_of("rows", x.shape[-1])
    return class_of(LAYOUTS[dense_format(x)], x.shape[2] * x.shape[3])


def class_of(kind: str, size: int) -> str:
    """`shape_class` of maps of a layout, or of "rows", with so many pixels or channels."""
    return f"{kind}_{next((most for most in CLASS_SIZES if size <= most), 'more')}"


def dense(x: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    """``x`` itself if it is dense in ``layout``, else a dense copy."""
    return None if x is None else x.contiguous(memory_format=layout)


def contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """The tensors by name, dense copies of those that are not contiguous."""
    return {name: None if t is None else t.contiguous() for name, t in tensors.items()}


def empty_features(x: Tensor) -> Tensor:
    """An uninitialised dense feature map of the shape, dtype and format of ``x``."""
    return torch.empty_like(x, memory_format=dense_format(x))


def features_like(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """An uninitialised dense feature map on the device of ``like``."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def describe(value: object) -> str:
    """What came, for error messages: dtype, shape and device of a tensor; of the rest, the repr, or
    for long ones its beginning."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
