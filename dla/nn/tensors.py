"""Tensors of modules, at small cost: a layer asks for two dozen of them in every call."""

import torch
from torch import Tensor, nn


def parameter(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor | None:
    """The attribute, in ``dtype``. If it is a plain parameter (not parametrized, say), without the
    search that nn.Module adds to every access, which takes a microsecond."""
    found = module._parameters.get(name)
    if found is None:
        found = getattr(module, name)
    return cast(found, dtype)


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` in ``dtype``, without a call where it is already."""
    return x if x is None or x.dtype == dtype else x.to(dtype)
