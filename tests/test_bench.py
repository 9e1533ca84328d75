"""The benchmark's own arithmetic, and one short run of the whole of it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tolerances import MODELS, assert_close

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import bench_dla  # noqa: E402
import cases  # noqa: E402
import dispatch  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import runner  # noqa: E402

CPU = torch.device("cpu")


def quick_bench(*arguments: str) -> runner.Bench:
    options = bench_dla.parser().parse_args(["--quick", "--device", "cpu", *arguments])
    return runner.Bench(options, cpus=[])


@pytest.mark.parametrize("text", ["2x32x8x4", "[2,32,8,4]", "2, 32, 8, 4"])
def test_shapes_are_read(text: str) -> None:
    assert bench_dla.shape(text) == (2, 32, 8, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "2x3"],
        ["--suite", "lairs"],
        ["--suite", ","],
        ["--backends", "cpp,gpu"],
        ["--repeats", "0"],
        ["--json", "no/folder/results.json"],
    ],
)
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_dla.parser().parse_args(arguments)
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "foo"], "--model: expected one of resnet20, .*, not foo"),
        (["--device", "foo"], "--device: expected cpu, cuda or cuda:1 .., not foo"),
        (["--device", "meta"], "--device: expected cpu or cuda, not meta"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs(
    arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        quick_bench(*arguments)


def test_quick_only_sets_defaults() -> None:
    asked = quick_bench("--model", "resnet29", "--batch", "2").settings
    assert (asked.model, asked.batch) == ("resnet29", 2)
    assert (quick_bench().settings.model, quick_bench().settings.batch) == ("resnet20", 4)


def test_all_backends_are_those_with_kernels_for_the_device() -> None:
    chosen = cases.LAYER.backends(cases.Settings(CPU, backends=("all",)))
    # Whether emulated CUDA is there depends on what this process has tested before.
    assert {"cpp"} <= set(chosen) <= {"cpp", "triton", "cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_check_on_a_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BENCH / "gpu_check.sh"), str(tmp_path / "results")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


# Finds a GPU, and measures one of two suites on it.
STUB = """#!/bin/sh
case "$*" in
  *dispatch.py*) echo "$@" ;;
  *layer_bfloat16.json*) echo "{}" >"$out/layer_bfloat16.json" ;;
  *bench_dla.py*) exit 3 ;;
