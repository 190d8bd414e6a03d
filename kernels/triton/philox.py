"""Philox-4x32-10 as device functions, and the kernel that only draws. See ``kernels/philox.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels import philox as reference
from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.launch import CompileCase
from fastsvi.kernels.triton.math import cos_sin_turn, low_byte

TILE = tl.constexpr(reference.TILE)
TILE_GROUPS = tl.constexpr(reference.TILE_GROUPS)
MULTIPLIER_0 = tl.constexpr(reference.MULTIPLIER_0)
MULTIPLIER_1 = tl.constexpr(reference.MULTIPLIER_1)
WEYL_0 = tl.constexpr(reference.WEYL_0)
WEYL_1 = tl.constexpr(reference.WEYL_1)

UNIFORM = tl.constexpr(reference.UNIFORM)
NORMAL = tl.constexpr(reference.NORMAL)


# ------------------------------------------------------------------------------- device functions


@triton.jit
def group_block(GROUPS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The groups 0 .. GROUPS - 1 of a tile as a block [N, 1, GROUPS / N], group = N t + j.

    Triton's default layout gives threads the last axes first, so that a thread owns N neighbouring
    groups, as many as 128 bits hold; a plain arange would go through shared memory to get there.
    The middle axis is for particles.
    """
    j = tl.arange(0, NEIGHBOURS)[:, None, None]
    t = tl.arange(0, GROUPS // NEIGHBOURS)[None, None, :]
    return NEIGHBOURS * t + j


@triton.jit
def four_words(key_0, key_1, c0, c1, c2, c3):
    """The four words of counters that broadcast against each other; all uint32."""
    for _ in tl.static_range(10):
        # One multiplication each, with a 64-bit result.
        product_0, product_1 = c0.to(tl.uint64) * MULTIPLIER_0, c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c1, c3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
        key_0 = tl.add(key_0, WEYL_0, sanitize_overflow=False)
        key_1 = tl.add(key_1, WEYL_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def unit(word, dtype: tl.constexpr):
    """A word to the open unit interval."""
    u = word.to(dtype) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return u if dtype == tl.float64 else tl.minimum(u, 0.999999940395355224609375)


@triton.jit
def _radius(word, dtype: tl.constexpr):
    """sqrt(-2 log u) of u = (word + 1/2) 2^-32."""
    if dtype == tl.float64:
        return tl.sqrt(-2.0 * tl.log(unit(word, dtype)))
    # float32 holds 24 bits of the word. The others decide where u is nearly 1: split the word into
    # two exact parts, and put back what their sum loses.
    high = (word & 0xFFFFFF00).to(dtype)
    low = low_byte(word, 0.5)
    total = high + low
    lost = low - (total - high)
    log_u = tl.log(total * 2.3283064365386963e-10) + lost * 2.3283064365386963e-10
    return tl.sqrt(-2.0 * log_u)


@triton.jit
def four_normals(w0, w1, w2, w3, dtype: tl.constexpr, LANES: tl.constexpr):
    """Standard normals of the first LANES lanes (1, 2 or 4) from four words; repeats beyond."""
    radius = _radius(w0, dtype)
    cosine, sine = cos_sin_turn(w1, dtype)
    n0, n1 = radius * cosine, radius * sine
    n2, n3 = n0, n1
    if LANES > 2:
        radius = _radius(w2, dtype)
        cosine, sine = cos_sin_turn(w3, dtype)
        n2, n3 = radius * cosine, radius * sine
    return n0, n1, n2, n3


@triton.jit
def tile_words(key_ptr, origin_ptr, tile, step, particle, fit, groups):
    """Words of the groups (a block within the tile) of one tile, at an offset from the origin.

    step, particle and fit are counted from the origin, in 32 bits; any of them may be a block.
    """
    return four_words(
        tl.load(key_ptr).to(tl.uint32),
        tl.load(key_ptr + 1).to(tl.uint32),
        tl.load(origin_ptr).to(tl.uint32) + (tile * TILE_GROUPS + groups).to(tl.uint32),
        tl.load(origin_ptr + 1).to(tl.uint32) + step,
        tl.load(origin_ptr + 2).to(tl.uint32) + particle,
        tl.load(origin_ptr + 3).to(tl.uint32) + fit,
    )


# ----------------------------------------------------------------------------------------- kernel


@triton.jit
def draw_kernel(
    key_ptr,  # int64 [B or 1, 2]
    origin_ptr,  # int64 [B or 1, 4]
    out_ptr,  # [B, K, F, P, D]
    num_steps,  # K
    num_fits,  # F
    num_particles,  # P
    num_elements,  # D
    num_tiles,
    key_stride,  # 2, or 0 if all batches share a key
    origin_stride,  # 4 or 0
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """One program draws one tile of one particle."""
    tile = tl.program_id(0) % num_tiles
    row = tl.program_id(0) // num_tiles
    particle = row % num_particles
    fit = row // num_particles % num_fits
    step = row // num_particles // num_fits % num_steps
    batch = row // num_particles // num_fits // num_steps
    groups = group_block(GROUPS, NEIGHBOURS)
    w0, w1, w2, w3 = tile_words(
        key_ptr + batch * key_stride,
        origin_ptr + batch * origin_stride,
        tile,
        step,
        particle,
        fit,
        groups,
    )
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if KIND == NORMAL:
        lanes = four_normals(w0, w1, w2, w3, dtype, LANES)
    elif KIND == UNIFORM:
        lanes = (unit(w0, dtype), unit(w1, dtype), unit(w2, dtype), unit(w3, dtype))
    else:
        lanes = (w0.to(dtype), w1.to(dtype), w2.to(dtype), w3.to(dtype))
    out_ptr += row.to(tl.int64) * num_elements
    for lane in tl.static_range(LANES):
        element = tile * TILE + lane * TILE_GROUPS + groups
        tl.store(out_ptr + element, lanes[lane], mask=element < num_elements)


# ---------------------------------------------------------------------------------------- launcher


def draw(
    key: Tensor,  # int64 [B or 1, 2]
    origin: Tensor,  # int64 [B or 1, 4]
    shape: tuple[int, int, int, int, int],  # B, K, F, P, D
    kind: int,
    dtype: torch.dtype,
) -> Tensor:
    key, origin = key.contiguous(), origin.contiguous()
    out = torch.empty(shape, dtype=dtype, device=key.device)
    if out.numel() == 0:
        return out
    *_, num_elements = shape
    tiles, lanes, groups = launch.tiling(num_elements)
    with launch.on_device_of(out):
        draw_kernel[(out.numel() // num_elements * tiles,)](
            key,
            origin,
            out,
            *shape[1:],
            tiles,
            launch.batch_stride(key),
            launch.batch_stride(origin),
            KIND=kind,
            LANES=lanes,
            GROUPS=groups,
            NEIGHBOURS=launch.neighbours(dtype),
            num_warps=launch.warps(groups // launch.neighbours(dtype)),
            **launch.OPTIONS,
        )
    return out


def _case(name: str, kind: int, lanes: int, groups: int, bits: int = 32) -> CompileCase:
    counts = ("num_steps", "num_fits", "num_particles", "num_elements", "num_tiles")
    out = "*i64" if kind == reference.WORDS else f"*fp{bits}"
    neighbours = 128 // bits
    return CompileCase(
        f"philox.draw-{name}",
        draw_kernel,
        signature={
            "key_ptr": "*i64",
            "origin_ptr": "*i64",
            "out_ptr": out,
            **dict.fromkeys((*counts, "key_stride", "origin_stride"), "i32"),
        },
        constants={"KIND": kind, "LANES": lanes, "GROUPS": groups, "NEIGHBOURS": neighbours},
        divisible=("key_ptr", "origin_ptr", "out_ptr", "num_elements"),
        threads=groups // neighbours,
        wide_stores=lanes if groups == reference.TILE_GROUPS else 0,
    )


COMPILE_CASES = [
    _case("words", reference.WORDS, 4, 256, 64),
    _case("uniform", reference.UNIFORM, 4, 256),
    _case("normal", reference.NORMAL, 4, 256),
    _case("normal-two-lanes", reference.NORMAL, 2, 256),
    _case("normal-short", reference.NORMAL, 1, 16),
    _case("normal-float64", reference.NORMAL, 4, 256, 64),
]
