"""A small call of ``light_attention`` for the self-check."""

from typing import Any

import torch


def example(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the public function: a training step with every term present."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    channels, hidden = 8, 2
    mlp = ((hidden, channels), (hidden,), (3 * channels, hidden), (3 * channels,))
    return {
        "x": random(3, channels, 7, 7),
        "p": random(3, channels, 7, 7),
        "state": random(2, 3, channels),
        "cell_params": [random(*shape) for shape in mlp + mlp],
        "q_weight": random(1, 1, 3),
        "k_weight": random(1, 1, 3),
        "v_weight": random(channels, 1, 3, 3),
        "prev_weight": random(channels, 1, 3, 3),
        "lam": random(channels),
        "norm_weight": random(channels),
        "norm_bias": random(channels),
        "branch_weight": random(channels),
        "branch_bias": random(channels),
        "mean_in": None,
        "var_in": None,
        "branch_mean_in": None,
        "branch_var_in": None,
        "drop_scale": random(3),
        "cell": "dsu_split",
        "activation": "sigmoid",
        "gate": "identity",
        "context": "per_sample",
        "head_dim": 4,
        "norm": "batch",
        "eps": 1e-5,
        "residual": True,
        "join": True,
        "branch_norm": "batch",
        "branch_eps": 1e-5,
        "return_o": True,
    }
