"""Random numbers by counter, as calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastsvi.engine.loops.ir import Value, of_array
from fastsvi.kernels import subsample

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program


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
        program.call([array], lambda: call, sources)
        return of_array(array)

    return lowered


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
