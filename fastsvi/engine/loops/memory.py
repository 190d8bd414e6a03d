"""Where the temporaries of a step lie: arrays whose lives do not overlap may share memory."""

from __future__ import annotations

from dataclasses import dataclass

from fastsvi.engine.loops.ir import Array
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import Schedule

ALIGNMENT = 64
# Smaller arrays have memory of their own. Those that share it are handed to a function of their
# nest's own, for the compiler is told of all arrays of one function that they are apart.
_WORTH_SHARING = 16 << 10


@dataclass
class Layout:
    """Byte offsets of the temporaries, the bytes in all, and which arrays share memory."""

    offsets: dict[Array, int]
    size: int
    shared: set[Array]


def place(program: Program, plan: Schedule, num_state: int) -> Layout:
    """Place all temporaries that are not private to a nest or written over an input."""
    lives = _lives(program, plan, num_state)
    offsets: dict[Array, int] = {}
    size, small = 0, [array for array in lives if _bytes(array) < _WORTH_SHARING]
    for array in small:
        offsets[array] = size
        size += _bytes(array)
    large = [array for array in lives if _bytes(array) >= _WORTH_SHARING]
    placed: list[tuple[int, int, tuple[int, int]]] = []  # start, end, life
    for array in sorted(large, key=_bytes, reverse=True):
        need, life, start = _bytes(array), lives[array], size
        for low, high, other in sorted(placed):
            if other[0] <= life[1] and life[0] <= other[1]:  # alive at the same time
                if low - start >= need:
                    break
                start = max(start, high)
        offsets[array] = start
        placed.append((start, start + need, life))
    return Layout(offsets, max((end for _, end, _ in placed), default=size), set(large))


def _bytes(array: Array) -> int:
    return -(-array.size * array.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _lives(program: Program, plan: Schedule, num_state: int) -> dict[Array, tuple[int, int]]:
    """First and last nest in which each array is written or read."""
    inputs = {array.name for array in program.inputs}
    lives: dict[Array, tuple[int, int]] = {}
    for time, nest in enumerate(plan.nests):
        for statement in nest.statements:
            for array in (statement.array, *statement.also, *statement.loads):
                if array.kind != "temporary" or array.name in inputs or array in plan.private:
                    continue
                first, _ = lives.get(array, (time, time))
                lives[array] = first, time
    loop = plan.loop
    for array, (first, last) in lives.items():
        if loop and first < loop[0] and last in loop:
            lives[array] = first, loop[-1]  # the next round reads it again
    for array in program.outputs:
        if array in lives:
            lives[array] = lives[array][0], len(plan.nests)
    return lives
