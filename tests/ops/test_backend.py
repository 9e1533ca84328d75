"""Choice of backends: explicit, automatic, and what is said about it."""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.util
import json
import logging
import re
import threading
from pathlib import Path

import _dla_native
import pytest
import torch

import dla_kernels
from dla_kernels import native, use_backend
from dla_kernels.backend import BACKENDS, _automatic_order, _class_of, implementation
from dla_kernels.ops import _calls, cuda_common
from dla_kernels.ops.common import CLASS_SIZES, LAYOUTS
from op_cases import op_names, python, skips
from op_samples import NAMES, SMALL, Call, sample

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [f"{k}_{size}" for k in (*LAYOUTS.values(), "rows") for size in (*CLASS_SIZES, "more")]
EACH_OP = pytest.mark.parametrize("op", op_names())
WITHOUT_EXTENSION = "import sys; sys.modules['_dla_native'] = None\n"
WITHOUT_CUDA = "import sys; sys.modules['_dla_native_cuda'] = None\n"
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
BROKEN_TRITON = """
import sys, types
parts = "", ".language", ".runtime", ".runtime.cache"
sys.modules.update((name, types.ModuleType(name)) for name in ("triton" + part for part in parts))
sys.modules["triton.runtime.cache"].get_cache_manager = None
"""
# python -m dla_kernels
REPORT = """
import runpy
sys.argv[:] = ["dla_kernels"]
runpy.run_module("dla_kernels", run_name="__main__")
"""
POOL = """
import torch, dla_kernels
x = torch.ones(2, 3, 4, 4)
"""


def test_report_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    report = importlib.import_module("dla_kernels.__main__").main
    with pytest.raises(SystemExit):
        report(["--bad"])
    assert "--bad" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report(["--help"])
    assert "which backends serve it" in capsys.readouterr().out


def test_report_leaves_the_precision_of_others_alone() -> None:
    report, cudnn = importlib.import_module("dla_kernels.__main__"), torch.backends.cudnn
    before = cudnn.allow_tf32
    with report.without_tf32():
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32 == before


def first_sample(op: str) -> Call:
    return sample(op, next(variant for name, variant in NAMES if name == op), SMALL)


def call(op: str) -> None:
    made = first_sample(op)
    made.function(*made.inputs.values(), **made.flags)


def serving(op: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends whose forward runs, in order, from now on."""
    seen: list[str] = []
    for name in ("cpp", "reference"):
        module = importlib.import_module(f"dla_kernels.ops.{op}.{name}")

        def spy(*args, name=name, forward=module.forward, **kwargs):
            seen.append(name)
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", spy)
    # Of calls of a form that came before, in other tests, it is known what serves them.
    describe, new = _calls._form_of_tensors(), object()
    monkeypatch.setattr(_calls, "_form_of_tensors", lambda: lambda *args: (describe(*args), new))
    return seen


@EACH_OP
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_explicit_choice_is_obeyed(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = serving(op, monkeypatch)
    with use_backend(backend):
        call(op)
    assert seen == [backend]


@EACH_OP
def test_automatic_choice_takes_the_kernels(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = serving(op, monkeypatch)
    call(op)
    with use_backend("auto"):
        call(op)
    assert seen == ["cpp", "cpp"]


def test_choice_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested, left by an error, and used twice."""
    seen = serving("global_pool", monkeypatch)
    again = use_backend("reference")
    with use_backend("reference"):
        call("global_pool")
        with use_backend("cpp"):
            call("global_pool")
        call("global_pool")
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    call("global_pool")
    with again:
        call("global_pool")
    call("global_pool")
    assert seen == ["reference", "cpp", "reference", "cpp", "reference", "cpp"]


def test_choice_is_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice in one thread does not reach another one that runs at the same time."""
    seen = serving("global_pool", monkeypatch)
    entered, done = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("reference"):
            entered.set()
            done.wait(10)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        assert entered.wait(10)
        call("global_pool")
        done.set()
        future.result()
    assert seen == ["cpp"]


def test_decorated_function_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has a choice of its own, which ends with it."""
    seen = serving("global_pool", monkeypatch)
    barrier = threading.Barrier(2)

    @use_backend("reference")
    def decorated() -> None:
        barrier.wait(10)
        call("global_pool")
        barrier.wait(10)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(decorated) for _ in range(2)]:
            future.result()
    call("global_pool")
    assert seen == ["reference", "reference", "cpp"]


def test_one_object_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which leave its blocks in the order in which they entered them."""
    seen = serving("global_pool", monkeypatch)
    shared, entered, left = use_backend("reference"), threading.Event(), threading.Event()

    def other() -> None:
        with shared:
            entered.set()
            assert left.wait(10)
            call("global_pool")
        call("global_pool")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with shared:
            future = pool.submit(other)
            assert entered.wait(10)
        left.set()
        future.result()
    call("global_pool")
    assert seen == ["reference", "cpp", "cpp"]


def refusals(requested: str, prefix: str = "") -> dict[str, str]:
    """What each op says in a process of its own when CPU tensors are to be served by a backend."""
    done = python(
        f"""{prefix}
