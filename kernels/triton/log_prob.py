"""Log-densities summed over event dimensions, and their gradients. See ``kernels/log_prob.py``.

Every call becomes a problem on a matrix ``[R, C]``: each argument, and each result, varies along
both axes (``"full"``), one (``"row"``, ``"col"``) or none (``"scalar"``). One skeleton kernel loads
the arguments of a tile, evaluates the formula of the family, and adds the results up as their
roles say. A program adds in its registers and writes one partial sum; partial sums are added up by
torch, in float64 and always in the same order. No atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsvi.kernels.triton import launch
from fastsvi.kernels.triton.families import derivatives, log_density
from fastsvi.kernels.triton.launch import CompileCase

_TILE = 1024
_PROGRAMS = 2048  # with so many programs or more, each takes several tiles
_MAX_LOOPS = 64


# ------------------------------------------------------------------------------- device functions


@triton.jit
def _load(pointer, rows, cols, num_rows, num_cols, stride, step, ROLE: tl.constexpr):
    """Block of an argument, with axes of length 1 where it does not vary; 1 outside."""
    if ROLE == "full":
        inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        at = rows[:, None] * stride + cols[None, :] * step
        return tl.load(pointer + at, mask=inside, other=1.0)
    elif ROLE == "row":
        return tl.load(pointer + rows * stride, mask=rows < num_rows, other=1.0)[:, None]
    elif ROLE == "col":
        return tl.load(pointer + cols * step, mask=cols < num_cols, other=1.0)[None, :]
    else:
        return tl.load(pointer + tl.zeros([1, 1], tl.int32))


@triton.jit
def _emit(pointer, block, rows, cols, num_rows, num_cols, col_block, by_col, ROLE: tl.constexpr):
    """Write a tile of a result or its row sums; return the sums by column gathered so far."""
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    block = tl.where(inside, block, 0.0)
    if ROLE == "full":
        tl.store(pointer + rows[:, None] * num_cols + cols[None, :], block, mask=inside)
    elif ROLE == "row":
        total = tl.sum(block.to(tl.float64), 1)
        tl.store(pointer + col_block * num_rows + rows, total, mask=rows < num_rows)
    else:
        by_col += tl.sum(block, 0).to(tl.float64)
    return by_col


@triton.jit
def _finish(pointer, by_col, cols, num_cols, row_split, col_block, col_blocks, ROLE: tl.constexpr):
    if ROLE == "col":
        tl.store(pointer + row_split * num_cols + cols, by_col, mask=cols < num_cols)
    elif ROLE == "scalar":
        tl.store(pointer + row_split * col_blocks + col_block, tl.sum(by_col, 0))


# ------------------------------------------------------------------------------------------- kernel


@triton.jit
def skeleton_kernel(
    value_ptr,
    a_ptr,  # parameters, as many as the family has; the others are not read
    b_ptr,
    c_ptr,
    grad_ptr,  # of the density: [R, C] or [B]
    out_value_ptr,  # the density itself in the forward pass
    out_a_ptr,
    out_b_ptr,
    out_c_ptr,
    num_rows,  # R
    num_cols,  # C
    col_blocks,
    loops,  # tiles of a program, one below the other
    rows_per_batch,  # R / B
    value_stride,  # of the rows, and of the columns
    value_step,
    a_stride,
    a_step,
    b_stride,
    b_step,
    c_stride,
    c_step,
    FAMILY: tl.constexpr,
    BACKWARD: tl.constexpr,
    VALUE: tl.constexpr,  # roles of the arguments
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    GRAD: tl.constexpr,  # "full" or "row"
    OUT_VALUE: tl.constexpr,  # roles of the results, or "none"
    OUT_A: tl.constexpr,
    OUT_B: tl.constexpr,
    OUT_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col_block = tl.program_id(0) % col_blocks
    row_split = tl.program_id(0) // col_blocks
    cols = col_block.to(tl.int64) * COLS + tl.arange(0, COLS)
    sum_value = tl.zeros([COLS], tl.float64)
    sum_a = tl.zeros([COLS], tl.float64)
    sum_b = tl.zeros([COLS], tl.float64)
    sum_c = tl.zeros([COLS], tl.float64)
    for loop in range(loops):
        rows = (row_split.to(tl.int64) * loops + loop) * ROWS + tl.arange(0, ROWS)
        v = _load(value_ptr, rows, cols, num_rows, num_cols, value_stride, value_step, VALUE)
        a = _load(a_ptr, rows, cols, num_rows, num_cols, a_stride, a_step, A)
        b, c = a, a
        if B != "none":
            b = _load(b_ptr, rows, cols, num_rows, num_cols, b_stride, b_step, B)
        if C != "none":
            c = _load(c_ptr, rows, cols, num_rows, num_cols, c_stride, c_step, C)
        if not BACKWARD:
            x = log_density(FAMILY, v, a, b, c)
            sum_value = _emit(
                out_value_ptr, x, rows, cols, num_rows, num_cols, col_block, sum_value, OUT_VALUE
            )
        else:
            if GRAD == "full":
                g = _load(grad_ptr, rows, cols, num_rows, num_cols, num_cols, 1, "full")
            else:
                at = rows // rows_per_batch
                g = tl.load(grad_ptr + at, mask=rows < num_rows, other=0.0)[:, None]
            by_value, by_a, by_b, by_c = derivatives(FAMILY, v, a, b, c)
            if OUT_VALUE != "none":
                x = g * by_value
                sum_value = _emit(
                    out_value_ptr, x, rows, cols, num_rows, num_cols, col_block, sum_value,
                    OUT_VALUE,
                )  # fmt: skip
            if OUT_A != "none":
                x = g * by_a
                sum_a = _emit(out_a_ptr, x, rows, cols, num_rows, num_cols, col_block, sum_a, OUT_A)
            if OUT_B != "none":
                x = g * by_b
                sum_b = _emit(out_b_ptr, x, rows, cols, num_rows, num_cols, col_block, sum_b, OUT_B)
            if OUT_C != "none":
                x = g * by_c
                sum_c = _emit(out_c_ptr, x, rows, cols, num_rows, num_cols, col_block, sum_c, OUT_C)
    _finish(out_value_ptr, sum_value, cols, num_cols, row_split, col_block, col_blocks, OUT_VALUE)
    _finish(out_a_ptr, sum_a, cols, num_cols, row_split, col_block, col_blocks, OUT_A)
    _finish(out_b_ptr, sum_b, cols, num_cols, row_split, col_block, col_blocks, OUT_B)
    _finish(out_c_ptr, sum_c, cols, num_cols, row_split, col_block, col_blocks, OUT_C)


# -------------------------------------------------------------------------------------- the matrix


class Argument(NamedTuple):
    """An argument as a matrix: element (r, c) lies at ``r * stride + c * step``."""

    tensor: Tensor
    stride: int
    step: int
    role: str


class Matrix(NamedTuple):
    """A problem ``[R, C]``; ``batches`` divides R, and a batch owns neighbouring rows."""

    num_rows: int
    num_cols: int
    batches: int
    arguments: list[Argument]


def _fold(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """One stride for several axes taken as one, or None where there is no such."""
    step = None
    span = 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != span:
            return None
        span = stride * size
    return step or 0


def as_matrix(args: Sequence[Tensor], event_ndims: int) -> Matrix:
    """Cut the broadcast shape in two so that each argument has one stride on either side.

    Where no cut will do (axes are broadcast in an alternating pattern), the arguments at fault are
    written out in full.
    """
    shape = torch.broadcast_shapes(*(arg.shape for arg in args))
    expanded = [arg.expand(shape) for arg in args]
    first = len(shape) - event_ndims
    cuts = range(first if event_ndims else 0, len(shape) + 1)

    def folded(cut: int) -> list[tuple[int | None, int | None]]:
        return [
            (_fold(shape[:cut], arg.stride()[:cut]), _fold(shape[cut:], arg.stride()[cut:]))
            for arg in expanded
        ]

    cut = min(cuts, key=lambda cut: sum(None in pair for pair in folded(cut)))
    rows, cols = shape[:cut].numel(), shape[cut:].numel()
    arguments = []
    for arg, (stride, step) in zip(expanded, folded(cut), strict=True):
        if stride is None or step is None:
            arg = arg.contiguous()
            stride, step = cols, 1
        # What varies along all there is counts as full, which has the widest accesses.
        if (stride or rows == 1) and (step or cols == 1):
            role = "full"
        else:
            role = "row" if stride else "col" if step else "scalar"
        arguments.append(Argument(arg, stride, step, role))
    return Matrix(rows, cols, shape[:first].numel(), arguments)


class _Tiling(NamedTuple):
    rows: int
    cols: int
    loops: int
    row_splits: int
    col_blocks: int


def _tiling(num_rows: int, num_cols: int) -> _Tiling:
    cols = min(_TILE, triton.next_power_of_2(num_cols))
    rows = min(_TILE // cols, triton.next_power_of_2(num_rows))
    col_blocks, row_blocks = -(-num_cols // cols), -(-num_rows // rows)
    loops = max(1, min(_MAX_LOOPS, row_blocks, col_blocks * row_blocks // _PROGRAMS))
    return _Tiling(rows, cols, loops, -(-row_blocks // loops), col_blocks)


def _threads(family: str) -> int:
    """Two 128-bit accesses of float32 for each thread; one where gamma functions fill registers."""
    return _TILE // 4 if family in ("poisson", "student_t", "gamma", "beta") else _TILE // 8


def _partial(role: str, matrix: Matrix, tiling: _Tiling, like: Tensor) -> Tensor:
    """Where the results of a role go: ``[partial sums, ...]``, float64 if there are several."""
    if role == "full":
        return like.new_empty((1, matrix.num_rows * matrix.num_cols))
    parts, length = {
        "row": (tiling.col_blocks, matrix.num_rows),
        "col": (tiling.row_splits, matrix.num_cols),
        "scalar": (tiling.row_splits * tiling.col_blocks, 1),
    }[role]
    return like.new_empty((parts, length), dtype=like.dtype if parts == 1 else torch.float64)


# ---------------------------------------------------------------------------------------- launchers


def _run(
    family: str,
    matrix: Matrix,
    grad: Tensor | None,
    grad_role: str,
    out_roles: Sequence[str],
) -> list[Tensor | None]:
    """Results as ``[elements]``, summed over the partial sums; None for the role "none"."""
    arguments = matrix.arguments
    like = arguments[0].tensor
    tiling = _tiling(matrix.num_rows, matrix.num_cols)
    missing = 4 - len(arguments)
    outs = [None if role == "none" else _partial(role, matrix, tiling, like) for role in out_roles]
    padded = [*arguments, *[Argument(like, 0, 0, "none")] * missing]
    with launch.on_device_of(like):
        skeleton_kernel[(tiling.row_splits * tiling.col_blocks,)](
            *(arg.tensor for arg in padded),
            like if grad is None else grad,
            *(like if out is None else out for out in outs),
            matrix.num_rows,
            matrix.num_cols,
            tiling.col_blocks,
            tiling.loops,
            matrix.num_rows // matrix.batches,
            *(number for arg in padded for number in (arg.stride, arg.step)),
            FAMILY=family,
            BACKWARD=grad is not None,
            VALUE=padded[0].role,
            A=padded[1].role,
            B=padded[2].role,
            C=padded[3].role,
            GRAD=grad_role,
            OUT_VALUE=out_roles[0],
            OUT_A=out_roles[1],
            OUT_B=out_roles[2],
            OUT_C=out_roles[3],
            ROWS=tiling.rows,
            COLS=tiling.cols,
            num_warps=launch.warps(_threads(family)),
            **launch.OPTIONS,
        )
    return [
        out if out is None else out[0] if len(out) == 1 else out.sum(0).to(like.dtype)
        for out in outs
    ]


def forward(family: str, args: Sequence[Tensor], event_ndims: int) -> Tensor:
    """The log-density ``[*batch]``."""
    shape = torch.broadcast_shapes(*(arg.shape for arg in args))
    batch = shape[: len(shape) - event_ndims]
    if shape.numel() == 0:
        return args[0].new_zeros(batch)
    matrix = as_matrix(args, event_ndims)
    role = "full" if event_ndims == 0 else "scalar" if matrix.batches == 1 else "row"
    (first, *_) = _run(family, matrix, None, "none", (role, "none", "none", "none"))
    out = cast(Tensor, first)  # None for the roles "none" only
    if role == "row" and matrix.num_rows > matrix.batches:
        out = out.view(matrix.batches, -1).sum(1)
    return out.view(batch)


def backward(
    family: str, grad: Tensor, args: Sequence[Tensor], event_ndims: int, wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the wanted arguments, each in the shape of its argument."""
    shape = torch.broadcast_shapes(*(arg.shape for arg in args))
    asked = [arg for arg, want in zip(args, wanted, strict=True) if want]
    if shape.numel() == 0:
        return [arg.new_zeros(arg.shape) for arg in asked]
    matrix = as_matrix(args, event_ndims)
    roles = [
        arg.role if want else "none" for arg, want in zip(matrix.arguments, wanted, strict=True)
    ]
    roles += ["none"] * (4 - len(roles))
    grad_role = "row" if event_ndims else "full"
    outs = _run(family, matrix, grad.contiguous(), grad_role, roles)
    grads = []
    for arg, role, out in zip(args, roles, outs, strict=False):
        if out is None:
            continue
        # An argument that was written out in full has its gradient in full, too.
        grads.append(
            out.view(shape).sum_to_size(arg.shape) if role == "full" else out.view(arg.shape)
        )
    return grads


