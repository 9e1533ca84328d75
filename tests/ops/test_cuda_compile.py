"""CUDA kernels compiled without a GPU: no spills, 16 bytes at a time."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
OPS = sorted(path.parent.name for path in CSRC.glob("ops/*/cuda.cu"))
CAPABILITIES = (80, 90, 100)
# Packs of a map that a thread asks for at once: kTogether of the op, or kInFlight of
# csrc/common/cuda/map.h.
IN_FLIGHT = {"base_attention": 2}

# Maps that a kernel reads and writes.
PASSES = {
    "global_pool": {"mean_kernel": (1, 0), "spread_kernel": (0, 1)},
    "gate": {"scale_kernel": (1, 1), "gradient_kernel": (2, 1)},
    "residual_gate": {"join_kernel": (2, 1), "gradient_kernel": (3, 2)},
    "residual_norm": {
        "moments_kernel": (1, 0),
        "join_kernel": (2, 1),
        "rectify_kernel": (3, 1),
        "norm_gradient_kernel": (2, 1),
    },
    "light_attention": {
        "means_kernel": (2, 0),
        "moments_kernel": (1, 0),
        "norm_gradient_kernel": (2, 1),
    },
    "base_attention": {
        "value_kernel": (1, 1),
        "mix_moments_kernel": (2, 1),
        "output_kernel": (3, 1),
        "norm_sums_kernel": (3, 0),
        "mix_gradients_kernel": (3, 1),
        "sum_kernel": (1, 1),
    },
}
# Those of kernels on csrc/common/cuda/tile.h, which copy them to shared memory. The written ones
# leave it in packs in NCHW; in channels_last threads side by side fill sectors of 32 bytes.
TILES = {
    "light_attention": {
        "plane_moments_kernel": (2, 0),
        "stencil_kernel": (2, 2),
        "gradients_kernel": (4, 2),
    },
    "base_attention": {"value_gradients_kernel": (3, 1)},
}
# Is told how a map was cut, to add up the sums of its pieces, and sees nothing of the map.
SUMS = "statistics_kernel"


def nvcc() -> str | None:
    places = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next(filter(None, (shutil.which(place) for place in places if place)), None)


def cuobjdump() -> str | None:
    """That of a CUDA toolkit, or the one that triton brings along."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else ""
    return shutil.which("cuobjdump") or shutil.which(own)


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (CUDA 12.8 or newer)")
needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump (CUDA, triton)")


@pytest.fixture(scope="module", params=[pytest.param(op, marks=needs_nvcc) for op in OPS])
def compiled(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[str, Path, str]:
    """Name of an op, its code for each capability, as the module has it, and what ptxas said.

    Without the host's part, which is not looked at.
    """
    op = request.param
    out = tmp_path_factory.mktemp(op) / "cuda.fatbin"
    command = [nvcc(), "-std=c++17", f"-I{CSRC}", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{one},code=sm_{one}" for one in CAPABILITIES]
    command += ["-fatbin", CSRC / "ops" / op / "cuda.cu", "-o", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return op, out, done.stderr


def test_nothing_spills(compiled: tuple[str, Path, str]) -> None:
    """Registers suffice; float64 serves gradcheck only and may be slow."""
    said = compiled[2]
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores", said, re.S
    )
    assert {int(capability) for _, capability, _ in kernels} == set(CAPABILITIES), said
    for name, capability, spilled in kernels:
        of_doubles = "kernelId" in name  # its first template argument
        assert spilled == "0" or of_doubles, f"{name} for sm_{capability}: {spilled} bytes"


def test_every_pass_is_listed(compiled: tuple[str, Path, str]) -> None:
    """A kernel that is told how a map is cut (`Cut`, `Tiling`) stands in PASSES or TILES."""
    op, _, said = compiled
    listed = {*PASSES.get(op, ()), *TILES.get(op, ()), SUMS}
    for name in re.findall(r"Compiling entry function '(\w+)'", said):
        over_maps = re.search(r"(3Cut|6Tiling)E", name)  # among the types of its arguments
        assert not over_maps or re.search(r"[a-z_]+_kernel", name).group() in listed, name


def functions(binary: Path) -> Iterator[tuple[str, str, str]]:
    """Mangled name, name and instructions of each kernel for compute capability 9.0."""
    arguments = [cuobjdump(), "-sass", "-arch", "sm_90", binary]
    sass = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    for text in re.split(r"Function : ", sass)[1:]:
        name = text.split()[0]
        yield name, re.search(r"[a-z_]+_kernel", name).group(), text


@needs_cuobjdump
@pytest.mark.parametrize(
    "compiled", [pytest.param(op, marks=needs_nvcc) for op in PASSES], indirect=True
)
def test_maps_move_in_16_bytes(compiled: tuple[str, Path, str]) -> None:
    op, binary, _ = compiled
    checked = 0
    for name, kernel, text in functions(binary):
        if kernel not in PASSES[op]:
            continue
        checked += 1
        read, written = PASSES[op][kernel]
        loads, stores = (len(re.findall(rf"{i}\.E\.128", text)) for i in ("LDG", "STG"))
        assert loads >= read * IN_FLIGHT.get(op, 4) and stores >= written, (
            f"{name}: {loads}, {stores}"
        )
    assert checked == 4 * len(PASSES[op])  # of four dtypes


@pytest.mark.parametrize(
    "compiled", [pytest.param(op, marks=needs_nvcc) for op in TILES], indirect=True
)
def test_shared_memory_suffices(compiled: tuple[str, Path, str]) -> None:
    """Of the 64 KB that every GPU gives on request, tile.h takes 40 and a row of zeros."""
    declared = [int(size) for size in re.findall(r"(\d+) bytes smem", compiled[2])]
    assert declared and max(declared) <= 20 * 1024


@needs_cuobjdump
@pytest.mark.parametrize(
    "compiled", [pytest.param(op, marks=needs_nvcc) for op in TILES], indirect=True
)
def test_tiles_are_copied_in_16_bytes(compiled: tuple[str, Path, str]) -> None:
    op, binary, _ = compiled
    checked = set()
    for name, kernel, text in functions(binary):
        if kernel not in TILES[op]:
            continue
        checked.add(name)
        read, written = TILES[op][kernel]
        copies = len(re.findall(r"LDGSTS\.\S*\.128\b", text))
        stores = len(re.findall(r"STG\.E\.128", text))
        channels_last = re.search(kernel + r"I.*?Lb([01])E", name).group(1) == "1"
        assert copies >= read and (channels_last or stores >= written), (
            f"{name}: {copies}, {stores}"
        )
    assert len(checked) >= 8 * len(TILES[op])  # of four dtypes, in two formats
