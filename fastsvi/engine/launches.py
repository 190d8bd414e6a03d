"""A recorded graph as launches on one device, one after the other.

What a CUDA graph of a step is captured from. Neither Python statements nor autograd stand between
the launches, and nothing is read from the host: constants that the program made there, and
operations that it asked for there, are taken to the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine.graph import Graph, Node, identity, operands, replaced
from fastsvi.engine.replay import VIEWS

aten = torch.ops.aten

# Tensors of one number, which take nothing but a shape from the one that they are made like.
_FILLS = (
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
)
_MOST_KEPT = 1 << 16  # elements of those that are made once for all calls


class Launches:
    """The operations of ``graph``; calling this with its inputs gives its outputs.

    A result is let go once nobody needs it any more, so memory is that of an eager step.

    Args:
        graph: the recording.
        device: where everything is computed.

    >>> from fastsvi.engine.record import record
    >>> graph = record(lambda x, y: [x * y + x.sum()], [torch.ones(2), torch.ones(2)])
    >>> Launches(graph, torch.device("cpu"))([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    [tensor([ 6., 11.])]
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._inputs = graph.inputs
        self._outputs = graph.outputs
        self._constants: dict[Node, Tensor] = {}
        self._several: dict[Node, tuple[Any, ...]] = {}  # which operation's result a node is in
        self._calls: list[tuple[Node, Any, tuple[Any, ...], dict[str, Any]]] = []
        for node in graph.nodes:
            if node.op in _FILLS and math.prod(node.shape) <= _MOST_KEPT:
                like = torch.empty(node.args[0].shape, dtype=node.args[0].dtype, device=device)
                kwargs = {**node.kwargs, "device": device}
                self._constants[node] = node.op(like, *node.args[1:], **kwargs)
                continue
            op, *rest = node.op if isinstance(node.op, tuple) else (node.op,)
            if rest:
                op = rest[0]
                self._several[node] = op, identity(node.args), identity(node.kwargs)
            # Strides may be others than they were where a change in place was recorded as a copy.
            op = torch.reshape if op in VIEWS else op
            args, kwargs = replaced((node.args, node.kwargs), torch.device, lambda _: device)
            self._calls.append((node, op, args, kwargs))
        used = [operand for node in graph.nodes for operand in operands(node)]
        for node in (*used, *graph.outputs):
            if node.is_constant and node.value is not None and node not in self._constants:
                self._constants[node] = node.value.to(device)
        self._last = self._last_uses()

    def _last_uses(self) -> list[list[Any]]:
        """What no call after each one needs: nodes, and results of several tensors."""
        kept = {*self._inputs, *self._outputs, *self._constants}
        last: list[list[Any]] = []
        seen: set[Any] = set()
        for node, *_ in reversed(self._calls):
            needed = [node, *operands(node)]
            if node in self._several:
                needed.append(self._several[node])
            last.append([what for what in dict.fromkeys(needed) if what not in seen | kept])
            seen.update(needed)
        return last[::-1]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for inputs of the recorded shapes and dtypes, on the device."""
        values: dict[Any, Any] = {**self._constants, **dict(zip(self._inputs, inputs, strict=True))}
        with torch.no_grad():
            for (node, op, args, kwargs), over in zip(self._calls, self._last, strict=True):
                key = self._several.get(node)
                if key is None or key not in values:
                    args, kwargs = replaced((args, kwargs), Node, values.__getitem__)
                    values[node if key is None else key] = op(*args, **kwargs)
                if key is not None:
                    values[node] = values[key][node.op[2]]
                del args, kwargs
                for what in over:
                    del values[what]
        return [values[node] for node in self._outputs]
