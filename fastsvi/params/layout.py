"""Where each parameter lies in a flat buffer.

A layout cuts the ``N`` elements of a buffer into ``S`` adjacent rows. Most rows are segments, one
per parameter; a few are nameless gaps that make the next segment start at an aligned address.
Tables with one entry per row (kinds, learning rates, step counts) have ``S`` entries and are read
at ``segment.row``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributions.constraints import Constraint


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter's place in a flat buffer.

    Attributes:
        name: of the parameter in the store.
        offset: its first element.
        shape: of the unconstrained leaf; the constrained value may have another one.
        constraint: of the constrained value.
        row: index into the layout's rows.
    """

    name: str
    offset: int
    shape: torch.Size
    constraint: Constraint
    row: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.offset + self.shape.numel()

    @property
    def slice(self) -> slice:
        """The elements, to index the flat tensor with."""
        return slice(self.offset, self.stop)


class Layout(Mapping[str, Segment]):
    """Name to :class:`Segment`, in buffer order, and the boundaries of all rows.

    >>> layout = Layout()
    >>> layout.append("loc", torch.Size([3]), torch.distributions.constraints.real).slice
    slice(0, 3, None)
    >>> layout.append("scale", torch.Size([2]), torch.distributions.constraints.positive, 4).offset
    4
    >>> layout.boundaries  # the row 3:4 is a gap
    [0, 3, 4, 6]
    """

    __slots__ = ("_boundaries", "_owners", "_segments")

    def __init__(self) -> None:
        self._segments: dict[str, Segment] = {}
        self._boundaries = [0]
        self._owners: list[str | None] = []

    def __getitem__(self, name: str) -> Segment:
        return self._segments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def __repr__(self) -> str:
        return f"Layout({len(self)} segments, {self.size} elements)"

    @property
    def size(self) -> int:
        """Elements in all, ``N``."""
        return self._boundaries[-1]

    @property
    def num_rows(self) -> int:
        """Rows in all, ``S``, gaps included."""
        return len(self._owners)

    @property
    def boundaries(self) -> Sequence[int]:
        """First element of every row and the end of the last, ``S + 1`` integers."""
        return self._boundaries

    def append(
        self, name: str, shape: torch.Size, constraint: Constraint, align: int = 1
    ) -> Segment:
        """Add a segment at the end, at a multiple of ``align`` elements."""
        offset = -(-self.size // align) * align
        if offset > self.size:
            self._boundaries.append(offset)
            self._owners.append(None)
        segment = Segment(name, offset, shape, constraint, row=self.num_rows)
        self._boundaries.append(segment.stop)
        self._owners.append(name)
        self._segments[name] = segment
        return segment

    def owner(self, element: int) -> str | None:
        """Whose segment ``element`` belongs to; None for a gap or an element outside."""
        inside = 0 <= element < self.size
        return self._owners[bisect_right(self._boundaries, element) - 1] if inside else None

    def forget(self, name: str) -> Segment:
        """Take a name off; its row stays behind as a gap."""
        segment = self._segments.pop(name)
        self._owners[segment.row] = None
        return segment

    def replace(self, segment: Segment) -> None:
        """Put another segment object (another constraint) in the place of the same name."""
        self._segments[segment.name] = segment
