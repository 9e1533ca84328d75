"""Cases of ``base_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from op_cases import compute_dtype, feature, random_small
from step_cases import SLOTS, StepCase, cell_params


@dataclass(frozen=True)
class Case(StepCase):
    """The default is a training step of the third layer of an official CIFAR model's stage."""

    op = "base_attention"
    outputs = (
        "out", "v", "state", "keys", "gates", "pooled", "scores", "mean", "var", "pooled_x",
    )  # fmt: skip
    constant = ("mean_in", "var_in", "drop_scale")

    arrives: tuple[str, ...] = outputs[:6]
    value_layout: str = "nchw"
    layers: int = 2  # before this one
    gated: str = "projections"
    relu: bool = True
    return_v: bool = True

    @property
    def valid(self) -> bool:
        """Whether the op is defined for this combination, and can be compared.

        A batch norm makes any two values -1 and 1: all gradients before it are rounding noise, as
        is everything where all values are the same.
        """
        batch, channels, height, width = self.shape
        values = height * width if self.x_layout == "expanded" else batch * height * width
        statistics_exist = self.norm != "batch" or values > 2
        static_form = self.cell != "none" or self.gated == "projections"
        return channels % self.head_dim == 0 and statistics_exist and static_form

    def flags(self) -> dict[str, Any]:
        return super().flags() | {
            "gated": self.gated, "relu": self.relu, "return_v": self.return_v,
        }  # fmt: skip

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """All tensor arguments in the op's order."""
        batch, channels = self.shape[:2]
        dynamic, features = self.cell != "none", self.gated == "features"
        like = {"generator": generator, "dtype": compute_dtype(self.dtype)}
        small = partial(random_small, **like)
        map_ = partial(feature, self.shape, self.dtype, generator=generator)

        def many(count: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
            return [small(*shape, scale=scale) for _ in range(count)]

        filter_shape = (1, 1, self.kernel)
        made = {
            "x": map_(self.x_layout),
            "values": [map_(self.value_layout) for _ in range(self.layers)],
            "state": small(SLOTS[self.cell], batch, channels),
            "keys": small(0 if features else self.layers, batch, channels),
            "gates": small(self.layers if dynamic else 0, batch, channels).sigmoid(),
            "pooled": many(self.layers if dynamic else 0, batch, channels),
            "cell_params": cell_params(self.cell, channels, self.hidden, **like),
            "q_weight": small(*filter_shape, scale=0.7),
            "k_weight": small(*filter_shape, scale=0.7),
            "key_weights": many(self.layers if features else 0, *filter_shape, scale=0.7),
            "v_weight": small(channels, 1, 3, 3, scale=0.5),
        }
        made["norm_weight"], made["norm_bias"] = self.affine_of(self.norm, small)
        made["mean_in"], made["var_in"] = self.statistics_of(self.norm, small)
        return {**made, "drop_scale": self.drop_scale()}

    def cotangents(self, generator: torch.Generator) -> dict[int, Tensor]:
        """Gradients arriving at the outputs, by number of the output."""
        batch, channels = self.shape[:2]
        dynamic, features = self.cell != "none", self.gated == "features"
        small = partial(random_small, generator=generator, dtype=compute_dtype(self.dtype))
        map_ = partial(feature, self.shape, self.dtype, self.grad_layout, generator=generator)
        has_pooled = features or (dynamic and self.return_v)
        return self.arriving(
            {
                "out": map_(),
                "v": map_() if self.return_v else None,
                "state": small(SLOTS[self.cell], batch, channels) if dynamic else None,
                "keys": None if features else small(self.layers + 1, batch, channels),
                "gates": small(self.layers + 1, batch, channels) if dynamic else None,
                "pooled": small(batch, channels) if has_pooled else None,
            }
        )
