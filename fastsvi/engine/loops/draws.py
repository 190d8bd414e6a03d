"""Random numbers by counter, as calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastsvi.engine.loops.index import Axis, Index
from fastsvi.engine.loops.ir import CTYPES, Body, Expr, Indices, Value, of_array
from fastsvi.kernels import subsample

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program


# Rough operations that a number takes: of a counter that makes four of them, or one.
_TOGETHER, _ALONE = 100.0, 300.0


def _noise(kind: str) -> Callable[..., Value]:
    def lowered(
        program: Program,
        node: Node,
        key: Value,
        origin: Value,
        group: int,
        fits: int,
        particles: int,
        elements: int,
        *_: Any,
    ) -> Value:
        if program.calls != "host":
            extents = fits, particles, elements
            return _drawn_where_read(program, kind, key, origin, group, extents, node.dtype)
        array = program.array((fits, particles, elements), node.dtype)
        # Few elements and many particles: let the particles be neighbours, so that a vector
        # register holds one element of many particles and not one particle's few elements.
        turned = elements < 64 < particles
        array.order = (0, 2, 1) if turned else (0, 1, 2)
        sources = [program.rows(key), program.rows(origin)]
        names = ", ".join(x.name for x in (array, *sources))
        step, stride = (1, particles) if turned else (elements, 1)
        shape = f"{group}, {fits}, {particles}, {elements}, {step}, {stride}"
        few = elements <= 256
        forms = f"{int(few)}, {int(few and step == 1)}, philox_{kind}<{array.ctype}>"
        call = f"philox_draw<{forms}>({names}, {shape});"
        program.call([array], lambda: call, sources, array.size * (_ALONE if few else _TOGETHER))
        return of_array(array)

    return lowered


# Rough operations of a draw, at which it is drawn once if several operations use it.
_COST = 60


def _drawn_where_read(
    program: Program,
    kind: str,
    key: Value,
    origin: Value,
    group: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Value:
    """Draws as a function of their place, for back ends with a thread for each element."""
    sources = [program.rows(key), program.rows(origin)]
    few = int(shape[2] <= 256)
    integer = "int32_t" if math.prod(shape) < 1 << 31 else "int64_t"
    start = (Index(),)

    def load(indices: Indices, body: Body) -> Expr:
        for array in sources:
            body.read(array, start)  # so that it is known who is read
        place = ", ".join(f"({integer})({index.text})" for index in indices)
        names = ", ".join(array.name for array in sources)
        text = f"fn::{kind}_at<{CTYPES[dtype]}, {few}>({names}, {group}, {place})"
        axes = frozenset[Axis]().union(*(index.axes for index in indices))
        return body.local(CTYPES[dtype], text, axes)

    return Value(shape, dtype, load, _COST)


def _subset(
    program: Program, node: Node, key: Value, origin: Value, draw: int, size: int, count: int
) -> Value:
    return _subsets(program, node, key, origin, draw, 1, size, count)


def _subsets(
    program: Program,
    node: Node,
    key: Value,
    origin: Value,
    draw: int,
    fits: int,
    size: int,
    count: int,
) -> Value:
    array = program.blank(node.shape, torch.int64)
    sources = [program.rows(key), program.rows(origin)]
    names = ", ".join(x.name for x in (array, *sources))
    numbers = f"{draw}, {fits}, {size}, {count}"
    if size <= subsample.SORTED_SIZE:
        call = f"subset_sorted({names}, {numbers});"
    else:
        rows, columns = subsample.grid_of(size)
        call = f"subset_walked({names}, {numbers}, {rows}, {columns});"
    program.call([array], lambda: call, sources)
    return of_array(array)


OPERATIONS: dict[Any, Callable[..., Value]] = {
    "normal_noise": _noise("normal"),
    "uniform_noise": _noise("uniform"),
    "random_subset": _subset,
    "random_subsets": _subsets,
}
