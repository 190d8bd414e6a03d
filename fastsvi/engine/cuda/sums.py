"""Sums and numbers in the text of a pass: how they begin, go on, and meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fastsvi.engine.cuda.passes import Placed
from fastsvi.engine.loops.combine import JOIN, start_of
from fastsvi.engine.loops.index import Axis
from fastsvi.engine.loops.ir import Expr, Statement

# A thread that adds up more float32 terms than this does so in float64.
_LONG = 256
_MANY = (1 << 31) - (1 << 22)  # what 32 bits count, and a team more

LANES = {
    "+": "lanes_sum",
    "*": "lanes_product",
    "max": "lanes_larger",
    "min": "lanes_smaller",
}


@dataclass
class Sum:
    """A sum, or an extremum, that a thread is at."""

    statement: Statement
    name: str
    value: Expr
    each: int  # terms of a thread
    placed: Placed

    @property
    def is_long(self) -> bool:
        is_float = self.statement.array.dtype == torch.float32
        return is_float and self.statement.combine == "+" and self.each > _LONG

    @property
    def kind(self) -> str:
        """The type that it is held in."""
        return "double" if self.is_long else self.statement.array.ctype

    @property
    def declared(self) -> str:
        return f"{self.kind} {self.name} = {start_of(self.statement)};"

    @property
    def result(self) -> str:
        return f"({self.statement.array.ctype}){self.name}" if self.is_long else self.name

    @property
    def added(self) -> str:
        return self.with_value(self.value.text)

    def with_value(self, text: str) -> str:
        """Add another value."""
        return f"{self.name} = {joined(self.statement, self.name, text)};"

    def exchanged(self, lanes: int) -> str:
        """All lanes have the sum over them."""
        return sum_over_lanes(self.name, lanes, self.statement.combine or "+")


def sum_over_lanes(name: str, lanes: int, combine: str = "+") -> str:
    """Have all of so many neighbouring lanes hold the sum over them."""
    return f"{name} = fn::{LANES[combine]}<{lanes}>({name});"


def digits(name: str, axes: Sequence[Axis], integer: str) -> list[str]:
    """Loop variables from a number that counts through them, the last one fastest."""
    lines, rest, stride = [], name, math.prod(axis.extent for axis in axes)
    for k, axis in enumerate(axes):
        stride //= max(1, axis.extent)
        last = k == len(axes) - 1
        text = rest if last else f"{rest} / {stride}"
        lines.append(f"const {integer} {axis.name} = {text};")
        if not last:
            lines.append(f"const {integer} {name}{k} = {rest} % {stride};")
            rest = f"{name}{k}"
    return lines


def index_type(counts: Iterable[int]) -> str:
    """Of 32 bits if they count so far; division by a constant is then a few instructions."""
    return "int32_t" if max(counts, default=0) < _MANY else "int64_t"


def joined(statement: Statement, target: str, value: str) -> str:
    """What ``target`` becomes with another value."""
    return JOIN[statement.combine or "+"].format(target, value)
