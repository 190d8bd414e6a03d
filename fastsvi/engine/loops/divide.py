"""How work is divided among threads: which axis of a nest is cut, and into how many parts.

All of it follows from the sizes alone and not from the number of threads, so that results have the
same bits for any number of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastsvi.engine.loops import blas
from fastsvi.engine.loops.index import Axis

# Work of a part, in rough operations: 3 us at 0.03 ns each, as they were measured in nests. Threads
# that are awake take half a microsecond to begin together and to end. What does not make some parts
# stays as it is: its code, and the time to compile it, are those of one thread.
PART = 100_000.0
_FEWEST, _MOST = 4, 256
# The innermost axis is cut at multiples of this: whole vector registers, whole cache lines.
_GRAIN = 64
# Adding one number of a part's own sum to the whole, in operations, which one thread does.
_JOINING = 30.0
# As many threads are thought of where more parts mean more to add up.
_THREADS = 16


@dataclass(frozen=True)
class Cut:
    """``axis`` in ``parts`` pieces of ``size``, of which the last may be shorter."""

    axis: Axis
    size: int
    parts: int

    @property
    def bounds(self) -> tuple[str, str]:
        """From where to where a part goes."""
        return "first", "last"

    @property
    def lines(self) -> list[str]:
        """C++ that finds the bounds of ``part``."""
        return [
            f"const int64_t first = part * {self.size};",
            f"const int64_t last = fn::least(first + {self.size}, {self.axis.extent});",
        ]


def cut(
    order: Sequence[Axis], work: float, kept_apart: Sequence[tuple[frozenset[Axis], float]]
) -> Cut | None:
    """Where to cut a nest of loops; None if it is not worth it.

    Args:
        order: the loops, outermost first.
        work: rough operations of the whole nest.
        kept_apart: for each sum the axes that it runs over and how many numbers it has: each part
            of such an axis sums on its own. Infinite if it cannot.
    """
    wanted = min(_MOST, int(work / PART)) if work >= _FEWEST * PART else 1
    best, least = None, 0.75 * work
    for axis in order:
        grain = _GRAIN if axis is order[-1] else 1
        apart = sum(size for axes, size in kept_apart if axis in axes)
        parts = min(wanted, axis.extent // grain)
        while parts > 1:
            size = -(-axis.extent // parts // grain) * grain
            found = Cut(axis, size, -(-axis.extent // size))
            time = work / min(found.parts, _THREADS) + apart * found.parts * _JOINING
            if time < least and found.parts > 1:
                best, least = found, time
            parts //= 2
    return best


# ---- calls

# Those of which the prelude has a form for several threads.
_SHARED = re.compile(r"\b(philox_draw|matrix_matrix|matrix_vector|matrix_narrow)<")
_BATCH = re.compile(r"for \(int64_t b = 0; b < (\d+); \+\+b\) (.*)", re.DOTALL)


def shared_call(text: str, work: float) -> str:
    """A call, or a loop of calls, for several threads; as it is if that does not pay."""
    # A BLAS whose threads cannot be set for each that calls is left to use its own.
    is_set = blas.pointers()[blas.THREADS] or "matrix_matrix<" not in text
    if work < _FEWEST * PART or not is_set:
        return text
    batch = _BATCH.fullmatch(text)
    if batch is None or work >= int(batch[1]) * 16 * PART:
        return re.sub(r"\b(shared_\w+<[\w, <>]*>\()", r"\1team, ", _SHARED.sub(r"shared_\1<", text))
    count = int(batch[1])
    parts = min(count, _MOST, int(work / PART))
    bounds = f"int64_t b = {count} * part / {parts}; b < {count} * (part + 1) / {parts}; ++b"
    alone = "team.single(1); " if "matrix_matrix<" in text else ""
    return f"team_each(team, {parts}, [=](int64_t part) {{ {alone}for ({bounds}) {batch[2]} }});"


def trips(order: Sequence[Axis]) -> list[int]:
    """How often is done what stands in front of the loops, in the first, the second, ..."""
    return [math.prod(axis.extent for axis in order[:depth]) for depth in range(len(order) + 1)]
