"""Views: other ways to index the same elements. None of them computes anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastsvi.engine.loops.index import ZERO, Index, Opaque
from fastsvi.engine.loops.ir import CTYPES, Body, Expr, Indices, Value
from fastsvi.errors import CaptureError


def _view(x: Value, shape: Sequence[int], back: Callable[[Indices], Indices]) -> Value:
    """``x`` under another shape; ``back`` turns an index of the view into one of ``x``."""
    load = lambda indices, body: x.load(back(indices), body)  # noqa: E731
    return Value(tuple(shape), x.dtype, load, x.cost)


def common_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Shape that all ``shapes`` broadcast to; torch's own function imports SymPy to tell."""
    result = [1] * max((len(shape) for shape in shapes), default=0)
    for shape in shapes:
        for k, n in enumerate(reversed(shape), start=1):
            if n != 1:
                result[-k] = n
    return tuple(result)


def broadcast(x: Value, shape: Sequence[int]) -> Value:
    shape = tuple(shape)
    if x.shape == shape:
        return x
    extra = len(shape) - len(x.shape)

    def back(indices: Indices) -> Indices:
        moving = zip(indices[extra:], x.shape, strict=True)
        return tuple(ZERO if n == 1 else i for i, n in moving)

    return _view(x, shape, back)


def expand(x: Value, shape: Sequence[int], implicit: bool = False) -> Value:
    extra = len(shape) - len(x.shape)
    return broadcast(x, [x.shape[k - extra] if n == -1 else n for k, n in enumerate(shape)])


def unsqueeze(x: Value, dim: int) -> Value:
    dim %= len(x.shape) + 1
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return _view(x, shape, lambda i: i[:dim] + i[dim + 1 :])


def squeeze(x: Value, dims: Any = None) -> Value:
    rank = len(x.shape)
    if dims is None:
        dims = range(rank)
    asked = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()
    kept = [d for d in range(rank) if d not in asked or x.shape[d] != 1]

    def back(indices: Indices) -> Indices:
        full = [ZERO] * rank
        for index, d in zip(indices, kept, strict=True):
            full[d] = index
        return tuple(full)

    return _view(x, [x.shape[d] for d in kept], back)


def permute(x: Value, dims: Sequence[int]) -> Value:
    dims = [d % len(x.shape) for d in dims]

    def back(indices: Indices) -> Indices:
        full = [ZERO] * len(dims)
        for index, d in zip(indices, dims, strict=True):
            full[d] = index
        return tuple(full)

    return _view(x, [x.shape[d] for d in dims], back)


