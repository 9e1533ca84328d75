"""``residual_norm`` on the compiled CPU kernels (``csrc/ops/residual_norm``)."""

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import (
    compute_dtype,
    contiguous,
    dense,
    dense_format,
    empty_features,
)
from dla_kernels.ops.cpp_common import DTYPES, NORMS, Loader, execution
from dla_kernels.ops.cpp_common import unsupported as unsupported


def forward(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_in: Tensor | None,
    var_in: Tensor | None,
    norm: str,
    eps: float,
    load: Loader = native.load,
    scratch: Tensor | None = None,
    pieces: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of ``dla_kernels::residual_norm``; those from ``load`` on are for
    GPUs."""
    layout = dense_format(x)
    x, shortcut = dense(x, layout), dense(shortcut, layout)
    small = contiguous(weight=weight, bias=bias, mean_in=mean_in, var_in=var_in)
    out = empty_features(x)
    size = x.shape[1] if norm == "batch" else 0
    mean, var = (x.new_empty(size, dtype=compute_dtype(x.dtype)) for _ in range(2))
    tensors = {"x": x, "shortcut": shortcut, "out": out, "mean": mean, "var": var}
    tensors |= {"scratch": scratch}
    load().residual_norm_forward(**tensors, **small, **_options(x, layout, norm, eps, pieces))
    return out, mean, var


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    norm: str,
    eps: float,
    load: Loader = native.load,
    scratch: Tensor | None = None,
    pieces: int = 1,
) -> list[Tensor | None]:
    """Arguments and results of ``dla_kernels::residual_norm_backward``: of x, shortcut, weight and
    bias; the last two arguments are for GPUs."""
    layout = dense_format(x)
    grad, x, out = (dense(t, layout) for t in (grad, x, out))
    small = contiguous(weight=weight, bias=bias, mean=mean, var=var)
    dx, dshortcut = empty_features(x), empty_features(x)
    dweight, dbias = (None if w is None else torch.empty_like(w) for w in (weight, bias))
    tensors = {"grad": grad, "x": x, "out": out, "dx": dx, "dshortcut": dshortcut}
    tensors |= {"dweight": dweight, "dbias": dbias, "scratch": scratch}
    load().residual_norm_backward(**tensors, **small, **_options(x, layout, norm, eps, pieces))
    return [dx, dshortcut, dweight, dbias]


def _options(
    x: Tensor, layout: torch.memory_format, norm: str, eps: float, pieces: int
) -> dict[str, object]:
    """The arguments that say what the tensors are and what is computed."""
    batch, channels, height, width = x.shape
    return {
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "channels_last": layout is torch.channels_last,
        "dtype": DTYPES[x.dtype],
        "norm": NORMS[norm],
        "eps": eps,
        "pieces": pieces,
        **execution(x),
    }
