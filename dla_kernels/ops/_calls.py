"""Calls of an op by their form: whatever depends on that alone is found out once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from dla_kernels import backend, native

Operator = Callable[..., Any]

# The types that arguments of a schema usually have: no subclass of Tensor, no symbolic number, and
# nothing of a wrong type, about which the dispatcher complains.
_TENSOR = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = {
    "Tensor": _TENSOR,
    "Optional[Tensor]": _TENSOR | {type(None)},
    "List[Tensor]": frozenset({list, tuple}),
    "List[int]": frozenset({list, tuple}),
    "str": frozenset({str}),
    "int": frozenset({int, torch.dtype}),  # a ScalarType is said to be an int
    "float": frozenset({int, float}),
    "bool": frozenset({bool}),
}
_OF_TENSORS = ("Tensor", "Optional[Tensor]", "List[Tensor]")
_metadata = attrgetter("shape", "dtype", "device", "layout")
_REMEMBERED = 1024  # forms of an op's calls


class Calls:
    """The function below autograd of one op.

    Args:
        schema: of the op; its tensors, and lists of them, come first.
        check: takes the arguments; raises if they do not fit.
        select: takes the arguments, gives the backend's function that serves them. If it has a
            method ``repeatable``, that takes the arguments and gives their results and a function
            for calls of the same form, or None.
    """

    def __init__(
        self, schema: torch._C.FunctionSchema, check: Operator | None, select: Operator
    ) -> None:
        kinds = [str(argument.type) for argument in schema.arguments]
        self._plain = [_PLAIN[kind] for kind in kinds]
        self._tensors = sum(kind in _OF_TENSORS for kind in kinds)
        self._lists = [i for i, kind in enumerate(kinds) if kind == "List[Tensor]"]
        self._check, self._select = check, select
        self._known: dict[tuple[Any, ...], Operator] = {}
        self._are_plain = functools.lru_cache(_REMEMBERED)(self._are_plain)

    def __call__(self, *args: Any) -> Any:
        return (self.find(args) or self._run)(*args)

    def find(self, args: Sequence[Any]) -> Operator | None:
        """The function that serves ``args``; None where the dispatcher is to look at them first:
        not of the usual types, or tensors that stand for their negatives (as the imaginary part of
        a conjugate does), which it forms."""
        tensors = _forms()(args, self._tensors)
        if tensors is None:
            return None
        numbers = args[self._tensors :]
        form = tensors, numbers, *map(type, numbers), backend.requested()
        return self._known.get(form) or functools.partial(self._first, form)

    def _are_plain(self, types: tuple[type, ...]) -> bool:
        return all(given in plain for given, plain in zip(types, self._plain, strict=True))

    def _run(self, *args: Any) -> Any:
        if self._check is not None:
            self._check(*args)
        return self._serve(*args)

    def _serve(self, *args: Any) -> Any:
        return self._select(*args)(*args)

    def _first(self, form: tuple[Any, ...], *args: Any) -> Any:
        """The first call of a form."""
        if not self._are_plain(tuple(map(type, args))):
            raise TypeError(args)
        if self._check is not None:
            self._check(*args)
        function = self._select(*args)
        again: Operator | None = None
        if hasattr(function, "repeatable"):
            results, again = function.repeatable(*args)
        else:
            results = function(*args)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[form] = again or self._serve
        return results


@functools.cache
def _forms() -> Callable[[tuple[Any, ...], int], Any]:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None or native.error() is not None:
        return _form
    return native.load().Forms(exchange, (Tensor, torch.nn.Parameter))


def _form(args: tuple[Any, ...], count: int) -> tuple[Any, ...] | None:
    tensors = flatten([t for t in args[:count] if t is not None])
    if not _TENSOR.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        return None
    try:
        types = map(type, args[:count])
        lists = [len(value) for value in args[:count] if isinstance(value, list|tuple)]
        return (*types, *lists, *map(_metadata, tensors), *map(Tensor.stride, tensors))
    except RuntimeError:  # no shape or no strides: nested, sparse
        return None


def flatten(values: Sequence[Any]) -> list[Any]:
    """One list of the values and, in their places, of those in lists."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat += value
        else:
            flat.append(value)
    return flat
