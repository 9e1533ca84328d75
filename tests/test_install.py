"""The installed package: found from anywhere, tied to no torch."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dla_kernels

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("where", ["repository", "elsewhere"])
def test_kernels_are_found(where: str, tmp_path: Path) -> None:
    """In the repository root, too, where dla_kernels/ is the source tree."""
    code = "import torch, dla_kernels; import dla_kernels.native as n; print(n.error())"
    assert run_python(code, ROOT if where == "repository" else tmp_path) == "None"


def test_versions_agree() -> None:
    assert importlib.metadata.version("dla-kernels") == dla_kernels.__version__


def test_extension_does_not_link_torch() -> None:
    """One build serves every torch: no symbol, no library of it."""
    torch.ones(1)  # the OpenMP runtime comes with torch
    import _dla_native

    image = Path(_dla_native.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10", b"_ZN5torch"):
        assert name not in image, name


def test_sources_do_not_include_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10)/", name)], path


def test_import_says_nothing(tmp_path: Path) -> None:
    """Importing prints nothing, and offers all that the README names."""
    code = "import dla, dla_kernels; dla.nn, dla.models; print(dla_kernels.__version__)"
    assert run_python(code, tmp_path) == dla_kernels.__version__
