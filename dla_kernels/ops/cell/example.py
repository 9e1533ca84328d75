"""A small call of ``cell`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function: the cell of the paper, 8 channels, reduction 4."""
    shapes = ((2, 16), (24, 2), (24,))
    return {
        "y": torch.randn(3, 8, device=device),
        "state": torch.randn(1, 3, 8, device=device),
        "params": [torch.randn(shape, device=device) for shape in shapes],
        "kind": "dsu",
    }
