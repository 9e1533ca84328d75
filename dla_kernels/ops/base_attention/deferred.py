"""Gradients of values, summed where they are used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops.step_formulas import scale


class WeightedSum(Tensor):
    """sum_j w_j * g_j of weights [B, C] and maps [B, C, H, W], formed when someone looks.

    A value gets such a term from every later layer. Adding them up as they come costs three maps
    of memory traffic a term; autograd adds these by joining their lists, and the value's own
    backward pass takes all terms at once. As an ordinary gradient, a sum belongs to the backward
    pass that it is made in: nothing is left behind by one that fails or is repeated.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def __new__(cls, terms: Sequence[tuple[Tensor, Tensor]]) -> WeightedSum:
        g = terms[0][1]
        result = Tensor._make_wrapper_subclass(
            cls, g.shape, strides=g.stride(), dtype=g.dtype, device=g.device
        )
        result.terms = tuple(terms)
        return result

    def formed(self) -> Tensor:
        """The sum as a plain tensor, rounded once."""
        products = (scale(w, g.to(w.dtype)) for w, g in self.terms)
        return functools.reduce(torch.add, products).to(self.dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        all_sums = all(isinstance(t, cls) for t in args)
        if all_sums and func is torch.ops.aten.add.Tensor and not kwargs:
            return cls([*args[0].terms, *args[1].terms])
        if all_sums and func is torch.ops.aten.detach.default:
            return cls(args[0].terms)
        if func._schema.is_mutable:
            raise NotImplementedError(
                "the gradient of a value is a sum that is not yet formed and cannot be changed in "
                "place; a hook may return another one, such as grad * 0.5"
            )
        plain = torch.utils._pytree.tree_map_only(cls, cls.formed, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def value_gradient(w: Tensor, g: Tensor, deferred: bool) -> Tensor:
    """w * g of a value: deferred on request, unless g is being traced (Inductor fuses sums)."""
    if deferred and type(g) is Tensor:
        return WeightedSum([(w, g)])
    return scale(w, g.to(w.dtype)).to(g.dtype)