import importlib, json, torch, dla_kernels
said = {{}}
for op in {op_names()}:
    example = importlib.import_module(f"dla_kernels.ops.{{op}}.example").example
    try:
        with dla_kernels.use_backend({requested!r}):
            getattr(dla_kernels, op)(**example(torch.device("cpu")))
    except RuntimeError as error:
        said[op] = str(error)
print(json.dumps(said))
"""
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("requested", ["cuda", "triton"])
def test_request_that_cannot_be_served(requested: str) -> None:
    """An explicit request never falls back; the error says what asked, why not and what helps."""
    said = refusals(requested)
    assert said.keys() == set(op_names())
    for op, message in said.items():
        assert op in message and requested in message
        assert "use_backend" in message, f"no remedy: {message}"


def test_cuda_kernels_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module loads, but for other GPUs or a newer driver: another backend is taken."""

    def load() -> None:
        raise RuntimeError("install a newer NVIDIA driver")

    monkeypatch.setattr(native, "EMULATE_CUDA", True)
    monkeypatch.setattr(native, "cuda_error", lambda: None)
    monkeypatch.setattr(native, "load_cuda", load)
    monkeypatch.setattr(cuda_common, "_unusable", cuda_common._unusable.__wrapped__)
    assert "newer NVIDIA driver" in cuda_common.unsupported(torch.ones(1, 1, 1, 1))


@pytest.mark.skipif(
    importlib.util.find_spec("_dla_native_cuda") is None, reason="needs CUDA kernels, built by nvcc"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU's driver")
def test_cuda_kernels_without_a_driver() -> None:
    """The module loads; a launch says which op and sizes it was for, and what is missing."""
    launch = "from dla_kernels.ops.global_pool import cuda; cuda.forward(torch.ones(2, 3, 4, 5))"
    done = python(f"import torch, _dla_native_cuda; print('loaded')\n{launch}")
    assert done.stdout == "loaded\n", done.stderr
    for words in ("global_pool on [batch 2, channels 3, area 20]: ", "NVIDIA driver"):
        assert words in done.stderr, done.stderr


def test_request_of_cuda_where_there_is_none() -> None:
    """Both that the kernels are not built, with the way to get them, and that x is on the CPU."""
    said = refusals("cuda", WITHOUT_CUDA)
    assert said.keys() == set(op_names())
    for message in said.values():
        for words in ("_dla_native_cuda is not installed", "DLA_BUILD_CUDA=1", "x is on cpu"):
            assert words in message, message


def test_request_of_a_backend_that_does_not_import() -> None:
    """The package imports; only asking for Triton is an error, with the way to get it."""
    said = refusals("triton", WITHOUT_TRITON)
    assert said.keys() == set(op_names())
    for message in said.values():
        assert "triton" in message and "pip install triton" in message, message


def test_request_of_a_backend_that_is_broken() -> None:
    """Whatever its import raises is the reason."""
    said = refusals("triton", BROKEN_TRITON)
    assert said.keys() == set(op_names())
    for message in said.values():
        assert "AttributeError: module 'triton' has no attribute" in message, message


@pytest.mark.parametrize("version", [pytest.param("3.5.1", marks=skips("triton"))])
def test_old_triton_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_common = importlib.import_module("dla_kernels.ops.triton_common")
    monkeypatch.setattr(triton_common.triton, "__version__", version)
    reason = triton_common.unsupported(torch.ones(1, 1, 1, 1))
    assert "3.6" in reason and version in reason and "pip install" in reason


def test_what_is_not_asked_for_is_not_imported() -> None:
    """A broken Triton does not matter to a call on a CPU."""
    run = "dla_kernels.global_pool(x); assert 'dla_kernels.ops.triton_common' not in sys.modules"
    done = python(BROKEN_TRITON + POOL + run)
    assert done.returncode == 0, done.stderr


@EACH_OP
def test_automatic_order(op: str) -> None:
    """By device; for GPUs as the package data say, which name our ops, classes and backends."""
    assert _automatic_order(op, None) == ("cpp", "reference")
    for shape_class in CLASSES:
        order = _automatic_order(op, shape_class)
        assert set(order) == {"cuda", "triton", "reference"} and order[-1] == "reference"
    data = json.loads(Path(dla_kernels.__file__).with_name("dispatch.json").read_text())
    default, *orders = data["order"].pop("default"), *data["order"].values()
    assert sorted(default) == ["cuda", "triton"]
    assert data["order"].keys() <= set(op_names())
    assert all(of_op.keys() <= {"default", *CLASSES} for of_op in orders)
    assert data["why"] and all((ROOT / name).is_file() for name in data["results"])


def test_order_by_shape_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own entry for a class of shapes, else that for the op, else the common one."""
    table = {"default": ["cuda", "triton"], "gate": {"default": ["cuda", "triton"]}}
    table["gate"]["nhwc_64"] = ["triton", "cuda"]
    monkeypatch.setattr(json, "loads", lambda text: {"order": table})
    chosen = _automatic_order.__wrapped__
    assert chosen("gate", "nhwc_64")[0] == "triton"
    assert chosen("gate", "nchw_64")[0] == chosen("cell", "nhwc_64")[0] == "cuda"


@pytest.mark.parametrize("batch", [1, 300])
def test_shape_class(batch: int) -> None:
    """Format and pixels of the first map, whatever the batch; the width of a call without maps."""
    pooled, nchw = torch.ones(batch, 300), torch.ones(batch, 2, 7, 7)
    nhwc = torch.ones(batch, 2, 40, 40).to(memory_format=torch.channels_last)
    assert _class_of(nchw, [nchw, nhwc]) == "nchw_64"
    assert _class_of(pooled, [pooled, nhwc]) == "nhwc_more"
    assert _class_of(pooled, [pooled, torch.ones(2, batch, 300), [pooled]]) == "rows_1024"


@pytest.mark.parametrize("name", ["", "CPP", "numpy"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError) as info, use_backend(name):
        pass
    assert repr(name) in str(info.value)
    assert all(known in str(info.value) for known in (*BACKENDS, "auto"))


def test_explicit_request_without_the_extension() -> None:
    """The package imports; only asking for its kernels is an error, with the way to get them."""
    done = python(
        WITHOUT_EXTENSION + POOL + "with dla_kernels.use_backend('cpp'): dla_kernels.global_pool(x)"
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert any(line.startswith("RuntimeError") for line in last), done.stderr
    for word in ("cpp", "global_pool", "_dla_native", "pip install"):
        assert word in done.stderr, f"does not say {word}: {done.stderr}"


def test_automatic_choice_is_logged_once() -> None:
    """One line per op and reason; with the kernels at hand and without."""
    repeated = POOL + (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "for _ in range(3): dla_kernels.global_pool(x)\n"
        "for _ in range(3): dla_kernels.gate([x], [x[:, :, 0, 0]])\n"
    )
    for prefix, chosen in (("", "cpp"), (WITHOUT_EXTENSION, "reference")):
        done = python(prefix + repeated)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if "dla_kernels" in line]
        for op in ("global_pool", "gate"):
            about = [line for line in lines if op in line and chosen in line]
            assert len(about) == 1, f"{len(about)} lines about {op}: {done.stderr}"


def test_fallback_warns_without_logging_being_set_up() -> None:
    """Running without the compiled kernels is slow: that must not pass in silence, nor flood."""
    done = python(WITHOUT_EXTENSION + POOL + "for _ in range(3): dla_kernels.global_pool(x)")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("global_pool") == 1, done.stderr
    quiet = python(POOL + "dla_kernels.global_pool(x)")
    assert quiet.stderr == ""


def test_call_that_is_refused_goes_to_the_next_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A backend may refuse a single call: the next one serves it, and the reason is logged once."""
    seen = serving("global_pool", monkeypatch)
    cpp = implementation("global_pool", "cpp")
    monkeypatch.setattr(
        cpp,
        "refuses",
        lambda backward, x: "it is too wide" if x.shape[3] > 9 else None,
        raising=False,
    )
    wide, narrow = torch.ones(1, 2, 3, 10), torch.ones(1, 2, 3, 4)
    with caplog.at_level(logging.DEBUG, "dla_kernels"):
        for x in (wide, narrow, wide):
            dla_kernels.global_pool(x)
    assert seen == ["reference", "cpp", "reference"]
    assert len([line for line in caplog.messages if "it is too wide" in line]) == 1
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"it is too wide.*use_backend"):
        dla_kernels.global_pool(wide)


