"""Loads the compiled module `_dla_native`; what prevents it is said only when it is needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

# torch first: its libgomp then serves the extension too, so that both share one thread pool.
import torch  # noqa: F401

_MODULE = "_dla_native"
_REBUILD = "reinstall dla-kernels with a C++ compiler at hand: pip install ."


@functools.cache
def _try_load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(_MODULE), None
    except ModuleNotFoundError:
        reason = f"the compiled module {_MODULE} is not installed; {_REBUILD}"
    except ImportError as error:
        found = importlib.util.find_spec(_MODULE)
        where = found.origin if found else _MODULE
        reason = f"the compiled module {where} does not load ({error}); {_REBUILD}"
    return None, reason


def error() -> str | None:
    """Why the native module cannot be used, with the remedy; None when it can."""
    return _try_load()[1]


def load() -> ModuleType:
    """The native module.

    Raises:
        RuntimeError: it cannot be loaded; the message says why and what to do.
    """
    module, reason = _try_load()
    if module is None:
        raise RuntimeError(f"dla_kernels: {reason}")
    return module
