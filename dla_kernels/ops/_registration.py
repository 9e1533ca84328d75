"""Turns functions into operators that autograd, torch.compile and the profiler know.

Operator ``dla_kernels::<op>`` and ``dla_kernels::<op>_backward`` run `check` and then whatever
implementation `dla_kernels.backend` selects. torch.library.register_autograd would do for autograd,
but with lists of tensors among the arguments it costs 0.4 ms a call, six times what this costs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from dla_kernels import backend

LIBRARY = torch.library.Library("dla_kernels", "DEF")

Operator = Callable[..., Any]

# Dispatch keys that matter to an op below autograd; the op makes no views and writes in no input.
_BELOW_AUTOGRAD = _C._after_autograd_keyset.remove(_C.DispatchKey.ADInplaceOrView)
_DEVICES = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
_AUTOGRAD = _C.DispatchKey.AutogradCPU  # excluded with those of all other devices
# What a thread adds to the keys of the arguments while no mode is active.
_EVERYDAY_KEYS = (
    _C.DispatchKeySet(_C.DispatchKey.BackendSelect)
    | _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView)
).raw_repr()
# The types that arguments of a schema usually have: no subclass of Tensor, no symbolic number, and
# nothing of a wrong type, about which the dispatcher complains.
_PLAIN = {
    "Tensor": frozenset({Tensor, torch.nn.Parameter}),
    "Optional[Tensor]": frozenset({Tensor, torch.nn.Parameter, type(None)}),
    "List[Tensor]": frozenset({list, tuple}),
    "List[int]": frozenset({list, tuple}),
    "str": frozenset({str}),
    "int": frozenset({int, torch.dtype}),  # a ScalarType is said to be an int
    "float": frozenset({int, float}),
    "bool": frozenset({bool}),
}
Nested = Sequence[Tensor | Sequence[Tensor | None] | None]
_metadata = attrgetter("shape", "dtype", "device", "layout")
_REMEMBERED = 1024  # calls that an op has checked


def define(
    op: str,
    schema: str,
    backward_schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    tensors: int,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., Nested],
    flops: Callable[..., int] | None = None,
    backward_flops: Callable[..., int] | None = None,
) -> tuple[Operator, Operator]:
    """Defines ``op`` and its backward op.

    Args:
        op: name of the op and of its package.
        schema, backward_schema: arguments and results of the two; no default values.
        check: takes the arguments of ``op``; raises if they do not fit. May look at the shape,
            dtype, device and layout of tensors only.
        fake, backward_fake: make results of the right shape, dtype and format, without values.
            Gradients of arguments that are not there are None here, as in implementations.
        tensors: number of leading arguments that are tensors (or lists of them).
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

    check_new = _once_per_form(check, tensors)

    def run(*args: Any) -> Any:
        check_new(*args)
        x = _first_tensor(args)
        return _on_device_of(x, backend.select(op, x, args, backward=False).forward, args)

    def run_backward(*args: Any) -> Any:
        x = _first_tensor(args)
        return _on_device_of(x, backend.select(op, x, args, backward=True).backward, args)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    overload = _register(op, schema, run, checked_fake, flops)
    backward = _register(
        f"{op}_backward",
        backward_schema,
        _whole(run_backward),
        _whole(backward_fake),
        backward_flops,
    )
    autograd = _register_autograd(op, overload, run, tensors, save, gradients)
    operator = _with_shortcut(overload, functools.partial(autograd, None))
    return operator, _with_shortcut(backward, run_backward)


def _once_per_form(check: Callable[..., None], tensors: int) -> Callable[..., None]:
    """``check``, but not again for arguments that differ only in the values of their tensors."""
    passed: set[tuple[Any, ...]] = set()

    def form_of(value: Tensor | Sequence[Tensor]) -> tuple[Any, ...]:
        return tuple(map(_metadata, value)) if type(value) in (list, tuple) else _metadata(value)

    def check_new(*args: Any) -> None:
        try:
            forms = [None if value is None else form_of(value) for value in args[:tensors]]
        except RuntimeError:  # of a nested tensor, which has no shape
            check(*args)
            raise
        form = (*forms, *args[tensors:])
        if form in passed:
            return
        check(*args)
        if len(passed) >= _REMEMBERED:
            passed.clear()
        passed.add(form)

    return check_new


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with empty tensors in place of None, which no list of a schema's results has."""

    def filled(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor):
            return results
        empty = _first_tensor(args)
        return [empty.new_empty(0) if t is None else t for t in results]

    return filled


