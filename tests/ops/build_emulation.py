"""Builds the emulated CUDA kernels (tests/emulation) when a test first runs one."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from dla_kernels import native

MODULE = "_dla_native_cuda_emulated"
ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def build() -> None:
    """Makes ``MODULE`` importable, unless it is: from PYTHONPATH or the repository root."""
    if importlib.util.find_spec(MODULE):
        return
    folder = ROOT / "build-emulated"
    configure = ["cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja"]
    configure += [f"-DDLA_OUTPUT_DIR={folder}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DDLA_EMULATE_CUDA=ON", "-DDLA_BUILD_CUDA=0"]
    with FileLock(f"{folder}.lock"):  # of pytest's workers the first one builds
        for command in (configure, ["cmake", "--build", folder, "--target", MODULE]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{command}:\n{done.stdout}\n{done.stderr}")
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    native._try_load.cache_clear()  # a test before may have asked in vain
