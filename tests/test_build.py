"""When the CUDA kernels are built, and what is said when not (csrc/cuda.cmake, setup.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Whatever it is asked: `--version` says "release ..", `--list-gpu-arch` lists compute_..
NVCC = {
    "failing": "echo 'cannot start'; exit 1",
    "of CUDA 11.4": "echo 'Cuda compilation tools, release 11.4, V11.4.1'",
    "of CUDA 12.4": "echo 'release 12.4'; for a in 75 80 90; do echo compute_$a; done",
    "of CUDA 13.0": "echo 'release 13.0'; for a in 75 80 90 100 120; do echo compute_$a; done",
}
REASONS = {
    "failing": ["did not report its version"],
    "of CUDA 11.4": ["CUDA 11.4", "12.0"],
    "of CUDA 12.4": ["CUDA 12.4", "capability 100", "DLA_CUDA_ARCHS", "12.8"],
}


def script(folder: Path, name: str, body: str) -> None:
    """An executable of this name."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run(command: list[object], folder: Path, **env: str) -> tuple[int, str]:
    """Exit status and output of a command that finds the scripts of a folder first."""
    kept = {k: v for k, v in os.environ.items() if k not in ("DLA_BUILD_CUDA", "DLA_CUDA_ARCHS")}
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    env = {**kept, "CUDACXX": "", "PATH": path, **env}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def decide(folder: Path, nvcc: str, **env: str) -> tuple[int, str]:
    """What csrc/cuda.cmake makes of an nvcc."""
    script(folder, "nvcc", NVCC[nvcc])
    return run(["cmake", "-P", ROOT / "csrc" / "cuda.cmake"], folder, **env)


def build(folder: Path, **env: str) -> tuple[int, str]:
    """What pip runs, with setup.py's own words."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return run(command, folder, **env)


@pytest.mark.parametrize("nvcc", REASONS)
@pytest.mark.parametrize("must", ["", "1"])
def test_nvcc_that_will_not_do(tmp_path: Path, nvcc: str, must: str) -> None:
    """The package does without CUDA kernels and says why; on request it refuses to."""
    status, said = decide(tmp_path, nvcc, DLA_BUILD_CUDA=must)
    assert (status == 0) == (must == ""), said
    words = ["DLA_BUILD_CUDA=1", "PATH", "CUDACXX"] if must else ["No CUDA kernels"]
    for word in (*words, *REASONS[nvcc], str(tmp_path / "nvcc")):
        assert word in said, f"does not say {word!r}: {said}"


@pytest.mark.parametrize("must", ["", "1"])
def test_no_nvcc(tmp_path: Path, must: str) -> None:
    """As with an nvcc that will not do. All folders are looked for below an empty one."""
    nowhere = [f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY"]
    command = ["cmake", *nowhere, "-P", ROOT / "csrc" / "cuda.cmake"]
    status, said = run(command, tmp_path, DLA_BUILD_CUDA=must)
    assert (status == 0) == (must == ""), said
    words = ["DLA_BUILD_CUDA=1", "12.8", "PATH", "CUDACXX"] if must else ["No CUDA kernels"]
    for word in (*words, "no nvcc was found"):
        assert word in said, f"does not say {word!r}: {said}"


def test_nvcc_that_will_do(tmp_path: Path) -> None:
    assert "CUDA kernels for 75;80;90;100, by" in decide(tmp_path, "of CUDA 13.0")[1]
    archs = {"DLA_CUDA_ARCHS": "120, 90"}
    assert "CUDA kernels for 90;120, by" in decide(tmp_path, "of CUDA 13.0", **archs)[1]
    # One that is too old for the default targets can build for some of them.
    assert "kernels for 90, by" in decide(tmp_path, "of CUDA 12.4", DLA_CUDA_ARCHS="90")[1]


def test_cuda_not_wanted(tmp_path: Path) -> None:
    status, said = decide(tmp_path, "of CUDA 13.0", DLA_BUILD_CUDA="0")
    assert status == 0 and "No CUDA kernels: DLA_BUILD_CUDA was 0" in said


# Fails to build unless it has been told to leave CUDA out.
CMAKE = """
echo "cmake $*"
case "$*" in
  *--fresh*DLA_CUDA_FAILED*) touch {folder}/without ;;
  *--fresh*) mkdir {folder}/temp; echo DLA_TRIES_CUDA:INTERNAL=ON > {folder}/temp/CMakeCache.txt ;;
  *--build*) test -e {folder}/without && {without} ;;
esac
"""


@pytest.mark.parametrize("must", ["", "1"])
@pytest.mark.parametrize("without", ["true", "false"])
def test_nvcc_that_fails_to_compile(tmp_path: Path, must: str, without: str) -> None:
    """Tried again without CUDA, unless CUDA is a must; a second failure is no fault of nvcc's."""
    script(tmp_path, "cmake", CMAKE.format(folder=tmp_path, without=without))
    status, said = build(tmp_path, DLA_BUILD_CUDA=must)
    assert (status == 0) == (must == "" and without == "true"), said
    assert ("trying again without CUDA kernels" in said) == (must == ""), said
    assert ("cmake failed" in said) == (status != 0), said


def test_no_compiler(tmp_path: Path) -> None:
    """Says once what to install."""
    status, said = build(tmp_path, CXX=str(tmp_path / "missing"))
    assert status != 0
    for word in ("needs a C++20 compiler", "apt-get install g++", "environment variable CXX"):
        assert said.count(word) == 1, said
