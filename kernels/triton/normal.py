"""The mean-field normal, forward: sample and log q. See ``kernels/normal.py`` for the formulas.

A program owns one tile of elements of a block of particles of one fit. Sums over elements go
through one partial sum per tile and particle; nothing is added up by atomics, so the same inputs
give the same bits.

``row`` is a fit of a batch: vmap adds a batch axis B in front of the fits, each batch with its own
key and origin or all with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels import philox
from fastsvi.kernels.transforms import Kind
from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.launch import CompileCase
from fastsvi.kernels.triton.math import exp
from fastsvi.kernels.triton.philox import (
    TILE,
    TILE_GROUPS,
    four_normals,
    group_block,
    tile_words,
)
from fastsvi.kernels.triton.special import HALF_LOG_2PI, log_sigmoid, sigmoid, softplus
from fastsvi.kernels.triton.transforms import _inside as inside

KIND_EXP = tl.constexpr(int(Kind.EXP))
KIND_SOFTPLUS = tl.constexpr(int(Kind.SOFTPLUS))
KIND_SIGMOID = tl.constexpr(int(Kind.SIGMOID))
HAS_EXP = tl.constexpr(1 << Kind.EXP)
HAS_SOFTPLUS = tl.constexpr(1 << Kind.SOFTPLUS)
HAS_SIGMOID = tl.constexpr(1 << Kind.SIGMOID)

_SUM_BLOCK = 1024

# Programs of 256 threads or fewer that fill the largest device: 132 multiprocessors, 16 each.
_PROGRAMS = 2112


# ------------------------------------------------------------------------------- device functions


@triton.jit
def scale_and_log(raw, SCALE_MAP: tl.constexpr):
    """Scale and its log from the unconstrained value."""
    if SCALE_MAP == "exp":
        return exp(raw), raw
    elif SCALE_MAP == "softplus":
        scale = softplus(raw)
        # Below this softplus(x) is exp(x), and its log is x where exp(x) has underflowed.
        return scale, tl.where(raw < -37.0, raw, tl.log(scale))
    else:
        return raw, tl.log(raw)


@triton.jit
def _constrain(x, kind, KINDS: tl.constexpr):
    """f(x) and log|f'(x)| where each element has its own kind; KINDS has a bit per kind in use."""
    y, log_slope = x, tl.zeros_like(x)
    if HAS_EXP & KINDS:
        chosen = kind == KIND_EXP
        y, log_slope = tl.where(chosen, exp(x), y), tl.where(chosen, x, log_slope)
    if (HAS_SOFTPLUS | HAS_SIGMOID) & KINDS:
        below = log_sigmoid(x)
        if HAS_SOFTPLUS & KINDS:
            chosen = kind == KIND_SOFTPLUS
            y, log_slope = tl.where(chosen, softplus(x), y), tl.where(chosen, below, log_slope)
        if HAS_SIGMOID & KINDS:
            chosen = kind == KIND_SIGMOID
            y = tl.where(chosen, inside(sigmoid(x)), y)
            log_slope = tl.where(chosen, below + log_sigmoid(-x), log_slope)
    return y, log_slope


@triton.jit
def row_stride(num_elements, WHOLE_QUADS: tl.constexpr):
    """num_elements, said such that the compiler sees it is a multiple of 4 where it is."""
    return num_elements // 4 * 4 if WHOLE_QUADS else num_elements


