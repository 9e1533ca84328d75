"""A call of a native function, made again with other tensors of the same form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_kernels.ops._calls import flatten
from dla_kernels.ops.cpp_common import execution


class Repeat:
    """Numbers and flags stay; the tensors among the arguments are the op's own, which come anew,
    and its results, which are allocated anew."""

    def __init__(
        self,
        function: Callable[..., object],
        constants: dict[str, Any],
        given: list[tuple[str, int]],
        made: list[tuple[str, int | slice]],
        makers: list[Callable[[], Tensor | None]],
        kind: type,
    ) -> None:
        self._function, self._constants = function, constants
        self._given, self._made = given, made
        self._makers, self._kind = makers, kind

    @classmethod
    def of(
        cls,
        function: Callable[..., object],
        arguments: dict[str, Any],
        args: Sequence[Any],
        results: Sequence[Tensor | None],
    ) -> Repeat | None:
        key = lambda v: tuple(map(id, v)) if isinstance(v, (list, tuple)) else id(v)
        tensors = [id(t) for t in flatten(args) if isinstance(t, Tensor)]
        if len(set(tensors)) < len(tensors):
            return None
        own = {id(t): index for index, t in enumerate(results) if t is not None}
        where = {key(v): index for index, v in enumerate(args) if isinstance(v, (Tensor, list, tuple))}
        constants, given, made = {}, [], []
        for name, value in arguments.items():
            if not isinstance(value, (Tensor, list)):
                constants[name] = value
            elif key(value) in where:
                given.append((name, where[key(value)]))
            elif isinstance(value, Tensor) and id(value) in own:
                made.append((name, own[id(value)]))
            elif isinstance(value, list) and value and id(value[0]) in own:
                first = own[id(value[0])]
                made.append((name, slice(first, first + len(value))))
            else:
                return None
        makers = [
            type(None) if t is None else functools.partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in results
        ]
        return cls(function, constants, given, made, makers, type(results))

    def __call__(self, *args: Any) -> Any:
        results = [make() for make in self._makers]
        arguments = {**self._constants, **execution(args[0])}
        for name, index in self._given:
            arguments[name] = args[index]
        for name, index in self._made:
            arguments[name] = results[index]
        self._function(**arguments)
        return self._kind(results)
