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
def lane_of(lane, lanes):
    """One of four lanes, by a number that is known when the program runs, or when it compiles."""
    return tl.where(
        lane < 2, tl.where(lane == 0, lanes[0], lanes[1]), tl.where(lane == 2, lanes[2], lanes[3])
    )


@triton.jit
def lane_noise(lane, lanes, noise_ptr, at, valid, GIVEN: tl.constexpr):
    """Noise of a lane: drawn already, or given."""
    if GIVEN:
        return tl.load(noise_ptr + at, mask=valid, other=0.0)
    else:
        return lane_of(lane, lanes)


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
    own = row.to(tl.int64) * stride + start

    locs, scales, log_scale_sum, log_factor_sum = (), (), nothing, nothing
    if KINDS:
        for number in tl.range(LANES, loop_unroll_factor=1):
            within = number * TILE_GROUPS + groups
            valid = within < stride - start
            raw_scale = tl.load(raw_scale_ptr + own + within, mask=valid, other=1.0)
            _, log_scale = scale_and_log(raw_scale, SCALE_MAP)
            log_scale_sum += tl.where(valid, log_scale + HALF_LOG_2PI, 0.0)
            segment = tl.load(segment_ptr + start + within, mask=valid, other=0)
            factor = tl.load(factor_ptr + segment)
            log_factor_sum += tl.where(valid, tl.log(tl.abs(factor)), 0.0)
    else:
        for lane in tl.static_range(LANES):
            within = lane * TILE_GROUPS + groups
            valid = within < stride - start
            raw_scale = tl.load(raw_scale_ptr + own + within, mask=valid, other=1.0)
            scale, log_scale = scale_and_log(raw_scale, SCALE_MAP)
            log_scale_sum += tl.where(valid, log_scale + HALF_LOG_2PI, 0.0)
            locs += (tl.load(loc_ptr + own + within, mask=valid, other=0.0),)
            scales += (scale,)

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
        if KINDS:
            # Rolled up, and all but the noise read again: four lanes at a time would spill.
            for number in tl.range(LANES, loop_unroll_factor=1):
                within = number * TILE_GROUPS + groups
                valid = within < stride - start
                at = line * stride + start + within
                noise = lane_noise(number, lanes, noise_ptr, at, valid & present, GIVEN)
                terms += tl.where(valid, 0.5 if ENTROPY else 0.5 * (noise * noise), 0.0)
                raw_scale = tl.load(raw_scale_ptr + own + within, mask=valid, other=1.0)
                scale, _ = scale_and_log(raw_scale, SCALE_MAP)
                loc = tl.load(loc_ptr + own + within, mask=valid, other=0.0)
                segment = tl.load(segment_ptr + start + within, mask=valid, other=0)
                kind = tl.load(kind_ptr + segment)
                value, log_slope = _constrain(loc + scale * noise, kind, KINDS)
                value = tl.load(shift_ptr + segment) + tl.load(factor_ptr + segment) * value
                log_det += tl.where(valid, log_slope, 0.0)
                tl.store(value_ptr + at, value, mask=valid & present)
        else:
            for lane in tl.static_range(LANES):
                within = lane * TILE_GROUPS + groups
                valid = within < stride - start
                at = line * stride + start + within
                noise = lane_noise(lane, lanes, noise_ptr, at, valid & present, GIVEN)
                terms += tl.where(valid, 0.5 if ENTROPY else 0.5 * (noise * noise), 0.0)
                tl.store(value_ptr + at, locs[lane] + scales[lane] * noise, mask=valid & present)
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
    neighbours = launch.neighbours(dtype)
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
        **(launch.registers(168) if kinds else {}),
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
    log_q = loc.new_empty((batches, fits, num_particles))
    log_det = loc.new_empty(log_q.shape if table else (0,))
    if value.numel() == 0:
        return value, log_q.zero_(), log_det.zero_()
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


def case(
    name: str, kernel: Any, dtype: str = "fp32", shape: tuple[int, int] = (1 << 20, 8), **flags: Any
) -> CompileCase:
    """A case of the forward or a backward kernel; ``flags`` replace constants and limits."""
    elements, particles = shape
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
    types = {
        **dict.fromkeys(pointers, f"*{dtype}"),
        **dict.fromkeys(("key_ptr", "origin_ptr"), "*i64"),
        **dict.fromkeys(("segment_ptr", "kind_ptr"), "*i32"),
        "active_ptr": "*i1",
    }
    limits = {k: flags.pop(k) for k in launch.LIMITS if k in flags}
    real = torch.float32 if dtype == "fp32" else torch.float64
    cut = blocks(elements, particles, real, flags.pop("KINDS", 0))
    threads = cut.pop("num_warps") * 32
    options = launch.OPTIONS | {k: cut.pop(k) for k in ("maxnreg",) if k in cut}
    constants = {
        "SCALE_MAP": "exp",
        **dict.fromkeys(("STL", "ENTROPY", "GIVEN", "HAS_LOG_DET"), False),
        **dict.fromkeys(("HAS_VALUE", "HAS_LOG_Q"), True),
        **cut,
        **flags,
    }
    return CompileCase(
        f"normal.{name}",
        kernel,
        signature={n: types.get(n, "i32") for n in kernel.arg_names if n not in constants},
        constants={n: v for n, v in constants.items() if n in kernel.arg_names},
        divisible=(*pointers, "num_elements"),
        threads=threads,
        options=options,
        **limits,
    )


ALL_KINDS = 0b1111
_WIDE: dict[str, Any] = {"wide_loads": 8, "wide_stores": 4}
# Where lanes are rolled up, the accesses of one are those of all.
_ROLLED: dict[str, Any] = {"wide_loads": 5, "wide_stores": 1, "KINDS": ALL_KINDS}

COMPILE_CASES = [
    case("forward", forward_kernel, **_WIDE),
    case("forward-softplus", forward_kernel, **_WIDE, SCALE_MAP="softplus"),
    case("forward-entropy", forward_kernel, **_WIDE, ENTROPY=True),
    case("forward-given", forward_kernel, **_WIDE | {"wide_loads": 12}, GIVEN=True),
    case("forward-positive", forward_kernel, **_ROLLED | {"KINDS": HAS_EXP.value}),
    case("forward-constrained", forward_kernel, **_ROLLED),
    case("forward-constrained-softplus", forward_kernel, **_ROLLED, SCALE_MAP="softplus"),
    # Two segments of 32 bits lie beside two doubles.
    case("forward-constrained-float64", forward_kernel, "fp64", **_ROLLED | {"wide_loads": 3}),
    case("forward-two-lanes", forward_kernel, shape=(512, 8), wide_loads=4, wide_stores=4),
    case("forward-short", forward_kernel, shape=(10, 64)),
    case("forward-float64", forward_kernel, "fp64", **_WIDE),
    CompileCase(
        "normal.sum",
        sum_kernel,
        signature={"part_ptr": "*fp32", "total_ptr": "*fp32", "num_parts": "i32"},
        constants={"BLOCK": _SUM_BLOCK},
        divisible=("part_ptr", "total_ptr", "num_parts"),
        wide_loads=1,
    ),
]