# ------------------------------------------------------------------------------------ compile cases


def _case(
    name: str,
    family: str,
    roles: Sequence[str],
    outs: Sequence[str],
    dtype: str = "fp32",
    tile: tuple[int, int] = (1, _TILE),
    **limits: Any,
) -> CompileCase:
    names = ("value", "a", "b", "c")
    roles = [*roles, *["none"] * (4 - len(roles))]
    outs = [*outs, *["none"] * (4 - len(outs))]
    backward = name == "backward"
    sizes = ("num_rows", "num_cols", "col_blocks", "loops", "rows_per_batch")
    strides = [f"{n}_stride" for n in names]
    steps = {
        f"{n}_step": int(role in ("full", "col")) for n, role in zip(names, roles, strict=True)
    }
    kept = {"row": "*fp64", "col": "*fp64", "scalar": "*fp64"}
    pointers = [f"{n}_ptr" for n in (*names, "grad", *(f"out_{n}" for n in names))]
    return CompileCase(
        name=f"log_prob.{family}_{name}-{'-'.join(r for r in roles if r != 'none')}-{dtype}",
        kernel=skeleton_kernel,
        signature={
            **{f"{n}_ptr": f"*{dtype}" for n in (*names, "grad")},
            **{
                f"out_{n}_ptr": kept.get(out, f"*{dtype}")
                for n, out in zip(names, outs, strict=True)
            },
            **dict.fromkeys((*sizes, *strides), "i32"),
        },
        constants={
            "FAMILY": family,
            "BACKWARD": backward,
            **dict(zip(("VALUE", "A", "B", "C"), roles, strict=True)),
            "GRAD": "row" if backward else "none",
            **{f"OUT_{n.upper()}": out for n, out in zip(names, outs, strict=True)},
            "ROWS": tile[0],
            "COLS": tile[1],
            **steps,
        },
        divisible=(*pointers, "num_cols", *strides),
        threads=_threads(family),
        **limits,
    )


