"""Arrays put together from pieces, such as a gradient, that are computed again instead of stored.

Where a vector is concatenated only to be read element by element, its readers are taken apart the
way it was put together: an iteration computes the piece that it reads. Pieces of one length are
done together, because they are made of the same values: location and scale of one latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsvi.engine.loops.index import Axis, Index, of_axis
from fastsvi.engine.loops.ir import Array, Body, Indices, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import Nest, Schedule

# Shorter arrays stay in a cache, and longer chains of operations are not done twice.
_SMALLEST, _MOST_LINES = 1 << 14, 400


@dataclass(eq=False)
class Pieces:
    """Where pieces start, what writes them, and what the iterations that do have at hand."""

    starts: tuple[int, ...]
    writers: tuple[Statement, ...]
    at_hand: tuple[dict[Array, Statement], ...]

    def groups(self) -> list[tuple[int, list[int]]]:
        """Extents, and the starts of the pieces that have them."""
        found: dict[int, list[int]] = {}
        for start, writer in zip(self.starts, self.writers, strict=True):
            found.setdefault(extent_of(writer), []).append(start)
        return list(found.items())

    def piece_at(self, indices: Indices) -> int | None:
        """The number of the piece that begins where an index does; None if it is none's."""
        (index,) = indices
        for k, (start, writer) in enumerate(zip(self.starts, self.writers, strict=True)):
            if index == inside(extent_of(writer), start):
                return k
        return None


def extent_of(writer: Statement) -> int:
    """The length of a piece."""
    return writer.domain[0] if writer.domain else 1


def inside(extent: int, start: int) -> Index:
    """The index of an iteration over a piece, in the whole."""
    return of_axis(Axis("i0", extent)) + start


def find_pieces(program: Program, plan: Schedule) -> dict[Array, Pieces]:
    """The arrays of a program that need not be stored."""
    if plan.loop:
        return {}
    place = {s: k for k, nest in enumerate(plan.nests) for s in nest.statements}
    writers, readers = program.uses()
    found: dict[Array, Pieces] = {}
    for array, those in writers.items():
        if array.size < _SMALLEST or array in program.outputs or len(those) < 2:
            continue
        pieces = _pieces(array, those, plan, place)
        reading = readers.get(array, [])
        if pieces is None or not all(_reads_in_step(x, array) for x in reading):
            continue
        nests = {place[statement] for statement in reading}
        if all(_can_be_taken_apart(plan.nests[k], found, pieces) for k in nests) and _is_safe(
            program, plan, place, pieces, nests
        ):
            found[array] = pieces
    return found


def _pieces(
    array: Array, writers: list[Statement], plan: Schedule, place: dict[Statement, int]
) -> Pieces | None:
    """The pieces of an array, if it consists of such."""
    starts = []
    for writer in writers:
        plain = writer.combine is None and writer.call is None and not writer.scattered
        if not plain or len(writer.domain) > 1 or len(array.shape) != 1:
            return None
        (index,) = writer.store(writer.indices)
        starts.append(index.const)
        if index != inside(extent_of(writer), index.const):
            return None
    order = sorted(range(len(writers)), key=lambda k: starts[k])
    end = 0
    for k in order:
        if starts[k] != end:
            return None
        end += extent_of(writers[k])
    sorted_ = tuple(writers[k] for k in order)
    at_hand = tuple(
        {
            s.array: s
            for s in plan.nests[place[writer]].statements
            if s.combine is None and s.array in plan.private
        }
        for writer in sorted_
    )
    return Pieces(tuple(starts[k] for k in order), sorted_, at_hand) if end == array.size else None


def _reads_in_step(reader: Statement, array: Array) -> bool:
    """Whether each iteration reads its own element."""
    plain = reader.call is None and not reader.scattered
    return plain and reader.domain == array.shape and reader.loads[array] == {reader.indices}


def _can_be_taken_apart(nest: Nest, found: dict[Array, Pieces], pieces: Pieces) -> bool:
    """Whether a nest runs along the pieces, and along no others."""
    read = {array for statement in nest.statements for array in statement.loads}
    return all(
        s.store(s.indices) == s.indices for s in nest.statements if s.combine is None
    ) and all(found[array].starts == pieces.starts for array in read if array in found)


def _is_safe(
    program: Program, plan: Schedule, place: dict[Statement, int], pieces: Pieces, nests: set[int]
) -> bool:
    """Whether what the pieces are made of is still there where they are computed again.

    State may be written over by then, unless it is by the same iteration.
    """
    overwritten = {program.inputs[k]: program.outputs[k] for k in plan.aliased}
    writing = {s.array: place[s] for s in program.statements}
    same = dict(pieces.groups())
    for writer, at_hand in zip(pieces.writers, pieces.at_hand, strict=True):
        body = Body()
        body.recomputed = plan.recomputed | at_hand
        writer.value(writer.indices, body)
        if len(body.lines) > _MOST_LINES:
            return False
        extent = extent_of(writer)
        fine = {(inside(extent, start),) for start in same[extent]}
        for array, read in body.loads.items():
            target = overwritten.get(array)
            if target is None:
                continue
            when = writing[target]
            if any(k > when or (k == when and not read <= fine) for k in nests):
                return False
    return True
