"""Turns functions into operators that autograd, torch.compile and the profiler know.

Operator ``dla_kernels::<op>`` and ``dla_kernels::<op>_backward`` run `check` and then whatever
implementation `dla_kernels.backend` selects. torch.library.register_autograd would do for autograd,
but with lists of tensors among the arguments it costs 0.4 ms a call, six times what this costs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from dla_kernels import backend
from dla_kernels.ops._calls import Calls, Operator, flatten

LIBRARY = torch.library.Library("dla_kernels", "DEF")

# Dispatch keys that matter to an op below autograd; the op makes no views and writes in no input.
_BELOW_AUTOGRAD = _C._after_autograd_keyset.remove(_C.DispatchKey.ADInplaceOrView)
_DEVICES = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
_AUTOGRAD = _C.DispatchKey.AutogradCPU  # excluded with those of all other devices
# What a thread adds to the keys of the arguments while no mode is active.
_EVERYDAY_KEYS = (
    _C.DispatchKeySet(_C.DispatchKey.BackendSelect)
    | _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView)
).raw_repr()
# By names of their own: to look them up in torch, call by call, takes longer than they do.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_profiling = _C._autograd._profiler_enabled
_included_keys = _C._dispatch_tls_local_include_set
_is_excluded = _C._dispatch_tls_is_dispatch_key_excluded
Nested = Sequence[Tensor | Sequence[Tensor | None] | None]


def define(
    op: str,
    schema: str,
    backward_schema: str,
    *,
    check: Callable[..., None],
    backward_check: Callable[..., None],
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., Nested],
    flops: Callable[..., int] | None = None,
    backward_flops: Callable[..., int] | None = None,
) -> tuple[Operator, Operator]:
    """Defines ``op`` and its backward op.

    Args:
        op: name of the op and of its package.
        schema, backward_schema: arguments, tensors and lists of them first, and results of the two;
            no default values.
        check, backward_check: take the arguments of the two; raise if they do not fit. May look at
            the shape, dtype, device and layout of tensors only. (What is kept for backward may be
            exchanged meanwhile, by module.half() say, or by hooks on saved tensors.)
        fake, backward_fake: make results of the right shape, dtype and format, without values.
            Gradients of arguments that are not there are None here, as in implementations.
        save: ``save(ctx, arguments, results)`` keeps what backward needs.
        gradients: ``gradients(ctx, *grads)`` gives one gradient (or None, or a list of these) per
            leading tensor argument. A gradient that never arrived is None.
        flops, backward_flops: take the arguments of the two; give what FlopCounterMode counts by
            torch's convention: two for each multiply-add of the reference's matrix products and
            convolutions, and of their gradients, all taken for wanted. None: there are none. (Of
            the gradient of a depthwise weight torch's own formula counts C times too many.)

    Returns:
        The two operators.
    """

    def select(backward: bool, *args: Any) -> Operator:
        x = _first_tensor(args)
        module = backend.select(op, x, args, backward)
        return _on_device_of(x, module.backward if backward else module.forward)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    overload = _declare(op, schema)
    calls = Calls(overload._schema, check, functools.partial(select, False))
    _implement(overload, calls, checked_fake, flops)
    backward = _declare(f"{op}_backward", backward_schema)
    backward_calls = Calls(backward._schema, backward_check, functools.partial(select, True))
    _implement(backward, _whole(backward_calls), _whole(backward_fake), backward_flops)
    differentiable = _register_autograd(op, overload, calls, save, gradients)
    return (
        _with_shortcut(overload, calls, differentiable),
        _with_shortcut(backward, backward_calls, lambda below, args: below(*args)),
    )


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with empty tensors in place of None, which no list of a schema's results has."""

    def filled(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor):
            return results
        empty = _first_tensor(args)
        return [empty.new_empty(0) if t is None else t for t in results]

    return filled


def _with_shortcut(
    overload: torch._ops.OpOverload,
    calls: Calls,
    differentiable: Callable[[Operator, tuple[Any, ...]], Any],
) -> Operator:
    """The operator; but ``differentiable(function, args)`` where the dispatcher would only end up
    there, with the function that serves the call. To convert forty arguments to and fro takes it as
    long as a layer's work on a small feature map."""

    def operator(*args: Any) -> Any:
        below = calls.find(args) if _dispatches_plainly() else None
        if below is not None:
            return differentiable(below, args)
        try:
            return overload(*args)
        except RuntimeError as error:
            if torch.compiler.is_compiling() or not _C._are_functorch_transforms_active():
                raise
            raise NotImplementedError(
                f"{overload.name()} failed under a transform of torch.func; the unfused path knows "
                f"them (fused=False): {error}"
            ) from error

    return operator


def _dispatches_plainly() -> bool:
    """Whether nothing but autograd is to see a call whose arguments are plain: no compiler, no
    profiler, no dispatch mode (fake tensors, functorch, tracing, ...). Modes of torch functions,
    among them ``with torch.device(..)``, are passed over, as by any extension's function."""
    return not (
        _is_compiling()
        or _is_profiling()
        or _included_keys().raw_repr() & ~_EVERYDAY_KEYS
        or _is_excluded(_AUTOGRAD)
    )


def _declare(name: str, schema: str) -> torch._ops.OpOverload:
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    return getattr(torch.ops.dla_kernels, name).default


def _implement(
    overload: torch._ops.OpOverload,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None,
) -> None:
    name = overload.name()
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if flops is not None:
        packet = overload.overloadpacket
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val: flops(*args))


