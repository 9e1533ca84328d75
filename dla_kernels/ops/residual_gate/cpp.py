"""``residual_gate`` on the compiled CPU kernels (``csrc/ops/residual_gate``)."""

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import dense, dense_format, empty_features
from dla_kernels.ops.cpp_common import DTYPES, Loader, execution
from dla_kernels.ops.cpp_common import unsupported as unsupported


def forward(u: Tensor, h: Tensor, shortcut: Tensor, load: Loader = native.load) -> Tensor:
    """Arguments and result of ``dla_kernels::residual_gate``."""
    layout = dense_format(u)
    u, shortcut, h = dense(u, layout), dense(shortcut, layout), h.contiguous()
    out = empty_features(u)
    module = load()
    module.residual_gate_forward(
        module.ResidualGateForward(u=u, h=h, shortcut=shortcut, out=out, **_sizes(u, layout))
    )
    return out


def backward(
    grad: Tensor, u: Tensor, h: Tensor, out: Tensor, load: Loader = native.load
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::residual_gate_backward``: of u, h and shortcut."""
    layout = dense_format(u)
    grad, u, out = (dense(t, layout) for t in (grad, u, out))
    h = h.contiguous()
    du, dh, dshortcut = empty_features(u), torch.empty_like(h), empty_features(u)
    module = load()
    module.residual_gate_backward(
        module.ResidualGateBackward(
            grad=grad, u=u, h=h, out=out, du=du, dh=dh, dshortcut=dshortcut, **_sizes(u, layout)
        )
    )
    return [du, dh, dshortcut]


def _sizes(u: Tensor, layout: torch.memory_format) -> dict[str, object]:
    """The fields that say what the tensors are."""
    return {
        "batch": u.shape[0],
        "channels": u.shape[1],
        "area": u.shape[2] * u.shape[3],
        "channels_last": layout is torch.channels_last,
        "dtype": DTYPES[u.dtype],
        **execution(u),
    }
