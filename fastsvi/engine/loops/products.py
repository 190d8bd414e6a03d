"""Matrix products by BLAS: the one thing that loops of our own should not do.

The routines are those that torch itself brings; if its build hides them, loops take over.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from fastsvi.engine.loops.index import Axis, of_axis
from fastsvi.engine.loops.ir import Array, Body, Indices, Value

# Products of fewer multiplications are done faster in place than by a call.
WORTH_A_CALL = 4096


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("libtorch_cpu.*")):
        return ctypes.CDLL(str(path))
    return None


@lru_cache(maxsize=1)
def pointers() -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of sgemm, dgemm, sgemv and dgemv, in Fortran's convention; zeros if not found."""
    library = _library()
    found = []
    for name in ("sgemm", "dgemm", "sgemv", "dgemv"):
        symbols = (f"{name}_", name.upper())
        symbol = next((s for s in symbols if library is not None and hasattr(library, s)), None)
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value if symbol else None
        found.append(address or 0)
    return (ctypes.c_void_p * len(found))(*found)


def _routines() -> dict[torch.dtype, tuple[int, int]]:
    return {torch.float32: (0, 2), torch.float64: (1, 3)} if all(pointers()) else {}


ROUTINES = _routines()  # by dtype: positions of the matrix and the vector routine


def source(x: Value) -> tuple[Array, Indices, tuple[Axis, ...]]:
    """The array that a view reads, where, and the axes of the view."""
    axes = tuple(Axis(f"v{k}", extent) for k, extent in enumerate(x.shape))
    body = Body()
    x.load(tuple(of_axis(axis) for axis in axes), body)
    ((array, places),) = body.loads.items()
    (indices,) = places
    return array, indices, axes


def is_plain(x: Value) -> bool:
    """Whether ``x`` is the whole of one array, up to the order and number of its axes of 1.

    A batch may repeat one matrix: its axis then does not move.
    """
    if x.cost:
        return False
    body = Body()
    axes = tuple(Axis(f"v{k}", extent) for k, extent in enumerate(x.shape))
    x.load(tuple(of_axis(axis) for axis in axes), body)
    if len(body.loads) != 1:
        return False
    ((array, places),) = body.loads.items()
    if len(places) != 1:
        return False
    (indices,) = places
    moving = [axis for axis in axes if axis.extent != 1]
    read = [i for i, extent in zip(indices, array.shape, strict=True) if extent != 1]
    used = [axis for axis in moving if any(index == of_axis(axis) for index in read)]
    repeated = [axis for axis in moving if axis not in used]
    return len(used) == len(read) and (not repeated or (len(axes) == 3 and repeated == [axes[0]]))


def has_rows(x: Value) -> bool:
    """Whether the matrices of a batch have neighbours in memory, in the order the array has."""
    return 1 in _strides(x)[-2:]


def call(out: Array, a: Value, b: Value, batch: int) -> Callable[[], str]:
    """C++ for ``out = a @ b``; made when the arrays have been laid out."""

    def write() -> str:
        left, right = _strides(a), _strides(b)
        matrix, vector = ROUTINES[out.dtype]
        kind = out.ctype
        if len(b.shape) == 1:
            m, k = a.shape
            routine = f"(Gemv<{kind}>)blas[{vector}]"
            x, y = source(a)[0].name, source(b)[0].name
            return (
                f"matrix_vector<{kind}>({routine}, {m}, {k}, {x}, {left[0]}, {left[1]}, {y}, "
                f"{right[0]}, {out.name});"
            )
        m, k = a.shape[-2:]
        n = b.shape[-1]
        steps = [left[0], right[0], m * n] if len(a.shape) == 3 else [0, 0, 0]
        x, y = source(a)[0].name, source(b)[0].name
        return (
            f"for (int64_t b = 0; b < {batch}; ++b) matrix_matrix<{kind}>("
            f"(Gemm<{kind}>)blas[{matrix}], {m}, {n}, {k}, {x} + b * {steps[0]}, {left[-2]}, "
            f"{left[-1]}, {y} + b * {steps[1]}, {right[-2]}, {right[-1]}, "
            f"{out.name} + b * {steps[2]});"
        )

    return write


def _strides(x: Value) -> list[int]:
    array, indices, axes = source(x)
    offset = array.offset(indices)
    return [offset.stride(axis) or 0 for axis in axes]
