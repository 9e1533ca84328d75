"""Channel gates for many features at once in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor


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
