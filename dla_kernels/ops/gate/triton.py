"""``gate`` in Triton: one launch for all features of one shape and format."""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.ops.common import dense, dense_format, empty_features
from dla_kernels.ops.triton_common import (
    finish,
    launch_tiles,
    new_sums,
    padded,
    pick,
    place,
    tile,
    tiles,
)
from dla_kernels.ops.triton_common import unsupported as unsupported

MAX_FEATURES = 32  # of a launch: a kernel takes at most 4 KB of arguments


def forward(features: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::gate``."""
    features = [dense(x, dense_format(x)) for x in features]
    gates = [d.contiguous() for d in gates]
    outs = [empty_features(x) for x in features]
    for alike in _alike(features):
        plan = tiles(features[alike[0]])
        lists = [padded([tensors[i] for i in alike]) for tensors in (features, gates, outs)]
        launch_tiles(plan, _forward_kernel, *lists, maps=len(alike))
    return outs


def backward(
    grads: Sequence[Tensor], features: Sequence[Tensor], gates: Sequence[Tensor]
) -> list[Tensor]:
    """Arguments and results of ``dla_kernels::gate_backward``: of all features, then all gates."""
    features = [dense(x, dense_format(x)) for x in features]
    grads = [dense(g, dense_format(x)) for g, x in zip(grads, features, strict=True)]
    gates = [d.contiguous() for d in gates]
    dx = [empty_features(x) for x in features]
    dgates: dict[int, Tensor] = {}
    for alike in _alike(features):
        x = features[alike[0]]
        plan = tiles(x, summing=True)
        sums = [new_sums(x, plan) for _ in alike]
        lists = [padded([tensors[i] for i in alike]) for tensors in (grads, features, gates, dx)]
        # With a limit, ptxas does not spill to get below it.
        launch_tiles(plan, _backward_kernel, *lists, padded(sums), maps=len(alike), maxnreg=128)
        dgates |= zip(alike, finish(sums), strict=True)
    return dx + [dgates[i] for i in range(len(gates))]


def _alike(features: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of features that one launch can serve, all features in turn."""
    classes: dict[object, list[int]] = {}
    for i, x in enumerate(features):
        classes.setdefault((x.shape, dense_format(x)), []).append(i)
    for members in classes.values():
        for start in range(0, len(members), MAX_FEATURES):
            yield members[start : start + MAX_FEATURES]


@triton.jit
def _forward_kernel(features, gates, outs, cut):
    """One tile of the feature on grid axis 1."""
    number = tl.program_id(1)
    x, gate, out = pick(features, number), pick(gates, number), pick(outs, number)
    first, row, exists, _, pixels = place(cut)
    offset, inside = tile(cut, 0, pixels, exists)
    factor = tl.load(gate + row, exists)[:, None]
    product = tl.load(x + first + offset, inside).to(factor.dtype) * factor
    tl.store(out + first + offset, product.to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(grads, features, gates, dx, sums, cut):
    """dx of one chunk of planes, and what it adds to the gradients of the gates."""
    number = tl.program_id(1)
    grad, x, gate = pick(grads, number), pick(features, number), pick(gates, number)
    out, dgate = pick(dx, number), pick(sums, number)
    first, row, exists, slot, pixels = place(cut)
    factor = tl.load(gate + row, exists)[:, None]
    total = tl.zeros((cut.PLANES, cut.PIXELS), dgate.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        g = tl.load(grad + first + offset, inside, 0.0).to(factor.dtype)
        total += g * tl.load(x + first + offset, inside, 0.0).to(factor.dtype)
        tl.store(out + first + offset, (g * factor).to(out.dtype.element_ty), inside)
    tl.store(dgate + slot, tl.sum(total, axis=1), exists)
