"""``python -m dla_kernels``: what is installed, which backends serve which op, a self-check."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import dla_kernels
from dla_kernels import native, ops
from dla_kernels.backend import BACKENDS, implementation, use_backend

FAILED = "[red]fails[/]"
NOT_TUNED = os.environ.get("DLA_AUTOTUNE") == "0"
TOLERANCE = 1e-4  # float32, relative; the tests are stricter


def op_names() -> list[str]:
    """All ops: the packages below ``dla_kernels.ops``."""
    return [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg]


def installed(package: str) -> str:
    """Version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """What to quote in a bug report."""
    found = {
        "dla-kernels": dla_kernels.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "triton": installed("triton") + (", DLA_AUTOTUNE=0" if NOT_TUNED else ""),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    found["CUDA kernels"] = (
        native.cuda_error() or f"for compute capability {native.load_cuda().targets()}"
    )
    if problem := native.error():
        return found | {"native module": problem}
    module = native.load()
    alone = "" if module.thread_pool() else ", without OpenMP: one thread"
    cap = os.environ.get("DLA_SIMD")
    capped = f" (DLA_SIMD={cap} caps it)" if cap else ""
    return found | {
        "native module": str(module.__file__),
        "compiler": module.compiler() + alone,
        "SIMD level": f"{module.simd_level()} of {module.simd_levels()}{capped}",
    }


def flat_tensors(values: Any) -> list[Tensor]:
    """The non-empty tensors in a nest of values."""
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.numel()]


def run(
    function: Callable[..., Any], inputs: dict[str, Any], outputs: list[int] | None = None
) -> tuple[list[Tensor | None], list[int]]:
    """Outputs and gradients of one call, and which outputs were differentiated."""
    inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), inputs)
    results = flat_tensors(function(**inputs))
    if outputs is None:
        outputs = [i for i, result in enumerate(results) if result.requires_grad]
    reached = [results[i] for i in outputs]
    cotangents = [torch.arange(t.numel(), device=t.device).sin().view(t.shape) for t in reached]
    leaves = flat_tensors(inputs)
    gradients = torch.autograd.grad(reached, leaves, cotangents, allow_unused=True)
    return [*(t.detach() for t in results), *gradients], outputs


@contextmanager
def without_tf32() -> Iterator[None]:
    """What kernels are compared with is float32 itself."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [one.allow_tf32 for one in settings]
    try:
        for one in settings:
            one.allow_tf32 = False
        yield
    finally:
        for one, allowed in zip(settings, before, strict=True):
            one.allow_tf32 = allowed


@without_tf32()
def error_of(op: str, backend: str, device: torch.device) -> float:
    """Largest relative error of an op's outputs and gradients against its reference."""
    package = f"{ops.__name__}.{op}"
    torch.manual_seed(0)
    inputs = importlib.import_module(f"{package}.example").example(device)
    with use_backend(backend):
        got, outputs = run(getattr(dla_kernels, op), inputs)
    formula = getattr(importlib.import_module(f"{package}.reference"), op)
    expected, _ = run(formula, inputs, outputs)
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None]
    floor = 1e-3 * max(b.norm() for _, b in pairs)  # some gradients are zero but for rounding
    errors = [(a - b).norm() / max(b.norm(), floor) for a, b in pairs]
    return torch.stack(errors).max().item()


def check(op: str, backend: str) -> tuple[str, str | None]:
    """One cell of the table, and what there is to say about it."""
    module = implementation(op, backend)
    if module is None:
        return "[dim]none yet[/]", None
    gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if reason := module.unsupported(torch.zeros(1, 1, 1, 1, device=device)):
        return "[yellow]no[/]", reason
    try:
        error = error_of(op, backend, device)
    except Exception as problem:  # a report has to survive what it reports
        return FAILED, repr(problem)
    if not error <= TOLERANCE:
        return FAILED, f"relative error {error:.1e}, expected at most {TOLERANCE:.0e}"
    return f"[green]ok[/] {error:.0e}", None


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; the exit status is 1 if an available implementation fails its check."""
    argparse.ArgumentParser(
        prog="python -m dla_kernels",
        description="Prints versions and, for every op, which backends serve it and if not, why; "
        "checks each on a small call. The exit status is 1 if one fails.",
    ).parse_args(arguments)
    console = Console()
    os.environ["DLA_AUTOTUNE"] = "0"  # for small calls that nobody waits for again
    grid = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    for name, value in facts().items():
        grid.add_row(f"[bold]{name}[/]", escape(value))
    console.print(grid)
    table = Table("op", *BACKENDS, title="Backends: relative error on a small call")
    notes: dict[str, list[str]] = {}
    failed = False
    for op in op_names():
        cells = []
        for backend in BACKENDS:
            cell, note = check(op, backend)
            cells.append(cell)
            failed |= cell == FAILED
            if note:
                notes.setdefault(f"{backend}: {note}", []).append(op)
        table.add_row(op, *cells)
    console.print(table)
    for note, concerned in notes.items():
        console.print(escape(f"{note} ({', '.join(concerned)})"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
