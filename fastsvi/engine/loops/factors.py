"""Factorizations of small matrices and systems of equations, as calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastsvi.engine.loops import pointwise, views
from fastsvi.engine.loops.ir import CTYPES, Array, Body, Expr, Indices, Value, of_array
from fastsvi.errors import CaptureError

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program


def _call(
    program: Program, routine: str, written: list[Array], read: list[Array], *options: int | bool
) -> None:
    names = [x.name for x in (*written, *read)]
    numbers = [str(int(x)) for x in options]
    program.call(written, lambda: f"{routine}({', '.join([*names, *numbers])});", read)


def _cholesky(program: Program, node: Node, a: Value, upper: bool = False, **_: Any) -> Value:
    out, source = program.blank(a.shape, a.dtype), program.rows(a)
    batch = math.prod(a.shape[:-2])
    _call(program, "linear_cholesky", [out], [source], batch, a.shape[-1], upper)
    return of_array(out)


def _fine(program: Program, node: Node, *_: Any, **__: Any) -> Value:
    """The error code of a factorization: what went wrong shows as NaN."""
    return pointwise.literal(0, node.shape, torch.int32)


def _triangular(
    program: Program,
    node: Node,
    a: Value,
    b: Value,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Value:
    batch, n = node.shape[:-2], a.shape[-1]
    m = node.shape[-1] if left else node.shape[-2]
    sources = [
        program.rows(views.broadcast(a, (*batch, n, n))),
        program.rows(views.broadcast(b, node.shape)),
    ]
    out = program.blank(node.shape, node.dtype)
    options = (math.prod(batch), n, m, upper, left, unitriangular)
    _call(program, "linear_triangular", [out], sources, *options)
    return of_array(out)


def _lu(program: Program, node: Node, a: Value) -> tuple[Value, Value]:
    """Both triangles in one matrix, and the row that each row was exchanged with, from 1."""
    key = ("lu", id(node.args[0]))
    if key not in program.shared:
        *batch, n, _ = a.shape
        source, factors = program.rows(a), program.blank(a.shape, a.dtype)
        pivots = program.blank((*batch, n), torch.int32)
        _call(program, "linear_lu", [factors, pivots], [source], math.prod(batch), n)
        program.shared[key] = of_array(factors), of_array(pivots)
    return program.shared[key]


def _factors(position: int) -> Callable[..., Value]:
    def lowered(program: Program, node: Node, a: Value, **_: Any) -> Value:
        if a.shape[-1] != a.shape[-2]:
            raise CaptureError("native loops factor square matrices only")
        return _lu(program, node, a)[position]

    return lowered


def _lu_solved(
    program: Program,
    node: Node,
    factors: Value,
    pivots: Value,
    b: Value,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Value:
    if not left:  # x a = b is a' x' = b'
        turned = views.transpose(b, -2, -1)
        found = _lu_applied(program, factors, pivots, turned, not adjoint)
        return views.transpose(found, -2, -1)
    return _lu_applied(program, factors, pivots, b, adjoint)


def _lu_applied(program: Program, factors: Value, pivots: Value, b: Value, adjoint: bool) -> Value:
    batch = views.common_shape(factors.shape[:-2], b.shape[:-2])
    n, m = b.shape[-2:]
    out = program.blank((*batch, n, m), b.dtype)
    sources = [
        program.rows(views.broadcast(factors, (*batch, n, n))),
        program.rows(views.broadcast(pivots, (*batch, n))),
        program.rows(views.broadcast(b, (*batch, n, m))),
    ]
    _call(program, "linear_lu_solve", [out], sources, math.prod(batch), n, m, adjoint)
    return of_array(out)


def _identity(n: int, batch: tuple[int, ...], dtype: torch.dtype) -> Value:
    def load(indices: Indices, body: Body) -> Expr:
        row, column = indices[-2:]
        text = f"({CTYPES[dtype]})({row.text} == {column.text})"
        return body.local(CTYPES[dtype], text, row.axes | column.axes)

    return Value((*batch, n, n), dtype, load, 1)


def _inverse(program: Program, node: Node, a: Value, **_: Any) -> Value:
    factors, pivots = _lu(program, node, a)
    unit = _identity(a.shape[-1], a.shape[:-2], a.dtype)
    return _lu_applied(program, factors, pivots, unit, adjoint=False)


OPERATIONS: dict[Any, Callable[..., Value]] = {
    ("linalg_cholesky_ex", 0): _cholesky,
    ("linalg_cholesky_ex", 1): _fine,
    "cholesky": _cholesky,
    "linalg_solve_triangular": _triangular,
    ("linalg_lu_factor_ex", 0): _factors(0),
    ("linalg_lu_factor_ex", 1): _factors(1),
    "linalg_lu_solve": _lu_solved,
    ("linalg_inv_ex", 0): _inverse,
    ("linalg_inv_ex", 1): _fine,
}
