"""Adam over a flat buffer: one launch over the elements. See ``kernels/adam.py``.

Before it, two small ones where they are needed: ``survey_kernel`` looks at the gradients (norm of
each chunk, and whether all are finite), and ``prelude_kernel`` turns step counts, rates, norms and
activity into five numbers per segment. The large launch then has nothing but scalars besides its
elements, and leaves at once where a segment is not to be touched. A program works on one chunk, the
common part of a tile and a segment.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels.segments import TILE
from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.launch import CompileCase
from fastsvi.kernels.triton.special import square_root
from fastsvi.kernels.triton.transforms import load_chunk, store_chunk

# What prelude_kernel hands to update_kernel for each segment, float64 [B, S, 5].
WRITTEN = tl.constexpr(0)  # 0 leaves the segment as it is
CLIP = tl.constexpr(1)  # factor of the gradient, from the clip of its norm
RATE = tl.constexpr(2)  # learning rate
STEP_SIZE = tl.constexpr(3)  # of m / denominator
ROOT = tl.constexpr(4)  # factor of sqrt(v) in the denominator
NUM_SCALARS = tl.constexpr(5)

# What torch.nn.utils.clip_grad_norm_ adds to the norm.
NORM_FLOOR = tl.constexpr(1e-6)

_BLOCK = 256  # of the sums over chunks
_THREADS = TILE // 8  # two 128-bit accesses of float32 each


# ------------------------------------------------------------------------------------ small kernels


@triton.jit
def survey_kernel(
    grad_ptr,  # [B, N]
    active_ptr,  # bool [B, S]
    squares_ptr,  # float64 [B, C], sum of squares of each chunk
    bad_ptr,  # int32 [B, C], 1 if an active chunk has an entry that is not finite
    chunks_ptr,  # int64 [C, 3]: segment, start, stop
    grad_row,  # elements from one row to the next
    num_chunks,  # C
    num_segments,  # S
    HAS_ACTIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    chunk = tl.program_id(0) % num_chunks
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    segment = tl.load(chunks_ptr + 3 * chunk)
    start = tl.load(chunks_ptr + 3 * chunk + 1)
    stop = tl.load(chunks_ptr + 3 * chunk + 2)
    tile = start // TILE * TILE
    grad_ptr += row * grad_row
    if stop - start == TILE:
        grad = load_chunk(grad_ptr, tile, start, stop, True, TILE)
    else:
        grad = load_chunk(grad_ptr, tile, start, stop, False, TILE)
    # In float64: the square of a float32 may overflow.
    wide = grad.to(tl.float64)
    tl.store(squares_ptr + row * num_chunks + chunk, tl.sum(wide * wide, 0))
    # Of a NaN no comparison is true.
    finite = (grad == grad) & (tl.abs(grad) != float("inf"))
    bad = tl.max(tl.where(finite, 0, 1), 0)
    if HAS_ACTIVE:
        bad = bad * tl.load(active_ptr + row * num_segments + segment).to(tl.int32)
    tl.store(bad_ptr + row * num_chunks + chunk, bad)


@triton.jit
def prelude_kernel(
    step_ptr,  # [B, S], raised by one where the segment is updated
    active_ptr,  # bool [B, S]
    skipped_ptr,  # int64 [B]
    lr_ptr,  # [B, S] with strides
    lrd_ptr,  # [B, S] with strides
    squares_ptr,  # float64 [B, C]
    bad_ptr,  # int32 [B, C]
    chunk_offsets_ptr,  # int64 [S + 1]
    scalars_ptr,  # float64 [B, S, 5]
    num_chunks,  # C
    num_segments,  # S
    lr_row,
    lr_column,
    lrd_row,
    lrd_column,
    lr: tl.float64,
    log_lrd: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    clip_norm: tl.float64,
    HAS_ACTIVE: tl.constexpr,
    HAS_SKIPPED: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    LRD: tl.constexpr,  # "none", "number" or "tensor"
    HAS_CLIP_NORM: tl.constexpr,
    EPS_HAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each segment of each row."""
    segment = tl.program_id(0) % num_segments
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    at = row * num_segments + segment
    written = tl.full([], 1, tl.int32)
    if HAS_ACTIVE:
        written = tl.load(active_ptr + at).to(tl.int32)
    if HAS_SKIPPED:
        found = tl.zeros([BLOCK], tl.int32)
        for first in range(0, num_chunks, BLOCK):
            chunk = first + tl.arange(0, BLOCK)
            found |= tl.load(bad_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=0)
        bad = tl.max(found, 0)
        written = written * (1 - bad)
        if segment == 0:
            tl.store(skipped_ptr + row, tl.load(skipped_ptr + row) + bad)
    factor = tl.full([], 1.0, tl.float64)
    if HAS_CLIP_NORM:
        total = tl.zeros([BLOCK], tl.float64)
        last = tl.load(chunk_offsets_ptr + segment + 1)
        for first in range(tl.load(chunk_offsets_ptr + segment), last, BLOCK):
            chunk = first + tl.arange(0, BLOCK)
            total += tl.load(squares_ptr + row * num_chunks + chunk, mask=chunk < last, other=0.0)
        factor = clip_norm / (tl.sqrt(tl.sum(total, 0)) + NORM_FLOOR)
        factor = tl.where(factor > 1.0, 1.0, factor)  # keeps a NaN

    step = tl.load(step_ptr + at)
    tick = step.to(tl.float64) + 1.0
    tl.store(step_ptr + at, step + written.to(step.dtype))
    rate = tl.full([], lr, tl.float64)
    if LR_TENSOR:
        rate = tl.load(lr_ptr + row * lr_row + segment * lr_column).to(tl.float64)
    if LRD == "number":
        rate *= tl.exp(tick * log_lrd)
    elif LRD == "tensor":
        decay = tl.load(lrd_ptr + row * lrd_row + segment * lrd_column).to(tl.float64)
        rate *= tl.exp(tick * tl.log(decay))
    step_size = rate / (1.0 - tl.exp(tick * log_beta1))
    root = tl.sqrt(1.0 - tl.exp(tick * log_beta2))
    if EPS_HAT:
        step_size *= root
        root = tl.full([], 1.0, tl.float64)
    else:
        root = 1.0 / root
    scalars = scalars_ptr + at * NUM_SCALARS
    tl.store(scalars + WRITTEN, written.to(tl.float64))
    tl.store(scalars + CLIP, factor)
    tl.store(scalars + RATE, rate)
    tl.store(scalars + STEP_SIZE, step_size)
    tl.store(scalars + ROOT, root)


