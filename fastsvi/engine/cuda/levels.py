"""The order of passes: who waits for whom, and where what they hand on lies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fastsvi.engine.cuda.passes import Pass
from fastsvi.engine.loops.ir import Array

# Arrays of so many bytes share memory with others whose lives do not overlap.
_WORTH_SHARING = 1024


def levels(passes: Sequence[Pass]) -> list[list[Pass]]:
    """Passes that need not wait for each other, in groups; a barrier stands between two groups.

    A phase begins once the one before it has ended: a loop must not run into what is around it.

    >>> a, b, c = Pass([], writes={"x"}), Pass([], writes={"y"}), Pass([], reads={"x", "y"})
    >>> [len(level) for level in levels([a, b, c])]
    [2, 1]
    """
    groups: list[list[Pass]] = []
    written: dict[str, int] = {}  # by array: the last level that writes it
    read: dict[str, int] = {}
    given: dict[str, int] = {}  # by register: the level at which it is made
    start = phase = 0
    for one in sorted(passes, key=lambda one: one.phase):
        if one.phase != phase:
            start, phase = len(groups), one.phase
        level = start
        # Two that write one array and do not read it write different parts of it.
        for name in one.reads:
            level = max(level, written.get(name, -1) + 1)
        for name in one.writes:
            level = max(level, read.get(name, -1) + 1)
        for name in one.takes:
            level = max(level, given.get(name, -1))
        for name in one.reads:
            read[name] = max(read.get(name, -1), level)
        for name in one.writes:
            written[name] = max(written.get(name, -1), level)
        for name in one.gives:
            given[name] = max(given.get(name, -1), level)
        one.level = level
        while len(groups) <= level:
            groups.append([])
        groups[level].append(one)
    return groups


@dataclass
class Layout:
    """Byte offsets of the temporaries, and the bytes in all."""

    offsets: dict[Array, int]
    size: int


def place(
    arrays: Collection[Array],
    groups: Sequence[Sequence[Pass]],
    outputs: Collection[str],
    alignment: int,
) -> Layout:
    """Memory for those of ``arrays`` that passes read or write; ``outputs`` live to the end."""
    lives = _lives(groups, outputs)
    named = {array.name: array for array in arrays if array.name in lives}
    sizes = {
        name: -(-max(1, array.size) * array.dtype.itemsize // alignment) * alignment
        for name, array in named.items()
    }
    offsets: dict[Array, int] = {}
    placed: list[tuple[int, int, tuple[int, int]]] = []  # start, end, life
    size = 0
    for name, array in named.items():
        if sizes[name] < _WORTH_SHARING:
            offsets[array], size = size, size + sizes[name]
    floor = size
    for name in sorted(named, key=lambda name: sizes[name], reverse=True):
        if sizes[name] < _WORTH_SHARING:
            continue
        start, life = floor, lives[name]
        for low, high, other in sorted(placed):
            if other[0] <= life[1] and life[0] <= other[1]:
                if low - start >= sizes[name]:
                    break
                start = max(start, high)
        offsets[named[name]] = start
        placed.append((start, start + sizes[name], life))
    return Layout(offsets, max([size, *(end for _, end, _ in placed)]))


def _lives(
    groups: Sequence[Sequence[Pass]], outputs: Collection[str]
) -> dict[str, tuple[int, int]]:
    """First and last level at which each array is written or read."""
    lives: dict[str, tuple[int, int]] = {}
    inside = [k for k, group in enumerate(groups) if any(one.phase == 1 for one in group)]
    for level, group in enumerate(groups):
        for one in group:
            for name in one.reads | one.writes:
                lives[name] = lives.get(name, (level, level))[0], level
    for name, (first, last) in lives.items():
        if inside and first < inside[0] and last in inside:
            lives[name] = first, inside[-1]  # the next round reads it again
    for name in outputs:
        if name in lives:
            lives[name] = lives[name][0], len(groups)
    return lives
