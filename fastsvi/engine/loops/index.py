"""Integer expressions over loop variables: where in an array an element lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Axis:
    """A loop variable, running from 0 to ``extent - 1``."""

    name: str
    extent: int

    @property
    def text(self) -> str:
        return self.name

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset((self,))


@dataclass(frozen=True)
class Opaque:
    """A subexpression that cannot be taken apart: a quotient, or an index read from a tensor."""

    text: str
    axes: frozenset[Axis]
    extent: int


Atom = Axis | Opaque


@dataclass(frozen=True)
class Index:
    """``const`` plus a sum of ``coefficient * atom``; all atoms are non-negative."""

    terms: tuple[tuple[Atom, int], ...] = ()
    const: int = 0

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.terms, self.const + other)
        terms = dict(self.terms)
        for atom, coefficient in other.terms:
            terms[atom] = terms.get(atom, 0) + coefficient
        kept = tuple((atom, c) for atom, c in terms.items() if c)
        return Index(kept, self.const + other.const)

    def __mul__(self, factor: int) -> Index:
        if factor == 0:
            return ZERO
        return Index(tuple((atom, c * factor) for atom, c in self.terms), self.const * factor)

    def divmod(self, divisor: int) -> tuple[Index, Index]:
        """Quotient and remainder; exact where the remainder provably does not carry."""
        if divisor == 1:
            return self, ZERO
        quotient, remainder = divmod(self.const, divisor)
        exact = tuple((atom, c // divisor) for atom, c in self.terms if c % divisor == 0)
        rest = tuple((atom, c) for atom, c in self.terms if c % divisor)
        largest = remainder + sum(c * (atom.extent - 1) for atom, c in rest)
        if all(c > 0 for _, c in rest) and largest < divisor:
            return Index(exact, quotient), Index(rest, remainder)
        text, axes, extent = self.text, self.axes, self.largest // divisor + 1
        high = Opaque(f"(({text}) / {divisor})", axes, extent)
        low = Opaque(f"(({text}) % {divisor})", axes, divisor)
        return Index(((high, 1),)), Index(((low, 1),))

    @property
    def largest(self) -> int:
        return self.const + sum(max(0, c * (atom.extent - 1)) for atom, c in self.terms)

    @cached_property
    def axes(self) -> frozenset[Axis]:
        return frozenset().union(*(atom.axes for atom, _ in self.terms))

    @cached_property
    def text(self) -> str:
        parts = [atom.text if c == 1 else f"{c} * {atom.text}" for atom, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)

    def stride(self, axis: Axis) -> int | None:
        """How far the index moves per step of ``axis``; None if not by a constant."""
        total = 0
        for atom, coefficient in self.terms:
            if atom == axis:
                total += coefficient
            elif axis in atom.axes:
                return None
        return total


ZERO = Index()


def of_axis(axis: Axis) -> Index:
    """The index that is the loop variable itself; 0 where it does not move."""
    return ZERO if axis.extent == 1 else Index(((axis, 1),))
