"""Channel gates for many features at once in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.ops.differentiate import differentiate
from dla_kernels.ops.reference_common import dense_as
from dla_kernels.ops.reference_common import unsupported as unsupported


def gate(features: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """Multiply every feature map by its own channel gate.

    Args:
        features: maps [B, C, H, W], any feature dtype; sizes may differ from map to map.
        gates: one [B, C] per map, in the compute dtype.

    Returns:
        One map per input, in the dtype of that input; the product is formed in the compute dtype.
    """
    return [
        (feature.to(factor.dtype) * factor[:, :, None, None]).to(feature.dtype)
        for feature, factor in zip(features, gates, strict=True)
    ]


def forward(features: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::gate``."""
    results = gate(features, gates)
    return [dense_as(x, result) for x, result in zip(features, results, strict=True)]


def backward(
    grads: Sequence[Tensor], features: Sequence[Tensor], gates: Sequence[Tensor]
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::gate_backward``: of all features, then all gates."""
    count = len(features)

    def function(*inputs: Tensor) -> list[Tensor]:
        return gate(inputs[:count], inputs[count:])

    inputs = [*features, *gates]
    found = differentiate(function, inputs, grads)
    return [dense_as(x, dx) for x, dx in zip(inputs, found, strict=True)]
