"""Checks of constructor arguments, with messages that name them."""

from collections.abc import Collection
from typing import Any


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """``value`` if it is among ``choices``, else ValueError."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
    return value


def positive_int(name: str, value: Any) -> int:
    """``value`` if it is an integer above zero, else TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def hidden_width(channels: int, reduction: int) -> int:
    """channels // reduction; ValueError if nothing is left."""
    hidden = positive_int("channels", channels) // positive_int("reduction", reduction)
    if hidden < 1:
        raise ValueError(
            f"reduction: expected at most the number of channels, {channels}, got {reduction}: "
            "the cell's hidden width channels // reduction would be 0"
        )
    return hidden
