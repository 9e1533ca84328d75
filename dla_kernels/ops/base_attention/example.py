"""A small call of ``base_attention`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function: a training step of the third layer of a stage."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    batch, channels, hidden, earlier = 3, 8, 2, 2
    mlp = ((hidden, channels), (hidden,), (3 * channels, hidden), (3 * channels,))
    return {
        "x": random(batch, channels, 7, 7),
        "values": [random(batch, channels, 7, 7) for _ in range(earlier)],
        "state": random(2, batch, channels),
        "keys": random(earlier, batch, channels),
        "gates": random(earlier, batch, channels),
        "pooled": [random(batch, channels) for _ in range(earlier)],
        "cell_params": [random(*shape) for shape in mlp + mlp],
        "q_weight": random(1, 1, 3),
        "k_weight": random(1, 1, 3),
        "key_weights": [],
        "v_weight": random(channels, 1, 3, 3),
        "norm_weight": random(channels),
        "norm_bias": random(channels),
        "mean_in": None,
        "var_in": None,
        "drop_scale": random(batch),
        "cell": "dsu_split",
        "activation": "sigmoid",
        "gate": "identity",
        "context": "per_sample",
        "gated": "projections",
        "head_dim": 4,
        "norm": "batch",
        "eps": 1e-5,
        "relu": True,
        "residual": True,
        "return_v": True,
    }
