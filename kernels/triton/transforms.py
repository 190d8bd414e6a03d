"""Elementwise constraints of a whole flat buffer in one launch. See ``kernels/transforms.py``.

A program works on one chunk, the common part of a tile and a segment, of one row of the buffer: its
kind, shift and scale are scalars, so only the function that is wanted is evaluated. Chunks that
fill their tile are read and written unmasked, 128 bits at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels.segments import TILE
from fastsvi.kernels.transforms import Kind
from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.launch import CompileCase
from fastsvi.kernels.triton.math import exp
from fastsvi.kernels.triton.special import divide, log1p_unit, one_minus_exp

EXP = tl.constexpr(int(Kind.EXP))
SOFTPLUS = tl.constexpr(int(Kind.SOFTPLUS))
SIGMOID = tl.constexpr(int(Kind.SIGMOID))

_SUM_BLOCK = 256


# ------------------------------------------------------------------------------- device functions


@triton.jit
def load_chunk(pointer, tile, start, stop, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Elements of a chunk, 0 in the rest of its tile."""
    at = tile + tl.arange(0, TILE)
    if WHOLE:
        return tl.load(pointer + at)
    return tl.load(pointer + at, mask=(at >= start) & (at < stop), other=0.0)


@triton.jit
def store_chunk(pointer, values, tile, start, stop, WHOLE: tl.constexpr, TILE: tl.constexpr):
    at = tile + tl.arange(0, TILE)
    if WHOLE:
        tl.store(pointer + at, values)
    else:
        tl.store(pointer + at, values, mask=(at >= start) & (at < stop))


@triton.jit
def _inside(u):
    """Away from 0 and 1, as the torch reference clips."""
    if u.dtype == tl.float32:
        u = tl.where(u < 1.1754943508222875e-38, 1.1754943508222875e-38, u)
        return tl.where(u > 0.99999988079071044921875, 0.99999988079071044921875, u)
    u = tl.where(u < 2.2250738585072014e-308, 2.2250738585072014e-308, u)
    return tl.where(u > 0.9999999999999997779554, 0.9999999999999997779554, u)


@triton.jit
def _function(kind, x, LOG_DET: tl.constexpr):
    """The function, and the log of its derivative if LOG_DET (else anything)."""
    y = x
    log_slope = tl.zeros_like(x)
    if kind == EXP:
        y = exp(x)
        log_slope = x
    elif kind == SOFTPLUS:
        rest = log1p_unit(exp(-tl.abs(x)))
        y = tl.where(x > 0.0, x, 0.0) + rest
        if LOG_DET:
            log_slope = tl.where(x < 0.0, x, 0.0) - rest
    elif kind == SIGMOID:
        e = exp(-tl.abs(x))
        y = _inside(divide(tl.where(x < 0.0, e, 1.0), 1.0 + e))
        if LOG_DET:
            log_slope = -tl.abs(x) - 2.0 * log1p_unit(e)
    return y, log_slope


@triton.jit
def _slopes(kind, x):
    """Derivatives of the function, and of the log of its derivative."""
    slope = tl.full(x.shape, 1.0, x.dtype)
    log_slope = tl.zeros_like(x)
    if kind == EXP:
        slope = exp(x)
        log_slope += 1.0
    elif kind >= SOFTPLUS:
        e = exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
        if kind == SOFTPLUS:
            slope = tl.where(x < 0.0, e * r, r)
            log_slope = tl.where(x < 0.0, r, e * r)
        else:
            slope = e * r * r
            log_slope = tl.where(x < 0.0, 1.0 - e, e - 1.0) * r
    return slope, log_slope


@triton.jit
def _inverse(kind, u):
    x = u
    if kind == EXP:
        x = tl.log(u)
    elif kind == SOFTPLUS:
        x = u + tl.log(one_minus_exp(u))
    elif kind == SIGMOID:
        u = _inside(u)
        x = tl.log(u) - tl.log(1.0 - u)
    return x


