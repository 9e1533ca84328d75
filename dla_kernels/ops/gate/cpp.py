"""``gate`` on the compiled CPU kernels (``csrc/ops/gate``): one native call for the whole list."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops.common import dense, dense_format, empty_features
from dla_kernels.ops.cpp_common import DTYPES, Loader, execution
from dla_kernels.ops.cpp_common import unsupported as unsupported


def forward(
    features: Sequence[Tensor], gates: Sequence[Tensor], load: Loader = native.load
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::gate``."""
    features = [dense(x, dense_format(x)) for x in features]
    gates = [d.contiguous() for d in gates]
    outs = [empty_features(x) for x in features]
    module = load()
    module.gate_forward(
        module.GateForward(
            **_inputs(features, gates),
            out=outs,
        )
    )
    return outs


def backward(
    grads: Sequence[Tensor],
    features: Sequence[Tensor],
    gates: Sequence[Tensor],
    load: Loader = native.load,
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::gate_backward``: of all features, then all gates."""
    features = [dense(x, dense_format(x)) for x in features]
    grads = [dense(g, dense_format(x)) for g, x in zip(grads, features, strict=True)]
    gates = [d.contiguous() for d in gates]
    dx = [empty_features(x) for x in features]
    dgates = [torch.empty_like(d) for d in gates]
    module = load()
    module.gate_backward(
        module.GateBackward(
            **_inputs(features, gates),
            grad=grads,
            dx=dx,
            dgates=dgates,
        )
    )
    return dx + dgates


def _inputs(features: Sequence[Tensor], gates: Sequence[Tensor]) -> dict[str, object]:
    """The fields that the two native structs share."""
    return {
        "x": features,
        "gates": gates,
        "batch": [x.shape[0] for x in features],
        "channels": [x.shape[1] for x in features],
        "area": [x.shape[2] * x.shape[3] for x in features],
        "channels_last": [dense_format(x) is torch.channels_last for x in features],
        "dtype": DTYPES[features[0].dtype],
        **execution(features[0]),
    }
