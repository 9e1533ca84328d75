"""What an error about bad input has to say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest


def assert_refused(call: Callable[[], Any], argument: str, *words: str) -> None:
    """``call`` must raise, naming the argument and saying all of ``words``: what was expected and
    what came (shapes as ``2, 3``, dtypes by their name)."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as info:
        call()
    message = str(info.value)
    assert re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", message), (
        f"does not name {argument}: {message}"
    )
    for word in words:
        assert word in message, f"does not say {word!r}: {message}"
