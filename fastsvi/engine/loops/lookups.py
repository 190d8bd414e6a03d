"""Reading and writing where index tensors point, and putting pieces together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastsvi.engine.loops import pointwise, views
from fastsvi.engine.loops.index import Index, Opaque
from fastsvi.engine.loops.ir import Body, Indices, Statement, Value, of_array, squeeze
from fastsvi.errors import CaptureError

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program

_CHEAP = 2  # costlier values are stored before they are looked into


def _cat(program: Program, node: Node, pieces: list[Value], dim: int = 0) -> Value:
    dim %= len(node.shape)
    array, start = program.array(node.shape, node.dtype), 0
    for piece in pieces:
        if math.prod(piece.shape):
            piece = pointwise.converted(piece, node.dtype)
            program.write(array, piece, (dim, start))
            start += piece.shape[dim]
    return of_array(array)


# ---- by index tensors


def _lookup(
    indices: list[Value | None], shape: tuple[int, ...]
) -> tuple[int, tuple[int, ...], Callable[[Indices, Body], Indices]]:
    """Where index tensors point: first axis, their common shape, and the full index."""
    places = [k for k, index in enumerate(indices) if index is not None]
    if any(index is not None and index.dtype == torch.bool for index in indices):
        raise CaptureError("native loops do not know indexing by a mask; use torch.where")
    adjacent = places == list(range(places[0], places[0] + len(places)))
    first = places[0] if adjacent else 0
    tensors = [index for index in indices if index is not None]
    common = views.common_shape(*(t.shape for t in tensors))
    looked = [views.broadcast(t, common) for t in tensors]

    def full(result: Indices, body: Body) -> Indices:
        inner = result[first : first + len(common)]
        others = iter(result[:first] + result[first + len(common) :])
        found = iter(looked)
        place: list[Index] = []
        for k in range(len(shape)):
            if k not in places:
                place.append(next(others))
                continue
            place.append(_pointed_at(next(found), inner, shape[k], body))
        return tuple(place)

    return first, common, full


def _pointed_at(index: Value, indices: Indices, extent: int, body: Body) -> Index:
    """The place along an axis of ``extent`` that an element of an index tensor names."""
    expr = index.load(indices, body)
    text = f"({expr.text} < 0 ? {expr.text} + {extent} : {expr.text})"
    wrapped = body.local("int64_t", text, expr.axes)
    return Index(((Opaque(wrapped.text, wrapped.axes, extent), 1),))


def _index(program: Program, node: Node, x: Value, indices: list[Value | None]) -> Value:
    x = x if x.cost <= _CHEAP else program.store(x)
    _, _, full = _lookup(indices, x.shape)
    load = lambda result, body: x.load(full(result, body), body)  # noqa: E731
    return Value(node.shape, node.dtype, load, x.cost + 2)


def _index_put(
    program: Program,
    node: Node,
    x: Value,
    indices: list[Value | None],
    new: Value,
    accumulate: bool = False,
    *_: Any,
) -> Value:
    first, common, full = _lookup(indices, x.shape)
    others = [n for k, n in enumerate(x.shape) if k >= len(indices) or indices[k] is None]
    shape = (*others[:first], *common, *others[first:])
    new = pointwise.converted(new, x.dtype)
    return _scatter(program, x, views.broadcast(new, shape), full, accumulate)


def _index_fill(program: Program, node: Node, x: Value, dim: int, index: Value, new: Any) -> Value:
    dim %= len(x.shape)
    shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
    if not isinstance(new, Value):
        new = pointwise.literal(new, (), x.dtype)
    spread = _spread(index, dim, shape)
    filled = views.broadcast(pointwise.converted(new, x.dtype), shape)
    return _scatter(program, x, filled, _along(dim, spread, x.shape), accumulate=False)


def _spread(index: Value, dim: int, shape: tuple[int, ...]) -> Value:
    """A one-dimensional index along axis ``dim`` of ``shape``."""
    ones = [1] * len(shape)
    ones[dim] = index.shape[0] if index.shape else 1
    return views.broadcast(views.view(index, ones), shape)


# ---- along an axis


def _along(dim: int, index: Value, shape: tuple[int, ...]) -> Callable[[Indices, Body], Indices]:
    """Where ``gather`` reads and ``scatter`` writes: axis ``dim`` is looked up in ``index``."""

    def full(indices: Indices, body: Body) -> Indices:
        if not shape:
            return ()
        return (*indices[:dim], _pointed_at(index, indices, shape[dim], body), *indices[dim + 1 :])

    return full


def _gather(program: Program, node: Node, x: Value, dim: int, index: Value, **_: Any) -> Value:
    x = x if x.cost <= _CHEAP else program.store(x)
    full = _along(dim % max(1, len(x.shape)), index, x.shape)
    load = lambda result, body: x.load(full(result, body), body)  # noqa: E731
    return Value(node.shape, node.dtype, load, x.cost + 2)


def _scattered(accumulate: bool) -> Callable[..., Value]:
    def lowered(
        program: Program, node: Node, x: Value, dim: int, index: Value, new: Any, **_: Any
    ) -> Value:
        if not isinstance(new, Value):
            new = pointwise.literal(new, index.shape, x.dtype)
        part = Value(index.shape, new.dtype, new.load, new.cost)
        full = _along(dim % max(1, len(x.shape)), index, x.shape)
        return _scatter(program, x, part, full, accumulate)

    return lowered


def _index_add(
    program: Program, node: Node, x: Value, dim: int, index: Value, new: Value, alpha: float = 1
) -> Value:
    dim %= max(1, len(x.shape))
    spread = _spread(index, dim, new.shape)
    new = pointwise.lower("mul", node.dtype, [new, alpha], {}) if alpha != 1 else new
    return _scatter(program, x, new, _along(dim, spread, x.shape))


def _scatter(
    program: Program,
    x: Value,
    new: Value,
    full: Callable[[Indices, Body], Indices],
    accumulate: bool = True,
) -> Value:
    """``x`` with the elements of ``new`` added (or put) at ``full`` of their index, one by one."""
    array = program.rows(x, fresh=True)
    domain, spread = squeeze(new.shape)

    def store(indices_and_body: Any) -> Indices:
        *where, body = indices_and_body
        return full(spread(tuple(where)), body)

    program.add(
        Statement(
            array,
            domain,
            lambda i, body: new.load(spread(i), body),
            store,
            tuple(range(len(domain))),
            "+" if accumulate else "put",
            scattered=True,
            fresh=False,
        )
    )
    return of_array(array)


OPERATIONS: dict[Any, Callable[..., Value]] = {
    "cat": _cat,
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _index_put,
    "_unsafe_index_put": _index_put,
    "index_fill": _index_fill,
    "index_add": _index_add,
    "gather": _gather,
    "scatter_add": _scattered(accumulate=True),
    "scatter": _scattered(accumulate=False),
}
