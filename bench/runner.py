"""Runs the suites: builds the contestants, checks that they agree, times them, keeps the rows."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cases
import measure
import report
from cases import MODES, Contestant, Network, Peer, Settings, Shape
from dla.models import list_models

# float32 means float32, for all contestants alike.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

Row = dict[str, Any]
REPEATS = {"layer": 30, "ops": 30, "model": 20, "family": 10, "depth": 5}
DEPTHS = (20, 29, 56, 110)
QUICK_REPEATS = 2
PEAK_STEPS = 3
FIRST = replace(cases.LAYER, formats=(cases.NCHW,))  # whose first call is timed


class Bench:
    """One run: what was asked for, and what has been measured so far."""

    def __init__(self, options: argparse.Namespace, cpus: list[int]) -> None:
        self.options, self.cpus = options, cpus
        self.settings = settings = settings_of(options)
        self.view = report.View()
        cache = measure.last_level_cache(settings.device)
        self.bandwidth = measure.copy_bandwidth(settings.device, cache, repeats=5)
        meta = report.metadata(settings, cache, self.bandwidth)
        self.store = report.Store(options.json, meta)
        self.failures: list[str] = []

    def run(self) -> None:
        self.view.header(self.store.meta)
        suites = {
            "layer": self.layer,
            "ops": self.ops,
            "first": self.first,
            "model": lambda: self.model("model"),
            "family": lambda: self.model("family"),
            "depth": self.depth,
        }
        try:
            for suite in self.options.suite:
                suites[suite]()
        finally:  # of an interrupted run, what there is
            if self.options.plot:
                report.plot(self.store.rows, self.store.meta, self.options.plot)
                self.view.say(f"drawn: {self.options.plot}")

    def layer(self) -> None:
        """The main suite: one complete layer."""
        for shape in self.shapes():
            self.op("layer", cases.LAYER, shape)
        self.view.layer_summary(self.store.rows)

    def ops(self) -> None:
        """The standalone ops."""
        for case in cases.OPS:
            for shape in self.shapes():
                self.op("ops", case, shape)

    def shapes(self) -> list[Shape]:
        return self.options.shapes or (cases.QUICK_SHAPES if self.options.quick else cases.SHAPES)

    def op(self, suite: str, case: cases.OpCase, shape: Shape) -> None:
        """One op at one shape in both modes, and its table."""
        table = []
        for mode in MODES:
            key = {"suite": suite, "case": case.name, "op": case.op, "mode": mode}
            key["shape"] = list(shape)
            rows = self.contest(key, list(case.contestants(self.settings, shape, mode)))
            rate_op(rows, case.ideal_bytes(self.settings, shape, mode), self.bandwidth)
            self.store.add(rows)
            table += rows
        self.view.op_table(table)

    def depth(self) -> None:
        """How time and memory grow with the number of layers."""
        for depth in DEPTHS[:1] if self.options.quick else DEPTHS:
            self.model("depth", f"resnet{depth}")

    def model(self, networks: str, model: str | None = None) -> None:
        """Whole networks: time, activations kept and peak memory."""
        settings = replace(self.settings, networks=networks, model=model or self.settings.model)
        table = []
        for mode in MODES:
            key = {"suite": networks, "case": settings.model, "mode": mode}
            key["shape"] = [settings.batch, 3, 32, 32]
            rows = self.contest(key, list(cases.model_contestants(settings, mode)))
            if mode == "training":
                self.weigh(settings, rows)
            rate_models(rows)
            self.store.add(rows)
            table += rows
        self.view.model_table(table)

    def weigh(self, settings: Settings, rows: list[Row]) -> None:
        """Adds what each model keeps for backward and its peak memory while training."""
        with self.view.progress(f"{settings.model} memory", len(rows)) as tick:
            for row, (name, (case, backend)) in zip(
                rows, cases.networks(settings).items(), strict=True
            ):
                if "ms" in row:
                    network = Network(settings, case, training=True, backend=backend)
                    forward = cases.on_backend(backend, network.forward)
                    row["kept_bytes"] = measure.saved_bytes(forward, network.model.parameters())
                    del network, forward
                    row |= self.peak(settings, name)
                tick()

    def peak(self, settings: Settings, name: str) -> Row:
        """Peak memory of one model, trained in a process of its own."""
        try:
            return self.child("peak", settings, name=name)
        except RuntimeError as error:
            self.fail(f"peak memory of {name}: {error}")
            return {}

    def first(self) -> None:
        """What the first training step of the layer takes, at the first shape."""
        shape, case = self.shapes()[0], f"{FIRST.name}, first call"
        contestants = [
            c for c in FIRST.contestants(self.settings, shape, "training") if c.role != "copy"
        ]
        about = {"suite": "first", "case": case, "mode": "training", "shape": list(shape)}
        about |= {"dtype": dtype_name(self.settings.dtype), "device": str(self.settings.device)}
        rows = []
        with self.view.progress(case, len(contestants)) as tick:
            for contestant in contestants:
                measured = self.first_call(contestant, shape)
                rows.append({**about, "peer": contestant.name, "role": contestant.role, **measured})
                tick()
        self.store.add(rows)
        self.view.op_table(rows)

    def first_call(self, contestant: Contestant, shape: Shape) -> Row:
        """Its first step in a process of its own that finds nothing compiled."""
        caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        with tempfile.TemporaryDirectory() as empty:
            fresh = {name: str(Path(empty, name)) for name in caches}
            try:
                return self.child("first", self.settings, fresh, name=contestant.name, shape=shape)
            except RuntimeError as error:
                if contestant.role == "ours":
                    self.fail(f"first call of {contestant.name}: {error}")
                return {"skipped": str(error)}

    def child(
        self, what: str, settings: Settings, environment: Mapping[str, str] | None = None, **of: Any
    ) -> Row:
        """What `print_child` finds in a process of its own; RuntimeError if that fails."""
        child = {
            **of,
            "what": what,
            "cpus": self.cpus,
            "device": str(settings.device),
            "dtype": dtype_name(settings.dtype),
            "threads": torch.get_num_threads(),
            "settings": {
                key: getattr(settings, key)
                for key in (
                    "backends", "spec", "compile", "channels_last", "networks", "model", "batch",
                )
            },
        }  # fmt: skip
        script = Path(__file__).with_name("bench_dla.py")
        command = [sys.executable, str(script), "--child", json.dumps(child)]
        done = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(lines[-1])
        return json.loads(done.stdout.splitlines()[-1])

    def contest(self, key: Row, contestants: list[Contestant]) -> list[Row]:
        """One row per contestant, all timed in the same rounds."""
        repeats = self.options.repeats
        if repeats is None:
            repeats = QUICK_REPEATS if self.options.quick else REPEATS[key["suite"]]
        title = f"{key['case']} {key['shape']} {key['mode']}"
        with self.view.progress(title, len(contestants) * (repeats + 1)) as tick:
            peers, reasons = self.prepare(contestants, title, tick)
            samples = measure.interleaved(peers, repeats, self.settings.device, tick)
        about = {"dtype": dtype_name(self.settings.dtype), "device": str(self.settings.device)}
        measured = {name: sample.row(self.settings.device) for name, sample in samples.items()}
        measured |= {name: {"skipped": reason} for name, reason in reasons.items()}
        return [
            {**key, **about, "peer": c.name, "role": c.role, **measured[c.name]}
            for c in contestants
        ]

    def prepare(
        self, contestants: list[Contestant], title: str, tick: Callable[[], None]
    ) -> tuple[dict[str, Peer], dict[str, str]]:
        """Builds, warms up and checks every contestant; those that fail, with the reason."""
        peers: dict[str, Peer] = {}
        reasons: dict[str, str] = {}
        answers: dict[str, list[torch.Tensor]] = {}
        # Ours last: the eager reference is what the others are compared with.
        for contestant in sorted(contestants, key=lambda c: c.role == "ours"):
            name = contestant.name
            try:
                with measure.unbound(self.cpus):  # for the compilers that torch.compile starts
                    peer = contestant.build()
                    answer = measure.warm_up(peer)
                expected = answers.setdefault(contestant.answer, answer)
                error = measure.disagreement(answer, expected)
                if error > measure.TOLERANCE[self.settings.dtype]:
                    raise ArithmeticError(f"results differ from the reference by {error:.1g}")
                peers[name] = peer
            except Exception as error:  # whatever it is, the others can still be measured
                reasons[name] = first_line(error)
                if contestant.role == "ours" or isinstance(error, ArithmeticError):
                    self.fail(f"{title}: {name}: {reasons[name]}")
                else:
                    self.view.say_once(f"{name} skipped: {reasons[name]}")
            tick()
        return peers, reasons

    def fail(self, message: str) -> None:
        """Says it now; the exit status tells it at the end."""
        self.failures.append(message)
        self.view.say(f"FAILED: {message}")


def rate_op(rows: list[Row], ideal: int | None, bandwidth: float) -> None:
    """Adds to each row its speed against the best peer, and its rate by the ideal bytes.

    speedup: time of the best peer by this row's. gb_per_s: the bytes that cannot be avoided by the
    time, and that in percent of a copy between large buffers and of a copy of one feature map.
    """
    timed = [row for row in rows if "ms" in row]
    best = min((row for row in timed if row["role"] == "peer"), key=lambda r: r["ms"], default=None)
    copy = next((row for row in timed if row["role"] == "copy"), None)
    for row in timed:
        if row["role"] != "copy" and best is not None:
            row["best_peer"] = best["peer"]
            row["speedup"] = best["ms"] / row["ms"]
        moved = 2 * map_bytes(row) if row["role"] == "copy" else ideal
        if moved is not None:
            row["ideal_bytes"] = moved
            row["gb_per_s"] = moved / row["ms"] / 1e6
            row["copy_percent"] = 100 * row["gb_per_s"] / bandwidth
            if copy is not None:
                own = 2 * map_bytes(row) / copy["ms"] / 1e6
                row["own_size_copy_percent"] = 100 * row["gb_per_s"] / own


def map_bytes(row: Row) -> int:
    return torch.Size(row["shape"]).numel() * getattr(torch, row["dtype"]).itemsize


def rate_models(rows: list[Row]) -> None:
    """Adds to each row what it needs relative to the first one, the plain network."""
    plain = rows[0]
    for row in rows:
        if "peak_bytes" in row:
            row["added_bytes"] = row["peak_bytes"] - row["base_bytes"]
        for what in ("ms", "kept_bytes", "peak_bytes", "added_bytes"):
            if what in row and what in plain:
                row[f"{what}_by_plain"] = row[what] / plain[what]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    """What went wrong in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def default_device(name: str | None) -> torch.device:
    """The named device, else a GPU where there is one, else the CPU.

    Raises:
        SystemExit: the device is not there or is neither a CPU nor a CUDA device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SystemExit(f"--device: expected cpu, cuda or cuda:1 .., not {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device: expected cpu or cuda, not {name}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {name}: torch {torch.__version__} finds no CUDA device")
        if device.index is not None:
            torch.cuda.set_device(device)  # where events are recorded
    return device


def settings_of(options: argparse.Namespace) -> Settings:
    quick = options.quick
    model = options.model or ("resnet20" if quick else "resnet56")
    known = [name.removesuffix("_plain") for name in list_models("*_plain")]
    if model not in known:
        raise SystemExit(f"--model: expected one of {', '.join(known)}, not {model}")
    return Settings(
        device=default_device(options.device),
        dtype=getattr(torch, options.dtype),
        backends=options.backends,
        spec=options.spec,
        compile=not (options.no_compile or quick),
        channels_last=options.channels_last,
        model=model,
        batch=options.batch or (4 if quick else 32),
    )


def print_child(child: Row) -> int:
    """In a process of its own: measures what `Bench.child` asks for and prints it."""
    torch.set_num_threads(child["threads"])
    chosen = child["settings"]
    chosen["backends"] = tuple(chosen["backends"])
    settings = Settings(
        device=default_device(child["device"]), dtype=getattr(torch, child["dtype"]), **chosen
    )
    measured = {"peak": peak_of, "first": first_call_of}[child["what"]](settings, child)
    print(json.dumps(measured))
    return 0


def peak_of(settings: Settings, child: Row) -> Row:
    """Trains one model for a few steps."""
    case, backend = cases.networks(settings)[child["name"]]

    def train() -> None:
        peer = Network(settings, case, training=True, backend=backend).peer()
        for _ in range(PEAK_STEPS):
            peer.step()
            peer.reset()

    return measure.peak_memory(train, settings.device)


def first_call_of(settings: Settings, child: Row) -> Row:
    """Builds one contestant and trains for a step, from a device that is awake to the results."""
    contestants = FIRST.contestants(settings, tuple(child["shape"]), "training")
    build = next(c.build for c in contestants if c.name == child["name"])
    torch.ones(1, device=settings.device).item()
    start = time.perf_counter()
    peer = build()
    results = peer.results(peer.step())
    results[-1].sum().item()  # waits for a GPU
    return {"ms": (time.perf_counter() - start) * 1e3}


def run(options: argparse.Namespace, cpus: list[int]) -> int:
    """The whole benchmark; the exit status is 1 if anything of ours failed."""
    if options.plot:
        report.require_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    # Compilers and torch warn about matters that no reader of the tables can act on.
    warnings.filterwarnings("ignore")
    bench = Bench(options, cpus)
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.view.say("interrupted; " + bench.store.whereabouts())
        return 130
    return 1 if bench.failures else 0
