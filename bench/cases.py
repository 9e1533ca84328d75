"""What is measured: every table of the benchmark is an `OpCase` or is made of `ModelCase`s.

To add an op: write a ``build_<op>`` that returns a `Problem`, and add one `OpCase` to ``OPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import dla_kernels
from dla.models import create_model
from dla.nn import DLALayer, DLAState
from dla_kernels.backend import backends_of, implementation
from dla_kernels.ops.cell.reference import CELLS
from dla_kernels.ops.cell.reference import cell as reference_cell
from dla_kernels.ops.common import compute_dtype
from dla_kernels.ops.gate.reference import gate as reference_gate
from dla_kernels.ops.global_pool.reference import global_pool as reference_global_pool
from dla_kernels.ops.residual_gate.reference import residual_gate as reference_residual_gate
from dla_kernels.ops.residual_norm.reference import residual_norm as reference_residual_norm

Shape = tuple[int, ...]
Module = TypeVar("Module", bound=torch.nn.Module)
Result = TypeVar("Result")
SHAPES: list[Shape] = [(32, 64, 32, 32), (32, 128, 16, 16), (32, 256, 8, 8), (8, 256, 56, 56)]
QUICK_SHAPES: list[Shape] = [(4, 64, 8, 8)]
MODES = ("inference", "training")
NCHW, NHWC = torch.contiguous_format, torch.channels_last


@dataclass(frozen=True)
class Settings:
    """What the command line chose; the cases need no more."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    backends: tuple[str, ...] = ("auto",)
    spec: str = "official"
    compile: bool = True
    channels_last: bool = False
    networks: str = "model"  # the suite whose networks are meant
    model: str = "resnet56"
    batch: int = 32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of parameters and pooled values, by the rule of `dla_kernels`."""
        return compute_dtype(self.dtype)

    def autocast(self) -> AbstractContextManager:
        """Layers and models keep their parameters in float32 when features are in a half dtype."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype) if half else nullcontext()


