"""The loop nests between a recorded graph and C++: arrays, values, statements.

A :class:`Value` is a tensor as a function from an index to a C++ expression. Nothing is computed
until a :class:`Statement` asks for it: views cost nothing, and chains of elementwise operations
grow into one expression. A statement loops over a domain and stores or accumulates into an
:class:`Array`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastsvi.engine.loops.index import ZERO, Axis, Index, of_axis

CTYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}

Indices = tuple[Index, ...]


class Expr(NamedTuple):
    """C++ text and the loop variables that it depends on."""

    text: str
    axes: frozenset[Axis]


@dataclass(eq=False)
class Array:
    """Memory: an input, a constant, or a temporary whose ``order`` of axes we may choose."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str  # "input", "constant" or "temporary"
    order: tuple[int, ...] | None = None  # axes from outermost to innermost; None: as they come

    @property
    def ctype(self) -> str:
        return CTYPES[self.dtype]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def offset(self, indices: Indices) -> Index:
        """Position of an element, counted in elements."""
        offset, stride = ZERO, 1
        for axis in reversed(self.order or range(len(self.shape))):
            offset, stride = offset + indices[axis] * stride, stride * self.shape[axis]
        return offset


class Body:
    """The inside of a loop nest while it is being written: every expression once, as a local."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, frozenset[Axis]]] = []
        self.loads: dict[Array, set[Indices]] = {}
        self.known: dict[tuple[Array, Indices], Expr] = {}  # stored by this nest
        self.recomputed: dict[Array, Statement] = {}  # to be computed, not read
        self._locals: dict[tuple[str, str], Expr] = {}

    def local(self, ctype: str, text: str, axes: frozenset[Axis]) -> Expr:
        """A local that holds ``text``, made now or found."""
        found = self._locals.get((ctype, text))
        if found is None:
            found = Expr(f"t{len(self._locals)}", axes)
            self._locals[ctype, text] = found
            self.lines.append((f"const {ctype} {found.text} = {text};", axes))
        return found

    def read(self, array: Array, indices: Indices) -> Expr:
        self.loads.setdefault(array, set()).add(indices)
        known = self.known.get((array, indices))
        if known is not None:
            return known
        writer = self.recomputed.get(array)
        if writer is not None:
            value = self.known[array, indices] = writer.value(writer.indices, self)
            return value
        offset = array.offset(indices)
        return self.local(array.ctype, f"{array.name}[{offset.text}]", offset.axes)


@dataclass(eq=False)
class Value:
    """A tensor of the graph: ``load(indices, body)`` gives the expression of one element."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Indices, Body], Expr]
    cost: int = 0  # rough operations per element; 0 for what is only looked up
    array: Array | None = None


def is_uniform(value: Value) -> bool:
    """Whether all elements are one number, known without reading memory."""
    body = Body()
    axes = [Axis(f"u{k}", extent) for k, extent in enumerate(value.shape)]
    expr = value.load(tuple(of_axis(axis) for axis in axes), body)
    return not body.loads and not expr.axes


def of_array(array: Array) -> Value:
    """The value that reads ``array``."""

    def load(indices: Indices, body: Body) -> Expr:
        moving = zip(indices, array.shape, strict=True)
        return body.read(array, tuple(ZERO if n == 1 else i for i, n in moving))

    return Value(array.shape, array.dtype, load, 0, array)


@dataclass(eq=False)
class Statement:
    """``array[store(...)] = value`` for all of a domain, or an accumulation over part of it.

    ``domain`` holds the extents of the loops, those of 1 left out. ``reduced`` are the positions in
    the domain that are summed (or maximised) over, by ``combine``: "+", "max" or "min".
    """

    array: Array
    domain: tuple[int, ...]
    value: Callable[[Indices, Body], Expr]
    store: Callable[[Indices], Indices]
    reduced: tuple[int, ...] = ()
    combine: str | None = None
    scattered: bool = False  # stores of two iterations may meet: run in order
    fresh: bool = True  # an accumulation that starts anew, and not from what the array holds
    call: Callable[[], str] | None = None  # C++ instead of loops, once the arrays are laid out
    also: tuple[Array, ...] = ()  # further arrays that a call writes
    loads: dict[Array, set[Indices]] = field(default_factory=dict)
    work: float = 0.0  # rough operations of one iteration
    phase: int = 0  # 1 in the loop over rounds, 0 before it, 2 after it

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(Axis(f"i{k}", extent) for k, extent in enumerate(self.domain))

    @property
    def indices(self) -> Indices:
        return tuple(of_axis(axis) for axis in self.axes)

    def trial(self) -> None:
        """Find out which elements of which arrays one iteration reads."""
        if self.call is None:
            body = Body()
            self.value(self.indices, body)
            self.store_offset(body)
            self.loads = body.loads
            self.work = sum(10.0 if "fn::" in line else 1.0 for line, _ in body.lines)

    def store_offset(self, body: Body) -> Indices:
        """Where one iteration stores; a scatter looks that up, hence the body."""
        if self.scattered:
            return self.store((*self.indices, body))  # type: ignore[arg-type]
        return self.store(self.indices)


def nothing(indices: Indices, body: Body) -> Expr:
    """The value of a statement that is a call."""
    return Expr("", frozenset())


def squeeze(shape: Sequence[int]) -> tuple[tuple[int, ...], Callable[[Indices], Indices]]:
    """The extents that move, and the way back from their indices to those of ``shape``."""

    def spread(indices: Indices) -> Indices:
        moving = iter(indices)
        return tuple(ZERO if n == 1 else next(moving) for n in shape)

    return tuple(n for n in shape if n != 1), spread
