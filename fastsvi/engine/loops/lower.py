"""Lower a recorded graph to statements: which arrays exist, and what each element of them is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastsvi.engine.loops import pointwise, products, views
from fastsvi.engine.loops.index import ZERO, Index, Opaque
from fastsvi.engine.loops.ir import (
    CTYPES,
    Array,
    Body,
    Expr,
    Indices,
    Statement,
    Value,
    of_array,
)
from fastsvi.engine.record import Graph, Node
from fastsvi.errors import CaptureError

# A value with several readers is stored if computing it again would cost more than reading it.
_CHEAP = 2


class Program:
    """Statements in order, and the arrays they read and write."""

    def __init__(self, graph: Graph) -> None:
        self.statements: list[Statement] = []
        self.inputs: list[Array] = []
        self.constants: list[tuple[Array, torch.Tensor]] = []
        self._count = 0
        self._values: dict[Node, Value] = {}
        for node in graph.inputs:
            array = self._array(node.shape, node.dtype, "input")
            self.inputs.append(array)
            self._values[node] = of_array(array)
        for node in graph.nodes:
            self._values[node] = self._lower(node)
        self.outputs = [self._output(self._value(node)) for node in graph.outputs]

    # ---- arrays and values

    def _array(self, shape: Sequence[int], dtype: torch.dtype, kind: str = "temporary") -> Array:
        if dtype not in CTYPES:
            raise CaptureError(f"native loops do not know dtype {dtype}")
        self._count += 1
        return Array(f"a{self._count}", tuple(shape), dtype, kind)

    def _value(self, node: Node) -> Value:
        value = self._values.get(node)
        if value is None:
            # Constants share the memory of the tensor, so that data written in place are seen.
            tensor = node.value.contiguous()
            if tensor.numel() == 1 and tensor.dtype in CTYPES:
                value = pointwise.literal(tensor.item(), node.shape, node.dtype)
            else:
                array = self._array(node.shape, node.dtype, "constant")
                self.constants.append((array, tensor))
                value = of_array(array)
            self._values[node] = value
        return value

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self._value(argument)
        if isinstance(argument, list | tuple):
            return [self._argument(x) for x in argument]
        return argument

    def _lower(self, node: Node) -> Value:
        args = [self._argument(x) for x in node.args]
        kwargs = {name: self._argument(x) for name, x in node.kwargs.items()}
        name = node.name
        if name in pointwise.OPERATIONS:
            value = pointwise.lower(name, node.dtype, args, kwargs)
        elif name in views.OPERATIONS:
            value = views.OPERATIONS[name](*args, **kwargs)
        else:
            method = getattr(self, f"_lower_{name}", None)
            if method is None or isinstance(node.op, tuple):
                raise CaptureError(f"native loops do not know `{name}`, used at {node.where}")
            value = method(node, *args, **kwargs)
        if value.shape != node.shape:
            raise CaptureError(f"`{name}` at {node.where} was lowered to the wrong shape")
        if node.users > 1 and value.cost > _CHEAP:
            value = self.store(value)
        return value

    def store(self, value: Value) -> Value:
        """The same value, held in an array."""
        if value.array is not None:
            return value
        array = self._array(value.shape, value.dtype)
        self._write(array, value)
        return of_array(array)

    def _output(self, value: Value) -> Array:
        # An output is an array of its own: an input passed through, or a value that is used as a
        # temporary elsewhere, must not share memory whose order of axes is ours to choose.
        array = self._array(value.shape, value.dtype)
        array.order = tuple(range(len(value.shape)))
        self._write(array, value)
        return array

    def _write(self, array: Array, value: Value, shift: tuple[int, int] | None = None) -> None:
        """Store ``value`` into ``array``, moved along one axis by ``shift = (axis, distance)``."""
        domain, spread = squeeze(value.shape)

        def store(indices: Indices) -> Indices:
            full = list(spread(indices))
            if shift is not None:
                full[shift[0]] = full[shift[0]] + shift[1]
            return tuple(full)

        self._add(Statement(array, domain, lambda i, body: value.load(spread(i), body), store))

    def _add(self, statement: Statement) -> None:
        statement.trial()
        self.statements.append(statement)

    # ---- reductions

    def _reduce(
        self, x: Value, dims: Any, keepdim: bool, combine: str, dtype: torch.dtype
    ) -> Value:
        rank = len(x.shape)
        if dims is None or dims == []:
            dims = range(rank)
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()
        kept = [d for d in range(rank) if d not in gone]
        array = self._array([x.shape[d] for d in kept], dtype)
        domain, spread = squeeze(x.shape)
        moving = [d for d in range(rank) if x.shape[d] != 1]
        reduced = tuple(k for k, d in enumerate(moving) if d in gone)

        def store(indices: Indices) -> Indices:
            full = spread(indices)
            return tuple(full[d] for d in kept)

        def value(indices: Indices, body: Body) -> Expr:
            return pointwise.cast(x.load(spread(indices), body), x.dtype, dtype, body)

        if reduced:
            self._add(Statement(array, domain, value, store, reduced, combine))
        else:
            self._add(Statement(array, domain, value, store))
        result = of_array(array)
        if keepdim:
            for d in sorted(gone):
                result = views.unsqueeze(result, d)
        return result

    def _lower_sum(
        self, node: Node, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Value:
        return self._reduce(x, dims, keepdim, "+", node.dtype)

    def _lower_mean(
        self, node: Node, x: Value, dims: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Value:
        total = self._reduce(x, dims, keepdim, "+", node.dtype)
        count = math.prod(x.shape) / max(1, math.prod(total.shape))
        return pointwise.lower("div", node.dtype, [total, count], {})

    def _lower_amax(self, node: Node, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
        return self._reduce(x, dims, keepdim, "max", node.dtype)

    def _lower_amin(self, node: Node, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
        return self._reduce(x, dims, keepdim, "min", node.dtype)

    def _lower_any(self, node: Node, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
        true = pointwise.lower("ne", torch.bool, [x, 0], {})
        number = pointwise.converted(true, torch.int32)
        largest = self._reduce(number, dims, keepdim, "max", torch.int32)
        return pointwise.lower("gt", torch.bool, [largest, 0], {})

    def _lower_all(self, node: Node, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
        false = pointwise.lower("eq", torch.bool, [x, 0], {})
        some_false = self._lower_any(node, false, dims, keepdim)
        return pointwise.lower("logical_not", torch.bool, [some_false], {})

    def _lower_cumsum(self, node: Node, x: Value, dim: int, dtype: Any = None) -> Value:
        """As a sum with a mask: quadratic in the length, but parallel; meant for short axes."""
        if not x.shape:
            return x
        dim %= len(x.shape)
        terms = views.unsqueeze(self.store(x), dim)  # [..., 1, n, ...]
        full = (*x.shape[:dim], x.shape[dim], *x.shape[dim:])

        def load(indices: Indices, body: Body) -> Expr:
            row, column = indices[dim], indices[dim + 1]
            term = views.broadcast(terms, full).load(indices, body)
            text = f"({column.text} <= {row.text}) ? {term.text} : 0"
            return body.local(CTYPES[x.dtype], text, term.axes | row.axes | column.axes)

        return self._reduce(Value(full, x.dtype, load, 2), dim + 1, False, "+", node.dtype)

    # ---- products

    def _product(self, node: Node, a: Value, b: Value, left: str, right: str, out: str) -> Value:
        """Sum of products in index notation, such as ``mk, kn -> mn``."""
        extent = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
        if math.prod(extent.values()) >= products.WORTH_A_CALL and a.dtype in products.ROUTINES:
            return self._call_blas(node, a, b, extent.get("b", 1))
        a = a if a.cost == 0 else self.store(a)
        b = b if b.cost == 0 else self.store(b)
        letters = out + "".join(x for x in left if x not in out)
        moving = [x for x in letters if extent[x] != 1]
        array = self._array(node.shape, node.dtype)

        def at(indices: Indices, names: str) -> Indices:
            place = dict(zip(moving, indices, strict=True))
            return tuple(place.get(x, ZERO) for x in names)

        def value(indices: Indices, body: Body) -> Expr:
            x, y = a.load(at(indices, left), body), b.load(at(indices, right), body)
            return body.local(CTYPES[node.dtype], f"{x.text} * {y.text}", x.axes | y.axes)

        reduced = tuple(k for k, x in enumerate(moving) if x not in out)
        domain = tuple(extent[x] for x in moving)
        store = lambda indices: at(indices, out)  # noqa: E731
        combine = "+" if reduced else None
        self._add(Statement(array, domain, value, store, reduced, combine))
        return of_array(array)

    def _call_blas(self, node: Node, a: Value, b: Value, batch: int) -> Value:
        factors = [x if products.is_plain(x) else self._copy(x) for x in (a, b)]
        if len(a.shape) == 3:
            factors = [x if products.has_rows(x) else self._copy(x) for x in factors]
            for factor in factors:
                source = products.source(factor)[0]
                source.order = source.order or tuple(range(len(source.shape)))
        array = self._array(node.shape, node.dtype)
        array.order = tuple(range(len(node.shape)))
        call = products.call(array, factors[0], factors[1], batch)
        statement = Statement(array, (), _nothing, lambda i: i, call=call)
        for factor in factors:
            statement.loads[products.source(factor)[0]] = set()
        self.statements.append(statement)
        return of_array(array)

    def _copy(self, x: Value) -> Value:
        """``x`` in an array of its own shape, even if it is a view of another."""
        return self.store(Value(x.shape, x.dtype, x.load, max(1, x.cost)))

    def _lower_mm(self, node: Node, a: Value, b: Value) -> Value:
        return self._product(node, a, b, "mk", "kn", "mn")

    def _lower_mv(self, node: Node, a: Value, b: Value) -> Value:
        return self._product(node, a, b, "mk", "k", "m")

    def _lower_bmm(self, node: Node, a: Value, b: Value) -> Value:
        return self._product(node, a, b, "bmk", "bkn", "bmn")

    # ---- pieces and lookups

    def _lower_cat(self, node: Node, pieces: list[Value], dim: int = 0) -> Value:
        dim %= len(node.shape)
        array, start = self._array(node.shape, node.dtype), 0
        for piece in pieces:
            if math.prod(piece.shape):
                piece = pointwise.converted(piece, node.dtype)
                self._write(array, piece, (dim, start))
                start += piece.shape[dim]
        return of_array(array)

    def _lookup(
        self, indices: list[Value | None], shape: tuple[int, ...], rank: int
    ) -> tuple[int, int, Callable[[Indices, Body], Indices]]:
        """Where index tensors point: first axis, number of result axes, and the full index."""
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
            for k in range(rank):
                if k not in places:
                    place.append(next(others))
                    continue
                place.append(_pointed_at(next(found), inner, shape[k], body))
            return tuple(place)

        return first, len(common), full

    def _lower_index(self, node: Node, x: Value, indices: list[Value | None]) -> Value:
        x = x if x.cost <= _CHEAP else self.store(x)
        _, _, full = self._lookup(indices, x.shape, len(x.shape))
        load = lambda result, body: x.load(full(result, body), body)  # noqa: E731
        return Value(node.shape, node.dtype, load, x.cost + 2)

    def _lower_index_put(
        self,
        node: Node,
        x: Value,
        indices: list[Value | None],
        new: Value,
        accumulate: bool = False,
    ) -> Value:
        if not accumulate:
            raise CaptureError(f"native loops do not know index assignment, used at {node.where}")
        first, _, full = self._lookup(indices, x.shape, len(x.shape))
        used = [index for index in indices if index is not None]
        common = views.common_shape(*(t.shape for t in used))
        others = [n for k, n in enumerate(x.shape) if k >= len(indices) or indices[k] is None]
        shape = (*others[:first], *common, *others[first:])
        return self._scatter(x, views.broadcast(new, shape), full)

    def _lower_gather(self, node: Node, x: Value, dim: int, index: Value, **_: Any) -> Value:
        x = x if x.cost <= _CHEAP else self.store(x)
        full = _along(dim % max(1, len(x.shape)), index, x.shape)
        load = lambda result, body: x.load(full(result, body), body)  # noqa: E731
        return Value(node.shape, node.dtype, load, x.cost + 2)

    def _lower_scatter_add(self, node: Node, x: Value, dim: int, index: Value, new: Value) -> Value:
        new = Value(index.shape, new.dtype, new.load, new.cost)
        return self._scatter(x, new, _along(dim % max(1, len(x.shape)), index, x.shape))

    def _lower_index_add(
        self, node: Node, x: Value, dim: int, index: Value, new: Value, alpha: float = 1
    ) -> Value:
        shape = [1] * len(new.shape)
        shape[dim] = index.shape[0]
        spread = views.broadcast(views.view(index, shape), new.shape)
        new = pointwise.lower("mul", node.dtype, [new, alpha], {}) if alpha != 1 else new
        return self._scatter(x, new, _along(dim % len(x.shape), spread, x.shape))

    def _scatter(self, x: Value, new: Value, full: Callable[[Indices, Body], Indices]) -> Value:
        """``x`` with the elements of ``new`` added at ``full`` of their index, one by one."""
        array = self._array(x.shape, x.dtype)
        array.order = tuple(range(len(x.shape)))
        self._write(array, x)
        domain, spread = squeeze(new.shape)

        def store(indices_and_body: Any) -> Indices:
            *where, body = indices_and_body
            return full(spread(tuple(where)), body)

        self._add(
            Statement(
                array,
                domain,
                lambda i, body: new.load(spread(i), body),
                store,
                tuple(range(len(domain))),
                "+",
                scattered=True,
                fresh=False,
            )
        )
        return of_array(array)

    def _lower_normal_noise(
        self,
        node: Node,
        key: Value,
        origin: Value,
        fits: int,
        particles: int,
        elements: int,
        *_: Any,
    ) -> Value:
        array = self._array((fits, particles, elements), node.dtype)
        # Few elements and many particles: let the particles be neighbours, so that a vector
        # register holds one element of many particles and not one particle's few elements.
        turned = elements < 64 < particles
        array.order = (0, 2, 1) if turned else (0, 1, 2)
        sources = [self.store(key).array, self.store(origin).array]
        names = ", ".join(x.name for x in sources if x is not None)
        step, stride = (1, particles) if turned else (elements, 1)
        shape = f"{fits}, {particles}, {elements}, {step}, {stride}"
        call = f"philox_normal({array.name}, {names}, {shape});"
        statement = Statement(array, (), _nothing, lambda i: i, call=lambda: call)
        statement.loads = {x: set() for x in sources if x is not None}
        self.statements.append(statement)
        return of_array(array)


def _nothing(indices: Indices, body: Body) -> Expr:
    return Expr("", frozenset())


def _pointed_at(index: Value, indices: Indices, extent: int, body: Body) -> Index:
    """The place along an axis of ``extent`` that an element of an index tensor names."""
    expr = index.load(indices, body)
    text = f"({expr.text} < 0 ? {expr.text} + {extent} : {expr.text})"
    wrapped = body.local("int64_t", text, expr.axes)
    return Index(((Opaque(wrapped.text, wrapped.axes, extent), 1),))


def _along(dim: int, index: Value, shape: tuple[int, ...]) -> Callable[[Indices, Body], Indices]:
    """Where ``gather`` reads and ``scatter`` writes: axis ``dim`` is looked up in ``index``."""

    def full(indices: Indices, body: Body) -> Indices:
        return (*indices[:dim], _pointed_at(index, indices, shape[dim], body), *indices[dim + 1 :])

    return full


def squeeze(shape: Sequence[int]) -> tuple[tuple[int, ...], Callable[[Indices], Indices]]:
    """The extents that move, and the way back from their indices to those of ``shape``."""

    def spread(indices: Indices) -> Indices:
        moving = iter(indices)
        return tuple(ZERO if n == 1 else next(moving) for n in shape)

    return tuple(n for n in shape if n != 1), spread
