"""Fixtures and settings of all tests. Test file names are unique in tests/ (no packages there)."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Workers of pytest-xdist share the cores: a thread that has nothing to do must not keep one busy.
# OpenMP asks when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Without a GPU Triton kernels are interpreted and CUDA kernels emulated (tests/emulation). Triton
# and dla_kernels.native ask when they are imported: this comes first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["DLA_EMULATE_CUDA"] = "1"

# On a GPU the settings of kernels are not to be measured for hundreds of small shapes.
os.environ.setdefault("DLA_AUTOTUNE", "0")

# The same examples every time. `pytest --hypothesis-profile=explore` looks elsewhere; what it finds
# may just be a badly conditioned case.
hypothesis.settings.register_profile("same", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills every fresh torch buffer with NaN: a kernel that leaves an element unwritten shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """Tiny maps gain nothing from a second thread, and lose minutes where it has to wait."""
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A freshly seeded source of random numbers."""
    return torch.Generator().manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, so that a misspelt one is an error under --strict-markers."""
    config.addinivalue_line("markers", "simd: repeated at every SIMD level that the machine has")
    config.addinivalue_line("markers", "long: takes about a minute, so it is begun first")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No worker of pytest-xdist is to begin a long test when the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
