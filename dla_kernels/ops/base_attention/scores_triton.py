"""The attention scores of ``base_attention`` in Triton, forward and backward, for autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dla_kernels.ops.triton_common import launch


def scores_of(q: Tensor, keys: Tensor, head_dim: int) -> Tensor:
    """As `dla_kernels.ops.base_attention.reference.scores_of`."""
    return _Scores.apply(q.contiguous(), keys.contiguous(), head_dim)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, head_dim: int) -> Tensor:
        layers, batch, channels = keys.shape
        found = q.new_empty(layers, batch, channels // head_dim)
        _launch(_scores_kernel, head_dim, q, keys, found)
        ctx.save_for_backward(q, keys, found)
        ctx.head_dim = head_dim
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, found = ctx.saved_tensors
        dq, dkeys = torch.empty_like(q), torch.empty_like(keys)
        tensors = q, keys, found, grad.contiguous(), dq, dkeys
        _launch(_scores_gradients_kernel, ctx.head_dim, *tensors)
        return dq, dkeys, None


def _launch(kernel: Any, head_dim: int, q: Tensor, keys: Tensor, *others: Tensor) -> None:
    """A program per sample and head."""
    layers, batch, channels = keys.shape
    width = triton.next_power_of_2(head_dim)
    launch(
        kernel,
        (batch, channels // head_dim),
        *(q, keys, *others, layers, batch, channels, head_dim),
        SCALE=1 / math.sqrt(head_dim),
        WIDTH=width,
        num_warps=1 if width <= 256 else 4,
    )


@triton.jit
def _scores_kernel(
    q, keys, scores, layers, batch, channels, head_dim, SCALE: tl.constexpr, WIDTH: tl.constexpr
):
    """Softmax over the layers of the products of one query with its keys.

    Online: one sweep over the keys, in which the sum follows the largest product so far.
    """
    at, inside, score = _place(channels, head_dim, WIDTH)
    query = tl.load(q + at, inside, 0.0) * SCALE
    largest = tl.full((), float("-inf"), query.dtype)
    total = tl.full((), 0.0, query.dtype)
    for layer in range(layers):
        product = tl.sum(query * _of_layer(keys, layer, batch * channels, at, inside))
        tl.store(_score_of(scores, layer, batch, score), product)
        before, largest = largest, tl.maximum(largest, product)
        total = total * tl.exp(before - largest) + tl.exp(product - largest)
    tl.debug_barrier()  # what one thread has stored, all threads load
    for layer in range(layers):
        to = _score_of(scores, layer, batch, score)
        tl.store(to, tl.exp(tl.load(to) - largest) / total)


@triton.jit
def _scores_gradients_kernel(
    q, keys, scores, grad, dq, dkeys, layers, batch, channels, head_dim,
    SCALE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of one query and of its keys."""
    at, inside, score = _place(channels, head_dim, WIDTH)
    query = tl.load(q + at, inside, 0.0) * SCALE
    mean = tl.full((), 0.0, query.dtype)
    for layer in range(layers):
        a = tl.load(_score_of(scores, layer, batch, score))
        mean += a * tl.load(_score_of(grad, layer, batch, score))
    dquery = tl.zeros((WIDTH,), query.dtype)
    for layer in range(layers):
        a = tl.load(_score_of(scores, layer, batch, score))
        change = a * (tl.load(_score_of(grad, layer, batch, score)) - mean)
        dquery += change * _of_layer(keys, layer, batch * channels, at, inside)
        to = dkeys + tl.cast(batch * channels, tl.int64) * layer + at
        tl.store(to, change * query, inside)
    tl.store(dq + at, dquery * SCALE, inside)


@triton.jit
def _place(channels, head_dim, WIDTH: tl.constexpr):
    """Offsets and mask [WIDTH] of a program's channels in a [B, C]; its place in a [B, heads]."""
    sample, head = tl.program_id(0), tl.program_id(1)
    number = tl.arange(0, WIDTH)
    at = sample * channels + head * head_dim + number
    return at, number < head_dim, sample * (channels // head_dim) + head


@triton.jit
def _of_layer(keys, layer, rows, at, inside):
    return tl.load(keys + tl.cast(rows, tl.int64) * layer + at, inside, 0.0)


@triton.jit
def _score_of(scores, layer, batch, score):
    return scores + tl.cast(batch, tl.int64) * tl.num_programs(1) * layer + score
