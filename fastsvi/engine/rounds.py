"""Loops in a recorded step: a sum over rounds that differ in a number only.

A recording unrolls the loops of Python. For a sum over chunks of particles that would make code and
working memory grow with their number. So one round is recorded, as a function of its number, and
its results are marked to be added up::

    number = round_number(origin, 16)             # int64 scalar, from 0 to 15
    total = sum_of_rounds(f(x, number), number)

What ``f`` makes of ``number`` is done in every round, and the rest once. Run by themselves the
operations show the first round only: a graph that holds them is for those who know of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsvi.engine.graph import Graph, Node, operands

_library = torch.library.Library("fastsvi", "FRAGMENT")
_library.define("round_number(Tensor like, int count) -> Tensor")
_library.define("sum_of_rounds(Tensor x, Tensor number) -> Tensor")
_library.impl(
    "round_number",
    lambda like, count: torch.zeros((), dtype=torch.int64, device=like.device),
    "CompositeExplicitAutograd",
)
_library.impl("sum_of_rounds", lambda x, number: x.clone(), "CompositeExplicitAutograd")


def round_number(like: Tensor, count: int) -> Tensor:  # int64 []
    """The number of a round, of which there are ``count``; on the device of ``like``.

    Args:
        like: an input of the recording, so that the number is no constant.
    """
    number: Tensor = torch.ops.fastsvi.round_number(like, count)
    return number


def sum_of_rounds(x: Tensor, number: Tensor) -> Tensor:
    """The sum of ``x``, which was computed from ``number``, over all rounds."""
    total: Tensor = torch.ops.fastsvi.sum_of_rounds(x, number)
    return total


class Loop(NamedTuple):
    """The nodes of a graph in the order of their execution; ``body`` is executed ``rounds`` times.

    A graph without a loop has all nodes in ``before``.
    """

    before: list[Node]
    body: list[Node]
    after: list[Node]
    rounds: int


def loop_of(graph: Graph) -> Loop:
    """Take a graph apart into its loop, and what stands before and after it."""
    starts = [node for node in graph.nodes if node.name == "round_number"]
    if not starts:
        return Loop(graph.nodes, [], [], 1)
    changing = set(starts)  # from round to round
    for node in graph.nodes:
        of = [x for x in operands(node) if x in changing and x.name != "sum_of_rounds"]
        if of:
            changing.add(node)
    needed = {x for node in changing for x in operands(node)} - changing
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(operands(node))
    parts: list[list[Node]] = [[], [], []]
    for node in graph.nodes:
        parts[1 if node in changing else 0 if node in needed else 2].append(node)
    before, body, after = parts
    return Loop(before, body, after, starts[0].args[1])