def _with_shortcut(overload: torch._ops.OpOverload, direct: Operator) -> Operator:
    """The operator; but ``direct`` itself where the dispatcher would only end up there. To convert
    forty arguments to and fro takes it as long as a layer's work on a small feature map."""

    kinds = [_PLAIN[str(argument.type)] for argument in overload._schema.arguments]
    lists = [index for index, kind in enumerate(kinds) if kind is _PLAIN["List[Tensor]"]]
    singles = [index for index, kind in enumerate(kinds) if Tensor in kind]

    @functools.lru_cache(1024)
    def are_plain(*types: type) -> bool:
        return all(given in plain for given, plain in zip(types, kinds, strict=True))

    def operator(*args: Any) -> Any:
        plainly = (
            _dispatches_plainly()
            and are_plain(*map(type, args))
            and all(_are_plain_tensors(args[index]) for index in lists)
            and not any(args[index].is_neg() for index in singles if type(args[index]) is Tensor)
        )
        if plainly:
            return direct(*args)
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


def _are_plain_tensors(values: Sequence[Tensor]) -> bool:
    """Whether a list is of no subclass, and of no tensor that stands for its negative, as the
    imaginary part of a conjugate does: the dispatcher forms these. Parameters never do."""
    types = set(map(type, values))
    if not types <= _PLAIN["Tensor"]:
        return False
    return Tensor not in types or not any(map(Tensor.is_neg, values))


def _dispatches_plainly() -> bool:
    """Whether nothing but autograd is to see a call whose arguments are plain: no compiler, no
    profiler, no dispatch mode (fake tensors, functorch, tracing, ...). Modes of torch functions,
    among them ``with torch.device(..)``, are passed over, as by any extension's function."""
    return not (
        torch.compiler.is_compiling()
        or _C._autograd._profiler_enabled()
        or _C._dispatch_tls_local_include_set().raw_repr() & ~_EVERYDAY_KEYS
        or _C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    )


def _register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None,
) -> torch._ops.OpOverload:
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dla_kernels::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.dla_kernels, name)
    if flops is not None:
        register_flop_formula(operator, get_raw=True)(lambda *args, out_val: flops(*args))
    return operator.default


def _register_autograd(
    op: str,
    overload: torch._ops.OpOverload,
    run: Callable[..., Any],
    tensors: int,
    save: Callable[..., None],
    gradients: Callable[..., Nested],
) -> Callable[..., Any]:
    """Registers and returns ``function(keyset, *args)``; keyset None: call ``run`` below."""
    returns_list = str(overload._schema.returns[0].type) == "List[Tensor]"

    def below_autograd(keyset: Any, args: tuple[Any, ...]) -> Any:
        if keyset is None:
            return run(*args)
        remaining = keyset & _BELOW_AUTOGRAD
        if remaining.highestPriorityTypeId() in _DEVICES:
            return run(*args)  # what the dispatcher would call; spares converting all arguments
        with _C._AutoDispatchBelowAutograd():
            return overload.redispatch(remaining, *args)

    def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: Any) -> Any:
        results = below_autograd(keyset, args)
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

    def autograd(keyset: Any, *args: Any) -> Any:
        _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return below_autograd(keyset, args)
        apply = apply_plainly if keyset is None else function.apply
        # args as one tuple for the redispatch; flat, for autograd to see every tensor.
        results = apply(keyset, args, *flatten(args[:tensors]))
        return list(results) if returns_list else results

    LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)
    return autograd


def _refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Raises in forward-mode differentiation, which would take the results for constants."""
    if forward_ad._current_level < 0:
        return
    for value in flatten(args):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative; the unfused path has (fused=False)"
            )


def _on_device_of(x: Tensor, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """``function(*args)``; kernels are launched on the current GPU, which must be that of ``x``."""
    if not x.is_cuda:
        return function(*args)
    with torch.cuda.device(x.device):
        return function(*args)


def flatten(values: Sequence[Any]) -> list[Any]:
    """One list of the values and, in their places, of those in lists."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat += value
        else:
            flat.append(value)
    return flat


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
