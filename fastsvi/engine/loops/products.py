"""Matrix products: small ones as loops, large ones by BLAS, which reads factors where they lie.

vmap makes of ``x @ w`` for many ``w`` a product of an expanded matrix: batches of which one factor
is the same throughout become one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsvi.engine.loops import blas
from fastsvi.engine.loops.index import ZERO, Axis, of_axis
from fastsvi.engine.loops.ir import (
    CTYPES,
    Array,
    Body,
    Expr,
    Indices,
    Statement,
    Value,
    nothing,
    of_array,
)

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program

# Products of fewer multiplications are done faster in place than by a call.
WORTH_A_CALL = 4096
# On a GPU a product costs a launch of its own, and one with few rows, columns or terms is bound by
# what it reads: loops do that as fast.
WORTH_A_LAUNCH = 1 << 18
_THIN = 4
# BLAS computes tiles of a result, of about this many elements along the axis whose elements are
# neighbours in memory and this many along the other. Tiles that stick out are computed whole.
_TILE = 16, 4
# Of results that fit tiles either way, those with fewer columns than this are laid out column by
# column, if they are long: what is done with them afterwards then runs along memory.
_NARROW = 64
# Where a program keeps its calls, by the array that they write.
PRODUCTS = "products"
# Where it keeps the factors of those that cuBLAS computes, likewise.
LAUNCHED = "launched products"
# Registers of 32 bytes that a routine may take to hold a row.
_REGISTERS = 8


def _product(program: Program, node: Node, a: Value, b: Value, names: str) -> Value:
    """Sum of products in index notation, such as ``mk,kn,mn``."""
    left, right, out = names.split(",")
    extent = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    work = math.prod(extent.values())
    if program.calls == "host" and work >= WORTH_A_CALL and a.dtype in blas.ROUTINES:
        return _call(program, node, a, b)
    is_large = program.calls == "device" and work >= WORTH_A_LAUNCH and a.dtype.is_floating_point
    if is_large and (_is_stacked(a, b) or not _is_thin(extent)):
        return _launched(program, node, a, b)
    a = a if a.cost == 0 else program.store(a)
    b = b if b.cost == 0 else program.store(b)
    letters = out + "".join(x for x in left if x not in out)
    moving = [x for x in letters if extent[x] != 1]
    array = program.array(node.shape, node.dtype)

    def at(indices: Indices, names: str) -> Indices:
        place = dict(zip(moving, indices, strict=True))
        return tuple(place.get(x, ZERO) for x in names)

    def value(indices: Indices, body: Body) -> Expr:
        x, y = a.load(at(indices, left), body), b.load(at(indices, right), body)
        return body.local(CTYPES[node.dtype], f"{x.text} * {y.text}", x.axes | y.axes)

    reduced = tuple(k for k, x in enumerate(moving) if x not in out)
    domain = tuple(extent[x] for x in moving)
    store = lambda indices: at(indices, out)  # noqa: E731
    combine = "+" if reduced else None
    program.add(Statement(array, domain, value, store, reduced, combine))
    return of_array(array)


# ---- products by a call


class Place(NamedTuple):
    """Where the elements of a view lie in an array: ``start`` and a stride per axis."""

    array: Array
    start: int
    strides: list[int]


def _place(x: Value) -> Place | None:
    """Place of a view of one array; None if it computes, or jumps about."""
    axes = tuple(Axis(f"v{k}", extent) for k, extent in enumerate(x.shape))
    body = Body()
    x.load(tuple(of_axis(axis) for axis in axes), body)
    if x.cost or len(body.loads) != 1:
        return None
    ((array, places),) = body.loads.items()
    if len(places) != 1:
        return None
    offset = array.offset(next(iter(places)))
    strides = [offset.stride(axis) for axis in axes]
    if not all(isinstance(atom, Axis) for atom, _ in offset.terms):
        return None
    return Place(array, offset.const, [s or 0 for s in strides])


def _factor(program: Program, x: Value) -> Value:
    """``x`` itself if its matrices lie so that BLAS can read them, else a copy."""
    place = _place(x)
    if place is not None:
        array = place.array
        if array.kind == "temporary" and array.order is None:
            # Its layout is free as long as it is used whole; a batch fixes it.
            whole = sorted(n for n in array.shape if n != 1) == sorted(n for n in x.shape if n != 1)
            if whole and len(x.shape) < 3:
                return x
            array.order = tuple(range(len(array.shape)))
        if _is_readable(x.shape, place.strides):
            return x
    # Both passes read a minibatch: one copy serves them.
    known = program.shared.setdefault("copied factors", {})
    if x not in known:
        array = program.array(x.shape, x.dtype)
        if len(x.shape) == 3:
            array.order = (0, 1, 2)
        program.write(array, x)
        known[x] = of_array(array)
    return known[x]


def _is_readable(shape: tuple[int, ...], strides: list[int]) -> bool:
    if len(shape) == 1:
        return strides[0] == 1 or shape[0] == 1
    (m, n), (row, column) = shape[-2:], strides[-2:]
    if m == 1 or n == 1:  # a vector in the guise of a matrix
        return (strides[-1] if m == 1 else strides[-2]) == 1 or m == n == 1
    return (column == 1 and row >= n) or (row == 1 and column >= m)


def _call(program: Program, node: Node, a: Value, b: Value) -> Value:
    a, b = _factor(program, a), _factor(program, b)
    array = program.blank(node.shape, node.dtype)
    if len(node.shape) == 2 and 1 not in node.shape and _is_better_turned(*node.shape):
        array.order = (1, 0)
    statement = Statement(array, (), nothing, lambda i: i, call=_text(array, a, b))
    statement.loads = {place_of(x).array: set() for x in (a, b)}
    statement.work = float(math.prod(node.shape) * a.shape[-1])
    program.append(statement)
    program.shared.setdefault(PRODUCTS, {})[array] = statement
    return of_array(array)


def _is_thin(extent: dict[str, int]) -> bool:
    """Whether a product has few rows, columns or terms."""
    return min(extent.get(x, 1) for x in "mkn") <= _THIN


def _is_stacked(a: Value, b: Value) -> bool:
    """Whether a batch of vectors meets one matrix: loops would read it once for each of them."""
    if len(a.shape) != 3 or a.shape[0] == 1:
        return False
    matrix = _place(b) if a.shape[1] == 1 else _place(a) if b.shape[2] == 1 else None
    return matrix is not None and matrix.strides[0] == 0


def _launched(program: Program, node: Node, a: Value, b: Value) -> Value:
    """A product by cuBLAS, whose factors are found once the arrays are laid out."""
    a, b = _factor(program, a), _factor(program, b)
    array = program.blank(node.shape, node.dtype)
    statement = Statement(array, (), nothing, lambda i: i, call=lambda: "")
    statement.loads = {place_of(x).array: set() for x in (a, b)}
    program.append(statement)
    program.shared.setdefault(LAUNCHED, {})[array] = a, b
    return of_array(array)


def _is_better_turned(rows: int, columns: int) -> bool:
    """Whether a matrix that BLAS computes is to lie column by column."""

    def computed(along: int, across: int) -> int:
        return -(-along // _TILE[0]) * _TILE[0] * -(-across // _TILE[1]) * _TILE[1]

    turned, natural = computed(rows, columns), computed(columns, rows)
    return turned < natural or (turned == natural and columns < min(_NARROW, rows))


def place_of(x: Value) -> Place:
    """Place of a factor that a call reads."""
    place = _place(x)
    if place is None:
        raise ValueError(f"a factor of shape {x.shape} has no place in memory")
    return place


class _Matrix(NamedTuple):
    """A matrix in memory: pointer, extents, strides."""

    pointer: str
    rows: int
    columns: int
    row: int
    column: int

    @property
    def turned(self) -> _Matrix:
        return _Matrix(self.pointer, self.columns, self.rows, self.column, self.row)


def _text(out: Array, a: Value, b: Value) -> Callable[[], str]:
    """C++ for ``out = a @ b``; made when the arrays have been laid out."""

    def write() -> str:
        left, right, result = place_of(a), place_of(b), place_of(of_array(out))
        x, y = (f"({place.array.name} + {place.start})" for place in (left, right))
        if len(b.shape) == 1:
            matrix = _Matrix(x, *a.shape, *left.strides)
            return _multiply(out, matrix, _Matrix(y, b.shape[0], 1, 1, 0), out.name, 1, 0)
        first = _Matrix(x, *a.shape[-2:], *left.strides[-2:])
        second = _Matrix(y, *b.shape[-2:], *right.strides[-2:])
        if len(a.shape) == 2:
            return _multiply(out, first, second, out.name, *result.strides)
        batch, m, k, n = a.shape[0], *a.shape[1:], b.shape[2]
        step_a, step_b = left.strides[0], right.strides[0]
        if batch == 1:
            return _multiply(out, first, second, out.name, n, 1)
        # One matrix with a batch of vectors, or of stacked rows, is one product.
        if step_a == 0 and n == 1 and step_b >= k:
            vectors = _Matrix(y, batch, k, step_b, 1)
            return _multiply(out, vectors, first.turned, out.name, m, 1)
        if step_b == 0 and m == 1 and step_a >= k:
            vectors = _Matrix(x, batch, k, step_a, 1)
            return _multiply(out, vectors, second, out.name, n, 1)
        if step_b == 0 and first.column == 1 and step_a == m * first.row:
            rows = _Matrix(x, batch * m, k, first.row, 1)
            return _multiply(out, rows, second, out.name, n, 1)
        call = _multiply(
            out,
            first._replace(pointer=f"{x} + b * {step_a}"),
            second._replace(pointer=f"{y} + b * {step_b}"),
            f"{out.name} + b * {m * n}",
            n,
            1,
        )
        return f"for (int64_t b = 0; b < {batch}; ++b) {call}"

    return write


def _multiply(out: Array, a: _Matrix, b: _Matrix, target: str, row: int, column: int) -> str:
    """One product into ``target``, whose elements lie ``row`` and ``column`` apart."""
    kind = out.ctype
    if a.rows == 1 or (column != 1 and b.columns != 1):
        a, b = b.turned, a.turned  # the transpose of the result, from those of the factors
    if b.columns == 1:
        lanes = 32 // out.dtype.itemsize
        if 1 not in (a.column, a.columns) and lanes <= a.rows <= _REGISTERS * lanes:
            matrix = f"{a.columns}, {a.rows}, {a.pointer}, {a.column}"
            routine = f"matrix_narrow<{kind}, {-(-a.rows // lanes)}>"
            return f"{routine}({matrix}, {b.pointer}, {b.row or 1}, {target});"
        matrix = f"{a.rows}, {a.columns}, {a.pointer}, {a.row}, {a.column}"
        return f"matrix_vector<{kind}>({matrix}, {b.pointer}, {b.row or 1}, {target});"
    routine = f"blas[{blas.ROUTINES[out.dtype]}]"
    sizes = f"{a.rows}, {b.columns}, {a.columns}"
    left = f"{a.pointer}, {a.row}, {a.column}"
    right = f"{b.pointer}, {b.row}, {b.column}"
    return f"matrix_matrix<{kind}>({routine}, {sizes}, {left}, {right}, {target});"


def _mm(program: Program, node: Node, a: Value, b: Value, *_: Any) -> Value:
    return _product(program, node, a, b, "mk,kn,mn")


def _mv(program: Program, node: Node, a: Value, b: Value) -> Value:
    return _product(program, node, a, b, "mk,k,m")


def _bmm(program: Program, node: Node, a: Value, b: Value, *_: Any) -> Value:
    return _product(program, node, a, b, "bmk,bkn,bmn")


OPERATIONS: dict[Any, Callable[..., Value]] = {"mm": _mm, "mv": _mv, "bmm": _bmm}
