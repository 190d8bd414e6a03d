"""Replay a recorded graph operation by operation, on any device, for one fit or for many at once.

The slow twin of native loops: no compiler is needed, and under :func:`torch.func.vmap` one replay
serves all fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastsvi.engine.record import Graph, Node

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


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

    for node in graph.nodes:
        args, kwargs = tree_map_only(Node, value, (node.args, node.kwargs))
        if not isinstance(node.op, tuple):
            # A view of one tensor need not be a view of several side by side.
            op = torch.reshape if node.op in _VIEWS else node.op
            values[node] = op(*args, **kwargs)
            continue
        _, op, position = node.op
        key = op, _identity(node.args), _identity(sorted(node.kwargs.items()))
        if key not in several:
            several[key] = op(*args, **kwargs)
        values[node] = several[key][position]
    return [value(node) for node in graph.outputs]


def _identity(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return tuple(map(_identity, argument))
    return id(argument) if isinstance(argument, Node) else repr(argument)


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
