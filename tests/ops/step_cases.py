"""What the cases of ``light_attention`` and ``base_attention``, the steps of a layer, share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from op_cases import assert_dense, compare, compute_dtype, label, random_small

AnyCase = TypeVar("AnyCase", bound="StepCase")
# Slots of the state of each kind of cell.
SLOTS = {"none": 0, "dsu": 1, "dsu_split": 2, "dia": 2, "lstm": 2, "rnn": 1}


@dataclass(frozen=True)
class StepCase:
    """One description, from which tensors and flags are made; a step's own adds ``valid``,
    ``inputs`` and ``cotangents``."""

    op: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]  # the first two are maps
    constant: ClassVar[tuple[str, ...]]  # inputs that are never differentiated

    shape: tuple[int, int, int, int] = (2, 6, 5, 4)
    head_dim: int = 3
    kernel: int = 3  # of the convolutions over the channels
    hidden: int = 3
    dtype: torch.dtype = torch.float32
    x_layout: str = "nchw"
    grad_layout: str = "nchw"
    cell: str = "dsu_split"
    activation: str = "sigmoid"
    gate: str = "identity"
    context: str = "per_sample"
    norm: str = "batch"
    affine: bool = True
    residual: bool = True
    drop: str = "none"  # none, some (a zero among the scales), all (zeros only)
    arrives: tuple[str, ...] = ()  # where gradients come from
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

    def with_(self: AnyCase, where: tuple[Any, ...] | None = None, **changes: Any) -> AnyCase:
        """where: shape, head_dim, kernel and hidden in one."""
        if where is not None:
            changes |= zip(("shape", "head_dim", "kernel", "hidden"), where, strict=True)
        return replace(self, **changes)

    def in_layout(self: AnyCase, layout: str) -> AnyCase:
        """All maps in the same."""
        names = [f.name for f in fields(self) if f.name.endswith("_layout")]
        return replace(self, **dict.fromkeys(names, layout))

    def flags(self) -> dict[str, Any]:
        """Those that both steps have."""
        names = "cell", "activation", "gate", "context", "head_dim", "norm", "eps", "residual"
        return {name: getattr(self, name) for name in names}

    def affine_of(
        self, norm: str, small: Callable[..., Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a norm; ``small`` makes random tensors."""
        if norm == "none" or not self.affine:
            return None, None
        channels = self.shape[1]
        return 1.0 + small(channels, scale=0.3), small(channels)

    def statistics_of(
        self, norm: str, small: Callable[..., Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Running mean and variance for a norm; ``small`` makes random tensors."""
        if norm != "running":
            return None, None
        channels = self.shape[1]
        return small(channels), small(channels).abs() + 0.5

    def drop_scale(self) -> Tensor | None:
        if self.drop == "none":
            return None
        scale = torch.full((self.shape[0],), 0.0 if self.drop == "all" else 1.25)
        scale[1::2] = 0.0
        return scale.to(compute_dtype(self.dtype))

    def arriving(self, gradients: dict[str, Tensor | None]) -> dict[int, Tensor]:
        """Those of the gradients that arrive, by number of the output."""
        return {
            number: gradients[name]
            for number, name in enumerate(self.outputs)
            if name in self.arrives and gradients[name] is not None
        }

    def arguments(self, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs and flags but for the changes; a callable changes the good one."""
        inputs, flags = self.inputs(torch.Generator().manual_seed(0)), self.flags()
        for name, change in changes.items():
            target = inputs if name in inputs else flags
            target[name] = change(target[name]) if callable(change) else change
        return tuple(inputs.values()), flags


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


def check(backend: str, case: StepCase) -> None:
    """Forward and gradients against the reference; dtypes and formats of all results."""
    generator = torch.Generator().manual_seed(sum(case.shape))
    inputs = case.inputs(generator)
    cotangents = case.cotangents(generator)
    outputs, gradients = compare(
        case.op,
        backend,
        inputs,
        cotangents,
        case=case.dtype,
        names=case.outputs,
        key=case,
        constant=case.constant,
        wants=case.wants,
        **case.flags(),
    )
    for name, output in zip(case.outputs, outputs, strict=True):
        is_map = name in case.outputs[:2]
        assert output.dtype == (case.dtype if is_map else compute_dtype(case.dtype)), name
        if is_map and output.numel():
            assert_dense(output, case.x_layout, name)
    if gradients.get("x") is not None:
        assert_dense(gradients["x"], case.x_layout, "gradient of x")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# What both steps refuse (B = 2, C = 6, H = 5, W = 4, heads of 3), and words of the error.
BAD: dict[str, tuple[Any, ...]] = {
    "x missing": ({"x": None}, "x", "Tensor", "None"),
    "x's rank": ({"x": zeros(2, 6, 5)}, "x", "B, C, H, W", "2, 6, 5"),
    "state's slots": ({"state": zeros(1, 2, 6)}, "state", "2, 2, 6", "1, 2, 6"),
    "number of params": ({"cell_params": lambda p: p[:3]}, "cell_params", "8", "3"),
    "q's length": ({"q_weight": zeros(1, 1, 4)}, "q_weight", "odd", "4"),
    "k unlike q": ({"k_weight": zeros(1, 1, 5)}, "k_weight", "1, 1, 3", "1, 1, 5"),
    "v's shape": ({"v_weight": zeros(6, 6, 3, 3)}, "v_weight", "6, 1, 3, 3", "6, 6, 3, 3"),
    "weight without bias": ({"norm_bias": None}, "norm_bias", "norm_weight"),
    "weight without norm": ({"norm": "none"}, "norm_weight", "None", "norm='none'", "float32 [6]"),
    "no running mean": ({"mean_in": None}, "mean_in", "running"),
    "drop path's batch": ({"drop_scale": zeros(3)}, "drop_scale", "2", "3"),
    "heads": ({"head_dim": 4}, "head_dim", "6", "4"),
    "cell": ({"cell": "gru"}, "cell", "dsu_split", "gru"),
    "gate": ({"gate": "softmax"}, "gate", "identity", "softmax"),
    "context": ({"context": "batch"}, "context", "per_sample", "batch"),
    "norm": ({"norm": "layer"}, "norm", "running", "layer"),
    "eps": ({"eps": -1.0}, "eps", "-1"),
    "eps NaN": ({"eps": float("nan")}, "eps", "at least 0", "nan"),
}
