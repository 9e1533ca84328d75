"""Compiles the Triton kernels of an op for GPUs that need not be there; prints what each one needs.

Which kernels there are, and with which arguments, is found out by running sample calls whose
launches only compile. For test_triton_compile.py, in a process of its own: this one must not
interpret. ``python compile_triton.py gate`` prints a JSON object.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dla_kernels import ops, use_backend
from dla_kernels.ops import triton_tuning
from op_cases import DENSE, case_id, covering, run
from op_samples import SAMPLES, base_attention, sample

FORM = {"dtype": (torch.float32, torch.bfloat16, torch.float16), "layout": DENSE}
PLACE = {
    "capability": (80, 90, 100),
    "setting": (0, 1, 2),  # what tuning chooses among
    # Aligned; an odd area; both odd, and one sample: Triton compiles a size of 1 as a constant.
    "shape": ((2, 256, 28, 28), (2, 2048, 7, 7), (1, 33, 19, 17)),
}
# float64, to which no speed is due, but whose values take twice the registers.
DOUBLE = ({"capability": 90, "layout": "nchw"}, {"capability": 80, "layout": "nhwc"})


class Driver:
    """Stands for a GPU of some compute capability, which is also its number."""

    capability = 90

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def needs(compiled: Any) -> dict[str, Any]:
    """Registers per thread, bytes of stack and spills per thread and of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    used = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", said)}
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }


def kernels(package: str) -> set[str]:
    """Names of the functions of an op for launching: ``..._kernel``, by convention."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    functions = {
        name: getattr(value, "fn", None)
        for module in modules
        for name, value in vars(module).items()
    }
    return {
        name
        for name, function in functions.items()
        if function and op_of(function) == package and name.endswith("_kernel")
    }


def op_of(function: Any) -> str | None:
    """Package of the op that a kernel belongs to; None: it is shared."""
    package = function.__module__.rpartition(".")[0]
    return None if package == ops.__name__ else package


def cases(op: str) -> list[dict[str, Any]]:
    """Every pair of dtype, format, GPU, setting and shape occurs; with each variant of the op,
    every dtype and format. And what is rare, once or twice."""
    variants = list(SAMPLES[op])
    found = covering(
        {"variant": variants, **FORM, **PLACE},
        meet=lambda one, other: one != "variant" or other in FORM,
    )
    rare = {"variant": variants[0], "setting": 0, "shape": PLACE["shape"][0]}
    found += [{**rare, "dtype": torch.float64, **case} for case in DOUBLE]
    if op == "base_attention":
        SAMPLES[op]["many"] = base_attention(layers=9)
        half = {"dtype": torch.bfloat16, "layout": "nchw"}
        found.append({**rare, **half, "variant": "many", "capability": 100})
    return found


def main(op: str) -> None:
    """Compiles a covering set of the op's variants, dtypes, formats, shapes and GPUs."""
    module = importlib.import_module(f"dla_kernels.ops.{op}.triton")
    module.unsupported = lambda x: None
    gpu, jit_run = Driver(), JITFunction.run
    driver.set_active(gpu)
    triton_tuning.fastest = lambda kernel, about, settings, run: settings[setting % len(settings)]
    found: dict[str, dict[str, Any]] = {}
    launched: set[str] = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if op_of(self.fn) not in (None, module.__package__):
            return  # compiled with that op's samples
        compiled = jit_run(self, *args, grid=grid, warmup=True, **options)
        launched.add(self.__name__)
        if compiled.hash not in found:
            found[compiled.hash] = {"kernel": self.__name__, "case": name, **needs(compiled)}

    JITFunction.run = compile_only
    for case in cases(op):
        name = case_id(case).strip()
        gpu.capability, setting = case.pop("capability"), case.pop("setting")
        call = sample(op, **case)
        with use_backend("triton"):
            run(call.function, call.inputs, call.cotangents, **call.options)
    forgotten = sorted(kernels(module.__package__) - launched)
    print(json.dumps({"compiled": list(found.values()), "forgotten": forgotten}))


if __name__ == "__main__":
    main(sys.argv[1])
