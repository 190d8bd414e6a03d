"""The mean-field normal, backward. See ``kernels/normal.py``.

A program owns one tile of elements of one fit and goes through all its particles, drawing their
noise again. So the sums over particles stay in its registers, no atomics are needed, and the same
inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.math import exp
from fastsvi.kernels.triton.normal import (
    ALL_KINDS,
    HAS_EXP,
    HAS_SIGMOID,
    HAS_SOFTPLUS,
    KIND_EXP,
    KIND_SIGMOID,
    KIND_SOFTPLUS,
    blocks,
    case,
    lane_noise,
    lane_of,
    row_stride,
    scale_and_log,
)
from fastsvi.kernels.triton.philox import (
    TILE,
    TILE_GROUPS,
    four_normals,
    group_block,
    tile_words,
)
from fastsvi.kernels.triton.special import sigmoid

# ------------------------------------------------------------------------------- device functions


@triton.jit
def _slopes(raw, scale, SCALE_MAP: tl.constexpr):
    """Derivatives of scale and log(scale) by the unconstrained value."""
    if SCALE_MAP == "exp":
        return scale, tl.zeros_like(raw) + 1.0
    elif SCALE_MAP == "softplus":
        slope = sigmoid(raw)
        return slope, tl.where(raw < -37.0, 1.0, slope / scale)
    else:
        return tl.zeros_like(raw) + 1.0, 1.0 / raw


@triton.jit
def _constrain_slopes(x, kind, KINDS: tl.constexpr):
    """Derivatives of what :func:`_constrain` returns."""
    slope, log_slope = tl.zeros_like(x) + 1.0, tl.zeros_like(x)
    if HAS_EXP & KINDS:
        chosen = kind == KIND_EXP
        slope, log_slope = tl.where(chosen, exp(x), slope), tl.where(chosen, 1.0, log_slope)
    if (HAS_SOFTPLUS | HAS_SIGMOID) & KINDS:
        e = exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
        if HAS_SOFTPLUS & KINDS:
            chosen = kind == KIND_SOFTPLUS
            slope = tl.where(chosen, tl.where(x < 0.0, e * r, r), slope)
            log_slope = tl.where(chosen, tl.where(x < 0.0, r, e * r), log_slope)
        if HAS_SIGMOID & KINDS:
            chosen = kind == KIND_SIGMOID
            slope = tl.where(chosen, e * r * r, slope)
            log_slope = tl.where(chosen, tl.where(x < 0.0, 1.0 - e, e - 1.0) * r, log_slope)
    return slope, log_slope


@triton.jit
def gradients(
    loc_ptr,
    raw_scale_ptr,
    key_ptr,
    origin_ptr,
    noise_ptr,
    segment_ptr,
    kind_ptr,
    factor_ptr,
    grad_value_ptr,  # [B, F, P, D], read if HAS_VALUE
    grad_log_q_ptr,  # [B, F, P], read if HAS_LOG_Q
    grad_log_det_ptr,  # [B, F, P], read if KINDS and HAS_LOG_DET
    num_fits,
    num_particles,
    num_elements,
    num_tiles,
    key_stride,
    origin_stride,
    SCALE_MAP: tl.constexpr,
    STL: tl.constexpr,
    GIVEN: tl.constexpr,
    KINDS: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_LOG_DET: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PARTICLES: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
):
    """Gradients of loc and raw_scale of one tile of one fit, four lanes each, all particles."""
    dtype: tl.constexpr = raw_scale_ptr.dtype.element_ty
    row = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    stride = row_stride(num_elements, WHOLE_QUADS)
    start = tile.to(tl.int64) * TILE
    left = stride - start
    own = row.to(tl.int64) * stride + start
    groups = group_block(GROUPS, NEIGHBOURS)
    batch = row // num_fits
    zeros = tl.zeros([NEIGHBOURS, PARTICLES, GROUPS // NEIGHBOURS], dtype)
    # A tuple, but by names: Triton 3.6 carries no tuple through a loop.
    loc_0, loc_1, loc_2, loc_3 = zeros, zeros, zeros, zeros
    raw_0, raw_1, raw_2, raw_3 = zeros, zeros, zeros, zeros
    weight = tl.zeros([1, PARTICLES, 1], dtype)
    for first in range(0, num_particles, PARTICLES):
        particle = first + tl.arange(0, PARTICLES)[None, :, None]
        present = particle < num_particles
        line = row.to(tl.int64) * num_particles + particle
        if GIVEN:
            lanes = (0, 0, 0, 0)
        else:
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
        if HAS_LOG_Q:
            grad_log_q = tl.load(grad_log_q_ptr + line, mask=present, other=0.0)
            if not STL:
                weight += grad_log_q
        if HAS_LOG_DET:
            grad_log_det = tl.load(grad_log_det_ptr + line, mask=present, other=0.0)
        # With transforms, four lanes at a time would spill. Without, choices by lane fold away.
        for lane in tl.range(LANES, loop_unroll_factor=1 if KINDS else LANES):
            within = lane * TILE_GROUPS + groups
            valid = (within < left) & present
            at = line * stride + start + within
            noise = lane_noise(lane, lanes, noise_ptr, at, valid, GIVEN)
            grad = zeros
            if HAS_VALUE:
                grad = tl.load(grad_value_ptr + at, mask=valid, other=0.0)
            if STL or KINDS:
                here = within < left
                raw_scale = tl.load(raw_scale_ptr + own + within, mask=here, other=1.0)
                scale, _ = scale_and_log(raw_scale, SCALE_MAP)
                if KINDS:
                    loc = tl.load(loc_ptr + own + within, mask=here, other=0.0)
                    segment = tl.load(segment_ptr + start + within, mask=here, other=0)
                    kind = tl.load(kind_ptr + segment)
                    slope, log_slope = _constrain_slopes(loc + scale * noise, kind, KINDS)
                    grad = grad * slope * tl.load(factor_ptr + segment)
                    if HAS_LOG_DET:
                        grad += grad_log_det * log_slope
                if STL and HAS_LOG_Q:
                    grad -= grad_log_q * noise / scale
                grad = tl.where(valid, grad, 0.0)
            loc_0 = tl.where(lane == 0, loc_0 + grad, loc_0)
            raw_0 = tl.where(lane == 0, raw_0 + grad * noise, raw_0)
            loc_1 = tl.where(lane == 1, loc_1 + grad, loc_1)
            raw_1 = tl.where(lane == 1, raw_1 + grad * noise, raw_1)
            loc_2 = tl.where(lane == 2, loc_2 + grad, loc_2)
            raw_2 = tl.where(lane == 2, raw_2 + grad * noise, raw_2)
            loc_3 = tl.where(lane == 3, loc_3 + grad, loc_3)
            raw_3 = tl.where(lane == 3, raw_3 + grad * noise, raw_3)
    total = tl.sum(weight, 1, True)
    return (loc_0, loc_1, loc_2, loc_3), (raw_0, raw_1, raw_2, raw_3), total


@triton.jit
def finish(grad_loc, grad_scale, weight, raw_scale, SCALE_MAP: tl.constexpr):
    """Sum over the block of particles, and go from the scale to its unconstrained value."""
    scale, _ = scale_and_log(raw_scale, SCALE_MAP)
    slope, log_slope = _slopes(raw_scale, scale, SCALE_MAP)
    grad_raw = tl.sum(grad_scale, 1, True) * slope - weight * log_slope
    return tl.sum(grad_loc, 1, True), grad_raw


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def backward_kernel(
    loc_ptr,  # [B, F, D], read if KINDS
    raw_scale_ptr,  # [B, F, D] unconstrained
    key_ptr,  # int64 [B or 1, 2]
    origin_ptr,  # int64 [B or 1, 4]
    noise_ptr,  # [B, F, P, D], read if GIVEN
    segment_ptr,  # int32 [D]; this and the next two if KINDS
    kind_ptr,  # int32 [S]
    factor_ptr,  # [S]
    grad_value_ptr,  # [B, F, P, D], read if HAS_VALUE
    grad_log_q_ptr,  # [B, F, P], read if HAS_LOG_Q
    grad_log_det_ptr,  # [B, F, P], read if HAS_LOG_DET
    grad_loc_ptr,  # [B, F, D]
    grad_raw_ptr,  # [B, F, D]
    num_fits,  # F
    num_particles,  # P
    num_elements,  # D
    num_tiles,  # T
    key_stride,  # 2 or 0
    origin_stride,  # 4 or 0
    SCALE_MAP: tl.constexpr,
    STL: tl.constexpr,
    GIVEN: tl.constexpr,
    KINDS: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_LOG_DET: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PARTICLES: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
):
    """One program: one tile of one fit, all its particles."""
    loc_lanes, raw_lanes, weight = gradients(
        loc_ptr,
        raw_scale_ptr,
        key_ptr,
        origin_ptr,
        noise_ptr,
        segment_ptr,
        kind_ptr,
        factor_ptr,
        grad_value_ptr,
        grad_log_q_ptr,
        grad_log_det_ptr,
        num_fits,
        num_particles,
        num_elements,
        num_tiles,
        key_stride,
        origin_stride,
        SCALE_MAP,
        STL,
        GIVEN,
        KINDS,
        HAS_VALUE,
        HAS_LOG_Q,
        HAS_LOG_DET,
        LANES,
        GROUPS,
        NEIGHBOURS,
        PARTICLES,
        WHOLE_QUADS,
    )
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    stride = row_stride(num_elements, WHOLE_QUADS)
    start = (tl.program_id(0) % num_tiles).to(tl.int64) * TILE
    for lane in tl.range(LANES, loop_unroll_factor=1 if KINDS else LANES):
        within = lane * TILE_GROUPS + group_block(GROUPS, NEIGHBOURS)
        valid = within < stride - start
        at = row * stride + start + within
        raw_scale = tl.load(raw_scale_ptr + at, mask=valid, other=1.0)
        of_loc, of_scale = lane_of(lane, loc_lanes), lane_of(lane, raw_lanes)
        grad_loc, grad_raw = finish(of_loc, of_scale, weight, raw_scale, SCALE_MAP)
        tl.store(grad_loc_ptr + at, grad_loc, mask=valid)
        tl.store(grad_raw_ptr + at, grad_raw, mask=valid)


# ---------------------------------------------------------------------------------------- launcher


def backward(
    loc: Tensor,  # [B, F, D]
    raw_scale: Tensor,  # [B, F, D]
    key: Tensor,  # int64 [B or 1, 2]
    origin: Tensor,  # int64 [B or 1, 4]
    noise: Tensor | None,  # [B, F, P, D]
    table: Sequence[Tensor],
    kinds: int,
    grad_value: Tensor | None,  # [B, F, P, D]
    grad_log_q: Tensor | None,  # [B, F, P]
    grad_log_det: Tensor | None,  # [B, F, P]
    num_particles: int,
    scale_map: str,
    estimator: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of loc and raw_scale, each ``[B, F, D]``."""
    batches, fits, elements = loc.shape
    loc, raw_scale = loc.contiguous(), raw_scale.contiguous()
    key, origin = key.contiguous(), origin.contiguous()
    noise, grad_value, grad_log_q, grad_log_det = (
        None if x is None else x.contiguous() for x in (noise, grad_value, grad_log_q, grad_log_det)
    )
    grad_loc, grad_raw = torch.empty_like(loc), torch.empty_like(raw_scale)
    if grad_loc.numel() == 0:
        return grad_loc, grad_raw
    tiles, *_ = launch.tiling(elements)
    segment, kind, _, factor = table or (loc,) * 4  # never read then
    with launch.on_device_of(loc):
        backward_kernel[(batches * fits * tiles,)](
            loc,
            raw_scale,
            key,
            origin,
            loc if noise is None else noise,
            segment,
            kind,
            factor,
            loc if grad_value is None else grad_value,
            loc if grad_log_q is None else grad_log_q,
            loc if grad_log_det is None else grad_log_det,
            grad_loc,
            grad_raw,
            fits,
            num_particles,
            elements,
            tiles,
            launch.batch_stride(key),
            launch.batch_stride(origin),
            SCALE_MAP=scale_map,
            STL=estimator == "stl",
            GIVEN=noise is not None,
            HAS_VALUE=grad_value is not None,
            HAS_LOG_Q=grad_log_q is not None,
            HAS_LOG_DET=grad_log_det is not None,
            **blocks(elements, num_particles, loc.dtype, kinds if table else 0),
            **launch.OPTIONS,
        )
    return grad_loc, grad_raw


