"""Does the emulation of CUDA (tests/emulation) notice what is wrong with a kernel?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulation"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux: fibers under AddressSanitizer"
)

MISTAKES = {
    "no_barrier": "shared memory",
    "barrier_forgotten_in_a_loop": "while another thread",
    "no_warp_barrier": "shared memory",
    "shared_out_of_bounds": "writes shared memory [64] of 64, which is out of bounds",
    "shared_never_written": "reads shared memory [1] of 64, which nobody wrote",
    "types_overlap": "while another thread uses it",
    "more_declared_than_there_is": "80000 bytes of shared memory, more than 49152",
    "more_shared_than_there_is": "500000 bytes of shared memory, more than 65536",
    "more_shared_in_all": "70000 bytes of shared memory, more than 65536",
    "copy_without_wait": "reads shared memory [8] of 64, which a copy is on its way to",
    "own_copy_without_wait": "reads shared memory [0] of 64, which a copy is on its way to",
    "copy_without_barrier": "reads shared memory [8] of 64",
    "barrier_before_the_wait": "reads shared memory [8] of 64",
    "written_while_copied": "writes shared memory [1] of 64, which a copy is on its way to",
    "unaligned": "16-byte access of an unaligned address",
    "copy_to_unaligned": "16-byte access of an unaligned address",
    "unaligned_shared": "16-byte access of an unaligned address",
    "lanes_missing": "waits for ever for lanes 16 17",
    "lane_not_in_its_mask": "not in its own mask",
    "source_not_in_the_mask": "which is not in the mask",
    "barrier_not_reached_by_all": "thread 5: ended, and others wait for it at a barrier",
}
FINE = {
    "healthy": "2016 6112 10208",
    "warps_on_their_own": "285 285 285",
    "half_a_warp": "8 8 8",
    "types_side_by_side": "75 75 75",
    "copies": "9 73 137",
}
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """planted.cu as a program of its own, with the sanitizers."""
    binary = tmp_path_factory.mktemp("planted") / "planted"
    options = ["-std=c++20", "-g1", "-fsanitize=address,undefined", "-DDLA_CUDA_EMULATED"]
    options += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-x", "c++", str(HERE / "planted.cu")]
    subprocess.run([os.environ.get("CXX", "g++"), *options, "-o", str(binary)], check=True)
    return binary


def run(program: Path, kernel: str, seed: int) -> subprocess.CompletedProcess[str]:
    # An LD_PRELOAD of the tests' own sanitizer build would come before the program's.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    env |= {"DLA_EMULATION_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, kernel], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistake_is_noticed(program: Path, kernel: str) -> None:
    """Whatever the order in which blocks and threads run."""
    for seed in SEEDS:
        done = run(program, kernel, seed)
        assert done.returncode == 1, f"seed {seed}: {done.stdout}{done.stderr}"
        assert MISTAKES[kernel] in done.stdout, f"seed {seed}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("kernel", FINE)
def test_no_false_alarm(program: Path, kernel: str) -> None:
    for seed in SEEDS:
        done = run(program, kernel, seed)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() == FINE[kernel]


def test_global_memory_out_of_bounds(program: Path) -> None:
    """AddressSanitizer's part, on the stacks of our own making."""
    done = run(program, "global_out_of_bounds", 1)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "global_out_of_bounds" in done.stderr


def test_orders_differ(program: Path) -> None:
    """A result that depends on the order of the blocks shows by differing between seeds."""
    assert len({run(program, "last_block_wins", seed).stdout for seed in range(8)}) > 1
