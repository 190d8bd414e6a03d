"""The mean-field normal, backward, with Adam's update. See ``normal_backward``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.normal import blocks, case, row_stride
from fastsvi.kernels.triton.normal_backward import finish, gradients
from fastsvi.kernels.triton.philox import TILE, TILE_GROUPS, group_block

# ----------------------------------------------------------------------------------------- kernel


@triton.jit
def _adam(
    param,
    grad,
    mean_ptr,
    square_ptr,
    at,
    valid,
    rate,  # lr / (1 - beta1^t)
    correction,  # 1 / (1 - beta2^t)
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    EPS: tl.constexpr,
):
    """Parameters after an update; the moments are written."""
    mean = tl.load(mean_ptr + at, mask=valid, other=0.0)
    square = tl.load(square_ptr + at, mask=valid, other=0.0)
    mean += (grad - mean) * (1.0 - BETA_1)
    square = square * BETA_2 + grad * grad * (1.0 - BETA_2)
    tl.store(mean_ptr + at, mean, mask=valid)
    tl.store(square_ptr + at, square, mask=valid)
    return param - rate * mean / (tl.sqrt(square * correction) + EPS)


@triton.jit
def adam_kernel(
    loc_ptr,  # [F, D] read and written
    raw_scale_ptr,  # [F, D] unconstrained; read and written
    key_ptr,  # int64 [2]
    origin_ptr,  # int64 [4]
    noise_ptr,  # [F, P, D], read if GIVEN
    grad_z_ptr,  # [F, P, D], read if HAS_VALUE
    grad_log_q_ptr,  # [F, P], read if HAS_LOG_Q
    loc_mean_ptr,  # [F, D] Adam's m and v, read and written
    loc_square_ptr,  # [F, D]
    raw_mean_ptr,  # [F, D]
    raw_square_ptr,  # [F, D]
    step_ptr,  # [F] number of this update, from 1
    lr_ptr,  # [F or 1]
    active_ptr,  # bool [F], read if HAS_ACTIVE
    num_fits,  # F
    num_particles,  # P
    num_elements,  # D
    num_tiles,  # T
    lr_stride,  # 1, or 0 if all fits share a rate
    SCALE_MAP: tl.constexpr,
    STL: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    LOG_BETA_1: tl.constexpr,
    LOG_BETA_2: tl.constexpr,
    EPS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PARTICLES: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
):
    """One program: one tile of one fit, all its particles, then its update."""
    dtype: tl.constexpr = raw_scale_ptr.dtype.element_ty
    fit = tl.program_id(0) // num_tiles
    if HAS_ACTIVE and tl.load(active_ptr + fit) == 0:
        return
    loc_lanes, raw_lanes, weight = gradients(
        loc_ptr,
        raw_scale_ptr,
        key_ptr,
        origin_ptr,
        noise_ptr,
        loc_ptr,  # no table
        loc_ptr,
        loc_ptr,
        grad_z_ptr,
        grad_log_q_ptr,
        grad_log_q_ptr,
        num_fits,
        num_particles,
        num_elements,
        num_tiles,
        0,
        0,
        SCALE_MAP,
        STL,
        GIVEN,
        0,
        HAS_VALUE,
        HAS_LOG_Q,
        False,
        LANES,
        GROUPS,
        NEIGHBOURS,
        PARTICLES,
        WHOLE_QUADS,
    )
    # In float64: 1 - beta^t of float32 has an error of 6e-5 at t = 1.
    step = tl.load(step_ptr + fit).to(tl.float64)
    rate = tl.load(lr_ptr + fit * lr_stride).to(tl.float64)
    rate = (rate / (1.0 - tl.exp(step * LOG_BETA_1))).to(dtype)
    correction = (1.0 / (1.0 - tl.exp(step * LOG_BETA_2))).to(dtype)
    stride = row_stride(num_elements, WHOLE_QUADS)
    start = (tl.program_id(0) % num_tiles).to(tl.int64) * TILE
    for lane in tl.static_range(LANES):
        within = lane * TILE_GROUPS + group_block(GROUPS, NEIGHBOURS)
        valid = within < stride - start
        at = fit.to(tl.int64) * stride + start + within
        loc = tl.load(loc_ptr + at, mask=valid, other=0.0)
        raw_scale = tl.load(raw_scale_ptr + at, mask=valid, other=1.0)
        grad_loc, grad_raw = finish(loc_lanes[lane], raw_lanes[lane], weight, raw_scale, SCALE_MAP)
        loc = _adam(
            loc,
            grad_loc,
            loc_mean_ptr,
            loc_square_ptr,
            at,
            valid,
            rate,
            correction,
            BETA_1,
            BETA_2,
            EPS,
        )
        raw_scale = _adam(
            raw_scale,
            grad_raw,
            raw_mean_ptr,
            raw_square_ptr,
            at,
            valid,
            rate,
            correction,
            BETA_1,
            BETA_2,
            EPS,
        )
        tl.store(loc_ptr + at, loc, mask=valid)
        tl.store(raw_scale_ptr + at, raw_scale, mask=valid)


# ---------------------------------------------------------------------------------------- launcher


def backward_adam(
    loc: Tensor,  # [F, D], written
    raw_scale: Tensor,  # [F, D], written
    key: Tensor,  # int64 [2]
    origin: Tensor,  # int64 [4]
    noise: Tensor | None,  # [F, P, D]
    grad_z: Tensor | None,  # [F, P, D]
    grad_log_q: Tensor | None,  # [F, P]
    moments: Sequence[Tensor],  # m and v of loc, m and v of raw_scale, [F, D] each, written
    step: Tensor,  # [F] number of this update, from 1
    lr: Tensor,  # [F] or [1]
    active: Tensor | None,  # bool [F]
    num_particles: int,
    scale_map: str,
    estimator: str,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Backward and one update of Adam, in place. What is written must be contiguous."""
    fits, elements = loc.shape
    if loc.numel() == 0:
        return
    key, origin, step, lr = (
        key.contiguous(),
        origin.contiguous(),
        step.contiguous(),
        lr.contiguous(),
    )
    noise, grad_z, grad_log_q, active = (
        None if x is None else x.contiguous() for x in (noise, grad_z, grad_log_q, active)
    )
    tiles, *_ = launch.tiling(elements)
    cut = blocks(elements, num_particles, loc.dtype)
    del cut["KINDS"]  # no table here
    with launch.on_device_of(loc):
        adam_kernel[(fits * tiles,)](
            loc,
            raw_scale,
            key,
            origin,
            loc if noise is None else noise,  # never read then
            loc if grad_z is None else grad_z,
            loc if grad_log_q is None else grad_log_q,
            *moments,
            step,
            lr,
            loc if active is None else active,
            fits,
            num_particles,
            elements,
            tiles,
            0 if lr.shape[0] == 1 else 1,
            SCALE_MAP=scale_map,
            STL=estimator == "stl",
            GIVEN=noise is not None,
            HAS_VALUE=grad_z is not None,
            HAS_LOG_Q=grad_log_q is not None,
            HAS_ACTIVE=active is not None,
            BETA_1=betas[0],
            BETA_2=betas[1],
            LOG_BETA_1=_log(betas[0]),
            LOG_BETA_2=_log(betas[1]),
            EPS=eps,
            **cut,
            **launch.OPTIONS,
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


# ----------------------------------------------------------------------------------- compile cases

_RULE: dict[str, Any] = {
    "BETA_1": 0.9,
    "BETA_2": 0.999,
    "LOG_BETA_1": _log(0.9),
    "LOG_BETA_2": _log(0.999),
    "EPS": 1e-8,
    "HAS_ACTIVE": False,
}

COMPILE_CASES = [
    case("adam", adam_kernel, **_RULE, wide_loads=24, wide_stores=24),
    case(
        "adam-stl-softplus",
        adam_kernel,
        **_RULE,
        STL=True,
        SCALE_MAP="softplus",
        wide_stores=24,
        max_bytes=90_112,
    ),
    case("adam-short", adam_kernel, **(_RULE | {"HAS_ACTIVE": True}), shape=(10, 64)),
    case("adam-float64", adam_kernel, "fp64", **_RULE),
]
