"""What the Triton kernels of several ops share: launches, tiles of planes, sums over planes.

A dense map [B, C, H, W] is seen as groups of planes of ``area`` pixels: in NCHW one group of B * C
planes, in channels_last B groups of C interleaved planes. A program takes a tile of planes and
pixels; which of the two is contiguous is known when the kernel is compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from dla_kernels.ops import triton_tuning
from dla_kernels.ops.common import LAYOUTS, class_of, compute_dtype, dense_format

OLDEST = "3.6"  # Triton that compiles all kernels; torch 2.9 still brings 3.5
# TRITON_INTERPRET=1: the kernels run as Python on the CPU, slowly, to be checked.
INTERPRETED = triton.knobs.runtime.interpret

# Elements of a tile: 16 per thread of `SETTINGS`' first; 8 where a kernel has more maps or sums to
# keep.
TILE, SMALL_TILE = 4096, 2048
# Pixels per program of a kernel that sums over planes. Fixed, so that a plane's sum does not depend
# on the batch that it comes in; few enough that a small batch still makes many programs.
SUMMED_PIXELS = {torch.contiguous_format: 4096, torch.channels_last: 256}


def unsupported(x: Tensor) -> str | None:
    """Why the Triton kernels cannot serve ``x``, or None."""
    if TorchVersion(triton.__version__) < OLDEST:
        return (
            f"the kernels need Triton {OLDEST} or newer, found {triton.__version__}; "
            "pip install -U torch, which brings it"
        )
    if x.is_cuda or (INTERPRETED and x.is_cpu):
        return None
    return f"Triton kernels run on GPUs; x is on {x.device} (TRITON_INTERPRET=1: slowly on CPUs)"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``. Only axis 0 of a grid may exceed 65535.

    Products and sums contract to FMAs in every Triton version; the default changes in 3.10.
    """
    if torch.version.hip:  # not known there
        options.pop("maxnreg", None)
    kernel[grid](*args, enable_fp_fusion=True, **options)


