"""What is shown and kept: tables on the terminal, a JSON file, a picture."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import dla_kernels
from cases import MODES, Settings
from dla_kernels import native

Row = dict[str, Any]
WIDTH = 110  # of tables where no terminal tells its own
MIB = 2**20


class Store:
    """All rows so far, with what they were measured on; in a file too if one is named."""

    def __init__(self, path: str | None, meta: Row) -> None:
        self.path = Path(path) if path else None
        self.meta, self.rows = meta, []
        self.add([])

    def add(self, rows: list[Row]) -> None:
        """Keeps ``rows``. The file is replaced as a whole: killed at any moment, it is complete."""
        self.rows += rows
        if self.path is None:
            return
        content = {"meta": self.meta, "summary": layer_summary(self.rows), "rows": self.rows}
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(self.path)

    def whereabouts(self) -> str:
        return f"what was measured is in {self.path}" if self.path else "nothing was written"


def layer_summary(rows: list[Row]) -> Row:
    """Geometric mean over the shapes of the layer's speed-ups, by mode and contestant."""
    result: Row = {}
    for mode in MODES:
        ratios: dict[str, list[float]] = {}
        for row in rows:
            key = row["suite"], row["mode"], row["role"]
            if key == ("layer", mode, "ours") and "speedup" in row:
                ratios.setdefault(row["peer"], []).append(row["speedup"])
        result[mode] = {peer: geometric_mean(values) for peer, values in ratios.items()}
    return result


def metadata(settings: Settings, cache: int, bandwidth: float) -> Row:
    """Everything that a reader needs to judge the rows or to measure them again."""
    extension = native.error()
    module = None if extension else native.load()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": re.sub(r"[^ =]*/", "", " ".join(["bench_dla.py", *sys.argv[1:]])),  # no folders
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dla_kernels": dla_kernels.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "device": device_name(settings.device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": module.simd_level() if module else extension,
        "load_average": os.getloadavg()[0],
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "cache_bytes": cache,
        "copy_gb_per_s": bandwidth,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "spec": settings.spec,
        "backends": list(settings.backends),
    }


def commit() -> str | None:
    """Of the checkout that this file is in, with ``+`` if it has changes; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain") else "")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


class View:
    """The terminal: tables in any case, a progress bar where there is a terminal."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=WIDTH)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Yields a function to be called ``total`` times."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        terminal = self.console.is_terminal
        with Progress(
            *columns,
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not terminal,
            auto_refresh=False,  # a thread that draws would disturb what is timed
        ) as bar:
            task = bar.add_task(title.replace("[", r"\["), total=total)
            bar.refresh()

            def tick() -> None:
                bar.advance(task)
                bar.refresh()

            yield tick

    def header(self, meta: Row) -> None:
        self.say(
            f"dla-kernels {meta['dla_kernels']} (commit {meta['commit']}), torch {meta['torch']}, "
            f"{meta['device']}, {meta['threads']} threads, SIMD {meta['simd']}\n"
            f"features {meta['dtype']}, spec {meta['spec']}; copy of buffers of 4 x "
            f"{meta['cache_bytes'] / MIB:.0f} MiB (cache): {meta['copy_gb_per_s']:.1f} GB/s, "
            f"OMP_PROC_BIND={meta['omp_proc_bind']}\n"
            f"NHWC: inputs in torch.channels_last, else contiguous; eager, compile: the same layer "
            f"with fused=False; times: medians of interleaved rounds"
        )

    def op_table(self, rows: list[Row]) -> None:
        """One op at one shape: both modes, one line per contestant."""
        first = rows[0]
        columns = dict(OP_COLUMNS)
        if first["device"].startswith("cuda"):
            columns["host ms"] = "host_ms", 1, ".3f"
            columns["MiB/step"] = "step_bytes", 1 / MIB, ".0f"
        else:
            columns["faults/step"] = "page_faults", 1, ".0f"
        columns = {
            name: column for name, column in columns.items() if any(column[0] in r for r in rows)
        }
        title = f"{first['case']} {first['shape']} {first['dtype']}"
        table = Table("", "peer", title=title, title_justify="left")
        for name in columns:
            table.add_column(name, justify="right")
        for mode in MODES:
            chosen = [row for row in rows if row["mode"] == mode]
            for row, label in zip(chosen, [mode] + [""] * len(chosen), strict=False):
                cells = [cell(row, *column) for column in columns.values()]
                style = "bold" if row["role"] == "ours" else None
                table.add_row(label, row["peer"], *cells, style=style)
            table.add_section()
        self.console.print(table)

    def layer_summary(self, rows: list[Row]) -> None:
        """The layer's speed-up against the best PyTorch peer at every shape, and its mean."""
        rows = [row for row in rows if row["suite"] == "layer"]
        ours = list(dict.fromkeys(row["peer"] for row in rows if row["role"] == "ours"))
        title = "DLA-L layer: how many times as fast as the best PyTorch peer"
        table = Table("", "shape", "best peer", title=title, title_justify="left")
        table.columns[1].no_wrap = True
        for peer in ours:
            table.add_column(peer, justify="right", style="bold")
        means = layer_summary(rows)
        for mode in MODES:
            cases: dict[str, dict[str, Row]] = {}
            for row in rows:
                if row["mode"] == mode:
                    cases.setdefault(str(row["shape"]), {})[row["peer"]] = row
            for shape, case in cases.items():
                best = next((case[r["best_peer"]] for r in case.values() if "best_peer" in r), None)
                told = f"{best['peer']}, {best['ms']:.2f} ms" if best else "-"
                table.add_row(
                    mode, shape, told, *(cell(case[p], "speedup", 1, ".2f") for p in ours)
                )
            mean = (cell(means[mode], peer, 1, ".2f") for peer in ours)
            table.add_row(mode, "geometric mean", "", *mean)
            table.add_section()
        self.console.print(table)

    def model_table(self, rows: list[Row]) -> None:
        """Networks: every figure beside its ratio to the plain network's."""
        first = rows[0]
        title = f"{first['case']} (CIFAR), batch {first['shape'][0]}, {first['dtype']}"
        table = Table(title=title, title_justify="left")
        table.add_column("model", no_wrap=True)
        for name, *_ in MODEL_COLUMNS:
            table.add_column(name, justify="right")
            table.add_column("x\nplain", justify="right", style="bold")
        by_mode = {
            mode: {row["peer"]: row for row in rows if row["mode"] == mode} for mode in MODES
        }
        for peer in by_mode["training"]:
            cells = []
            for _, mode, key, scale in MODEL_COLUMNS:
                row = by_mode[mode][peer]
                cells += [cell(row, key, scale, ".1f"), cell(row, f"{key}_by_plain", 1, ".2f")]
            table.add_row(peer, *cells)
        self.console.print(table)
        added = [
            f"{row['peer']} {row['added_bytes_by_plain']:.2f}"
            for row in by_mode["training"].values()
            if "added_bytes_by_plain" in row
        ]
        base = next((row["base_bytes"] for row in rows if "base_bytes" in row), 0)
        if added:
            self.say(
                f"Peak memory of the process, {base / MIB:.0f} MiB of which were there before the "
                f"model; without those, x plain: {', '.join(added)}"
            )