esac
"""


def test_check_on_a_gpu_keeps_what_it_has(tmp_path: Path) -> None:
    """Whatever fails, the steps after it run, and all there is comes in one file."""
    python, out = tmp_path / "python", tmp_path / "results"
    python.write_text(STUB)
    python.chmod(0o755)
    done = subprocess.run(
        [str(BENCH / "gpu_check.sh"), str(out)],
        env={
            **os.environ,
            "PYTHON": str(python),
            "STEPS": "layer_bfloat16 ops_bfloat16 dispatch",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "FAILED: ops_bfloat16 (exit status 3)\n" in done.stdout
    assert (out / "dispatch.log").read_text().count(".json") == 2  # what is written, what is read
    with tarfile.open(f"{out}.tar.gz") as archive:
        names = {"layer_bfloat16.json", "layer_bfloat16.log", "ops_bfloat16.log", "dispatch.log"}
        assert set(archive.getnames()) == {"results", *(f"results/{name}" for name in names)}


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(10))
    x = torch.randn(6, 10, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x * weight  # keeps x and weight
        return y.exp() * y.view(60).view(6, 10)  # exp keeps its output, the product that and y

    assert measure.saved_bytes(forward, [weight]) == 3 * 60 * 4


def test_saved_bytes_counts_the_whole_storage_of_a_slice() -> None:
    base = torch.randn(100)
    x = torch.randn(10, requires_grad=True)
    assert measure.saved_bytes(lambda: x * base[:10], []) == 400


def test_resnet56_keeps_little_more_than_plain() -> None:
    """What the README claims of memory, by the definition that the benchmark uses."""
    settings = cases.Settings(CPU)
    kept = {}
    for name in ("plain", "DLA-L fused"):
        case = cases.model_cases(settings)[name]
        network = cases.Network(settings, case, training=True, backend="auto")
        kept[name] = measure.saved_bytes(network.forward, network.model.parameters())
    assert kept["plain"] / 2**20 == pytest.approx(279.5, abs=0.1)
    assert kept["DLA-L fused"] <= 1.06 * kept["plain"]


@pytest.mark.parametrize("suite", ["family", "depth"])
def test_every_network_of_a_suite_trains(suite: str) -> None:
    """And members of one name start from the same loss, fused or not."""
    settings = cases.Settings(CPU, networks=suite, model="resnet20", batch=2)
    losses: dict[str, torch.Tensor] = {}
    for contestant in cases.model_contestants(settings, "training"):
        loss, _ = contestant.build().step()
        assert_close(loss, losses.setdefault(contestant.answer, loss), table=MODELS)


def test_disagreement() -> None:
    x = torch.randn(50)
    assert measure.disagreement([x, x], [x, x]) == 0
    assert measure.disagreement([1.01 * x], [x]) == pytest.approx(0.01, rel=1e-3)
    noise = [1e-9 * torch.randn(50) for _ in range(2)]  # both stand for a gradient that is zero
    assert measure.disagreement([x, noise[0]], [x, noise[1]]) < MODELS[x.dtype].forward
    assert measure.disagreement([x, x * float("nan")], [x, x]) == float("inf")


def test_rounds_run_every_peer_and_drop_its_gradients() -> None:
    leaf = torch.ones(3, requires_grad=True)
    seen = []

    def step(name: str) -> tuple[torch.Tensor, ...]:
        assert leaf.grad is None
        seen.append(name)
        leaf.sum().backward()
        return ()

    peers = {name: cases.Peer(lambda n=name: step(n), [leaf]) for name in "abc"}
    samples = measure.interleaved(peers, 4, CPU, lambda: None)
    assert [sorted(seen[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert all(len(sample.ms) == 4 for sample in samples.values())
    assert samples["a"].row(CPU)["repeats"] == 4


def test_page_faults_are_counted() -> None:
    def touch_fresh_pages() -> mmap.mmap:
        memory = mmap.mmap(-1, 100 * mmap.PAGESIZE)
        memory.write(bytes(len(memory)))
        return memory

    _, _, faults = measure.timed(touch_fresh_pages, CPU)
    assert faults >= 100


def test_rates() -> None:
    key = {"shape": [1, 1, 1000, 1000], "dtype": "float32"}
    rows = [
        {**key, "peer": "fused", "role": "ours", "ms": 2.0},
        {**key, "peer": "eager", "role": "peer", "ms": 8.0},
        {**key, "peer": "compile", "role": "peer", "ms": 6.0},
        {**key, "peer": "copy", "role": "copy", "ms": 0.5},
        {**key, "peer": "lost", "role": "peer", "skipped": "no compiler"},
    ]
    runner.rate_op(rows, ideal=20_000_000, bandwidth=20.0)
    assert rows[0]["best_peer"] == "compile"
    assert rows[0]["speedup"] == pytest.approx(3)
    assert rows[0]["gb_per_s"] == pytest.approx(10)
    assert rows[0]["copy_percent"] == pytest.approx(50)
    assert rows[3]["gb_per_s"] == pytest.approx(16)
    assert rows[0]["own_size_copy_percent"] == pytest.approx(100 * 10 / 16)


def test_store_is_complete_after_every_addition(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    store = report.Store(str(path), {"date": "today"})
    assert json.loads(path.read_text())["rows"] == []
    row = {"suite": "layer", "mode": "training", "role": "ours", "peer": "fused"}
    store.add([{**row, "speedup": 2.0}])
    store.add([{**row, "speedup": 8.0}])
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 2
    assert content["summary"]["training"]["fused"] == pytest.approx(4)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def contestant(name: str, role: str, value: float | None) -> cases.Contestant:
    def build() -> cases.Peer:
        if value is None:
            raise RuntimeError("no compiler\nand many more lines")
        return cases.Peer(lambda: (torch.tensor([value]),))

    return cases.Contestant(name, role, build)


def test_a_peer_that_fails_is_skipped_with_the_reason() -> None:
    bench = quick_bench()
    key = {"suite": "layer", "case": "test", "mode": "inference", "shape": [1]}
    rows = bench.contest(
        key, [contestant("eager", "peer", 1.0), contestant("compile", "peer", None)]
    )
    assert "ms" in rows[0]
    assert rows[1]["skipped"] == "RuntimeError: no compiler"
    assert not bench.failures


def test_interrupted_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    bench = quick_bench("--plot", str(tmp_path / "rows.png"))
    monkeypatch.setattr(bench, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [None, 1.5])
def test_ours_failing_or_computing_something_else_fails_the_run(value: float | None) -> None:
    bench = quick_bench()
    key = {"suite": "layer", "case": "test", "mode": "inference", "shape": [1]}
    rows = bench.contest(
        key, [contestant("fused", "ours", value), contestant("eager", "peer", 1.0)]
    )
    assert "skipped" in rows[0]
    assert len(bench.failures) == 1


@pytest.mark.long
def test_quick_run(tmp_path: Path) -> None:
    """The command as CI and users run it, all suites, in well under a minute."""
    data, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    command = [
        sys.executable,
        str(BENCH / "bench_dla.py"),
        "--quick",
        "--suite",
        "layer,ops,first,model",
    ]
    # One thread: bound threads crawl where other processes hold a core, as in parallel tests.
    command += ["--device", "cpu", "--threads", "1", "--json", str(data), "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(data.read_text())
    for what in ("commit", "torch", "cpu", "threads", "simd", "copy_gb_per_s", "date"):
        assert what in content["meta"]
    rows = content["rows"]
    assert all(row["ms"] > 0 for row in rows)
    layers = [row for row in rows if row["suite"] == "layer" and row["role"] == "ours"]
    assert {(row["mode"], row["peer"]) for row in layers} == {
        (mode, peer) for mode in cases.MODES for peer in ("fused", "fused NHWC")
    }
    assert all(row["speedup"] > 0 and row["gb_per_s"] > 0 for row in layers)
    first = [row for row in rows if row["suite"] == "first"]
    assert [(row["peer"], row["role"]) for row in first] == [("fused", "ours"), ("eager", "peer")]
    trained = [row for row in rows if row["suite"] == "model" and row["mode"] == "training"]
    assert [row["peer"] for row in trained] == list(cases.model_cases(cases.Settings(CPU)))
    assert all(row["kept_bytes"] > 0 and row["peak_bytes"] > row["base_bytes"] for row in trained)
    kept = {row["peer"]: row["kept_bytes"] for row in trained}
    assert kept["plain"] < kept["DLA-L fused"] < kept["DLA-L unfused"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def synthetic_results(times: dict[tuple[str, tuple[int, ...], str], float]) -> dict:
    """Results as the benchmark would write them, of invented ``{(op, shape, peer): ms}``."""
    about = {"suite": "ops", "mode": "training", "dtype": "float32", "device": "cuda"}
    rows = [
        {
            **about,
            "case": op,
            "op": op,
            "shape": list(shape),
            "peer": peer,
            "role": "ours",
            "ms": ms,
            **({} if op == "cell" else {"ideal_bytes": 1}),
        }
        for (op, shape, peer), ms in times.items()
    ]
    skipped = {**rows[0], "shape": [1, 1, 9, 9], "skipped": "why"}
    del skipped["ms"]
    eager = {**rows[0], "peer": "eager", "role": "peer", "ms": 0.0}
    return {"meta": {"device": "GPU of this test"}, "rows": [*rows, skipped, eager]}


LARGE, SMALL = (8, 256, 56, 56), (8, 256, 7, 7)


def test_dispatch_table_from_results(tmp_path: Path) -> None:
    """Per op and class, over all shapes of a class; without both backends' times the default."""
    times = {
        ("gate", LARGE, "cuda"): 1.0, ("gate", LARGE, "triton"): 2.0,
        ("gate", SMALL, "cuda NHWC"): 4.0, ("gate", SMALL, "triton NHWC"): 3.0,
        ("cell", LARGE, "cuda"): 2.0, ("cell", LARGE, "triton"): 1.0,
        ("cell", (2, 64, 8, 8), "triton"): 9.0,
        ("global_pool", LARGE, "triton"): 1.0,
    }  # fmt: skip
    for name in ("one.json", "two.json"):  # the same op in two files counts as often
        (tmp_path / name).write_text(json.dumps(synthetic_results(times)))
    written = tmp_path / "dispatch.json"
    results = [str(tmp_path / name) for name in ("one.json", "two.json")]
    dispatch.main([*results, "--output", str(written)])
    table = json.loads(written.read_text())
    assert table["results"] == ["one.json", "two.json"] and "GPU of this test" in table["why"]
    cuda, triton = ["cuda", "triton"], ["triton", "cuda"]
    assert table["order"] == {
        "default": cuda,
        "gate": {"default": cuda, "nhwc_64": triton},
        "cell": {"default": triton},
        "global_pool": {"default": cuda},
    }


def test_dispatch_table_wants_a_gpu(tmp_path: Path) -> None:
    """The results of a CPU say nothing about backends for GPUs."""
    with pytest.raises(SystemExit, match="cpu_xeon"):
        dispatch.main(
            [
                str(BENCH / "results/cpu_xeon_cascade_lake_2_cores.json"),
                *("--output", str(tmp_path / "none.json")),
            ]
        )
    assert not list(tmp_path.iterdir())


def test_rows_suit_the_dispatch_table() -> None:
    """What the benchmark writes of an op has all that the table is made from."""
    bench = quick_bench("--suite", "ops")
    bench.op("ops", cases.OPS[0], (2, 4, 8, 8))
    row = next(row for row in bench.store.rows if row["role"] == "ours")
    assert row["op"] == "global_pool" and dispatch.shape_class(row) == "nchw_64"
    as_if = [{**row, "device": "cuda", "peer": "triton"}]
    assert dispatch.times_by_class(as_if)["global_pool"]["nchw_64"]
