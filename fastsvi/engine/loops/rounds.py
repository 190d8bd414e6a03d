"""The loop over rounds of a recorded step; see :mod:`fastsvi.engine.rounds`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastsvi.engine.loops.ir import Array, Statement, Value, of_array, squeeze

if TYPE_CHECKING:
    from fastsvi.engine.graph import Node
    from fastsvi.engine.loops.lower import Program


def _number(program: Program, node: Node, *_: Any) -> Value:
    array = program.blank((), torch.int64)
    program.call([array], lambda: f"{array.name}[0] = round;", [])
    return of_array(array)


def _sum(program: Program, node: Node, x: Value, *_: Any) -> Value:
    array = _accumulated(program, node.args[0])
    if array is not None:
        program.before(lambda: program.call([array], lambda: _zeros(array), []))
        return x
    total = program.blank(x.shape, x.dtype)
    program.before(lambda: program.call([total], lambda: _zeros(total), []))
    domain, spread = squeeze(x.shape)
    load = lambda indices, body: x.load(spread(indices), body)  # noqa: E731
    program.add(Statement(total, domain, load, spread, combine="+", fresh=False))
    return of_array(total)


_VIEWS = ("view", "_unsafe_view", "squeeze", "unsqueeze")


def _accumulated(program: Program, node: Node) -> Array | None:
    """The array of a sum that may go on from round to round, so that it needs no second one."""
    while node.name in _VIEWS and node.users == 1:
        node = node.args[0]
    if node.name != "sum" or node.users != 1:
        return None
    array = program.value(node).array
    writers = [s for s in program.statements if array in (s.array, *s.also)]
    if len(writers) != 1 or writers[0].combine != "+" or not writers[0].fresh:
        return None
    writers[0].fresh = False
    return array


def _zeros(array: Array) -> str:
    return f"fn::fill({array.name}, {array.size}, ({array.ctype})0);"


OPERATIONS = {"round_number": _number, "sum_of_rounds": _sum}