@triton.jit
def _inverse_slope(kind, u):
    y = tl.full(u.shape, 1.0, u.dtype)
    if kind == EXP:
        y = 1.0 / u
    elif kind == SOFTPLUS:
        y = 1.0 / one_minus_exp(u)
    elif kind == SIGMOID:
        v = _inside(u)
        y = tl.where(u == v, 1.0 / (v * (1.0 - v)), 0.0)
    return y


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _transform_chunk(
    in_ptr,  # [N], this row
    grad_ptr,  # [N], this row
    grad_log_det_ptr,  # this row and segment
    out_ptr,  # [N], this row
    partial_ptr,  # this row and chunk
    kind,
    shift,
    scale,
    start,
    stop,
    MODE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    LOG_DET: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = start // TILE * TILE
    x = load_chunk(in_ptr, tile, start, stop, WHOLE, TILE)
    if HAS_GRAD:
        grad = load_chunk(grad_ptr, tile, start, stop, WHOLE, TILE)
    if MODE == "constrain":
        y, log_slope = _function(kind, x, LOG_DET)
        y = shift + scale * y
        if LOG_DET:
            if not WHOLE:
                at = tile + tl.arange(0, TILE)
                log_slope = tl.where((at >= start) & (at < stop), log_slope, 0.0)
            total = tl.sum(log_slope, 0).to(tl.float64)
            total += (stop - start).to(tl.float64) * tl.log(tl.abs(scale).to(tl.float64))
            tl.store(partial_ptr, total)
    elif MODE == "constrain_backward":
        slope, log_slope = _slopes(kind, x)
        y = tl.zeros_like(x)
        if HAS_GRAD:
            y = grad * scale * slope
        if LOG_DET:
            y += tl.load(grad_log_det_ptr) * log_slope
    else:
        u = divide(x - shift, tl.full(x.shape, scale, x.dtype))
        if MODE == "unconstrain":
            y = _inverse(kind, u)
        else:  # "unconstrain_backward"
            y = grad / scale * _inverse_slope(kind, u)
    store_chunk(out_ptr, y, tile, start, stop, WHOLE, TILE)


@triton.jit
def transform_kernel(
    in_ptr,  # [B, N] unconstrained, or constrained in the modes "unconstrain"
    grad_ptr,  # [B, N] gradient of the output, in the backward modes
    grad_log_det_ptr,  # [B, S]
    out_ptr,  # [B, N]
    partial_ptr,  # float64 [B, C], log-determinant of each chunk
    chunks_ptr,  # int64 [C, 3]: segment, start, stop
    kinds_ptr,  # int32 [S]
    shift_ptr,  # [S]
    scale_ptr,  # [S]
    num_elements,  # N
    num_chunks,  # C
    num_segments,  # S
    MODE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    LOG_DET: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for each chunk of each row."""
    chunk = tl.program_id(0) % num_chunks
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    segment = tl.load(chunks_ptr + 3 * chunk)
    start = tl.load(chunks_ptr + 3 * chunk + 1)
    stop = tl.load(chunks_ptr + 3 * chunk + 2)
    kind = tl.load(kinds_ptr + segment)
    shift = tl.load(shift_ptr + segment)
    scale = tl.load(scale_ptr + segment)
    in_ptr += row * num_elements
    grad_ptr += row * num_elements
    out_ptr += row * num_elements
    grad_log_det_ptr += row * num_segments + segment
    partial_ptr += row * num_chunks + chunk
    # Two copies of the body: a mask would split every access to the width of an element.
    if stop - start == TILE:
        _transform_chunk(
            in_ptr, grad_ptr, grad_log_det_ptr, out_ptr, partial_ptr,
            kind, shift, scale, start, stop, MODE, HAS_GRAD, LOG_DET, True, TILE,
        )  # fmt: skip
    else:
        _transform_chunk(
            in_ptr, grad_ptr, grad_log_det_ptr, out_ptr, partial_ptr,
            kind, shift, scale, start, stop, MODE, HAS_GRAD, LOG_DET, False, TILE,
        )  # fmt: skip


@triton.jit
def segment_sum_kernel(
    partial_ptr,  # float64 [B, C]
    chunk_offsets_ptr,  # int64 [S + 1]
    out_ptr,  # [B, S]
    num_chunks,  # C
    num_segments,  # S
    BLOCK: tl.constexpr,
):
    """One program adds up the chunks of one segment, always in the same order."""
    segment = tl.program_id(0) % num_segments
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    first = tl.load(chunk_offsets_ptr + segment)
    last = tl.load(chunk_offsets_ptr + segment + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(first, last, BLOCK):
        chunk = at + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + row * num_chunks + chunk, mask=chunk < last, other=0.0)
    tl.store(out_ptr + row * num_segments + segment, tl.sum(total, 0))


# --------------------------------------------------------------------------------------- launchers


def _threads(dtype: torch.dtype) -> int:
    """Two 128-bit accesses for each thread; one in float64, which takes twice the registers."""
    return TILE // 8 if dtype == torch.float32 else TILE // 2


def transform(
    mode: str,
    x: Tensor,  # [..., N]
    grad: Tensor | None,  # [..., N]
    grad_log_det: Tensor | None,  # [..., S]
    partial: Tensor | None,  # float64 [B, C], written where it is given
    kinds: Tensor,
    shift: Tensor,
    scale: Tensor,
    chunks: Tensor,
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    grad = None if grad is None else grad.contiguous()
    grad_log_det = None if grad_log_det is None else grad_log_det.contiguous()
    num_chunks = chunks.shape[0]
    with launch.on_device_of(x):
        transform_kernel[(x.numel() // x.shape[-1] * num_chunks,)](
            x,
            x if grad is None else grad,  # never read then
            x if grad_log_det is None else grad_log_det,
            out,
            x if partial is None else partial,
            chunks,
            kinds,
            shift,
            scale,
            x.shape[-1],
            num_chunks,
            kinds.shape[0],
            MODE=mode,
            HAS_GRAD=grad is not None,
            LOG_DET=partial is not None or grad_log_det is not None,
            TILE=TILE,
            num_warps=launch.warps(_threads(x.dtype)),
            **launch.OPTIONS,
        )
    return out


def constrain(
    x: Tensor,
    kinds: Tensor,
    shift: Tensor,
    scale: Tensor,
    chunks: Tensor,
    chunk_offsets: Tensor,
    with_log_det: bool,
) -> tuple[Tensor, Tensor]:
    """y ``[..., N]`` and the log-determinant ``[..., S]``, or ``[..., 0]`` if not asked for."""
    lead = x.shape[:-1]
    if not with_log_det:
        y = transform("constrain", x, None, None, None, kinds, shift, scale, chunks)
        return y, x.new_empty((*lead, 0))
    log_det = x.new_zeros((*lead, kinds.shape[0]))
    num_chunks = chunks.shape[0]
    partial = x.new_empty((lead.numel(), num_chunks), dtype=torch.float64)
    y = transform("constrain", x, None, None, partial, kinds, shift, scale, chunks)
    if partial.numel():
        with launch.on_device_of(x):
            segment_sum_kernel[(log_det.numel(),)](
                partial,
                chunk_offsets,
                log_det,
                num_chunks,
                kinds.shape[0],
                BLOCK=_SUM_BLOCK,
                **launch.OPTIONS,
            )
    return y, log_det


# ------------------------------------------------------------------------------------ compile cases


def _case(mode: str, dtype: str, log_det: bool, **limits: Any) -> CompileCase:
    pointers = ("in_ptr", "grad_ptr", "grad_log_det_ptr", "out_ptr")
    return CompileCase(
        name=f"transforms.{mode}{'_log_det' * log_det}-{dtype}",
        kernel=transform_kernel,
        signature={
            **dict.fromkeys(pointers, f"*{dtype}"),
            "partial_ptr": "*fp64",
            "chunks_ptr": "*i64",
            "kinds_ptr": "*i32",
            "shift_ptr": f"*{dtype}",
            "scale_ptr": f"*{dtype}",
            **dict.fromkeys(("num_elements", "num_chunks", "num_segments"), "i32"),
        },
        constants={
            "MODE": mode,
            "HAS_GRAD": mode.endswith("backward"),
            "LOG_DET": log_det,
            "TILE": TILE,
        },
        divisible=(*pointers, "partial_ptr", "chunks_ptr", "num_elements"),
        threads=_threads(torch.float32 if dtype == "fp32" else torch.float64),
        max_bytes=49_152,
        **limits,
    )


COMPILE_CASES = [
    _case("constrain", "fp32", False, wide_loads=2, wide_stores=2),
    _case("constrain", "fp32", True, wide_loads=2, wide_stores=2),
    _case("constrain_backward", "fp32", True, wide_loads=4, wide_stores=2),
    _case("unconstrain", "fp32", False, wide_loads=2, wide_stores=2),
    _case("unconstrain_backward", "fp32", False, wide_loads=4, wide_stores=2),
    _case("constrain", "fp64", True, wide_loads=1, wide_stores=1),
    _case("constrain_backward", "fp64", True, wide_loads=2, wide_stores=1),
    CompileCase(
        name="transforms.segment_sum",
        kernel=segment_sum_kernel,
        signature={
            "partial_ptr": "*fp64",
            "chunk_offsets_ptr": "*i64",
            "out_ptr": "*fp32",
            "num_chunks": "i32",
            "num_segments": "i32",
        },
        constants={"BLOCK": _SUM_BLOCK},
        divisible=("partial_ptr", "chunk_offsets_ptr", "out_ptr"),
    ),
]
