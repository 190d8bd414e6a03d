"""Sums, extrema and what else runs along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastsvi.engine.loops import pointwise, views
from fastsvi.engine.loops.ir import (
    CTYPES,
    Array,
    Body,
    Expr,
    Indices,
    Statement,
    Value,
    is_uniform,
    of_array,
    squeeze,
)

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program

# Longer axes are accumulated one element after the other.
_SHORT = 64


def reduce(
    program: Program, x: Value, dims: Any, keepdim: bool, combine: str, dtype: torch.dtype
) -> Value:
    """``x`` combined ("+", "max", "min" or "*") over ``dims``, all of them if there are none."""
    rank = len(x.shape)
    if dims is None or dims == []:
        dims = range(rank)
    gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()
    kept = [d for d in range(rank) if d not in gone]
    count = math.prod(x.shape[d] for d in gone)
    if count == 1 or (count and combine != "*" and is_uniform(x)):
        return _of_equals(x, gone, keepdim, count if combine == "+" else 1, dtype)
    array = program.array([x.shape[d] for d in kept], dtype)
    domain, spread = squeeze(x.shape)
    moving = [d for d in range(rank) if x.shape[d] != 1]
    reduced = tuple(k for k, d in enumerate(moving) if d in gone)

    def store(indices: Indices) -> Indices:
        full = spread(indices)
        return tuple(full[d] for d in kept)

    def value(indices: Indices, body: Body) -> Expr:
        return pointwise.cast(x.load(spread(indices), body), x.dtype, dtype, body)

    program.add(Statement(array, domain, value, store, reduced, combine))
    result = of_array(array)
    if keepdim:
        for d in sorted(gone):
            result = views.unsqueeze(result, d)
    return result


def _of_equals(x: Value, gone: set[int], keepdim: bool, count: int, dtype: torch.dtype) -> Value:
    """The reduction of elements that are all the same, or alone: nothing to loop over."""
    x = pointwise.converted(x, dtype)
    for d in sorted(gone, reverse=True):
        x = views.select(x, d, 0)
    if count > 1:
        x = pointwise.lower("mul", dtype, [x, count], {})
    for d in sorted(gone) if keepdim else ():
        x = views.unsqueeze(x, d)
    return x


def _reduction(combine: str) -> Callable[..., Value]:
    def lowered(
        program: Program,
        node: Node,
        x: Value,
        dims: Any = None,
        keepdim: bool = False,
        dtype: Any = None,
    ) -> Value:
        return reduce(program, x, dims, keepdim, combine, node.dtype)

    return lowered


def _mean(
    program: Program, node: Node, x: Value, dims: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    total = reduce(program, x, dims, keepdim, "+", node.dtype)
    count = math.prod(x.shape) / max(1, math.prod(total.shape))
    return pointwise.lower("div", node.dtype, [total, count], {})


def _some(combine: str) -> Callable[..., Value]:
    def lowered(
        program: Program, node: Node, x: Value, dims: Any = None, keepdim: bool = False
    ) -> Value:
        true = x if x.dtype == torch.bool else pointwise.lower("ne", torch.bool, [x, 0], {})
        number = pointwise.converted(true, torch.int32)
        found = reduce(program, number, dims, keepdim, combine, torch.int32)
        # Over no elements, `all` is true and `any` is false: the extrema's starting values.
        return pointwise.lower("gt", torch.bool, [found, 0], {})

    return lowered


# ---- positions of extrema


def _position(
    program: Program, x: Value, dim: Any, keepdim: bool, combine: str
) -> tuple[Value, Value]:
    """The extreme value along ``dim`` and the first position that holds it."""
    if dim is None:
        x, dim = views.view(x, (math.prod(x.shape),)), 0
    dim = dim % len(x.shape) if x.shape else 0
    if not x.shape:
        return x, pointwise.literal(0, (), torch.int64)
    x = program.store(x) if x.cost else x
    best = reduce(program, x, dim, True, combine, x.dtype)
    spread = views.broadcast(best, x.shape)

    def load(indices: Indices, body: Body) -> Expr:
        here, top = x.load(indices, body), spread.load(indices, body)
        # NaN is equal to nothing, itself included.
        test = f"{here.text} == {top.text} || {here.text} != {here.text}"
        text = f"({test}) ? (int64_t)({indices[dim].text}) : (int64_t){x.shape[dim]}"
        return body.local("int64_t", text, here.axes | top.axes | indices[dim].axes)

    places = Value(x.shape, torch.int64, load, 3)
    first = reduce(program, places, dim, keepdim, "min", torch.int64)
    return (best if keepdim else views.squeeze(best, dim)), first


def _extremum(combine: str, position: int) -> Callable[..., Value]:
    def lowered(program: Program, node: Node, x: Value, dim: int, keepdim: bool = False) -> Value:
        key = (combine, id(node.args[0]), dim, keepdim)
        if key not in program.shared:
            program.shared[key] = _position(program, x, dim, keepdim, combine)
        return program.shared[key][position]

    return lowered


def _arg(combine: str) -> Callable[..., Value]:
    def lowered(
        program: Program, node: Node, x: Value, dim: Any = None, keepdim: bool = False
    ) -> Value:
        return _position(program, x, dim, keepdim, combine)[1]

    return lowered


# ---- along an axis


def _running(routine: str) -> Callable[..., Value]:
    """Sums and products so far: by a call, line after line."""

    def lowered(program: Program, node: Node, x: Value, dim: int, dtype: Any = None) -> Value:
        x = pointwise.converted(x, node.dtype)
        if not x.shape:
            return x
        dim %= len(x.shape)
        if routine == "running_sum" and x.shape[dim] <= _SHORT:
            return _masked_sum(program, x, dim, node.dtype)
        source, array = program.rows(x), program.blank(x.shape, node.dtype)
        program.call([array], _along(routine, [array, source], x.shape, dim), [source])
        return of_array(array)

    return lowered


def _masked_sum(program: Program, x: Value, dim: int, dtype: torch.dtype) -> Value:
    """Running sums as sums with a mask: quadratic in the length, but all in vector registers."""
    terms = views.unsqueeze(program.store(x), dim)  # [..., 1, n, ...]
    full = (*x.shape[:dim], x.shape[dim], *x.shape[dim:])

    def load(indices: Indices, body: Body) -> Expr:
        row, column = indices[dim], indices[dim + 1]
        term = views.broadcast(terms, full).load(indices, body)
        text = f"({column.text} <= {row.text}) ? {term.text} : 0"
        return body.local(CTYPES[x.dtype], text, term.axes | row.axes | column.axes)

    return reduce(program, Value(full, x.dtype, load, 2), dim + 1, False, "+", dtype)


def _along(
    routine: str, arrays: list[Array], shape: tuple[int, ...], dim: int, more: str = ""
) -> Callable[[], str]:
    """A call with the number of lines before ``dim``, its length, and the stride along it."""
    sizes = f"{math.prod(shape[:dim])}, {shape[dim]}, {math.prod(shape[dim + 1 :])}"
    return lambda: f"{routine}({', '.join(array.name for array in arrays)}, {sizes}{more});"


def _sorted(position: int) -> Callable[..., Value]:
    def lowered(program: Program, node: Node, x: Value, *args: Any, **kwargs: Any) -> Value:
        names = _SORT_ARGUMENTS[node.op[1]._overloadname]
        given = dict(zip(names, args, strict=False)) | kwargs
        dim, descending = given.get("dim", -1), bool(given.get("descending", False))
        if not x.shape:
            return x if position == 0 else pointwise.literal(0, (), torch.int64)
        dim %= len(x.shape)
        key = ("sort", id(node.args[0]), dim, descending)
        if key not in program.shared:
            source, values = program.rows(x), program.blank(x.shape, x.dtype)
            places = program.blank(x.shape, torch.int64)
            flag = ", true" if descending else ", false"
            text = _along("running_sort", [values, places, source], x.shape, dim, flag)
            program.call([values, places], text, [source])
            program.shared[key] = of_array(values), of_array(places)
        return program.shared[key][position]

    return lowered


_SORT_ARGUMENTS = {"default": ("dim", "descending"), "stable": ("stable", "dim", "descending")}

OPERATIONS: dict[Any, Callable[..., Value]] = {
    "sum": _reduction("+"),
    "amax": _reduction("max"),
    "amin": _reduction("min"),
    "mean": _mean,
    "any": _some("max"),
    "all": _some("min"),
    "argmax": _arg("max"),
    "argmin": _arg("min"),
    ("max", 0): _extremum("max", 0),
    ("max", 1): _extremum("max", 1),
    ("min", 0): _extremum("min", 0),
    ("min", 1): _extremum("min", 1),
    "max": _reduction("max"),
    "min": _reduction("min"),
    "prod": _reduction("*"),
    "cumsum": _running("running_sum"),
    "cumprod": _running("running_product"),
    ("sort", 0): _sorted(0),
    ("sort", 1): _sorted(1),
}
