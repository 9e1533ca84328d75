"""A small call of ``global_pool`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function."""
    return {"x": torch.randn(2, 8, 7, 7, device=device)}
