"""A small call of ``residual_norm`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function."""
    return {
        "x": torch.randn(2, 8, 7, 7, device=device),
        "shortcut": torch.randn(2, 8, 7, 7, device=device),
        "weight": torch.randn(8, device=device),
        "bias": torch.randn(8, device=device),
    }
