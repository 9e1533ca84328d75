"""Which of a few settings a kernel runs fastest with: measured once, then remembered on disk.

A choice belongs to a kernel and a key, in which there are dtypes and a class of shapes, but not the
batch; and to the kind of GPU. Sums of floating-point numbers depend on the setting in their last
bits. Where nothing may be measured, the first setting, a constant, serves: with DLA_AUTOTUNE=0,
under torch.use_deterministic_algorithms, and in the interpreter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager

Setting = TypeVar("Setting")

# Of the first setting's time. What is not clearly faster is not worth the difference.
WORTHWHILE = 0.95
FILE = "dla_kernels.json"  # in a folder of Triton's cache, one for each choice


def switched_on() -> bool:
    """Whether the user and Triton allow for measurements in this process."""
    return os.environ.get("DLA_AUTOTUNE") != "0" and not triton.knobs.runtime.interpret


ENABLED = switched_on()
_chosen: dict[Hashable, int] = {}  # in this process
_log = logging.getLogger("dla_kernels")


def fastest(
    kernel: Any, about: Sequence[Any], settings: Sequence[Setting], run: Callable[[Setting], object]
) -> Setting:
    """The setting with which ``run(setting)``, a launch of the kernel, takes least time.

    about: what the choice depends on: texts, flags, dtypes of tensors, what is None; but no number.
    run: is called often in order to measure, so it must not change what it reads.
    """
    if len(settings) == 1 or not may_measure():
        return settings[0]
    key = kinds(about)
    place = kernel, torch.cuda.current_device(), key
    if place not in _chosen:
        if torch.cuda.is_current_stream_capturing():  # a CUDA graph: nothing may be waited for
            return settings[0]
        _chosen[place] = _recalled_or_measured(kernel, key, settings, run)
    return settings[_chosen[place]]


def may_measure() -> bool:
    """Not where kernels are interpreted or only compiled, on a machine that may have no GPU."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return ENABLED and not deterministic and torch.cuda.is_initialized()


def kinds(values: Sequence[Any]) -> tuple[Any, ...]:
    """Tells calls of a kernel apart but for sizes. Its repr is the same in every process."""
    return tuple(map(_kind, values))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, tuple):
        return kinds(value)
    return value if isinstance(value, str | bool) else type(value).__name__


def _recalled_or_measured(
    kernel: Any, key: Hashable, settings: Sequence[Setting], run: Callable[[Setting], object]
) -> int:
    depends_on = triton.__version__, _device_name(), kernel.cache_key, key, list(settings)
    cache = get_cache_manager(hashlib.sha256(repr(depends_on).encode()).hexdigest())
    if path := cache.get_file(FILE):
        return json.loads(Path(path).read_text())["fastest"]
    try:
        times = [_milliseconds(lambda s=setting: run(s)) for setting in settings]
    except torch.OutOfMemoryError:  # the timer wants 256 MB, to empty the GPU's cache
        return 0
    best = times.index(min(times))
    best = best if times[best] < WORTHWHILE * times[0] else 0
    _log.debug("%s %s: %s of %s ms", kernel.__name__, key, settings[best], times)
    cache.put(json.dumps({"fastest": best, "ms": times}), FILE)
    return best


def _device_name() -> str:
    return torch.cuda.get_device_name()


def _milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