COMPILE_CASES = [
    _case("forward", "normal", ("full", "full", "full"), ("scalar",), wide_loads=6),
    _case("forward", "normal", ("full", "col", "scalar"), ("row",), tile=(4, 256), wide_loads=2),
    _case(
        "backward", "normal", ("full", "full", "full"), ("full", "full", "full"),
        wide_loads=6, wide_stores=6,
    ),
    _case(
        "backward", "normal", ("full", "col", "scalar"), ("full", "col", "scalar"), tile=(4, 256),
        wide_loads=2, wide_stores=2,
    ),
    _case("backward", "normal", ("full", "full", "full"), ("full",) * 3, dtype="fp64"),
    *(
        _case(direction, family, ("full", *["scalar"] * count), outs, wide_loads=1)
        for family, count in (
            ("bernoulli_logits", 1),
            ("poisson", 1),
            ("student_t", 3),
            ("log_normal", 2),
            ("half_normal", 1),
            ("half_cauchy", 1),
            ("gamma", 2),
            ("beta", 2),
        )
        for direction, outs in (
            ("forward", ("scalar",)),
            ("backward", ("full", *["scalar"] * count)),
        )
    ),
    _case("backward", "student_t", ("full",) * 4, ("full",) * 4, max_bytes=49_152, wide_loads=3),
    _case("backward", "beta", ("full",) * 3, ("full",) * 3, max_bytes=49_152, wide_loads=3),
]  # fmt: skip
