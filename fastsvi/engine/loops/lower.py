"""Lower a recorded graph to statements: which arrays exist, and what each element of them is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastsvi.engine.graph import Graph, Node
from fastsvi.engine.loops import (
    draws,
    factors,
    lookups,
    pointwise,
    products,
    reductions,
    rounds,
    views,
)
from fastsvi.engine.loops.ir import (
    CTYPES,
    Array,
    Indices,
    Statement,
    Value,
    is_uniform,
    nothing,
    of_array,
    squeeze,
)
from fastsvi.engine.rounds import loop_of
from fastsvi.errors import CaptureError

# A value with several readers is stored if computing it again would cost more than reading it.
CHEAP = 2

# What is neither elementwise nor a view, by name, or by name and position among several results.
_OPERATIONS: dict[Any, Callable[..., Value]] = {
    **reductions.OPERATIONS,
    **products.OPERATIONS,
    **lookups.OPERATIONS,
    **draws.OPERATIONS,
    **factors.OPERATIONS,
    **rounds.OPERATIONS,
}


class Program:
    """Statements in order, and the arrays they read and write.

    Those of phase 1 are done ``rounds`` times, after those of phase 0 and before those of phase 2.
    Large matrix products become calls: of a CPU's BLAS ("host"), of cuBLAS ("device"), or none do
    ("loops").
    """

    def __init__(self, graph: Graph, products: str = "host") -> None:
        self.calls = products
        self.statements: list[Statement] = []
        self.inputs: list[Array] = []
        self.constants: list[tuple[Array, torch.Tensor]] = []
        self.shared: dict[Any, Any] = {}  # what several results of one operation are made of
        self._count = 0
        self._phase = 0
        self._values: dict[Node, Value] = {}
        self._dense: dict[Any, Array] = {}  # constants by the memory that they are
        for node in graph.inputs:
            array = self.array(node.shape, node.dtype, "input")
            self.inputs.append(array)
            self._values[node] = of_array(array)
        *phases, self.rounds = loop_of(graph)
        for self._phase, nodes in enumerate(phases):
            for node in nodes:
                self._values[node] = self._lower(node)
        if not phases[1]:
            self._phase = 0  # nothing keeps the outputs from being made along with the rest
        self.outputs = [self._output(self.value(node)) for node in graph.outputs]

    # ---- arrays and values

    def array(self, shape: Sequence[int], dtype: torch.dtype, kind: str = "temporary") -> Array:
        """A new array."""
        if dtype not in CTYPES:
            raise CaptureError(f"native loops do not know dtype {dtype}")
        self._count += 1
        return Array(f"a{self._count}", tuple(shape), dtype, kind)

    def value(self, node: Node) -> Value:
        """What a node was lowered to."""
        value = self._values.get(node)
        if value is None:
            if node.value is None:
                raise CaptureError(f"`{node.name}` at {node.where} is used before it is computed")
            value = self._values[node] = self._constant(node.value)
        return value

    def _constant(self, tensor: torch.Tensor) -> Value:
        """A constant, which shares the memory of its tensor: data written in place are seen.

        A tensor that repeats or reorders the elements of a dense one reads that: a matrix and its
        transpose are one array, and a matrix expanded over particles is not written out.
        """
        shape, dtype = tuple(tensor.shape), tensor.dtype
        moving = [d for d, n in enumerate(shape) if n != 1 and tensor.stride(d) != 0]
        if not moving and tensor.numel() and dtype in CTYPES:
            return pointwise.literal(tensor.flatten()[0].item(), shape, dtype)
        dims = sorted(moving, key=tensor.stride, reverse=True)
        stride = 1
        for d in reversed(dims):
            if tensor.stride(d) != stride:
                tensor, dims = tensor.contiguous(), list(range(len(shape)))
                break
            stride *= shape[d]
        extents = tuple(shape[d] for d in dims)
        key = (tensor.data_ptr(), extents, dtype)
        array = self._dense.get(key)
        if array is None:
            array = self._dense[key] = self.array(extents, dtype, "constant")
            rows = [math.prod(extents[k + 1 :]) for k in range(len(extents))]
            self.constants.append((array, tensor.detach().as_strided(extents, rows)))
        base = of_array(array)
        if dims == list(range(len(shape))):
            return base
        back = lambda indices: tuple(indices[d] for d in dims)  # noqa: E731
        return Value(shape, dtype, lambda indices, body: base.load(back(indices), body))

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.value(argument)
        if isinstance(argument, list | tuple):
            return [self._argument(x) for x in argument]
        return argument

    def _lower(self, node: Node) -> Value:
        pattern = _pattern(node)
        if pattern is not None:
            name, operand = pattern
            value = pointwise.lower(name, node.dtype, [self.value(operand)], {})
            return self._kept(node, value)
        args = [self._argument(x) for x in node.args]
        kwargs = {name: self._argument(x) for name, x in node.kwargs.items()}
        name = _name(node)
        if name in pointwise.OPERATIONS:
            value = pointwise.lower(name, node.dtype, args, kwargs, node.shape)
        elif name in views.OPERATIONS:
            value = views.OPERATIONS[name](*args, **kwargs)
        elif name in _OPERATIONS:
            value = _OPERATIONS[name](self, node, *args, **kwargs)
        else:
            raise CaptureError(f"native loops do not know `{node.name}`, used at {node.where}")
        if value.shape != node.shape:
            raise CaptureError(f"`{node.name}` at {node.where} was lowered to the wrong shape")
        return self._kept(node, value)

    def _kept(self, node: Node, value: Value) -> Value:
        """``value``, stored if several operations use it and it is worth that."""
        if node.users > 1 and value.cost > CHEAP and not is_uniform(value):
            value = self.store(value)
        return value

    def store(self, value: Value) -> Value:
        """The same value, held in an array."""
        if value.array is not None:
            return value
        array = self.array(value.shape, value.dtype)
        self.write(array, value)
        return of_array(array)

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Array:
        """A new array, row after row, for a call to fill."""
        array = self.array(shape, dtype)
        array.order = tuple(range(len(shape)))
        return array

    def rows(self, value: Value, fresh: bool = False) -> Array:
        """``value`` row after row, for a call to read; ``fresh``, and to write."""
        found = value.array
        if found is not None and not fresh:
            natural = tuple(range(len(found.shape)))
            if found.kind == "temporary" and found.order is None:
                found.order = natural
            if found.order in (None, natural):
                return found
        array = self.blank(value.shape, value.dtype)
        self.write(array, value)
        return array

    def _output(self, value: Value) -> Array:
        # An output is an array of its own: an input passed through, or a value that is used as a
        # temporary elsewhere, must not share memory whose order of axes is ours to choose.
        return self.rows(value, fresh=True)

    def write(self, array: Array, value: Value, shift: tuple[int, int] | None = None) -> None:
        """Store ``value`` into ``array``, moved along one axis by ``shift = (axis, distance)``."""
        domain, spread = squeeze(value.shape)

        def store(indices: Indices) -> Indices:
            full = list(spread(indices))
            if shift is not None:
                full[shift[0]] = full[shift[0]] + shift[1]
            return tuple(full)

        self.add(Statement(array, domain, lambda i, body: value.load(spread(i), body), store))

    def add(self, statement: Statement) -> None:
        """Append a statement of loops, of which it is yet to be found what it reads."""
        statement.trial()
        self.append(statement)

    def append(self, statement: Statement) -> None:
        """Append a statement of which it is known what it reads."""
        statement.phase = self._phase
        self.statements.append(statement)

    def uses(self) -> tuple[dict[Array, list[Statement]], dict[Array, list[Statement]]]:
        """The statements that write each array, and those that read it."""
        writers: dict[Array, list[Statement]] = {}
        readers: dict[Array, list[Statement]] = {}
        for statement in self.statements:
            for array in (statement.array, *statement.also):
                writers.setdefault(array, []).append(statement)
            for array in statement.loads:
                readers.setdefault(array, []).append(statement)
        return writers, readers

    def before(self, make: Callable[[], None]) -> None:
        """Have ``make`` append statements that come before the loop over rounds."""
        phase, self._phase = self._phase, 0
        make()
        self._phase = phase

    def call(
        self,
        arrays: Sequence[Array],
        text: Callable[[], str],
        reads: Sequence[Array],
        work: float = 0.0,
    ) -> None:
        """Append a call that writes ``arrays``; ``text`` is made once all are laid out."""
        first, *also = arrays
        statement = Statement(first, (), nothing, lambda i: i, call=text, also=tuple(also))
        statement.work = work
        statement.loads = {x: set() for x in reads}
        self.append(statement)


def _name(node: Node) -> Any:
    """What an operation is known by here."""
    return (node.name, node.op[2]) if isinstance(node.op, tuple) else node.name


def _chain(node: Node, *names: str) -> Node | None:
    """The operand of a chain of operations, from the last to the first; None if it is another."""
    for name in names:
        if node.name != name or isinstance(node.op, tuple):
            return None
        node = node.args[0]
    return node


# Softplus, sigmoid and their kin are made of exp(-|x|), which lies between 0 and 1, never
# overflows, and is computed once for all of them that a nest holds.
_PATTERNS = [
    (("log1p", "exp", "neg", "abs"), "softplus_below"),
    (("exp", "neg", "abs"), "exp_neg_abs"),
    (("log1p", "exp"), "softplus"),
    (("sigmoid", "neg"), "sigmoid_neg"),
]


def _pattern(node: Node) -> tuple[str, Node] | None:
    """A better form of an operation and its operand, if there is one."""
    for names, better in _PATTERNS:
        operand = _chain(node, *names)
        if operand is not None and node.dtype.is_floating_point:
            return better, operand
    return None