@triton.jit
def lane_noise(lane: tl.constexpr, lanes, noise_ptr, at, valid, GIVEN: tl.constexpr):
    """Noise of a lane: drawn already, or given."""
    return tl.load(noise_ptr + at, mask=valid, other=0.0) if GIVEN else lanes[lane]


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def forward_kernel(
    loc_ptr,  # [B, F, D]
    raw_scale_ptr,  # [B, F, D] unconstrained
    key_ptr,  # int64 [B or 1, 2]
    origin_ptr,  # int64 [B or 1, 4]
    noise_ptr,  # [B, F, P, D], read if GIVEN
    segment_ptr,  # int32 [D], segment of each element; this and the next three if KINDS
    kind_ptr,  # int32 [S]
    shift_ptr,  # [S]
    factor_ptr,  # [S]
    value_ptr,  # [B, F, P, D] z, or the constrained value if KINDS
    log_q_ptr,  # [B, F, P, T] one sum per tile
    log_det_ptr,  # [B, F, P, T], written if KINDS
    num_fits,  # F
    num_particles,  # P
    num_elements,  # D
    num_tiles,  # T
    particles_per_program,
    key_stride,  # 2, or 0 if all batches share a key
    origin_stride,  # 4 or 0
    SCALE_MAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GIVEN: tl.constexpr,
    KINDS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PARTICLES: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
):
    """One program: one tile of some particles of one fit, whose loc and scale it reads once."""
    dtype: tl.constexpr = value_ptr.dtype.element_ty
    row = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    batch = row // num_fits
    stride = row_stride(num_elements, WHOLE_QUADS)
    start = tile.to(tl.int64) * TILE
    groups = group_block(GROUPS, NEIGHBOURS)
    nothing = tl.zeros([NEIGHBOURS, 1, GROUPS // NEIGHBOURS], dtype)

    locs, scales, log_scale_sum = (), (), nothing
    kinds, shifts, factors, log_factor_sum = (), (), (), nothing
    for lane in tl.static_range(LANES):
        within = lane * TILE_GROUPS + groups
        valid = within < stride - start
        own = row.to(tl.int64) * stride + start + within
        raw_scale = tl.load(raw_scale_ptr + own, mask=valid, other=1.0)
        scale, log_scale = scale_and_log(raw_scale, SCALE_MAP)
        log_scale_sum += tl.where(valid, log_scale + HALF_LOG_2PI, 0.0)
        locs += (tl.load(loc_ptr + own, mask=valid, other=0.0),)
        scales += (scale,)
        if KINDS:
            segment = tl.load(segment_ptr + start + within, mask=valid, other=0)
            factor = tl.load(factor_ptr + segment)
            log_factor_sum += tl.where(valid, tl.log(tl.abs(factor)), 0.0)
            kinds += (tl.load(kind_ptr + segment),)
            shifts += (tl.load(shift_ptr + segment),)
            factors += (factor,)

    first = tl.program_id(1) * particles_per_program
    last = tl.minimum(first + particles_per_program, num_particles)
    for here in range(first, last, PARTICLES):
        particle = here + tl.arange(0, PARTICLES)[None, :, None]
        present = particle < last
        line = row.to(tl.int64) * num_particles + particle  # row of the particle's elements
        lanes = (0, 0, 0, 0)
        if not GIVEN:
            w0, w1, w2, w3 = tile_words(
                key_ptr + batch * key_stride,
                origin_ptr + batch * origin_stride,
                tile,
                0,
                particle,
                row % num_fits,
                groups,
            )
            lanes = four_normals(w0, w1, w2, w3, dtype, LANES)
        terms = tl.zeros([NEIGHBOURS, PARTICLES, GROUPS // NEIGHBOURS], dtype) + log_scale_sum
        log_det = tl.zeros([NEIGHBOURS, PARTICLES, GROUPS // NEIGHBOURS], dtype) + log_factor_sum
        for lane in tl.static_range(LANES):
            within = lane * TILE_GROUPS + groups
            valid = within < stride - start
            at = line * stride + start + within
            noise = lane_noise(lane, lanes, noise_ptr, at, valid & present, GIVEN)
            value = locs[lane] + scales[lane] * noise
            terms += tl.where(valid, 0.5 if ENTROPY else 0.5 * (noise * noise), 0.0)
            if KINDS:
                value, log_slope = _constrain(value, kinds[lane], KINDS)
                value = shifts[lane] + factors[lane] * value
                log_det += tl.where(valid, log_slope, 0.0)
            tl.store(value_ptr + at, value, mask=valid & present)
        part = line * num_tiles + tile
        tl.store(log_q_ptr + part, -tl.sum(tl.sum(terms, 2, True), 0, True), mask=present)
        if KINDS:
            tl.store(log_det_ptr + part, tl.sum(tl.sum(log_det, 2, True), 0, True), mask=present)


@triton.jit
def sum_kernel(
    part_ptr,  # [N, T]
    total_ptr,  # [N]
    num_parts,  # T
    BLOCK: tl.constexpr,
):
    """One program adds up one row, in float64: a float32 sum of 1e8 terms would drift."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + row * num_parts + at, mask=at < num_parts, other=0.0)
    tl.store(total_ptr + row, tl.sum(total, 0))


# --------------------------------------------------------------------------------------- launcher


def blocks(
    num_elements: int, num_particles: int, dtype: torch.dtype, kinds: int = 0
) -> dict[str, Any]:
    """How a kernel is cut: four lanes of 128 bits a thread, of several particles if D is small."""
    _, lanes, groups = launch.tiling(num_elements)
    # Transforms keep so many values at a time that four float32 neighbours would spill.
    neighbours = 2 if kinds else launch.neighbours(dtype)
    threads = max(32, groups // neighbours)
    room = threads * philox.LANES * neighbours // (lanes * groups)
    return {
        "LANES": lanes,
        "GROUPS": groups,
        "NEIGHBOURS": neighbours,
        "PARTICLES": min(room, 1 << max(0, num_particles - 1).bit_length()),
        "WHOLE_QUADS": num_elements % 4 == 0,
        "KINDS": kinds,
        "num_warps": launch.warps(threads),
    }


def forward(
    loc: Tensor,  # [B, F, D]
    raw_scale: Tensor,  # [B, F, D]
    key: Tensor,  # int64 [B or 1, 2]
    origin: Tensor,  # int64 [B or 1, 4]
    noise: Tensor | None,  # [B, F, P, D]
    table: Sequence[Tensor],  # none, or segment [D], kind, shift and factor [S]
    kinds: int,
    num_particles: int,
    scale_map: str,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[B, F, P, D]``, log q ``[B, F, P]``; with a table log|det| ``[B, F, P]``."""
    batches, fits, elements = loc.shape
    loc, raw_scale = loc.contiguous(), raw_scale.contiguous()
    key, origin = key.contiguous(), origin.contiguous()
    noise = None if noise is None else noise.contiguous()
    value = loc.new_empty((batches, fits, num_particles, elements))
    log_q = loc.new_zeros((batches, fits, num_particles))
    log_det = loc.new_zeros(log_q.shape if table else (0,))
    if value.numel() == 0:
        return value, log_q, log_det
    tiles, *_ = launch.tiling(elements)
    parts = [
        sums if tiles == 1 else loc.new_empty((*sums.shape, tiles)) for sums in (log_q, log_det)
    ]
    segment, kind, shift, factor = table or (loc,) * 4  # never read then
    cut = blocks(elements, num_particles, loc.dtype, kinds if table else 0)
    # Enough programs to fill the device, and otherwise as many particles in each as there are.
    wanted = -(-_PROGRAMS // (batches * fits * tiles))
    per_program = max(cut["PARTICLES"], -(-num_particles // wanted))
    grid = (batches * fits * tiles, -(-num_particles // per_program))
    with launch.on_device_of(loc):
        forward_kernel[grid](
            loc,
            raw_scale,
            key,
            origin,
            loc if noise is None else noise,
            segment,
            kind,
            shift,
            factor,
            value,
            *parts,
            fits,
            num_particles,
            elements,
            tiles,
            per_program,
            launch.batch_stride(key),
            launch.batch_stride(origin),
            SCALE_MAP=scale_map,
            ENTROPY=estimator == "entropy",
            GIVEN=noise is not None,
            **cut,
            **launch.OPTIONS,
        )
        if tiles > 1:
            for part, total in zip(parts, (log_q, log_det), strict=True):
                if total.numel():
                    sum_kernel[(total.numel(),)](
                        part, total, tiles, BLOCK=_SUM_BLOCK, **launch.OPTIONS
                    )
    return value, log_q, log_det


# ----------------------------------------------------------------------------------- compile cases


def _case(
    name: str, dtype: str = "fp32", shape: tuple[int, int] = (1 << 20, 8), **flags: Any
) -> CompileCase:
    """A forward case; ``flags`` replace what is compiled in, wide_loads and such included."""
    elements, particles = shape
    pointers = [n for n in forward_kernel.arg_names if n.endswith("_ptr")]
    types = {
        **dict.fromkeys(pointers, f"*{dtype}"),
        "key_ptr": "*i64",
        "origin_ptr": "*i64",
        "segment_ptr": "*i32",
        "kind_ptr": "*i32",
    }
    limits = {k: flags.pop(k) for k in launch.LIMITS if k in flags}
    real = torch.float32 if dtype == "fp32" else torch.float64
    cut = blocks(elements, particles, real, flags.pop("KINDS", 0))
    threads = cut.pop("num_warps") * 32
    constants = {"SCALE_MAP": "exp", "ENTROPY": False, "GIVEN": False, **cut, **flags}
    return CompileCase(
        f"normal.{name}",
        forward_kernel,
        signature={n: types.get(n, "i32") for n in forward_kernel.arg_names if n not in constants},
        constants=constants,
        divisible=(*pointers, "num_elements"),
        threads=threads,
        **limits,
    )


_ALL_KINDS = 0b1111

COMPILE_CASES = [
    _case("forward", wide_loads=8, wide_stores=4),
    _case("forward-softplus", SCALE_MAP="softplus", wide_loads=8, wide_stores=4),
    _case("forward-entropy", ENTROPY=True, wide_loads=8, wide_stores=4),
    _case("forward-given", GIVEN=True, wide_loads=12, wide_stores=4),
    _case("forward-positive", KINDS=HAS_EXP.value),
    _case("forward-constrained", KINDS=_ALL_KINDS),
    _case("forward-two-lanes", shape=(512, 8), wide_loads=4, wide_stores=4),
    _case("forward-short", shape=(10, 64)),
    _case("forward-float64", "fp64", wide_loads=8, wide_stores=4),
    CompileCase(
        "normal.sum",
        sum_kernel,
        signature={"part_ptr": "*fp32", "total_ptr": "*fp32", "num_parts": "i32"},
        constants={"BLOCK": _SUM_BLOCK},
        divisible=("part_ptr", "total_ptr", "num_parts"),
        wide_loads=1,
    ),
]
