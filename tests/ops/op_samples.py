"""A few typical calls of every op, for the promises that all ops make alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import base_cases
import dla_kernels
import light_cases
from op_cases import compute_dtype, feature, random_small
from step_cases import SLOTS, StepCase, cell_params

Shape = tuple[int, int, int, int]
SMALL: Shape = (2, 4, 3, 5)  # for gradcheck
MEDIUM: Shape = (3, 33, 17, 19)  # enough work to be cut into blocks, in no multiple of anything


@dataclass
class Call:
    """One call of an op: inputs in order, flags, and the gradients that arrive at its outputs."""

    function: Callable[..., Any]
    inputs: dict[str, Any]
    cotangents: dict[int, Tensor]
    flags: dict[str, Any]
    constant: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``op_cases.run``."""
        return {"constant": self.constant, **self.flags}


Make = Callable[[Shape, torch.dtype, str, torch.Generator], Call]


def global_pool(shape: Shape, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Call:
    grad = random_small(*shape[:2], generator=generator, dtype=compute_dtype(dtype))
    x = feature(shape, dtype, layout, generator=generator)
    return Call(dla_kernels.global_pool, {"x": x}, {0: grad}, {})


def cell(kind: str, slots: int) -> Make:
    def make(shape: Shape, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Call:
        batch, channels = shape[:2]
        like = {"generator": generator, "dtype": compute_dtype(dtype)}
        inputs = {
            "y": random_small(batch, channels, **like),
            "state": random_small(slots, batch, channels, **like),
            "params": cell_params(kind, channels, max(1, channels // 4), **like),
        }
        grad = random_small(slots, batch, channels, **like)
        return Call(dla_kernels.cell, inputs, {0: grad}, {"kind": kind, "activation": "tanh"})

    return make


def gate(shape: Shape, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Call:
    batch, channels, height, width = shape
    shapes = [shape, (batch, channels + 1, 2, 2), (batch, channels, height + 1, width)]

    def maps() -> list[Tensor]:
        return [feature(s, dtype, layout, generator=generator) for s in shapes]

    like = {"generator": generator, "dtype": compute_dtype(dtype)}
    gates = [random_small(*s[:2], **like) for s in shapes]
    return Call(dla_kernels.gate, {"features": maps(), "gates": gates}, dict(enumerate(maps())), {})


def residual_gate(
    shape: Shape, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> Call:
    u, shortcut, grad = (feature(shape, dtype, layout, generator=generator) for _ in range(3))
    h = random_small(*shape[:2], generator=generator, dtype=compute_dtype(dtype))
    inputs = {"u": u, "h": h, "shortcut": shortcut}
    return Call(dla_kernels.residual_gate, inputs, {0: grad}, {})


def residual_norm(norm: str) -> Make:
    def make(shape: Shape, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Call:
        x, shortcut, grad = (feature(shape, dtype, layout, generator=generator) for _ in range(3))
        like = {"generator": generator, "dtype": compute_dtype(dtype)}
        weight, bias, mean = (random_small(shape[1], **like) for _ in range(3))
        var = random_small(shape[1], **like).abs() + 0.5
        inputs = {"x": x, "shortcut": shortcut, "weight": weight, "bias": bias}
        constant = {"mean_in": mean, "var_in": var} if norm == "running" else {}
        flags = {"norm": norm}
        return Call(dla_kernels.residual_norm, inputs | constant, {0: grad}, flags, tuple(constant))

    return make


def step(kind: type[StepCase], **changes: Any) -> Make:
    def make(shape: Shape, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Call:
        channels = shape[1]
        heads = 3 if channels % 3 == 0 else 2
        sizes = {"head_dim": channels // heads, "hidden": max(1, channels // 4)}
        case = kind(shape=shape, dtype=dtype, **sizes, **changes).in_layout(layout)
        return Call(
            getattr(dla_kernels, case.op),
            case.inputs(generator),
            case.cotangents(generator),
            case.flags(),
            case.constant,
        )

    return make


light_attention = partial(step, light_cases.Case)
base_attention = partial(step, base_cases.Case)

# op -> variant -> how to make a call
SAMPLES: dict[str, dict[str, Make]] = {
    "global_pool": {"": global_pool},
    "cell": {kind: cell(kind, slots) for kind, slots in SLOTS.items() if kind != "none"},
    "gate": {"": gate},
    "residual_gate": {"": residual_gate},
    "residual_norm": {norm: residual_norm(norm) for norm in ("batch", "running")},
    "light_attention": {
        "official": light_attention(drop="some"),
        "paper": light_attention(cell="dsu", has_prev=False, return_o=True),
        "first_layer": light_attention(cell="dsu", has_p=False, has_prev=False, return_o=True),
        "evaluation": light_attention(
            norm="running", context="first_sample", join=True, branch_norm="running"
        ),
        "static": light_attention(cell="none", has_prev=False),
        "whole_block": light_attention(join=True, branch_norm="batch"),
        "own_norm": light_attention(cell="dsu", gate="sigmoid", norm="none", residual=False),
    },
    "base_attention": {
        "official": base_attention(drop="some"),
        "paper": base_attention(cell="dsu", gated="features"),
        "first_layer": base_attention(layers=0),
        "last_layer": base_attention(return_v=False, arrives=("out",)),
        "evaluation": base_attention(norm="running", context="first_sample"),
        "static": base_attention(cell="none"),
        "own_norm": base_attention(
            cell="dsu", gate="sigmoid", norm="none", relu=False, residual=False
        ),
    },
}

NAMES = [(op, variant) for op, variants in SAMPLES.items() for variant in variants]


def sample(
    op: str,
    variant: str,
    shape: Shape = MEDIUM,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    seed: int = 0,
) -> Call:
    """The same call every time."""
    return SAMPLES[op][variant](shape, dtype, layout, torch.Generator().manual_seed(seed))
