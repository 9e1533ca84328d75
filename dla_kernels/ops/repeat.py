"""Calls of a native function that differ in their tensors, but not in the form of these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels import native
from dla_kernels.ops._calls import flatten

Results = Sequence[Tensor | None]


def repeat(
    function: str, arguments: dict[str, Any], args: Sequence[Any], results: Results
) -> Callable[..., Results] | None:
    """What an op does by calling a native function, in a fraction of the time that it takes to find
    out the function's arguments.

    Args:
        function: of the CPU kernels.
        arguments: of one call. Tensors and lists of tensors among them are arguments or results of
            the op; everything else is the same in every call.
        args, results: those of the op in this call; no tensor twice.

    Returns:
        The op for arguments of the same form as ``args``. None if a tensor is neither argument nor
        result (a dense copy, say).
    """
    places = {_identity(value): place for place, value in enumerate(args)}
    made = {id(t): place for place, t in enumerate(results)}
    constants, from_args, from_results = {}, [], []
    for name, value in arguments.items():
        if not isinstance(value, Tensor | list):
            constants[name] = value
        elif _identity(value) in places:
            from_args.append((name, places[_identity(value)]))
        elif all(id(t) in made for t in flatten([value])):
            place = [made[id(t)] for t in value] if isinstance(value, list) else made[id(value)]
            from_results.append((name, place))
        else:
            return None
    call = getattr(native.load(), f"repeat_{function}")(constants, from_args, from_results)
    allocations = [type(None) if t is None else _allocation(t) for t in results]
    kind = type(results)

    def again(*args: Any) -> Results:
        results = [allocate() for allocate in allocations]
        call(args, results)
        return kind(results)

    return again


def _identity(value: Any) -> Any:
    return tuple(map(id, value)) if isinstance(value, list | tuple) else id(value)


def _allocation(like: Tensor) -> Callable[[], Tensor]:
    return functools.partial(
        torch.empty_strided, like.shape, like.stride(), dtype=like.dtype, device=like.device
    )
