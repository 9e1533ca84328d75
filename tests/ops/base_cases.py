"""Cases of ``base_attention``: one description, from which tensors and flags are made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from light_cases import SLOTS, cell_params
from op_cases import compute_dtype, feature, label, random_small

OUTPUTS = (
    "out", "v", "state", "keys", "gates", "pooled", "scores", "mean", "var", "pooled_x",
)  # fmt: skip
CONSTANT = ("mean_in", "var_in", "drop_scale")  # never differentiated


@dataclass(frozen=True)
class Case:
    """The default is a training step of the third layer of an official CIFAR model's stage."""

    shape: tuple[int, int, int, int] = (2, 6, 5, 4)
    layers: int = 2  # before this one
    head_dim: int = 3
    kernel: int = 3  # of the convolutions over the channels
    hidden: int = 3
    dtype: torch.dtype = torch.float32
    x_layout: str = "nchw"
    value_layout: str = "nchw"
    grad_layout: str = "nchw"
    cell: str = "dsu_split"
    activation: str = "sigmoid"
    gate: str = "identity"
    context: str = "per_sample"
    gated: str = "projections"
    norm: str = "batch"
    affine: bool = True
    relu: bool = True
    residual: bool = True
    return_v: bool = True
    drop: str = "none"  # none, some (a zero among the scales), all (zeros only)
    arrives: tuple[str, ...] = OUTPUTS[:6]  # where gradients come from
    wants: tuple[str, ...] | None = None  # inputs to differentiate; None: all

    @property
    def eps(self) -> float:
        """As of the cases of light_attention: no tiny variance among a few values."""
        batch, _, height, width = self.shape
        return 1e-5 if batch > 1 and height * width >= 16 else 0.3

    def __str__(self) -> str:
        """What differs from the default, for names of tests."""
        named = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return " ".join(label(name, value) for name, value, default in named if value != default)

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

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
        return {
            "cell": self.cell, "activation": self.activation, "gate": self.gate,
            "context": self.context, "gated": self.gated, "head_dim": self.head_dim,
            "norm": self.norm, "eps": self.eps, "relu": self.relu, "residual": self.residual,
            "return_v": self.return_v,
        }  # fmt: skip

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """All tensor arguments in the op's order."""
        batch, channels = self.shape[:2]
        like = {"dtype": compute_dtype(self.dtype)}
        dynamic, features = self.cell != "none", self.gated == "features"

        def small(*shape: int, scale: float = 1.0) -> Tensor:
            return random_small(*shape, generator=generator, scale=scale, **like)

        def many(count: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
            return [small(*shape, scale=scale) for _ in range(count)]

        def drop_scale() -> Tensor | None:
            if self.drop == "none":
                return None
            scale = torch.full((batch,), 0.0 if self.drop == "all" else 1.25, **like)
            scale[1::2] = 0.0
            return scale

        def map_(layout: str) -> Tensor:
            return feature(self.shape, self.dtype, layout, generator=generator)

        normed, running = self.norm != "none" and self.affine, self.norm == "running"
        filter_shape = (1, 1, self.kernel)
        return {
            "x": map_(self.x_layout),
            "values": [map_(self.value_layout) for _ in range(self.layers)],
            "state": small(SLOTS[self.cell], batch, channels),
            "keys": small(0 if features else self.layers, batch, channels),
            "gates": small(self.layers if dynamic else 0, batch, channels).sigmoid(),
            "pooled": many(self.layers if dynamic else 0, batch, channels),
            "cell_params": cell_params(self.cell, channels, self.hidden, generator, **like),
            "q_weight": small(*filter_shape, scale=0.7),
            "k_weight": small(*filter_shape, scale=0.7),
            "key_weights": many(self.layers if features else 0, *filter_shape, scale=0.7),
            "v_weight": small(channels, 1, 3, 3, scale=0.5),
            "norm_weight": 1.0 + small(channels, scale=0.3) if normed else None,
            "norm_bias": small(channels) if normed else None,
            "mean_in": small(channels) if running else None,
            "var_in": small(channels).abs() + 0.5 if running else None,
            "drop_scale": drop_scale(),
        }

    def cotangents(self, generator: torch.Generator) -> dict[int, Tensor]:
        """Gradients arriving at the outputs, by number of the output."""
        batch, channels = self.shape[:2]
        dynamic, features = self.cell != "none", self.gated == "features"
        like = {"dtype": compute_dtype(self.dtype)}

        def map_() -> Tensor:
            return feature(self.shape, self.dtype, self.grad_layout, generator=generator)

        def small(*shape: int) -> Tensor:
            return random_small(*shape, generator=generator, **like)

        made = {
            "out": map_(),
            "v": map_() if self.return_v else None,
            "state": small(SLOTS[self.cell], batch, channels) if dynamic else None,
            "keys": None if features else small(self.layers + 1, batch, channels),
            "gates": small(self.layers + 1, batch, channels) if dynamic else None,
            "pooled": small(batch, channels) if features or (dynamic and self.return_v) else None,
        }
        return {
            number: made[name]
            for number, name in enumerate(OUTPUTS)
            if name in self.arrives and made[name] is not None
        }
