"""A small call of ``gate`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function: two maps of different sizes."""
    shapes = ((2, 8, 7, 7), (2, 16, 3, 5))
    return {
        "features": [torch.randn(shape, device=device) for shape in shapes],
        "gates": [torch.randn(shape[:2], device=device) for shape in shapes],
    }
