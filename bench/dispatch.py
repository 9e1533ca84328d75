#!/usr/bin/env python
"""Writes dla_kernels/dispatch.json: which backend comes first on a GPU, from what was measured.

    python bench/dispatch.py bench/results/h200_*.json

The files are results of ``bench_dla.py --device cuda --backends all --json FILE`` and are named in
what is written. Per op and shape class the backends are ordered by the geometric means of their
times over the modes, shapes and dtypes that all of them were measured with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dla_kernels.ops.common import class_of  # noqa: E402

TABLE = ROOT / "dla_kernels" / "dispatch.json"
BACKENDS = ("cuda", "triton")
NHWC = " NHWC"  # ends the names of peers in channels_last

Row = Mapping[str, Any]
Times = dict[tuple, dict[str, float]]  # by what was run, by backend


def shape_class(row: Row) -> str:
    """As `dla_kernels.ops.common.shape_class` says it of the op's first tensor."""
    _, channels, height, width = row["shape"]
    if "ideal_bytes" not in row:  # it moves no maps
        return class_of("rows", channels)
    return class_of("nhwc" if row["peer"].endswith(NHWC) else "nchw", height * width)


def times_by_class(rows: Iterable[Row]) -> dict[str, dict[str, Times]]:
    """The times of our backends on a GPU, by op and shape class."""
    found: dict[str, dict[str, Times]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        backend = row["peer"].removesuffix(NHWC)
        on_gpu = row["device"].startswith("cuda") and "op" in row
        if on_gpu and row["role"] == "ours" and backend in BACKENDS and "ms" in row:
            run = row["case"], row["mode"], *row["shape"], row["dtype"]
            found[row["op"]][shape_class(row)][run][backend] = row["ms"]
    return found


def order(times: Iterable[Mapping[str, float]], default: Sequence[str]) -> list[str]:
    """Backends, the fastest first; ``default`` where they cannot be compared."""
    common = [one for one in times if one.keys() == set(BACKENDS)]
    if not common:
        return list(default)
    return sorted(BACKENDS, key=lambda backend: geometric_mean(one[backend] for one in common))


def table(results: Mapping[str, Row], default: Sequence[str]) -> Row:
    """What the package reads. results: contents of the files by their names.

    Raises:
        ValueError: nothing in the results was measured on a GPU.
    """
    rows = [row for content in results.values() for row in content["rows"]]
    orders: dict[str, Any] = {"default": list(default)}
    for op, classes in sorted(times_by_class(rows).items()):
        overall = order((one for times in classes.values() for one in times.values()), default)
        orders[op] = {"default": overall}
        for name, times in sorted(classes.items()):
            of_class = order(times.values(), overall)
            if of_class != overall:
                orders[op][name] = of_class
    if len(orders) == 1:
        raise ValueError(f"no time of {' or '.join(BACKENDS)} on a GPU in {', '.join(results)}")
    devices = sorted({content["meta"]["device"] for content in results.values()})
    return {
        "what": json.loads(TABLE.read_text())["what"],
        "results": list(results),
        "why": f"Measured on {', '.join(devices)}; what was not measured takes the default.",
        "order": orders,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of the benchmark")
    parser.add_argument("--output", type=Path, default=TABLE, help="default: the package's table")
    options = parser.parse_args(arguments)
    files = {name_of(path): json.loads(path.read_text()) for path in options.results}
    default = json.loads(TABLE.read_text())["order"]["default"]
    try:
        written = table(files, default)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    options.output.write_text(json.dumps(written, indent=2) + "\n")


def name_of(path: Path) -> str:
    """Relative to the repository where that can be."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    main()
