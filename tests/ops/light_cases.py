"""Cases of ``light_attention``: one description, from which tensors and flags are made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from op_cases import compute_dtype, feature, label, random_small

# Slots of the state of each kind of cell.
SLOTS = {"none": 0, "dsu": 1, "dsu_split": 2, "dia": 2, "lstm": 2, "rnn": 1}
OUTPUTS = ("out", "o", "state", "mean", "var", "branch_mean", "branch_var", "summary")
# Never differentiated.
CONSTANT = ("mean_in", "var_in", "branch_mean_in", "branch_var_in", "drop_scale")


@dataclass(frozen=True)
class Case:
    """The default is a training step of the first layers of an official CIFAR model."""

    shape: tuple[int, int, int, int] = (2, 6, 5, 4)
    head_dim: int = 3
    kernel: int = 3  # of the convolutions over the channels
    hidden: int = 3
    dtype: torch.dtype = torch.float32
    x_layout: str = "nchw"
    p_layout: str = "nchw"
    grad_layout: str = "nchw"
    cell: str = "dsu_split"
    activation: str = "sigmoid"
    gate: str = "identity"
    context: str = "per_sample"
    norm: str = "batch"
    affine: bool = True
    residual: bool = True
    join: bool = False
    branch_norm: str = "none"
    return_o: bool = False
    has_p: bool = True
    has_prev: bool = True
    drop: str = "none"  # none, some (a zero among the scales), all (zeros only)
    arrives: tuple[str, ...] = ("out", "o", "state")  # where gradients come from
    wants: tuple[str, ...] | None = None  # inputs to differentiate; None: all

    @property
    def eps(self) -> float:
        """Few values per channel leave next to no variance of some kind, and the gradient is then
        a small difference of large numbers: a larger eps keeps such a case meaningful."""
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
        return {
            "cell": self.cell, "activation": self.activation, "gate": self.gate,
            "context": self.context, "head_dim": self.head_dim, "norm": self.norm,
            "eps": self.eps, "residual": self.residual, "join": self.join,
            "branch_norm": self.branch_norm, "branch_eps": self.eps, "return_o": self.return_o,
        }  # fmt: skip

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """All tensor arguments in the op's order."""
        channels = self.shape[1]
        like = {"dtype": compute_dtype(self.dtype)}

        def small(*shape: int, scale: float = 1.0) -> Tensor:
            return random_small(*shape, generator=generator, scale=scale, **like)

        def drop_scale() -> Tensor | None:
            if self.drop == "none":
                return None
            scale = torch.full((self.shape[0],), 0.0 if self.drop == "all" else 1.25, **like)
            scale[1::2] = 0.0
            return scale

        def map_(layout: str) -> Tensor:
            return feature(self.shape, self.dtype, layout, generator=generator)

        def affine(norm: str) -> tuple[Tensor | None, Tensor | None]:
            if norm == "none" or not self.affine:
                return None, None
            return 1.0 + small(channels, scale=0.3), small(channels)

        def statistics(norm: str) -> tuple[Tensor | None, Tensor | None]:
            if norm != "running":
                return None, None
            return small(channels), small(channels).abs() + 0.5

        slots = SLOTS[self.cell]
        made = {
            "x": map_(self.x_layout),
            "p": map_(self.p_layout) if self.has_p else None,
            "state": small(slots, self.shape[0], channels),
            "cell_params": cell_params(self.cell, channels, self.hidden, generator, **like),
            "q_weight": small(1, 1, self.kernel, scale=0.7),
            "k_weight": small(1, 1, self.kernel, scale=0.7),
            "v_weight": small(channels, 1, 3, 3, scale=0.5),
            "prev_weight": small(channels, 1, 3, 3, scale=0.5) if self.has_prev else None,
            "lam": small(channels),
        }
        made["norm_weight"], made["norm_bias"] = affine(self.norm)
        made["branch_weight"], made["branch_bias"] = affine(self.branch_norm)
        made["mean_in"], made["var_in"] = statistics(self.norm)
        made["branch_mean_in"], made["branch_var_in"] = statistics(self.branch_norm)
        return {**made, "drop_scale": drop_scale()}

    def cotangents(self, generator: torch.Generator) -> dict[int, Tensor]:
        """Gradients arriving at the outputs, by number of the output."""
        slots = SLOTS[self.cell]
        state = (slots, *self.shape[:2])
        like = {"dtype": compute_dtype(self.dtype)}
        made = {
            "out": feature(self.shape, self.dtype, self.grad_layout, generator=generator),
            "state": random_small(*state, generator=generator, **like) if slots else None,
            "o": feature(self.shape, self.dtype, self.grad_layout, generator=generator)
            if self.return_o
            else None,
        }
        return {
            number: made[name]
            for number, name in enumerate(OUTPUTS)
            if name in self.arrives and made[name] is not None
        }


def cell_params(
    kind: str, channels: int, hidden: int, generator: torch.Generator, **like: Any
) -> list[Tensor]:
    """Random parameters of a cell, scaled so that no gate saturates."""
    c, h = channels, hidden
    shapes: dict[str, list[tuple[int, ...]]] = {
        "none": [],
        "dsu": [(h, 2 * c), (3 * c, h), (3 * c,)],
        "dsu_split": [(h, c), (h,), (3 * c, h), (3 * c,)] * 2,
        "dia": [(h, c), (h,), (4 * c, h), (4 * c,)] * 2,
        "lstm": [(4 * c, c), (4 * c, c), (4 * c,), (4 * c,)],
        "rnn": [(c, c), (c, c), (c,), (c,)],
    }
    return [
        random_small(*shape, generator=generator, scale=shape[-1] ** -0.5, **like)
        if len(shape) == 2
        else random_small(*shape, generator=generator, scale=0.5, **like)
        for shape in shapes[kind]
    ]
