"""Random subsets: the permutation of ``kernels/subsample.py``, evaluated where it is asked for.

A Triton kernel and not the torch form, for that is some 250 launches. The walk along a cycle is a
loop here; it ends where the reference's table says it does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels import subsample as reference
from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.launch import CompileCase
from fastsvi.kernels.triton.philox import TILE_GROUPS, four_words

SORTED_SIZE = tl.constexpr(reference.SORTED_SIZE)

_BLOCK = 256
# Indices ranked by a program, and how many words it looks at in one go.
_RANKED, _CHUNK = 128, 32


# ------------------------------------------------------------------------------- device functions


@triton.jit
def _shift(place, other, key, length):
    """Round of the network: ``place``, moved around ``length`` cells by a hash of ``other``."""
    word = other + key
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    word ^= word >> 16
    moved = place + ((word.to(tl.uint64) * length) >> 32).to(tl.uint32)
    return tl.where(moved >= length, moved - length, moved)


@triton.jit
def _permute(points, a0, a1, a2, a3, b0, b1, b2, b3, rows, columns):
    """Image of cells (int64) of the grid under the permutation with these eight round keys."""
    row = (points // columns).to(tl.uint32)
    column = (points - row.to(tl.int64) * columns).to(tl.uint32)
    height, width = rows.to(tl.uint32), columns.to(tl.uint32)
    row = _shift(row, column, a0, height)
    column = _shift(column, row, b0, width)
    row = _shift(row, column, a1, height)
    column = _shift(column, row, b1, width)
    row = _shift(row, column, a2, height)
    column = _shift(column, row, b2, width)
    row = _shift(row, column, a3, height)
    column = _shift(column, row, b3, width)
    return row.to(tl.int64) * columns + column.to(tl.int64)


@triton.jit
def _words(key_ptr, origin_ptr, row, counts, strides, group):
    """Words of a group for one subset: ``row`` counts particles, fits, steps and batches."""
    num_steps, num_fits, num_particles = counts
    batch = row // num_particles // num_fits // num_steps
    key_ptr += batch * strides[0]
    origin_ptr += batch * strides[1]
    return four_words(
        tl.load(key_ptr).to(tl.uint32),
        tl.load(key_ptr + 1).to(tl.uint32),
        group.to(tl.uint32),
        tl.load(origin_ptr + 1).to(tl.uint32)
        + (row // num_particles // num_fits % num_steps).to(tl.uint32),
        tl.load(origin_ptr + 2).to(tl.uint32) + (row % num_particles).to(tl.uint32),
        tl.load(origin_ptr + 3).to(tl.uint32) + (row // num_particles % num_fits).to(tl.uint32),
    )


@triton.jit
def _tagged(key_ptr, origin_ptr, row, counts, strides, index):
    """The random word of an index, made distinct by the index itself."""
    w0, w1, w2, w3 = _words(key_ptr, origin_ptr, row, counts, strides, index % TILE_GROUPS)
    lane = index // TILE_GROUPS
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word.to(tl.int64) * SORTED_SIZE + index


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def walk_kernel(
    key_ptr,  # int64 [B or 1, 2]
    origin_ptr,  # int64 [B or 1, 4]
    out_ptr,  # int64 [B, K, F, P, b]
    num_steps,  # K
    num_fits,  # F
    num_particles,  # P
    size,  # N
    subsample_size,  # b
    rows,
    columns,
    num_blocks,
    key_stride,  # 2, or 0 if all batches share a key
    origin_stride,  # 4 or 0
    BLOCK: tl.constexpr,
):
    """One program: one block of one subset."""
    row = tl.program_id(0) // num_blocks
    counts = (num_steps, num_fits, num_particles)
    strides = (key_stride, origin_stride)
    # The round keys are all lanes of groups 0 and 1.
    a0, a1, a2, a3 = _words(key_ptr, origin_ptr, row, counts, strides, row * 0)
    b0, b1, b2, b3 = _words(key_ptr, origin_ptr, row, counts, strides, row * 0 + 1)
    points = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = points < subsample_size
    out_ptr += row.to(tl.int64) * subsample_size + points
    points = _permute(points, a0, a1, a2, a3, b0, b1, b2, b3, rows, columns)
    outside = wanted & (points >= size)
    while tl.max(outside.to(tl.int32), 0) > 0:
        following = _permute(points, a0, a1, a2, a3, b0, b1, b2, b3, rows, columns)
        points = tl.where(outside, following, points)
        outside = wanted & (points >= size)
    tl.store(out_ptr, points, mask=wanted)


@triton.jit
def rank_kernel(
    key_ptr,  # int64 [B or 1, 2]
    origin_ptr,  # int64 [B or 1, 4]
    out_ptr,  # int64 [B, K, F, P, b]
    num_steps,  # K
    num_fits,  # F
    num_particles,  # P
    size,  # N
    subsample_size,  # b
    num_blocks,
    key_stride,  # 2 or 0
    origin_stride,  # 4 or 0
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one block of indices, each put in the place that its rank among the words is."""
    row = tl.program_id(0) // num_blocks
    counts = (num_steps, num_fits, num_particles)
    strides = (key_stride, origin_stride)
    index = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    own = _tagged(key_ptr, origin_ptr, row, counts, strides, index)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, CHUNK):
        other = start + tl.arange(0, CHUNK)
        words = _tagged(key_ptr, origin_ptr, row, counts, strides, other)
        smaller = (words[None, :] < own[:, None]) & (other < size)[None, :]
        rank += tl.sum(smaller.to(tl.int32), 1)
    out_ptr += row.to(tl.int64) * subsample_size
    tl.store(out_ptr + rank, index.to(tl.int64), mask=(index < size) & (rank < subsample_size))


