"""Choice of launch settings by measurement: when, what it depends on, what is remembered."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dla_kernels.backend import backends_of
from op_cases import DENSE, INTERPRETED, compare, op_names, python, skips
from op_samples import SAMPLES, sample

pytestmark = skips("triton")
OPS = [op for op in op_names() if "triton" in backends_of(op)]
SETTINGS = ("first", "second", "third")
# Where a plane is larger than a tile; where channels are more than a few.
SHAPES = {"nchw": (1, 2, 17, 31), "nhwc": (1, 20, 3, 5)}


class Kernel:
    """In place of a compiled kernel; keeps how it was launched."""

    cache_key, __name__ = "its source", "kernel"

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((grid, options["num_warps"]))


class Timer:
    """In place of the one on a GPU: takes its times from a list, over and over."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = times, 0

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        self.calls += 1
        return self.times[(self.calls - 1) % len(self.times)]


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module as on a GPU, with nothing chosen yet and an empty cache on disk."""
    module = importlib.import_module("dla_kernels.ops.triton_tuning")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "ENABLED", True)
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return module


@pytest.fixture
def timer(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> Timer:
    """The third setting is fastest."""
    made = Timer(3.0, 2.0, 1.0)
    monkeypatch.setattr(tuning, "_milliseconds", made)
    return made


def choice(tuning: Any, about: tuple[Any, ...] = (), kernel: Any = None) -> str:
    return tuning.fastest(kernel or Kernel(), about, SETTINGS, lambda setting: None)


def test_fastest_is_measured_once(tuning: Any, timer: Timer) -> None:
    kernel = Kernel()
    assert [choice(tuning, ("nchw",), kernel) for _ in range(3)] == ["third"] * 3
    assert timer.calls == 3
    timer.times = 1.0, 2.0, 3.0
    assert choice(tuning, ("nhwc",), kernel) == "first"


def test_what_is_hardly_faster_is_not_taken(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise must not decide about the last bits of results."""
    monkeypatch.setattr(tuning, "_milliseconds", Timer(1.0, 0.97, 0.96))
    assert choice(tuning) == "first"


def test_choice_is_remembered_on_disk(tuning: Any, timer: Timer, tmp_path: Path) -> None:
    """By another process, which then measures nothing."""
    about = ("nchw", torch.ones(1), None, True)
    assert choice(tuning, about) == "third"
    done = python(
        f"""
import torch
from dla_kernels.ops import triton_tuning as tuning
torch.cuda.is_initialized, torch.cuda.current_device = lambda: True, lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
tuning._device_name, tuning._milliseconds = lambda: "some GPU", None
class Kernel: cache_key = "its source"
print(tuning.fastest(Kernel, ("nchw", torch.ones(2), None, True), {SETTINGS}, None))
""",
        env={"TRITON_CACHE_DIR": str(tmp_path), "DLA_AUTOTUNE": "1"},
    )
    assert done.stdout.strip() == "third", done.stderr


def test_another_gpu_or_kernel_is_measured(
    tuning: Any, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk of one GPU, or of a kernel before it was changed, says nothing."""
    choice(tuning)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_device_name", lambda: "another GPU")
    choice(tuning)
    changed = Kernel()
    changed.cache_key = "its new source"
    choice(tuning, kernel=changed)
    assert timer.calls == 9


def test_default_where_nothing_may_be_measured(
    tuning: Any, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is remembered of it."""
    for owner, name, value in (
        (tuning, "ENABLED", False),
        (torch.cuda, "is_initialized", lambda: False),
        (torch.cuda, "is_current_stream_capturing", lambda: True),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert choice(tuning) == "first", name
    assert timer.calls == 0 and not tuning._chosen
    assert choice(tuning) == "third"


def test_capture_takes_what_was_chosen_before(
    tuning: Any, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    choice(tuning, (), kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice(tuning, (), kernel) == "third"


def test_full_memory(tuning: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The timer needs some itself: without it there is no measuring, and no second attempt."""

    def fail(run: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError

    kernel = Kernel()
    monkeypatch.setattr(tuning, "_milliseconds", fail)
    assert choice(tuning, (), kernel) == "first"
    monkeypatch.setattr(tuning, "_milliseconds", Timer(2.0, 1.0, 3.0))
    assert choice(tuning, (), kernel) == "first"
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("variable", "value", "on"),
    [("DLA_AUTOTUNE", "0", False), ("DLA_AUTOTUNE", "1", True), ("TRITON_INTERPRET", "1", False)],
)
def test_switch(
    tuning: Any, variable: str, value: str, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DLA_AUTOTUNE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tuning.switched_on()
    monkeypatch.setenv(variable, value)
    assert tuning.switched_on() == on


def test_launches(tuning: Any, timer: Timer) -> None:
    """Measured once per dtype, format and size of planes, whatever the batch; then launched so."""
    common = importlib.import_module("dla_kernels.ops.triton_common")
    kernel = Kernel()

    def launch(*shape: int, dtype: torch.dtype = torch.float32, nhwc: bool = False) -> int:
        x = torch.empty(shape, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if nhwc else x
        before = timer.calls
        common.launch_tiles(common.tiles(x), kernel, x, None, 1e-5)
        return timer.calls - before

    assert [launch(batch, 64, 28, 28) for batch in (2, 1, 50)] == [3, 0, 0]
    whole = common.tiles(torch.empty(50, 64, 28, 28))
    halved, warps = common.SETTINGS[2]
    assert kernel.launches[-1] == ((whole.halved.programs, 1), warps) and halved
    assert whole.halved.programs > whole.programs
    assert launch(2, 64, 28, 28, dtype=torch.float16) == 3
    assert launch(2, 64, 28, 28, nhwc=True) == launch(2, 64, 7, 7) == launch(2, 64, 7, 7) + 3
    common.launch_tiles(whole, kernel, tuned=False)
    assert kernel.launches[-1] == ((whole.programs, 1), common.SETTINGS[0].warps)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["triton"])
def test_halved_tiles(backend: str, op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other settings compute the same (warps make no difference to an interpreter)."""
    tuning = importlib.import_module("dla_kernels.ops.triton_tuning")
    monkeypatch.setattr(tuning, "fastest", lambda kernel, about, settings, run: settings[-1])
    variant = "static" if "static" in SAMPLES[op] else next(iter(SAMPLES[op]))
    call = sample(op, variant, SHAPES[layout], layout=layout)
    compare(op, backend, call.inputs, call.cotangents, case=torch.float32, **call.options)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: kernels are timed")
@pytest.mark.parametrize("layout", DENSE)
def test_on_the_device(layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real measurement: it ends, is kept, and leaves the results right."""
    tuning = importlib.import_module("dla_kernels.ops.triton_tuning")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    with torch.device("cuda"):
        call = sample("light_attention", "official", (8, 64, 28, 28), layout=layout)
        compare(
            "light_attention", "triton", call.inputs, call.cotangents, case=torch.float32,
            **call.options,
        )  # fmt: skip
    assert tuning._chosen and list(tmp_path.rglob(tuning.FILE))
