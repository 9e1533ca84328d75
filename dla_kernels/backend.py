"""Which implementation serves a call, and why.

The implementations of an op are the modules of its package that bear a backend's name. Each has
``unsupported(x) -> reason | None``, ``forward`` and ``backward`` with the arguments of the op; and,
where calls on tensors that it supports may still ask too much, ``refuses(backward, *args) ->
reason | None`` for the arguments of either; and, where it serves some calls for want of a better
backend only, ``gives_way(backward, *args) -> reason | None``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import itertools
import json
import logging
from collections.abc import Sequence
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from dla_kernels.ops.common import shape_class

AUTO = "auto"
BACKENDS = ("cuda", "triton", "cpp", "reference")

# The names that `use_backend` asks for, the innermost first.
_requested: ContextVar[tuple[str, ...]] = ContextVar("dla_kernels_backend", default=())
_log = logging.getLogger("dla_kernels")


class Implementation(Protocol):
    """What a backend's module for an op offers."""

    def unsupported(self, x: Tensor) -> str | None: ...
    def forward(self, *args: Any) -> Any: ...
    def backward(self, *args: Any) -> Any: ...


class use_backend(ContextDecorator):
    """Runs the ops in a ``with`` block on one backend, in this thread (or asyncio task) only.

    Backward passes follow their forward pass, or a ``with`` block around them. A graph made by
    torch.compile looks up the backend at every run, forward and backward separately.

    Args:
        name: "cuda", "triton", "cpp" or "reference", which then must serve every call; or "auto":
            the best that can.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: (by a call in the block) the backend cannot serve the call; says why.
    """

    def __init__(self, name: str) -> None:
        if name not in (AUTO, *BACKENDS):
            known = ", ".join((AUTO, *BACKENDS))
            raise ValueError(f"name: expected one of {known}; got {name!r}")
        self.name = name

    def __enter__(self) -> use_backend:
        _requested.set((self.name, *_requested.get()))
        return self

    def __exit__(self, *_: object) -> None:
        _requested.set(_requested.get()[1:])


def requested() -> str:
    """The name that the innermost `use_backend` asks for; "auto" outside of any."""
    names = _requested.get()
    return names[0] if names else AUTO


def select(op: str, x: Tensor, args: Sequence[Any], backward: bool) -> Implementation:
    """The module that serves a call of ``op`` or its backward; ``x``: the first tensor of ``args``.

    Raises:
        RuntimeError: the requested backend cannot.
    """
    name = requested()
    if name != AUTO:
        return _demand(op, name, x, args, backward)
    *fast, slowest = _automatic_order(op, _class_of(x, args) if x.is_cuda else None)
    refusals: list[str] = []
    later: list[str] = []  # what gave way, to be asked again before the slowest
    for name in itertools.chain(fast, later, (slowest,)):
        module = implementation(op, name)
        if module is None:
            continue
        reason = _refusal(module, x, args, backward)
        if reason is None and name not in later and (reason := _gives_way(module, args, backward)):
            later.append(name)
        if reason is None:
            _report(op, name, tuple(refusals))
            return module
        refusals.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend serves {op} on {x.device}: {'; '.join(refusals)}")


def _refusal(module: Implementation, x: Tensor, args: Sequence[Any], backward: bool) -> str | None:
    """Why an implementation cannot serve a call, or None."""
    refuses = getattr(module, "refuses", None)
    return module.unsupported(x) or (refuses(backward, *args) if refuses else None)


def _gives_way(module: Implementation, args: Sequence[Any], backward: bool) -> str | None:
    """Why an implementation gives way to others, or None."""
    gives_way = getattr(module, "gives_way", None)
    return gives_way(backward, *args) if gives_way else None


def _demand(op: str, name: str, x: Tensor, args: Sequence[Any], backward: bool) -> Implementation:
    module = implementation(op, name)
    if module is None:
        problem = f"{op} has no such implementation (it has {', '.join(backends_of(op))})"
    elif reason := _refusal(module, x, args, backward):
        problem = reason
    else:
        return module
    raise RuntimeError(
        f"backend {name!r}, asked for by use_backend, cannot serve {op}: {problem}; "
        f"use_backend({AUTO!r}) takes what is available"
    )


@functools.cache
def backends_of(op: str) -> list[str]:
    """The backends that an op has implementations for, whether or not these can be imported."""
    return [name for name in BACKENDS if importlib.util.find_spec(f"dla_kernels.ops.{op}.{name}")]


@functools.cache
def implementation(op: str, name: str) -> Implementation | None:
    """The implementation of an op for a backend, which refuses every call if it cannot be imported;
    None if there is none. Imported when it is asked for: a broken Triton does not concern a CPU."""
    if name not in backends_of(op):
        return None
    try:
        return importlib.import_module(f"dla_kernels.ops.{op}.{name}")
    except Exception as error:  # whatever is wrong with what it imports
        return _NotImportable(error)


class _NotImportable:
    """In place of a module that lacks something: a refusal with the remedy."""

    def __init__(self, error: Exception) -> None:
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        missing = isinstance(error, ModuleNotFoundError) and error.name
        remedy = f"; pip install {error.name.partition('.')[0]}" if missing else ""
        self._reason = f"{kind}{error}{remedy}"

    def unsupported(self, x: Tensor) -> str:
        return self._reason


def _class_of(x: Tensor, args: Sequence[Any]) -> str:
    """Shape class of a call: of its first map, or of ``x`` if there is none."""
    maps = (value for value in (x, *args) if isinstance(value, Tensor) and value.dim() == 4)
    return shape_class(next(maps, x))


@functools.cache
def _automatic_order(op: str, gpu_class: str | None) -> Sequence[str]:
    """Backends by speed. On CPU tensors Triton's interpreter would be slower than anything.

    gpu_class: shape class of the call; None on a CPU.
    """
    if gpu_class is None:
        return ("cpp", "reference")
    text = importlib.resources.files("dla_kernels").joinpath("dispatch.json").read_text()
    order = json.loads(text)["order"]
    of_op = order.get(op, order)
    return (*of_op.get(gpu_class, of_op["default"]), "reference")


@functools.cache
def _report(op: str, name: str, refusals: tuple[str, ...]) -> None:
    """Says once per op and reasons what serves it; loudly if that is the slow reference."""
    level = logging.WARNING if name == "reference" else logging.DEBUG
    because = f" ({'; '.join(refusals)})" if refusals else ""
    _log.log(level, "%s runs on backend %s%s", op, name, because)