# Heading: key in a row, factor, format.
OP_COLUMNS = {
    "ms": ("ms", 1, ".3f"),
    "x best peer": ("speedup", 1, ".2f"),
    "GB/s": ("gb_per_s", 1, ".1f"),
    "% copy": ("copy_percent", 1, ".0f"),
    "% copy own size": ("own_size_copy_percent", 1, ".0f"),
}
# Heading, mode, key in a row, factor.
MODEL_COLUMNS = [
    ("inference\nms", "inference", "ms", 1),
    ("training\nms", "training", "ms", 1),
    ("kept for\nbackward MiB", "training", "kept_bytes", 1 / MIB),
    ("peak memory\nMiB", "training", "peak_bytes", 1 / MIB),
]


def cell(row: Row, key: str, scale: float, form: str) -> str:
    """A figure of a row as text; a dash where the row has none."""
    if key not in row:
        return "skipped" if key == "ms" and "skipped" in row else "-"
    return format(row[key] * scale, form)


def require_matplotlib() -> None:
    """Raises SystemExit at once, not after minutes of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            "--plot needs matplotlib, which is in the extra 'bench': pip install '.[bench]'"
        )


def plot(rows: list[Row], meta: Row, path: str) -> None:
    """Draws single ops by their speed against the best peer, models by their cost against plain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: bars for title, bars in panels_of(rows).items() if bars}
    figure, axes = pyplot.subplots(
        max(len(panels), 1), 1, figsize=(10, 1 + 3 * len(panels)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (title, bars) in zip(axes.flat, panels.items(), strict=False):
        groups = list(dict.fromkeys(group for group, _ in bars))
        peers = list(dict.fromkeys(peer for _, peer in bars))
        width = 0.85 / len(peers)
        for index, peer in enumerate(peers):
            heights = [bars.get((group, peer), 0.0) for group in groups]
            places = np.arange(len(groups)) + (index - (len(peers) - 1) / 2) * width
            drawn = ax.bar(places, heights, width, label=peer)
            ax.bar_label(drawn, [f"{h:.2f}" if h else "" for h in heights], fontsize=6)
        ax.axhline(1, color="black", linewidth=0.7)
        ax.set_title(title, fontsize=9)
        ax.set_xticks(range(len(groups)), groups, fontsize=8)
        ax.margins(y=0.15)
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{meta['device']}, {meta['threads']} threads, torch {meta['torch']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def panels_of(rows: list[Row]) -> dict[str, dict[tuple[str, str], float]]:
    """Per panel: the height of the bar of every (group, peer)."""
    result = {
        f"{suite}, {mode}: times as fast as the best PyTorch peer (more is better)": {
            (f"{row['case']}\n{'x'.join(map(str, row['shape']))}", row["peer"]): row["speedup"]
            for row in rows
            if (row["suite"], row["mode"]) == (suite, mode) and "speedup" in row
        }
        for suite in ("layer", "ops")
        for mode in MODES
    }
    result["models: relative to the plain network (less is better)"] = {
        (heading.removesuffix("ms").removesuffix("MiB"), row["peer"]): row[f"{key}_by_plain"]
        for heading, mode, key, _ in MODEL_COLUMNS
        for row in rows
        if (row["suite"], row["mode"]) == ("model", mode) and f"{key}_by_plain" in row
    }
    return result