# ----------------------------------------------------------------------------------- compile cases


_WIDE: dict[str, Any] = {"wide_loads": 8, "wide_stores": 8}
_ROLLED: dict[str, Any] = {"wide_loads": 5, "wide_stores": 2}
_CONSTRAINED: dict[str, Any] = {**_ROLLED, "KINDS": ALL_KINDS, "HAS_LOG_DET": True}

COMPILE_CASES = [
    case("backward", backward_kernel, **_WIDE),
    case("backward-softplus", backward_kernel, **_WIDE, SCALE_MAP="softplus"),
    case("backward-stl", backward_kernel, **_WIDE, STL=True),
    case("backward-given", backward_kernel, **_WIDE | {"wide_loads": 12}, GIVEN=True),
    case("backward-constrained", backward_kernel, **_CONSTRAINED),
    case("backward-constrained-stl", backward_kernel, **_CONSTRAINED, STL=True),
    case("backward-constrained-softplus", backward_kernel, **_CONSTRAINED, SCALE_MAP="softplus"),
    # Two segments of 32 bits lie beside two doubles.
    case(
        "backward-constrained-float64", backward_kernel, "fp64", **_CONSTRAINED | {"wide_loads": 4}
    ),
    case("backward-short", backward_kernel, shape=(10, 64)),
    case("backward-float64", backward_kernel, "fp64", **_WIDE),
]