@pytest.mark.parametrize("where", ["repository", "elsewhere"])
def test_report(where: str, tmp_path: Path) -> None:
    """python -m dla_kernels: versions, backends per op (and how they fare), SIMD, threads."""
    done = python(["-m", "dla_kernels"], cwd=ROOT if where == "repository" else tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for word in (torch.__version__, dla_kernels.__version__, *op_names(), "cpp", "reference"):
        assert word in said, f"does not say {word}:\n{said}"
    assert re.search(rf"SIMD.*{_dla_native.simd_level()}", said), said
    assert re.search(rf"threads\s+{torch.get_num_threads()}", said), said
    for op in op_names():  # the self-check of both backends, on a GPU of more
        row = next(line for line in said.splitlines() if re.search(rf"\b{op}\b", line))
        assert row.count("ok") >= 2, f"{op}: {row}"


def test_report_without_the_extension() -> None:
    """The report is what a user runs when something is wrong: it must not fail then."""
    done = python(WITHOUT_EXTENSION + WITHOUT_TRITON + REPORT)
    assert "Traceback" not in done.stderr
    for word in ("_dla_native", "pip install .", "pip install triton"):
        assert word in done.stdout, done.stdout


def test_report_without_cuda_kernels() -> None:
    """Why the build left them out, and how to get them."""
    pretend = "import torch, _dla_native; _dla_native.without_cuda = lambda: 'nvcc was asleep'"
    done = python(WITHOUT_CUDA + pretend + REPORT)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert re.search(
        r"CUDA kernels the compiled module _dla_native_cuda is not installed: "
        r"nvcc was asleep; .*DLA_BUILD_CUDA=1 pip install",
        said,
    ), said
