"""A small call of ``residual_gate`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function."""
    return {
        "u": torch.randn(2, 8, 7, 7, device=device),
        "h": torch.randn(2, 8, device=device),
        "shortcut": torch.randn(2, 8, 7, 7, device=device),
    }