def _register_autograd(
    op: str,
    overload: torch._ops.OpOverload,
    calls: Calls,
    save: Callable[..., None],
    gradients: Callable[..., Nested],
) -> Callable[[Operator, tuple[Any, ...]], Any]:
    """Registers the op's derivative. Returns ``differentiable(function, args)``, which calls the
    function that is given for the work below autograd."""
    returns_list = str(overload._schema.returns[0].type) == "List[Tensor]"

    def forward(ctx: Any, below: Operator, args: tuple[Any, ...], *_: Any) -> Any:
        results = below(*args)
        results = tuple(results) if returns_list else results
        ctx.backend = backend.requested()
        ctx.set_materialize_grads(False)
        save(ctx, args, results)
        return results

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # never in a backward pass, but for create_graph=True
            raise NotImplementedError(
                f"{op} cannot be differentiated twice (create_graph=True); the unfused path can "
                "(fused=False)"
            )
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if ctx.backend == backend.AUTO or backend.requested() != backend.AUTO:
            nested = gradients(ctx, *grads)
        else:
            with backend.use_backend(ctx.backend):
                nested = gradients(ctx, *grads)
        return None, None, *flatten(nested)

    function = type(
        f"{op}_function",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    # What function.apply does where no transform of torch.func is active, in half the time; but for
    # unwrapping tensors that have outlived their transform, which kernels refuse.
    apply_plainly = super(torch.autograd.Function, function).apply

    def differentiable(
        below: Operator, args: tuple[Any, ...], apply: Operator = apply_plainly
    ) -> Any:
        _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return below(*args)
        # args as one tuple for the call below; flat, for autograd to see every tensor.
        results = apply(below, args, *flatten(args[: calls.tensors]))
        return list(results) if returns_list else results

    def autograd(keyset: Any, *args: Any) -> Any:
        remaining = keyset & _BELOW_AUTOGRAD

        def below(*args: Any) -> Any:
            if remaining.highestPriorityTypeId() in _DEVICES:
                return calls(*args)  # what the dispatcher would call; spares converting arguments
            with _C._AutoDispatchBelowAutograd():
                return overload.redispatch(remaining, *args)

        return differentiable(below, args, function.apply)

    LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)
    return differentiable


def _refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Raises in forward-mode differentiation, which would take the results for constants."""
    if forward_ad._current_level < 0:
        return
    for value in flatten(args):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative; the unfused path has (fused=False)"
            )


def _on_device_of(x: Tensor, function: Operator) -> Operator:
    """The function, launching its kernels on the GPU of ``x``, whichever is the current one."""
    if not x.is_cuda:
        return function

    def on_device(*args: Any) -> Any:
        with torch.cuda.device(x.device):
            return function(*args)

    return on_device


def sizes_of(values: Sequence[Any]) -> list[int | None]:
    """What `unflatten` needs: the length of each value that is a list, None for others."""
    return [len(value) if isinstance(value, list | tuple) else None for value in values]


def unflatten(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """Inverse of `flatten` for values of these sizes."""
    rest = iter(flat)
    return [next(rest) if n is None else list(itertools.islice(rest, n)) for n in sizes]


def _first_tensor(args: Sequence[Any]) -> Tensor:
    """The tensor that decides on the backend: the first of a call that is there."""
    first = next(value for value in args if value is not None)
    return first if isinstance(first, Tensor) else first[0]
