"""Cases of ``light_attention``."""

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
    """The default is a training step of the first layers of an official CIFAR model."""

    op = "light_attention"
    outputs = ("out", "o", "state", "mean", "var", "branch_mean", "branch_var", "summary")
    constant = ("mean_in", "var_in", "branch_mean_in", "branch_var_in", "drop_scale")

    arrives: tuple[str, ...] = outputs[:3]
    p_layout: str = "nchw"
    join: bool = False
    branch_norm: str = "none"
    return_o: bool = False
    has_p: bool = True
    has_prev: bool = True

    @property
    def valid(self) -> bool:
        """Whether the op is defined for this combination, and can be compared.

        A batch norm makes any two values -1 and 1: all gradients before it are rounding noise. The
        same goes for values that are equal in pairs, as in a batch of one expanded sample.
        """
        batch, channels, height, width = self.shape
        statistics_exist = (
            "batch" not in (self.norm, self.branch_norm) or batch * height * width > 2
        )
        equal = self.x_layout == "expanded" and self.branch_norm == "batch" and height * width <= 2
        return (
            channels % self.head_dim == 0
            and not equal
            and statistics_exist
            and (self.has_p or not (self.has_prev or self.join))
            and (self.join or self.branch_norm == "none")
        )

    def flags(self) -> dict[str, Any]:
        return super().flags() | {
            "join": self.join, "branch_norm": self.branch_norm, "branch_eps": self.eps,
            "return_o": self.return_o,
        }  # fmt: skip

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """All tensor arguments in the op's order."""
        batch, channels = self.shape[:2]
        like = {"generator": generator, "dtype": compute_dtype(self.dtype)}
        small = partial(random_small, **like)
        map_ = partial(feature, self.shape, self.dtype, generator=generator)
        made = {
            "x": map_(self.x_layout),
            "p": map_(self.p_layout) if self.has_p else None,
            "state": small(SLOTS[self.cell], batch, channels),
            "cell_params": cell_params(self.cell, channels, self.hidden, **like),
            "q_weight": small(1, 1, self.kernel, scale=0.7),
            "k_weight": small(1, 1, self.kernel, scale=0.7),
            "v_weight": small(channels, 1, 3, 3, scale=0.5),
            "prev_weight": small(channels, 1, 3, 3, scale=0.5) if self.has_prev else None,
            "lam": small(channels),
        }
        made["norm_weight"], made["norm_bias"] = self.affine_of(self.norm, small)
        made["branch_weight"], made["branch_bias"] = self.affine_of(self.branch_norm, small)
        made["mean_in"], made["var_in"] = self.statistics_of(self.norm, small)
        made["branch_mean_in"], made["branch_var_in"] = self.statistics_of(self.branch_norm, small)
        return {**made, "drop_scale": self.drop_scale()}

    def cotangents(self, generator: torch.Generator) -> dict[int, Tensor]:
        """Gradients arriving at the outputs, by number of the output."""
        like = {"generator": generator, "dtype": compute_dtype(self.dtype)}
        map_ = partial(feature, self.shape, self.dtype, self.grad_layout, generator=generator)
        slots = SLOTS[self.cell]
        return self.arriving(
            {
                "out": map_(),
                "state": random_small(slots, *self.shape[:2], **like) if slots else None,
                "o": map_() if self.return_o else None,
            }
        )
