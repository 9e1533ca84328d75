"""What the arguments that a layer passes to its op follow from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from dla.nn.batch_norm import HOOKS
from dla_kernels import native


class Facts:
    """What a layer and its modules held at a time, by identity.

    To look whether that is still so takes a fraction of the time in which a layer finds two dozen
    arguments. Nothing here refers to the layer itself, so that it may keep its own facts and still
    is freed at once when nobody else needs it.
    """

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._empty: list[Any] = []
        self._types: list[Any] = []

    def own(self, owner: nn.Module, *names: str) -> None:
        """Attributes of the layer; None also stands for one that is missing."""
        for name in names:
            self._values += (None, name, vars(owner).get(name))

    def attributes(self, module: nn.Module, *names: str) -> None:
        """Those of another module."""
        self.items(vars(module), *names)

    def parameters(self, module: nn.Module, *names: str) -> None:
        self.attributes(module, "_parameters")
        self.items(module._parameters, *names)

    def buffers(self, module: nn.Module, *names: str) -> None:
        self.attributes(module, "_buffers")
        self.items(module._buffers, *names)

    def items(self, held: dict[str, Any], *names: str) -> None:
        for name in names:
            self._values += (held, name, held.get(name))

    def plain(self, module: nn.Module) -> None:
        """That its type is this one, and that `dla.nn.batch_norm.is_unhooked`."""
        self.attributes(module, "forward")
        for name in HOOKS:
            self._empty += (vars(module), name)
        self._types += (module, type(module))

    def cover(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether all of the tensors are among what was held, and are no results of anything: none
        was made for the occasion."""
        held = set(map(id, self._values[2::3]))
        return all(t is None or (id(t) in held and t.is_leaf) for t in tensors)

    def hold(self, owner: nn.Module) -> bool:
        """Whether all is as it was."""
        return _unchanged()(vars(owner), self._values, self._empty, self._types)


@functools.cache
def _unchanged() -> Callable[..., bool]:
    return _unchanged_in_python if native.error() is not None else native.load().unchanged


def _unchanged_in_python(
    owner: dict[str, Any], values: list[Any], empty: list[Any], types: list[Any]
) -> bool:
    """As in csrc/unchanged.h."""
    return (
        all(
            (owner if held is None else held).get(name) is value
            for held, name, value in zip(*3 * [iter(values)], strict=True)
        )
        and not any(held[name] for held, name in zip(*2 * [iter(empty)], strict=True))
        and all(type(module) is kind for module, kind in zip(*2 * [iter(types)], strict=True))
    )
