"""Replay a recorded graph operation by operation, on any device, for one fit or for many at once.

The slow twin of native loops: no compiler is needed, and under :func:`torch.func.vmap` one replay
serves all fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine.graph import Graph, Node, identity, replaced
from fastsvi.engine.rounds import loop_of

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def replay(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``graph`` for other inputs of the same shapes and dtypes.

    >>> from fastsvi.engine.record import record
    >>> graph = record(lambda x, y: [x * y + x.sum()], [torch.ones(2), torch.ones(2)])
    >>> replay(graph, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    [tensor([ 6., 11.])]
    """
    values: dict[Node, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
    several: dict[Any, Any] = {}  # results of operations that return more than one tensor

    def value(node: Node) -> Tensor:
        return values[node] if node.value is None or node in values else node.value

    def compute(node: Node) -> Tensor:
        args, kwargs = replaced((node.args, node.kwargs), Node, value)
        if not isinstance(node.op, tuple):
            # A view of one tensor need not be a view of several side by side.
            op = torch.reshape if node.op in VIEWS else node.op
            if op is torch.ops.aten.slice_scatter.default:
                args = _within(*args)
            return op(*args, **kwargs)
        _, op, position = node.op
        key = op, identity(node.args), identity(node.kwargs)
        if key not in several:
            several[key] = op(*args, **kwargs)
        return several[key][position]

    before, body, after, count = loop_of(graph)
    for node in before:
        values[node] = compute(node)
    totals: dict[Node, Tensor] = {}
    for number in range(count if body else 0):
        several.clear()
        for node in body:
            if node.name == "round_number":
                values[node] = torch.full((), number, device=value(node.args[0]).device)
            elif node.name == "sum_of_rounds":
                term = value(node.args[0])
                totals[node] = totals[node] + term if number else term
            else:
                values[node] = compute(node)
    values.update(totals)
    for node in after:
        values[node] = compute(node)
    return [value(node) for node in graph.outputs]


def _within(
    base: Tensor,
    part: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> tuple[Any, ...]:
    """Arguments of ``slice_scatter`` with limits that lie in the tensor: vmap's rule needs it."""
    first, last, _ = slice(start, end, step).indices(base.shape[dim])
    return base, part, dim, first, last, step


class ReplayStep:
    """``step(*state, *inputs) -> (*new_state, loss, halt)`` for ``F`` fits, replayed under vmap.

    Args:
        graph: of the step of one fit.
        num_state: how many of its inputs are state.
        is_own: for each input whether every fit has its own, and it comes with a leading axis
            ``[F, ...]``; state always does.
    """

    def __init__(self, graph: Graph, num_state: int, is_own: Sequence[bool]) -> None:
        self._graph = graph
        self._num_state = num_state
        self._dims = tuple(0 if own else None for own in is_own)

    def step(self, state: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One step: overwrites ``state``; returns losses ``[F]`` and whether each fit halts."""
        with torch.no_grad():
            outputs = torch.func.vmap(
                lambda *tensors: tuple(replay(self._graph, tensors)), in_dims=self._dims
            )(*state, *inputs)
            for old, new in zip(state, outputs[: self._num_state], strict=True):
                old.copy_(new)
        return outputs[-2], outputs[-1]