@dataclass(frozen=True)
class Peer:
    """What is run. ``step`` is timed; ``reset``, which drops its gradients, is not.

    comparable: gradients are results to be compared. Not so in deep networks, where a ReLU that
        flips on a rounding error changes some of them visibly.
    """

    step: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()
    comparable: bool = True

    def reset(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def results(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What a step computed: outputs, then gradients."""
        leaves = self.leaves if self.comparable else ()
        return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@dataclass(frozen=True)
class Contestant:
    """A peer that is yet to be built, which may fail.

    role: "ours" is this package, and its failure fails the benchmark; "peer" is what it has to
        beat; "copy" is the yardstick.
    answer: contestants with the same answer must agree before any of them is timed.
    """

    name: str
    role: str
    build: Callable[[], Peer]
    answer: str = "all"


class Source:
    """Random inputs, equal for all contestants of a case whatever their memory format."""

    def __init__(
        self, settings: Settings, memory_format: torch.memory_format, training: bool
    ) -> None:
        self.settings, self.memory_format, self.training = settings, memory_format, training
        self.generator = torch.Generator(settings.device).manual_seed(0)

    def place(self, make: Callable[[], Module]) -> Module:
        """A module with reproducible weights, in the case's mode, device, precision and format."""
        torch.manual_seed(0)
        module = make().train(self.training)
        return module.to(
            self.settings.device, self.settings.compute_dtype, memory_format=self.memory_format
        )

    def features(self, shape: Shape) -> Tensor:
        """A feature map that receives a gradient in training."""
        return self.constant(shape).requires_grad_(self.training)

    def constant(self, shape: Shape) -> Tensor:
        """A feature map that does not, such as the gradient of an output."""
        value = self.normal(shape).to(self.settings.dtype)
        return value.contiguous(memory_format=self.memory_format)

    def small(self, *shape: int, scale: float = 1.0, constant: bool = False) -> Tensor:
        """Pooled values, states or weights, in the compute dtype."""
        value = scale * self.normal(shape).to(self.settings.compute_dtype)
        return value.requires_grad_(self.training and not constant)

    def normal(self, shape: Shape) -> Tensor:
        """Normally distributed float32 numbers, made on the device: on a CPU it takes seconds."""
        return torch.randn(shape, generator=self.generator, device=self.settings.device)


# --------------------------------------------------------------------------------- single ops


@dataclass(frozen=True)
class Problem:
    """A function on prepared inputs, with the gradients its results receive.

    leaves: what receives gradients, inputs and parameters.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Any, ...]
    grads: Sequence[Tensor]
    leaves: Sequence[Tensor]


@dataclass(frozen=True)
class OpCase:
    """One op: how to build it and what it moves at best.

    op: of `dla_kernels.ops`, that does the work.
    build: ``(source of inputs, shape, fused) -> Problem``.
    passes: per mode, the reads and writes of a whole feature map that cannot be avoided (forward
        and backward together); None where the op moves no feature maps.
    """

    name: str
    op: str
    build: Callable[[Source, Shape, bool], Problem]
    passes: Callable[[Settings], Mapping[str, int]] | None
    formats: tuple[torch.memory_format, ...] = (NCHW, NHWC)

    def ideal_bytes(self, settings: Settings, shape: Shape, mode: str) -> int | None:
        if self.passes is None:
            return None
        return self.passes(settings)[mode] * torch.Size(shape).numel() * settings.dtype.itemsize

    def backends(self, settings: Settings) -> Sequence[str]:
        """Those asked for; of "all", the kernels that the op has for the device."""
        if settings.backends != ("all",):
            return settings.backends
        x = torch.empty(0, dtype=settings.dtype, device=settings.device)
        return [
            name
            for name in backends_of(self.op)
            if name != "reference" and implementation(self.op, name).unsupported(x) is None
        ]

    def contestants(self, settings: Settings, shape: Shape, mode: str) -> Iterator[Contestant]:
        """Ours by backend and format, eager by format, torch.compile, and the yardstick."""

        def build(
            fused: bool,
            memory_format: torch.memory_format,
            backend: str = "auto",
            compile: bool = False,
        ) -> Peer:
            training = mode == "training"
            source = Source(settings, memory_format, training)
            problem = on_backend(backend, lambda: self.build(source, shape, fused))()
            step = on_backend(backend, op_step(problem, training, compile))
            return Peer(step, problem.leaves if training else ())

        for backend in self.backends(settings):
            label = "fused" if backend == "auto" else backend
            for memory_format in self.formats:
                yield Contestant(
                    label + suffix(memory_format),
                    "ours",
                    lambda m=memory_format, b=backend: build(True, m, backend=b),
                )
        for memory_format in self.formats:
            yield Contestant(
                "eager" + suffix(memory_format), "peer", lambda m=memory_format: build(False, m)
            )
        if settings.compile:
            yield Contestant("compile", "peer", lambda: build(False, NCHW, compile=True))
        if self.passes is not None:
            yield Contestant("copy of x", "copy", lambda: copy_peer(settings, shape), "copy")


def copy_peer(settings: Settings, shape: Shape) -> Peer:
    """Copies one feature map: what a read and a write of it cost in the midst of this case."""
    source = Source(settings, NCHW, False).constant(shape)
    target = torch.empty_like(source)
    return Peer(lambda: (target.copy_(source),))


def suffix(memory_format: torch.memory_format) -> str:
    return " NHWC" if memory_format == NHWC else ""


def op_step(problem: Problem, training: bool, compile: bool) -> Callable[[], Sequence[Tensor]]:
    """A step: forward alone, or forward and backward with given output gradients."""
    function, inputs = problem.function, problem.inputs
    if compile:
        torch._dynamo.reset()  # else the second shape is compiled for dynamic shapes
        function = torch.compile(function, dynamic=False)

    def inference() -> Sequence[Tensor]:
        with torch.inference_mode():
            return function(*inputs)

    def train() -> Sequence[Tensor]:
        outputs = function(*inputs)
        torch.autograd.backward(outputs, problem.grads)
        return outputs

    return train if training else inference


def on_backend(backend: str, function: Callable[[], Result]) -> Callable[[], Result]:
    """``function`` with the implementation chosen by name; "auto" costs nothing."""
    if backend == "auto":
        return function

    def chosen() -> Result:
        with dla_kernels.use_backend(backend):
            return function()

    return chosen


def build_layer(source: Source, shape: Shape, fused: bool) -> Problem:
    """A DLA-L layer in the middle of a stage: it has a p and the state of an earlier layer."""
    settings = source.settings
    layer = source.place(lambda: DLALayer(shape[1], spec=settings.spec, fused=fused))
    x, p = source.features(shape), source.features(shape)
    with torch.no_grad(), settings.autocast():
        _, state = layer(p, prev=x)

    def function(x: Tensor, p: Tensor, state: DLAState) -> tuple[Tensor, ...]:
        with settings.autocast():
            out, new = layer(x, prev=p, state=state)
        # o, where the spec hands it to the next layer, receives a gradient as well.
        return (out,) if new.output is None else (out, new.output)

    grads = [source.constant(shape) for _ in range(1 if settings.spec == "official" else 2)]
    return Problem(function, (x, p, state), grads, [x, p, *layer.parameters()])


def build_global_pool(source: Source, shape: Shape, fused: bool) -> Problem:
    x, grad = source.features(shape), source.small(*shape[:2], constant=True)
    function = dla_kernels.global_pool if fused else reference_global_pool
    return Problem(lambda x: (function(x),), (x,), (grad,), [x])


GATED = 3  # feature maps in one call of gate


def build_gate(source: Source, shape: Shape, fused: bool) -> Problem:
    features = [source.features(shape) for _ in range(GATED)]
    gates = [source.small(*shape[:2]) for _ in range(GATED)]
    grads = [source.constant(shape) for _ in range(GATED)]
    function = dla_kernels.gate if fused else reference_gate
    return Problem(function, (features, gates), grads, features + gates)


def build_cell(kind: str, source: Source, shape: Shape, fused: bool) -> Problem:
    batch, channels = shape[:2]
    slots, shapes = CELLS[kind].slots, CELLS[kind].shapes(channels // 4, channels)
    params = [source.small(*size, scale=0.1) for size in shapes]
    y, state = source.small(batch, channels), source.small(slots, batch, channels)
    grad = source.small(slots, batch, channels, constant=True)
    function = dla_kernels.cell if fused else reference_cell
    return Problem(
        lambda y, state, params: (function(y, state, params, kind),),
        (y, state, params),
        (grad,),
        [y, state, *params],
    )


def layer_passes(settings: Settings) -> dict[str, int]:
    """5N forward and 8N backward; the paper's form also writes o and reads its gradient twice."""
    if settings.spec == "paper":
        return {"inference": 6, "training": 16}
    return {"inference": 5, "training": 13}


EARLIER = 4  # layers before the DLA-B layer


def build_base_layer(source: Source, shape: Shape, fused: bool) -> Problem:
    """The last DLA-B layer of a stage, after `EARLIER` others."""
    settings = source.settings
    layer = source.place(
        lambda: DLALayer(shape[1], variant="base", spec=settings.spec, fused=fused)
    )
    x = source.features(shape)
    state = None
    with torch.no_grad(), settings.autocast():
        for _ in range(EARLIER):
            _, state = layer(source.constant(shape), state=state)
    values = [value.detach().requires_grad_(source.training) for value in state.values]

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with settings.autocast():
            earlier = state._replace(values=values)
            return (layer(x, state=earlier, keep_output=False)[0],)

    leaves = [x, *values, *layer.parameters()]
    return Problem(function, (x, *values), [source.constant(shape)], leaves)


def build_residual_gate(source: Source, shape: Shape, fused: bool) -> Problem:
    u, shortcut, h = source.features(shape), source.features(shape), source.small(*shape[:2])
    function = dla_kernels.residual_gate if fused else reference_residual_gate
    inputs = (u, h, shortcut)
    return Problem(lambda *of: (function(*of),), inputs, [source.constant(shape)], inputs)


def build_residual_norm(source: Source, shape: Shape, fused: bool) -> Problem:
    x, shortcut = source.features(shape), source.features(shape)
    weight, bias = source.small(shape[1]), source.small(shape[1])
    function = dla_kernels.residual_norm if fused else reference_residual_norm
    inputs = (x, shortcut, weight, bias)
    return Problem(lambda *of: function(*of)[:1], inputs, [source.constant(shape)], inputs)


LAYER = OpCase("DLA-L layer", "light_attention", build_layer, layer_passes)
OPS = [
    # mean; its gradient is one write
    OpCase(
        "global_pool", "global_pool", build_global_pool, lambda _: {"inference": 1, "training": 2}
    ),
    # x -> x d; then x and the gradient are read and dx is written
    OpCase(
        f"gate ({GATED} maps)",
        "gate",
        build_gate,
        lambda _: {"inference": 2 * GATED, "training": 5 * GATED},
    ),
    # x and the earlier values to out; then these and the gradient of out, and as many gradients
    OpCase(
        f"DLA-B layer ({EARLIER} earlier)",
        "base_attention",
        build_base_layer,
        lambda _: {"inference": EARLIER + 2, "training": 3 * EARLIER + 5},
    ),
    # u and the shortcut to out; then u, out and the gradient to two gradients
    OpCase(
        "residual_gate",
        "residual_gate",
        build_residual_gate,
        lambda _: {"inference": 3, "training": 8},
    ),
    # x and the shortcut to out; then x, out and the gradient to two gradients
    OpCase(
        "residual_norm",
        "residual_norm",
        build_residual_norm,
        lambda _: {"inference": 3, "training": 8},
    ),
    *(
        OpCase(f"cell {kind}", "cell", partial(build_cell, kind), None, formats=(NCHW,))
        for kind in CELLS
    ),
]


# ------------------------------------------------------------------------------- whole models


@dataclass(frozen=True)
class ModelCase:
    """A network: the suffix of its name, its options, and what it must agree with."""

    suffix: str
    options: Mapping[str, Any]
    role: str
    answer: str


FAMILY = {"DLA-L": "dla_l", "MRLA-L": "mrla_l", "DLA-B": "dla_b", "MRLA-B": "mrla_b", "DIA": "dia"}


def model_cases(settings: Settings) -> dict[str, ModelCase]:
    """Those of ``settings.networks`` by name; the first is what the others are compared with."""
    plain = {"plain": ModelCase("plain", {}, "peer", "plain")}
    light, base = both_paths("DLA-L", settings), both_paths("DLA-B", settings)
    if settings.networks == "depth":
        return plain | light | base
    if settings.networks == "model":
        others = {}
        for label in ("MRLA-L", "DLA-B", "MRLA-B"):
            name = f"{label} fused"
            others[name] = both_paths(label, settings)[name]
        return plain | light | others
    family = plain | {name.upper(): ModelCase(name, {}, "ours", name) for name in ("se", "eca")}
    for label in FAMILY:
        family |= both_paths(label, settings)
    for kind in CELLS:
        family |= both_paths("DLA-L", settings, cell=kind)
    return family


def both_paths(label: str, settings: Settings, **options: Any) -> dict[str, ModelCase]:
    """A member of the family, unfused and fused."""
    title = " ".join([label, *options.values()])
    options = {"spec": settings.spec, **options}
    return {
        f"{title} {path}": ModelCase(FAMILY[label], {**options, "fused": fused}, role, title)
        for path, fused, role in (("unfused", False, "peer"), ("fused", True, "ours"))
    }


class Network:
    """One model with its data and optimizer, ready to train or to answer."""

    def __init__(self, settings: Settings, case: ModelCase, training: bool, backend: str):
        self.settings, self.backend = settings, backend
        source = Source(settings, NHWC if settings.channels_last else NCHW, training)
        name = f"{settings.model}_{case.suffix}"
        self.model = source.place(lambda: create_model(name, num_classes=10, **case.options))
        self.x = source.constant((settings.batch, 3, 32, 32)).to(settings.compute_dtype)
        self.target = torch.randint(
            10, (settings.batch,), generator=source.generator, device=settings.device
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Loss and logits."""
        with self.settings.autocast():
            logits = self.model(self.x)
            return cross_entropy(logits, self.target), logits

    def train(self) -> Sequence[Tensor]:
        loss, logits = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss, logits

    def infer(self) -> Sequence[Tensor]:
        with torch.inference_mode(), self.settings.autocast():
            return (self.model(self.x),)

    def peer(self) -> Peer:
        """Trains or answers, as the model's mode says."""
        if self.model.training:
            parameters = list(self.model.parameters())
            return Peer(on_backend(self.backend, self.train), parameters, comparable=False)
        return Peer(on_backend(self.backend, self.infer))


def networks(settings: Settings) -> dict[str, tuple[ModelCase, str]]:
    """All models to measure with their backends, ours once per backend; "all" is "auto" here."""
    ours = ("auto",) if settings.backends == ("all",) else settings.backends
    return {
        name if backend == "auto" else f"{name} ({backend})": (case, backend)
        for name, case in model_cases(settings).items()
        for backend in (ours if case.role == "ours" else ("auto",))
    }


def model_contestants(settings: Settings, mode: str) -> Iterator[Contestant]:
    """The models as contestants; they agree with each other where they are the same model."""
    for name, (case, backend) in networks(settings).items():
        yield Contestant(
            name,
            case.role,
            lambda c=case, b=backend: Network(settings, c, mode == "training", b).peer(),
            case.answer,
        )
