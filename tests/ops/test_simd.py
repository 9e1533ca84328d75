"""The kernels of every instruction set that the machine has, not only of its best one."""

from __future__ import annotations

from pathlib import Path

import pytest

from op_cases import python

LEVELS = ("baseline", "avx2", "avx512")
SHOW = "import torch, _dla_native; print(_dla_native.simd_level())"


def level(cap: str) -> str:
    """The level in use when DLA_SIMD says ``cap``."""
    done = python(SHOW, env={"DLA_SIMD": cap})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("cap", LEVELS)
def test_kernels_of(cap: str) -> None:
    """A selection of all ops' tests in a process that DLA_SIMD holds at a level.

    MALLOC_PERTURB_ fills the native code's own fresh memory with huge numbers, as the poisoned
    torch buffers are filled with NaN.
    """
    if level(cap) != cap:
        pytest.skip(f"needs a CPU with {cap}")
    args = ["-m", "pytest", "-q", "-m", "simd", "-k", "cpp", "-p", "no:cacheprovider", "--tb=short"]
    done = python(
        [*args, str(Path(__file__).parent)], env={"DLA_SIMD": cap, "MALLOC_PERTURB_": "1"}
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_unknown_level_is_refused() -> None:
    """A misspelt cap must not silently test the best kernels again."""
    done = python(SHOW, env={"DLA_SIMD": "sse9"})
    assert done.returncode != 0
    assert "sse9" in done.stderr and "avx2" in done.stderr, done.stderr
