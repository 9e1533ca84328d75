"""Loads the compiled modules; what prevents it is said only when it is needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

# torch first: its libgomp then serves the extension too, so that both share one thread pool.
import torch  # noqa: F401

_CPU = "_dla_native"
_CUDA = "_dla_native_cuda"
_EMULATED = "_dla_native_cuda_emulated"
_REBUILD = "reinstall dla-kernels with a C++ compiler at hand: pip install ."
_REBUILD_CUDA = (
    "reinstall dla-kernels with the nvcc of CUDA 12.8 or newer at hand: "
    "DLA_BUILD_CUDA=1 pip install ."
)

# For tests: the CUDA kernels compiled as C++ serve tensors on the CPU, when asked for by name.
EMULATE_CUDA = os.environ.get("DLA_EMULATE_CUDA") == "1"


@functools.cache
def _try_load(name: str) -> tuple[ModuleType | None, str | None]:
    remedy = _REBUILD_CUDA if name == _CUDA else _REBUILD
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError:
        reason = f"the compiled module {name} is not installed{_because(name)}; {remedy}"
    except ImportError as error:
        found = importlib.util.find_spec(name)
        where = found.origin if found else name
        reason = f"the compiled module {where} does not load ({error}); {remedy}"
    return None, reason


def _because(name: str) -> str:
    """What the build has to say about a missing CUDA module."""
    module = _try_load(_CPU)[0] if name == _CUDA else None
    reason = module.without_cuda() if module else ""
    return f": {reason}" if reason else ""


def _load(name: str) -> ModuleType:
    module, reason = _try_load(name)
    if module is None:
        raise RuntimeError(f"dla_kernels: {reason}")
    return module


def error() -> str | None:
    """Why the native module cannot be used, with the remedy; None when it can."""
    return _try_load(_CPU)[1]


def load() -> ModuleType:
    """The native module.

    Raises:
        RuntimeError: it cannot be loaded; the message says why and what to do.
    """
    return _load(_CPU)


def cuda_error() -> str | None:
    """As `error`, of the module with the CUDA kernels."""
    return _try_load(_EMULATED if EMULATE_CUDA else _CUDA)[1]


def load_cuda() -> ModuleType:
    """As `load`, the module with the CUDA kernels: the same functions and structs."""
    return _load(_EMULATED if EMULATE_CUDA else _CUDA)