def padded(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors as one kernel argument, repeated up to a power of two: few kernels to compile."""
    missing = triton.next_power_of_2(len(tensors)) - len(tensors)
    return (*tensors, *[tensors[-1]] * missing)


@triton.jit
def pick(tensors, index):
    """``tensors[index]`` of a tuple of pointers, for an index known at run time."""
    chosen = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        chosen = tl.where(index == i, tensors[i], chosen)
    return chosen


class Cut(NamedTuple):
    """How groups of ``planes`` planes are cut into tiles: an argument of kernels."""

    planes: int
    area: int  # pixels of a plane
    PLANES: Any  # of a tile, as PIXELS; these and what follows are known to the compiler
    PIXELS: Any
    CHUNK: Any  # pixels of a row of tiles, the work of a program
    ALIGN: Any  # divides the contiguous one of planes and area
    CHANNELS_LAST: Any


class Tiles(NamedTuple):
    """How programs cover the planes of a dense map."""

    programs: int  # along axis 0 of the grid
    chunks: int  # programs along a plane: the partial sums that a summing kernel leaves per plane
    cut: Cut
    kind: str  # shape class, and all that the compiler is told: what a choice of setting depends on
    halved: Tiles | None  # the same with tiles of half the size and as many chunks


class Setting(NamedTuple):
    """How a kernel is launched on tiles; which is fastest is measured."""

    halved: bool
    warps: int


# The first serves where nothing is measured. No other asks for more registers per thread.
SETTINGS = Setting(False, 8), Setting(True, 4), Setting(True, 8)


def tiles(
    x: Tensor, *, summing: bool = False, size: int = TILE, max_planes: int = TILE, chunk: int = 0
) -> Tiles:
    """One tile per program; for a kernel that sums over planes, a row of tiles.

    size, max_planes: of a tile at most, for kernels that keep many numbers per pixel or plane.
    chunk: pixels of a row of tiles, if not `SUMMED_PIXELS`.
    """
    batch, channels, height, width = x.shape
    layout = dense_format(x)
    chunk = chunk or (SUMMED_PIXELS[layout] if summing else 1)
    if x.dtype is torch.float64:  # each takes two registers
        size //= 2
    return _tiles(batch, channels, height * width, layout, size, max_planes, chunk)


@functools.lru_cache(1024)
def _tiles(
    batch: int,
    channels: int,
    area: int,
    layout: torch.memory_format,
    size: int,
    max_planes: int,
    chunk: int,
) -> Tiles:
    channels_last = layout is torch.channels_last
    # Halves are made across what is contiguous, if that can be.
    if channels_last:
        groups, count, contiguous = batch, channels, channels
        planes = min(triton.next_power_of_2(channels), 64, size // 16, max_planes)
        pixels = min(triton.next_power_of_2(area), size // planes)
        half = (planes, pixels // 2) if pixels > 1 else (planes // 2, pixels)
    else:
        groups, count, contiguous = 1, batch * channels, area
        pixels = min(triton.next_power_of_2(area), 512, size)
        planes = min(size // pixels, max_planes)
        half = (planes // 2, pixels) if planes > 1 else (planes, pixels // 2)
    # Triton itself sees multiples of 16 only; 14x14 is one of 4.
    align = math.gcd(contiguous, 16)
    row = max(chunk, pixels) if chunk > 1 else 1

    def covered(planes: int, pixels: int, halved: Tiles | None) -> Tiles:
        known = planes, pixels, max(row, pixels), align, channels_last
        chunks = triton.cdiv(area, max(row, pixels))
        cut = Cut(count, area, *(tl.constexpr(value) for value in known))
        kind = " ".join(map(str, (class_of(LAYOUTS[layout], area), *known)))
        return Tiles(groups * triton.cdiv(count, planes) * chunks, chunks, cut, kind, halved)

    return covered(planes, pixels, covered(*half, None))


def launch_tiles(
    plan: Tiles, kernel: Any, *args: Any, maps: int = 1, tuned: bool = True, **options: Any
) -> None:
    """``kernel(*args, cut, **options)`` for all tiles; on axis 1 of the grid, for several maps.

    tuned: a kernel that changes what it reads must not be launched again and again.
    """

    def run(setting: Setting) -> None:
        cover = plan.halved if setting.halved else plan
        grid = cover.programs, maps
        launch(kernel, grid, *args, cover.cut, num_warps=setting.warps, **options)

    settings = SETTINGS if tuned else SETTINGS[:1]
    run(triton_tuning.fastest(kernel, (plan.kind, args, *options.values()), settings, run))


@triton.jit
def place(cut):
    """Where this program works.

    Returns:
        first: int64 offset of its first element.
        row: [PLANES], index of its planes among those of all groups, so in a [B, C].
        exists: [PLANES], whether there is such a plane.
        slot: [PLANES], index of its chunk of each plane among all chunks of all planes.
        pixels: how many there are from the beginning of that chunk.
    """
    return place_of(cut, tl.program_id(0))


@triton.jit
def place_of(cut, program):
    """`place` for one of several pieces of work of a program."""
    planes, area = aligned(cut)
    chunks = tl.cdiv(area, cut.CHUNK)
    blocks = tl.cdiv(planes, cut.PLANES)
    chunk = program % chunks
    block = program // chunks
    group = block // blocks
    first_plane = block % blocks * cut.PLANES
    plane = first_plane + tl.arange(0, cut.PLANES)
    row = group * planes + plane
    pixels = area - chunk * cut.CHUNK
    if cut.CHANNELS_LAST:
        first = (group.to(tl.int64) * area + chunk * cut.CHUNK) * planes + first_plane
    else:
        first = (group.to(tl.int64) * planes + first_plane) * area + chunk * cut.CHUNK
    return first, row, plane < planes, row * chunks + chunk, pixels


@triton.jit
def aligned(cut):
    """planes and area; the compiler now knows that the contiguous one is a multiple of ALIGN."""
    if cut.CHANNELS_LAST:
        return cut.planes // cut.ALIGN * cut.ALIGN, cut.area
    return cut.planes, cut.area // cut.ALIGN * cut.ALIGN


@triton.jit
def tile(cut, start, pixels, exists):
    """Offsets and mask [PLANES, PIXELS] of the tile that begins at pixel ``start`` of a chunk."""
    planes, area = aligned(cut)
    pixel = start + tl.arange(0, cut.PIXELS)[None, :]
    return offsets(cut, pixel, planes, area), exists[:, None] & (pixel < pixels)


@triton.jit
def offsets(cut, pixel, planes, area):
    """[PLANES, ..] of these pixels, where so many planes of such an area are a group."""
    plane = tl.arange(0, cut.PLANES)[:, None]
    if cut.CHANNELS_LAST:
        return pixel * planes + plane
    return plane * area + pixel


@triton.jit
def in_plane(cut, start, pixels):
    """[1, PIXELS], which pixels of their planes those of a tile are."""
    return cut.area - pixels + start + tl.arange(0, cut.PIXELS)[None, :]


@triton.jit
def step_of(cut):
    """Offset from a pixel of a plane to the next."""
    return cut.planes if cut.CHANNELS_LAST else 1


@triton.jit
def per_plane(values, index, exists):
    """[PLANES, 1] of an array."""
    return tl.load(values + index, exists, 0.0)[:, None]


def plane_sums(maps: Sequence[Tensor], count: int = 1, tuned: bool = True) -> list[Tensor]:
    """Plane sums, over ``count``, of dense maps [B, C, H, W] of one shape, dtype and format.

    tuned: see `launch_tiles`; not worth it for small maps.

    Returns:
        [B, C] for each map, in the compute dtype.
    """
    x = maps[0]
    plan = tiles(x, summing=True)
    sums = [new_sums(x, plan) for _ in maps]
    over = count if plan.chunks == 1 else 1
    tensors = padded(maps), padded(sums), over
    launch_tiles(plan, _sum_kernel, *tensors, maps=len(maps), tuned=tuned)
    return finish(sums, count)


def new_sums(x: Tensor, plan: Tiles, *counts: int) -> Tensor:
    """Room for what a summing kernel leaves of a map: [*counts, B, C, chunks], compute dtype."""
    return x.new_empty((*counts, *x.shape[:2], plan.chunks), dtype=compute_dtype(x.dtype))


def finish(sums: Sequence[Tensor], count: int = 1) -> list[Tensor]:
    """Adds up what a kernel left for each chunk: tensors [B, C, chunks] of one shape to [B, C]."""
    if sums[0].shape[2] == 1:
        return [s[..., 0] for s in sums]
    return plane_sums([s[..., None] for s in sums], count, tuned=False)


@triton.jit
def _sum_kernel(maps, sums, count, cut):
    """sums[plane, chunk] = sum of the chunk's pixels / count, for the map on grid axis 1."""
    x, out = pick(maps, tl.program_id(1)), pick(sums, tl.program_id(1))
    first, _, exists, slot, pixels = place(cut)
    total = tl.zeros((cut.PLANES, cut.PIXELS), out.dtype.element_ty)
    for start in range(0, tl.minimum(pixels, cut.CHUNK), cut.PIXELS):
        offset, inside = tile(cut, start, pixels, exists)
        total += tl.load(x + first + offset, inside, 0.0).to(total.dtype)
    tl.store(out + slot, tl.sum(total, axis=1) / count, exists)
