"""Tensors of modules, at small cost: a layer asks for two dozen of them in every call."""

from typing import Any

import torch
from torch import Tensor, nn


def child(module: nn.Module, name: str) -> Any:
    """The attribute; if it is a module, without the search that nn.Module adds to every access."""
    found = module._modules.get(name)
    return getattr(module, name) if found is None else found


def parameter(module: nn.Module, name: str, dtype: torch.dtype | None) -> Tensor | None:
    """The attribute, in ``dtype`` (None: its own). If it is a plain parameter (not parametrized,
    say), without the search that nn.Module adds to every access, which takes a microsecond. If it
    is none, hooks may have to make it (torch.nn.utils.prune, weight_norm), since nobody calls the
    module."""
    found = module._parameters.get(name)
    if found is not None and (dtype is None or found.dtype == dtype):
        return found
    if name not in module._parameters:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
    return cast(getattr(module, name), dtype)


def cast(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """``x`` in ``dtype``, without a call where it is already or none is asked for."""
    return x if x is None or dtype is None or x.dtype == dtype else x.to(dtype)