def transpose(x: Value, a: int, b: int) -> Value:
    dims = list(range(len(x.shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return permute(x, dims)


def t(x: Value) -> Value:
    return transpose(x, 0, 1) if len(x.shape) == 2 else x


def select(x: Value, dim: int, position: int) -> Value:
    dim %= len(x.shape)
    fixed = Index(const=position % x.shape[dim])
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    return _view(x, shape, lambda i: (*i[:dim], fixed, *i[dim:]))


def slice_(x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim %= len(x.shape)
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    shape = (*x.shape[:dim], max(0, -(-(end - start) // step)), *x.shape[dim + 1 :])
    return _view(x, shape, lambda i: (*i[:dim], i[dim] * step + start, *i[dim + 1 :]))


def diagonal(x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = len(x.shape)
    dim1, dim2 = dim1 % rank, dim2 % rank
    kept = [d for d in range(rank) if d not in (dim1, dim2)]
    rows, columns = x.shape[dim1], x.shape[dim2]
    length = max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))

    def back(indices: Indices) -> Indices:
        full = [ZERO] * rank
        for index, d in zip(indices, kept, strict=False):
            full[d] = index
        full[dim1] = indices[-1] + max(0, -offset)
        full[dim2] = indices[-1] + max(0, offset)
        return tuple(full)

    return _view(x, [*(x.shape[d] for d in kept), length], back)


def view(x: Value, shape: Sequence[int]) -> Value:
    shape = list(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = math.prod(x.shape) // max(1, known)

    def back(indices: Indices) -> Indices:
        flat, stride = ZERO, 1
        for index, n in zip(reversed(indices), reversed(shape), strict=True):
            flat, stride = flat + index * stride, stride * n
        result: list[Index] = []
        for n in reversed(x.shape):
            flat, here = flat.divmod(n)
            result.append(here if n != 1 else ZERO)
        return tuple(reversed(result))

    return _view(x, shape, back)


def flip(x: Value, dims: Sequence[int]) -> Value:
    turned = {d % len(x.shape) for d in dims}

    def back(indices: Indices) -> Indices:
        return tuple(i * -1 + (x.shape[k] - 1) if k in turned else i for k, i in enumerate(indices))

    return _view(x, x.shape, back)


def _inserted(
    x: Value,
    new: Value,
    dim: int,
    start: int,
    end: int,
    into: Callable[[Index], Index],
    squash: bool,
) -> Value:
    """``x`` with positions ``start`` to ``end`` of axis ``dim`` taken from ``new``."""

    def load(indices: Indices, body: Body) -> Expr:
        index = indices[dim]
        tests = [f"{index.text} >= {start}"] if start > 0 else []
        tests += [f"{index.text} < {end}"] if end < x.shape[dim] else []
        place = indices[:dim] + (() if squash else (into(index),)) + indices[dim + 1 :]
        inside = new.load(place, body)
        if not tests:
            return inside
        outside = x.load(indices, body)
        text = f"({' && '.join(tests)}) ? {inside.text} : {outside.text}"
        return body.local(CTYPES[x.dtype], text, inside.axes | outside.axes | index.axes)

    return Value(x.shape, x.dtype, load, 2 + x.cost + new.cost)


def select_scatter(x: Value, new: Value, dim: int, position: int) -> Value:
    dim %= len(x.shape)
    position %= x.shape[dim]
    return _inserted(x, new, dim, position, position + 1, lambda i: i, squash=True)


def slice_scatter(
    x: Value, new: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim %= len(x.shape)
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    if step != 1:
        raise CaptureError("native loops do not know gradients of slices with a step")
    last = end - start - 1

    def into(index: Index) -> Index:
        # Read inside the slice even where the result is not used, so never out of bounds.
        text = f"fn::clamped({index.text} - {start}, {last})"
        return Index(((Opaque(text, index.axes, last + 1), 1),))

    return _inserted(x, new, dim, start, end, into, squash=False)


def diagonal_scatter(x: Value, new: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = len(x.shape)
    dim1, dim2 = dim1 % rank, dim2 % rank
    last = new.shape[-1] - 1

    def load(indices: Indices, body: Body) -> Expr:
        row, column = indices[dim1], indices[dim2]
        text = f"fn::clamped({(row if offset >= 0 else column).text}, {last})"
        along = Index(((Opaque(text, row.axes | column.axes, last + 1), 1),))
        others = tuple(i for k, i in enumerate(indices) if k not in (dim1, dim2))
        inside, outside = new.load((*others, along), body), x.load(indices, body)
        axes = inside.axes | outside.axes | row.axes | column.axes
        test = f"{column.text} - ({row.text}) == {offset}"
        text = f"({test}) ? {inside.text} : {outside.text}"
        return body.local(CTYPES[x.dtype], text, axes)

    return Value(x.shape, x.dtype, load, 2 + x.cost + new.cost)


_VIEWS: dict[str, Callable[..., Value]] = {
    "expand": expand,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "permute": permute,
    "transpose": transpose,
    "t": t,
    "select": select,
    "slice": slice_,
    "diagonal": diagonal,
    "view": view,
    "_unsafe_view": view,
    "reshape": view,
    "flip": flip,
    "select_scatter": select_scatter,
    "slice_scatter": slice_scatter,
    "diagonal_scatter": diagonal_scatter,
}

# A copy of a view is the view: nothing is written to in place here.
OPERATIONS = _VIEWS | {f"{name}_copy": function for name, function in _VIEWS.items()}