# ---------------------------------------------------------------------------------------- launcher


def indices(
    key: Tensor,  # int64 [B or 1, 2]
    origin: Tensor,  # int64 [B or 1, 4]
    counts: tuple[int, int, int, int],  # B, K, F, P
    size: int,
    subsample_size: int,
) -> Tensor:
    """Subsets ``[B, K, F, P, b]``."""
    key, origin = key.contiguous(), origin.contiguous()
    out = torch.empty((*counts, subsample_size), dtype=torch.int64, device=key.device)
    if out.numel() == 0:
        return out
    subsets = out.numel() // subsample_size
    strides = launch.batch_stride(key), launch.batch_stride(origin)
    with launch.on_device_of(out):
        if size <= reference.SORTED_SIZE:
            blocks = -(-size // _RANKED)
            rank_kernel[(subsets * blocks,)](
                key,
                origin,
                out,
                *counts[1:],
                size,
                subsample_size,
                blocks,
                *strides,
                BLOCK=_RANKED,
                CHUNK=_CHUNK,
                **launch.OPTIONS,
            )
        else:
            blocks = -(-subsample_size // _BLOCK)
            walk_kernel[(subsets * blocks,)](
                key,
                origin,
                out,
                *counts[1:],
                size,
                subsample_size,
                *reference.grid_of(size),
                blocks,
                *strides,
                BLOCK=_BLOCK,
                num_warps=launch.warps(_BLOCK),
                **launch.OPTIONS,
            )
    return out


# ----------------------------------------------------------------------------------- compile cases


def _case(name: str, kernel: Any, threads: int, size: str = "i32", **blocks: int) -> CompileCase:
    types = {"key_ptr": "*i64", "origin_ptr": "*i64", "out_ptr": "*i64", "size": size}
    return CompileCase(
        f"subsample.{name}",
        kernel,
        signature={n: types.get(n, "i32") for n in kernel.arg_names if n not in blocks},
        constants=blocks,
        divisible=("key_ptr", "origin_ptr", "out_ptr"),
        never_one=("rows", "columns"),  # of a grid with more than 1,024 cells
        threads=threads,
    )


COMPILE_CASES = [
    _case("walk", walk_kernel, _BLOCK, BLOCK=_BLOCK),
    _case("walk-huge", walk_kernel, _BLOCK, "i64", BLOCK=_BLOCK),
    _case("rank", rank_kernel, 128, BLOCK=_RANKED, CHUNK=_CHUNK),
]