# -------------------------------------------------------------------------------------- the update


@triton.jit
def _update_chunk(
    param_ptr,  # this row
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    scalars_ptr,  # this row and segment
    start,
    stop,
    beta1,
    beta2,
    eps,
    weight_decay,
    clip_value,
    WEIGHT_DECAY: tl.constexpr,
    HAS_CLIP_VALUE: tl.constexpr,
    CENTERED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = start // TILE * TILE
    param = load_chunk(param_ptr, tile, start, stop, WHOLE, TILE)
    grad = load_chunk(grad_ptr, tile, start, stop, WHOLE, TILE)
    exp_avg = load_chunk(exp_avg_ptr, tile, start, stop, WHOLE, TILE)
    exp_avg_sq = load_chunk(exp_avg_sq_ptr, tile, start, stop, WHOLE, TILE)
    dtype: tl.constexpr = param_ptr.dtype.element_ty

    # tl.full() is the cast that also takes the plain floats of the interpreter.
    grad *= tl.load(scalars_ptr + CLIP).to(dtype)
    if HAS_CLIP_VALUE:
        limit = tl.full([], clip_value, dtype)
        grad = tl.where(grad > limit, limit, tl.where(grad < -limit, -limit, grad))
    if WEIGHT_DECAY == "coupled":
        grad += tl.full([], weight_decay, dtype) * param
    elif WEIGHT_DECAY == "decoupled":
        param *= (1.0 - tl.load(scalars_ptr + RATE) * weight_decay).to(dtype)

    exp_avg += tl.full([], 1.0 - beta1, dtype) * (grad - exp_avg)
    spread = grad
    if CENTERED:
        spread -= exp_avg
    gain = tl.full([], 1.0 - beta2, dtype)
    exp_avg_sq = tl.full([], beta2, dtype) * exp_avg_sq + gain * spread * spread
    second = exp_avg_sq
    if AMSGRAD:
        largest = load_chunk(max_exp_avg_sq_ptr, tile, start, stop, WHOLE, TILE)
        # A NaN on either side stays, as torch.maximum keeps it.
        second = tl.where((largest > second) | (largest != largest), largest, second)
        store_chunk(max_exp_avg_sq_ptr, second, tile, start, stop, WHOLE, TILE)
    denominator = square_root(second) * tl.load(scalars_ptr + ROOT).to(dtype)
    denominator += tl.full([], eps, dtype)
    param -= tl.load(scalars_ptr + STEP_SIZE).to(dtype) * (exp_avg / denominator)

    store_chunk(exp_avg_ptr, exp_avg, tile, start, stop, WHOLE, TILE)
    store_chunk(exp_avg_sq_ptr, exp_avg_sq, tile, start, stop, WHOLE, TILE)
    store_chunk(param_ptr, param, tile, start, stop, WHOLE, TILE)


@triton.jit
def update_kernel(
    param_ptr,  # [B, N] unconstrained
    grad_ptr,  # [B, N]
    exp_avg_ptr,  # [B, N]
    exp_avg_sq_ptr,  # [B, N]
    max_exp_avg_sq_ptr,  # [B, N]
    scalars_ptr,  # float64 [B, S, 5]
    chunks_ptr,  # int64 [C, 3]: segment, start, stop
    param_row,  # elements from one row to the next; the last dimension is contiguous
    grad_row,
    exp_avg_row,
    exp_avg_sq_row,
    max_exp_avg_sq_row,
    num_chunks,  # C
    num_segments,  # S
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    clip_value: tl.float64,
    WEIGHT_DECAY: tl.constexpr,  # "none", "coupled" or "decoupled"
    HAS_CLIP_VALUE: tl.constexpr,
    CENTERED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for each chunk of each row."""
    chunk = tl.program_id(0) % num_chunks
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    segment = tl.load(chunks_ptr + 3 * chunk)
    start = tl.load(chunks_ptr + 3 * chunk + 1)
    stop = tl.load(chunks_ptr + 3 * chunk + 2)
    scalars_ptr += (row * num_segments + segment) * NUM_SCALARS
    param_ptr += row * param_row
    grad_ptr += row * grad_row
    exp_avg_ptr += row * exp_avg_row
    exp_avg_sq_ptr += row * exp_avg_sq_row
    max_exp_avg_sq_ptr += row * max_exp_avg_sq_row
    if tl.load(scalars_ptr + WRITTEN) != 0.0:
        # Two copies of the body: a mask would split every access to the width of an element.
        if stop - start == TILE:
            _update_chunk(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, scalars_ptr,
                start, stop, beta1, beta2, eps, weight_decay, clip_value,
                WEIGHT_DECAY, HAS_CLIP_VALUE, CENTERED, AMSGRAD, True, TILE,
            )  # fmt: skip
        else:
            _update_chunk(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, scalars_ptr,
                start, stop, beta1, beta2, eps, weight_decay, clip_value,
                WEIGHT_DECAY, HAS_CLIP_VALUE, CENTERED, AMSGRAD, False, TILE,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------- launcher


def update(
    param: Tensor,  # [B, N]
    grad: Tensor,  # [B, N]
    exp_avg: Tensor,  # [B, N]
    exp_avg_sq: Tensor,  # [B, N]
    max_exp_avg_sq: Tensor | None,  # [B, N]
    step: Tensor,  # [B, S]
    active: Tensor | None,  # bool [B, S]
    skipped: Tensor | None,  # int64 [B]
    lr_tensor: Tensor | None,  # [B, S]
    lrd_tensor: Tensor | None,  # [B, S]
    chunks: Tensor,
    chunk_offsets: Tensor,
    lr: float,
    lrd: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    eps_hat: bool,
    centered: bool,
    clip_norm: float | None,
    clip_value: float | None,
) -> None:
    """All rows are contiguous, and so are step and skipped as a whole; the caller sees to it."""
    rows, num_segments = step.shape
    num_chunks = chunks.shape[0]
    if step.numel() == 0:
        return
    scalars = param.new_empty((rows, num_segments, NUM_SCALARS.value), dtype=torch.float64)
    # Stands for arguments that are not there; nothing reads it.
    absent = squares = bad = scalars
    if (skipped is not None or clip_norm is not None) and num_chunks:
        squares = param.new_empty((rows, num_chunks), dtype=torch.float64)
        bad = param.new_empty((rows, num_chunks), dtype=torch.int32)
    active = None if active is None else active.contiguous()
    amsgrad = max_exp_avg_sq is not None
    with launch.on_device_of(param):
        if squares is not absent:
            survey_kernel[(rows * num_chunks,)](
                grad,
                absent if active is None else active,
                squares,
                bad,
                chunks,
                grad.stride(0),
                num_chunks,
                num_segments,
                HAS_ACTIVE=active is not None,
                TILE=TILE,
                num_warps=launch.warps(_THREADS),
                **launch.OPTIONS,
            )
        prelude_kernel[(rows * num_segments,)](
            step,
            absent if active is None else active,
            absent if skipped is None else skipped,
            absent if lr_tensor is None else lr_tensor,
            absent if lrd_tensor is None else lrd_tensor,
            squares,
            bad,
            chunk_offsets,
            scalars,
            num_chunks,
            num_segments,
            *((0, 0) if lr_tensor is None else lr_tensor.stride()),
            *((0, 0) if lrd_tensor is None else lrd_tensor.stride()),
            lr,
            math.log(lrd),
            math.log(beta1) if beta1 else -math.inf,
            math.log(beta2) if beta2 else -math.inf,
            clip_norm or 0.0,
            HAS_ACTIVE=active is not None,
            HAS_SKIPPED=skipped is not None,
            LR_TENSOR=lr_tensor is not None,
            LRD="tensor" if lrd_tensor is not None else "number" if lrd != 1.0 else "none",
            HAS_CLIP_NORM=clip_norm is not None,
            EPS_HAT=eps_hat,
            BLOCK=_BLOCK,
            num_warps=1,
            **launch.OPTIONS,
        )
        if num_chunks == 0:
            return
        update_kernel[(rows * num_chunks,)](
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            absent if max_exp_avg_sq is None else max_exp_avg_sq,
            scalars,
            chunks,
            *(x.stride(0) for x in (param, grad, exp_avg, exp_avg_sq)),
            max_exp_avg_sq.stride(0) if max_exp_avg_sq is not None else 0,
            num_chunks,
            num_segments,
            beta1,
            beta2,
            eps,
            weight_decay,
            clip_value or 0.0,
            WEIGHT_DECAY="none" if not weight_decay else "decoupled" if decoupled else "coupled",
            HAS_CLIP_VALUE=clip_value is not None,
            CENTERED=centered,
            AMSGRAD=amsgrad,
            TILE=TILE,
            num_warps=launch.warps(_THREADS),
            **launch.OPTIONS,
        )


# ------------------------------------------------------------------------------------ compile cases


def _update_case(name: str, dtype: str, accesses: tuple[int, int], **constants: Any) -> CompileCase:
    buffers = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    pointers = [f"{buffer}_ptr" for buffer in buffers]
    strides = [f"{buffer}_row" for buffer in buffers]
    numbers = ("beta1", "beta2", "eps", "weight_decay", "clip_value")
    plain = {
        "WEIGHT_DECAY": "none",
        "HAS_CLIP_VALUE": False,
        "CENTERED": False,
        "AMSGRAD": False,
        "TILE": TILE,
    }
    return CompileCase(
        name=f"adam.{name}-{dtype}",
        kernel=update_kernel,
        signature={
            **dict.fromkeys(pointers, f"*{dtype}"),
            "scalars_ptr": "*fp64",
            "chunks_ptr": "*i64",
            **dict.fromkeys((*strides, "num_chunks", "num_segments"), "i32"),
            **dict.fromkeys(numbers, "fp64"),
        },
        constants=plain | constants,
        divisible=(*pointers, *strides, "scalars_ptr", "chunks_ptr"),
        threads=_THREADS,
        wide_loads=accesses[0],
        wide_stores=accesses[1],
        max_bytes=32_768,
    )


_EVERYTHING = {
    "WEIGHT_DECAY": "coupled",
    "HAS_CLIP_VALUE": True,
    "CENTERED": True,
    "AMSGRAD": True,
}
_SIZES = ("num_chunks", "num_segments")

COMPILE_CASES = [
    _update_case("plain", "fp32", (8, 6)),
    _update_case("everything", "fp32", (10, 8), **_EVERYTHING),
    _update_case("plain", "fp64", (16, 12)),
    CompileCase(
        name="adam.survey-fp32",
        kernel=survey_kernel,
        signature={
            "grad_ptr": "*fp32",
            "active_ptr": "*i1",
            "squares_ptr": "*fp64",
            "bad_ptr": "*i32",
            "chunks_ptr": "*i64",
            **dict.fromkeys(("grad_row", *_SIZES), "i32"),
        },
        constants={"HAS_ACTIVE": True, "TILE": TILE},
        divisible=("grad_ptr", "squares_ptr", "bad_ptr", "chunks_ptr", "grad_row"),
        threads=_THREADS,
        wide_loads=2,
    ),
    CompileCase(
        name="adam.prelude-fp32",
        kernel=prelude_kernel,
        signature={
            **dict.fromkeys(("step_ptr", "lr_ptr", "lrd_ptr"), "*fp32"),
            "active_ptr": "*i1",
            **dict.fromkeys(("skipped_ptr", "chunk_offsets_ptr"), "*i64"),
            **dict.fromkeys(("squares_ptr", "scalars_ptr"), "*fp64"),
            "bad_ptr": "*i32",
            **dict.fromkeys((*_SIZES, "lr_row", "lr_column", "lrd_row", "lrd_column"), "i32"),
            **dict.fromkeys(("lr", "log_lrd", "log_beta1", "log_beta2", "clip_norm"), "fp64"),
        },
        constants={
            "HAS_ACTIVE": True,
            "HAS_SKIPPED": True,
            "LR_TENSOR": True,
            "LRD": "tensor",
            "HAS_CLIP_NORM": True,
            "EPS_HAT": False,
            "BLOCK": _BLOCK,
        },
        divisible=("squares_ptr", "bad_ptr", "scalars_ptr", "step_ptr"),
        threads=32,
    ),
]
