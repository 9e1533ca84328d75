"""Calls of an op by the form of their arguments: what depends on that alone is found out once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import _C, Tensor, get_num_threads

from dla_kernels import backend, native
from dla_kernels.ops.common import describe

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
_SINGLE = _TENSOR | {type(None)}
_metadata = attrgetter("shape", "dtype", "device")
_REMEMBERED = 1024  # forms of an op's calls


class Calls:
    """What an op does below autograd.

    Args:
        schema: of the op; its tensors, and lists of them, come first.
        check: takes the arguments; raises if they do not fit. May look at the shape, dtype, device
            and layout of tensors only.
        select: takes the arguments, gives the function of a backend that serves them. Its method
            ``prepare``, if it has one, takes them too and gives a function for all arguments of
            their form, or None.
    """

    def __init__(self, schema: _C.FunctionSchema, check: Operator, select: Operator) -> None:
        kinds = [str(argument.type) for argument in schema.arguments]
        self._plain = [_PLAIN[kind] for kind in kinds]
        self.tensors = sum(kind in _OF_TENSORS for kind in kinds)
        self._has_int_lists = "List[int]" in kinds
        self._check, self._select = check, select
        self._known: dict[tuple[Any, ...], Operator] = {}

    def __call__(self, *args: Any) -> Any:
        return (self.find(args) or self._serve_checked)(*args)

    def find(self, args: tuple[Any, ...]) -> Operator | None:
        """The function that serves ``args``; None where the dispatcher is to look at them first:
        not of the usual types, or tensors that stand for their negatives (as the imaginary part of
        a conjugate does), which it forms."""
        tensors = _form_of_tensors()(args, self.tensors)
        if tensors is None:
            return None
        if not tensors:
            return self._serve_formless if self._are_plain(args) else None
        rest = args[self.tensors :]
        if self._has_int_lists:
            rest = tuple(tuple(value) if isinstance(value, list) else value for value in rest)
        # types: 1, 1.0 and True are equal, but not all the same to a schema.
        form = tensors, rest, *map(type, rest), backend.requested(), get_num_threads()
        try:
            known = self._known.get(form)
        except TypeError:  # not hashable, hence none of the usual types
            return None
        if known is None and self._are_plain(args):
            known = functools.partial(self._first, form)
        return known

    def _are_plain(self, args: tuple[Any, ...]) -> bool:
        return all(type(value) in plain for value, plain in zip(args, self._plain, strict=True))

    def _first(self, form: tuple[Any, ...], *args: Any) -> Any:
        """The first call of a form."""
        self._check(*args)
        prepare = getattr(self._select(*args), "prepare", None)
        known = (prepare and prepare(*args)) or self._serve
        results = known(*args)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[form] = known
        return results

    def _serve(self, *args: Any) -> Any:
        return self._select(*args)(*args)

    def _serve_checked(self, *args: Any) -> Any:
        self._check(*args)
        return self._serve(*args)

    def _serve_formless(self, *args: Any) -> Any:
        """What the check lets pass may still be without memory, which no kernel would notice."""
        self._check(*args)
        function = self._select(*args)
        for tensor in flatten([value for value in args[: self.tensors] if value is not None]):
            if tensor.numel() and not tensor.is_meta and tensor.data_ptr() == 0:
                raise ValueError(
                    f"expected tensors with memory, got {describe(tensor)} whose storage is empty "
                    "(freed, as FSDP does with parameters)"
                )
        return function(*args)


@functools.cache
def _form_of_tensors() -> Callable[[tuple[Any, ...], int], Any]:
    """Describes so many leading arguments, which are tensors, lists of them, or None. Gives None if
    a tensor is of a subclass or stands for its negative; else nothing that is true if one has no
    such form: sparse, nested, without memory."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch >= 2.10
    if exchange is None or native.error() is not None:
        return _form_in_python
    try:
        return native.load().Forms(exchange, Tensor, torch.nn.Parameter)
    except (TypeError, ValueError):  # of a version to come
        return _form_in_python


def _form_in_python(args: tuple[Any, ...], count: int) -> tuple[Any, ...] | None:
    """Of shapes rather than bytes, several times as slow."""
    present = [value for value in args[:count] if value is not None]
    tensors = flatten(present)
    if not _TENSOR.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        return None
    if any(t.layout is not torch.strided or t.is_nested or t.is_meta for t in tensors):
        return ()
    if any(t.data_ptr() == 0 and t.numel() for t in tensors):
        return ()
    lists = [(i, len(v)) for i, v in enumerate(args[:count]) if isinstance(v, list | tuple)]
    missing = [i for i, value in enumerate(args[:count]) if value is None]
    form = *lists, None, *missing, None, *map(_metadata, tensors)
    return *form, *map(Tensor.stride, tensors)


def flatten(values: Sequence[Any]) -> list[Any]:
    """One list of the values and, in their places, of those in lists."""
    flat: list[Any] = []
    for value in values:
        if type(value) not in _SINGLE and isinstance(value, (list, tuple)):
            flat += value
        else:
            flat.append(value)
    return flat
