#!/usr/bin/env python
"""Times dla-kernels against PyTorch: how much faster and leaner the fused layers are.

    python bench/bench_dla.py                      # one DLA-L layer, then ResNet-56; < 5 minutes
    python bench/bench_dla.py --suite ops,first    # the standalone ops; the first call of a layer
    python bench/bench_dla.py --suite family,depth # every model, cell and depth; half an hour
    python bench/bench_dla.py --json out.json --plot out.png
    python bench/bench_dla.py --quick              # smoke test, < 30 seconds

What is measured, and how, stands in bench/README.md. This file reads the command line and prepares
the process; it imports nothing that imports torch before that is done.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

SUITES = ("layer", "model", "ops", "first", "family", "depth")
BACKENDS = ("auto", "all", "cpp", "cuda", "triton", "reference")
DTYPES = ("float32", "float64", "bfloat16", "float16")


def shape(text: str) -> tuple[int, ...]:
    """``32x64x32x32`` or ``[32,64,32,32]`` as a tuple."""
    try:
        sizes = tuple(int(part) for part in text.strip("[]() ").replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected BxCxHxW such as 32x64x32x32, not {text!r}")
    return sizes


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, not {text!r}")
    return int(text)


def some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option that takes one or more words, with commas between them."""

    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if not names or not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, not {text!r}")
        return names

    return chosen


def new_file(text: str) -> str:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, not {text!r}")
    return text


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add(
        "--suite",
        type=some_of(SUITES),
        default=("layer", "model"),
        help=f"some of {','.join(SUITES)}",
    )
    add("--device", help="cpu, cuda, cuda:1 ..; by default cuda where there is one, else cpu")
    add("--dtype", choices=DTYPES, default="float32", help="feature dtype (autocast for models)")
    add("--shapes", type=shape, nargs="+", help="BxCxHxW .. for the suites layer and ops")
    add("--backends", type=some_of(BACKENDS), default=("auto",), help=f"of {','.join(BACKENDS)}")
    add("--spec", choices=("official", "paper"), default="official", help="preset of DLA-L")
    add("--model", help="family and depth of the suites model, family; by default resnet56")
    add("--batch", type=positive, help="batch size of the networks; by default 32")
    add("--channels-last", action="store_true", help="run the networks in channels_last")
    add("--threads", type=positive, help="CPU threads; by default what torch chooses")
    add(
        "--repeats",
        type=positive,
        help="rounds over all peers; by default 30, model 20, family 10, depth 5",
    )
    add("--no-compile", action="store_true", help="leave out the torch.compile peer (slow start)")
    add("--quick", action="store_true", help="smoke test: tiny shapes, 2 repeats, no torch.compile")
    add(
        "--json",
        metavar="FILE",
        type=new_file,
        help="write all rows here, again after every measurement",
    )
    add(
        "--plot",
        metavar="PNG",
        type=new_file,
        help="draw the results (needs matplotlib: the extra 'bench')",
    )
    # How this program calls itself for what has to be measured in a process of its own.
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return result


def prepare_process(cpus: list[int] | None) -> list[int]:
    """Sets what must be set before torch is imported; returns the CPUs of this process.

    Unbound OpenMP threads sometimes cost a fixed 8 ms per parallel region, so they are bound,
    which is the same for all peers. libgomp then also binds the main thread, and child processes
    inherit that: a child gets the CPUs of its parent as the parent first saw them.
    """
    os.environ.setdefault("OMP_PROC_BIND", "true")
    if not hasattr(os, "sched_setaffinity"):
        return []
    if cpus:
        os.sched_setaffinity(0, cpus)
    return sorted(os.sched_getaffinity(0))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    child = options.child
    cpus = prepare_process(child and child["cpus"])
    import runner  # imports torch

    if child:
        return runner.print_child(child)
    return runner.run(options, cpus)


if __name__ == "__main__":
    raise SystemExit(main())
