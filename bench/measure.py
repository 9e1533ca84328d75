"""Clocks, page faults, copy bandwidth, saved activations and peak memory."""

from __future__ import annotations

import gc
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases import Peer

WARM_UP = 3
# ||a - b|| / ||b|| that a peer may have before its time is refused. Wider than the tests: it is
# to catch a peer that computes something else, in one unlucky float32 sum as well.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


@dataclass
class Sample:
    """What was measured of one peer, step by step: see `timed`."""

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, ms: float, host_ms: float, memory: int) -> None:
        self.ms.append(ms)
        self.host_ms.append(host_ms)
        self.memory.append(memory)

    def row(self, device: torch.device) -> dict[str, Any]:
        """Median, quartiles and extremes of the times; medians of the other figures."""
        first, median, third = np.percentile(self.ms, [25, 50, 75]).tolist()
        row = {
            "ms": median,
            "ms_quartiles": [first, third],
            "ms_range": [min(self.ms), max(self.ms)],
            "repeats": len(self.ms),
        }
        memory = np.median(self.memory).item()
        if device.type == "cuda":
            return row | {"host_ms": np.median(self.host_ms).item(), "step_bytes": memory}
        return row | {"page_faults": memory}


SLEEP = 20_000_000  # cycles of a GPU, about ten milliseconds


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float, int]:
    """Milliseconds of one step, milliseconds that the host was busy, and what it took of memory.

    On a GPU by CUDA events, with the peak of the bytes allocated during the step; the GPU sleeps
    first, so that it need not wait for a host that launches within that time, as in a training
    loop. On a CPU by the wall clock, with the minor page faults.
    """
    # `result` is held until the clock has stopped: freeing it is no part of the step.
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda._sleep(SLEEP)
        begin.record()
        start = time.perf_counter()
        result = step()
        host_ms = (time.perf_counter() - start) * 1e3
        end.record()
        end.synchronize()
        memory = torch.cuda.max_memory_allocated(device) - before
        ms = begin.elapsed_time(end)
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        result = step()
        ms = host_ms = (time.perf_counter() - start) * 1e3
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del result
    return ms, host_ms, memory


def interleaved(
    peers: Mapping[str, Peer], repeats: int, device: torch.device, tick: Callable[[], None]
) -> dict[str, Sample]:
    """``repeats`` rounds; each runs every peer once, in a new (reproducible) order.

    A slow moment of the machine then hits all peers, and no peer always follows the same one.
    """
    samples = {name: Sample() for name in peers}
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name in shuffle.sample(list(peers), len(peers)):
                samples[name].add(*timed(peers[name].step, device))
                peers[name].reset()
                tick()
    finally:
        gc.enable()
    return samples


def warm_up(peer: Peer) -> list[Tensor]:
    """Runs a peer until it is ready to be timed; returns the results of its first step."""
    results = [tensor.detach().clone() for tensor in peer.results(peer.step())]
    for _ in range(WARM_UP - 1):
        peer.reset()
        peer.step()
    peer.reset()
    return results


@contextmanager
def unbound(cpus: Collection[int]) -> Iterator[None]:
    """Lifts the binding of the main thread, so that processes it starts may use all CPUs."""
    if not cpus:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def disagreement(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference between two lists of results, as in tests/tolerances.py.

    Some gradients are mathematically zero: the norm of the largest result bounds what counts.
    """
    floor = 1e-3 * max(tensor.double().norm().item() for tensor in expected)
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        error = (a.double() - b.double()).norm().item()
        worst = max(worst, error / max(b.double().norm().item(), floor))
        if error != error:
            return float("inf")
    return worst


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes) or 64 * 2**20


def copy_bandwidth(device: torch.device, cache: int, repeats: int) -> float:
    """GB/s, read plus written, of a copy between buffers four times the last-level cache."""
    source = torch.ones(4 * cache, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device)[0] for _ in range(repeats + 1)][1:]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters left out.

    Tensors that an autograd function hides on its ctx escape: hence the peak memory beside it.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # kept alive, so that no address is seen twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def resident_bytes(key: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process.

    Not ru_maxrss: Linux hands that down from the parent through fork and exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak_memory(train: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Peak of this process while ``train`` builds and trains a model, and what it was before.

    On a GPU the memory that torch allocated there; on a CPU the resident set, in which the
    libraries are included (``base_bytes``). Empty where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        train()
        return {"base_bytes": base, "peak_bytes": torch.cuda.max_memory_allocated(device)}
    if not Path("/proc/self/status").exists():
        return {}
    base = resident_bytes("VmRSS")
    train()
    return {"base_bytes": base, "peak_bytes": resident_bytes("VmHWM")}
