"""Group statements into loop nests, and choose loop orders and memory orders.

Statements over one domain share a nest if each needs of the others only what the same iteration
has just computed; such values then never leave the registers. In each nest the innermost loop is
the one that the arrays are read along and that is long enough for vector registers; temporaries
are laid out as their nest writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastsvi.engine.loops.index import Axis
from fastsvi.engine.loops.ir import Array, Statement
from fastsvi.engine.loops.landing import land
from fastsvi.engine.loops.lower import Program

_VECTOR = 8  # lanes of a vector register that a loop should fill
# Cost of a load whose neighbours are not neighbours in memory, from a cache or from further away.
_NEAR, _FAR = 6.0, 16.0
_CACHE = 16 << 10  # bytes of an array that stays in the first cache
# Operations that are rather done twice than their result written to memory and read again.
_LITTLE = 12


@dataclass(eq=False)
class Nest:
    """Statements that share their loops; ``order`` lists the axes from outermost to innermost."""

    statements: list[Statement]
    order: tuple[Axis, ...] = ()

    @property
    def alone(self) -> bool:
        first = self.statements[0]
        return first.scattered or first.call is not None


@dataclass
class Schedule:
    """Nests in order of execution."""

    nests: list[Nest]
    private: set[Array]  # read by nobody outside of the nest that computes them
    recomputed: dict[Array, Statement]  # computed anew in each nest that reads them
    aliased: set[int]  # positions of outputs that overwrite their input in place

    @property
    def loop(self) -> range:
        """Positions of the nests in the loop over rounds."""
        inside = [k for k, nest in enumerate(self.nests) if nest.statements[0].phase == 1]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


def schedule(program: Program, num_state: int) -> Schedule:
    """Schedule a program whose first ``num_state`` outputs replace its first inputs."""
    land(program)
    nests, place = _group(program.statements)
    for nest in nests:
        if not nest.alone:
            nest.order = _order(nest)
        elif nest.statements[0].call is None:
            nest.order = nest.statements[0].axes
        _lay_out(nest)
    outputs = set(program.outputs)
    recomputed = _recompute(program, nests, place, outputs)
    readers: dict[Array, set[int]] = {}
    for statement in program.statements:
        for array in statement.loads:
            readers.setdefault(array, set()).add(place[statement])
    private = {
        s.array
        for s in program.statements
        if s.combine is None
        and s.call is None
        and s.array not in outputs
        and readers.get(s.array, set()) <= {place[s]}
    }
    return Schedule(nests, private, recomputed, _aliases(program, place, num_state))


def _group(statements: list[Statement]) -> tuple[list[Nest], dict[Statement, int]]:
    nests: list[Nest] = []
    place: dict[Statement, int] = {}
    producers: dict[Array, list[Statement]] = {}
    start, phase = 0, 0
    for statement in sorted(statements, key=lambda statement: statement.phase):
        if statement.phase != phase:
            start, phase = len(nests), statement.phase
        earliest = start
        needed = set(statement.loads) | ({statement.array} if statement.scattered else set())
        for array in needed:
            for producer in producers.get(array, []):
                later = 0 if _same_iteration(statement, producer, producers[array]) else 1
                earliest = max(earliest, place[producer] + later)
        alone = statement.scattered or statement.call is not None
        for position in range(earliest, len(nests)):
            nest = nests[position]
            if not alone and not nest.alone and nest.statements[0].domain == statement.domain:
                nest.statements.append(statement)
                break
        else:
            position = len(nests)
            nests.append(Nest([statement]))
        place[statement] = position
        for array in (statement.array, *statement.also):
            producers.setdefault(array, []).append(statement)
    return nests, place


def _recompute(
    program: Program, nests: list[Nest], place: dict[Statement, int], outputs: set[Array]
) -> dict[Array, Statement]:
    """Arrays that are computed again wherever they are read, because that moves less memory."""
    writers, readers = program.uses()
    recomputed: dict[Array, Statement] = {}
    for array, (first, *more) in writers.items():
        reading = readers.get(array, [])
        if (
            array in outputs
            or array.size * array.dtype.itemsize < _CACHE
            or more
            or first.call is not None
            or first.work > _LITTLE
            or not all(_same_iteration(reader, first, [first]) for reader in reading)
        ):
            continue
        others = {place[reader] for reader in reading} - {place[first]}
        extra = 0
        for position in others:
            at_hand = [s.loads for s in nests[position].statements]
            for source, places in first.loads.items():
                small = source.size * source.dtype.itemsize < _CACHE
                if not small and not any(places <= loads.get(source, set()) for loads in at_hand):
                    extra += 1
        if not others or extra > len(others) + 1:
            continue
        recomputed[array] = first
        for reader in reading:
            if place[reader] in others:
                del reader.loads[array]
                reader.work += first.work
                for source, places in first.loads.items():
                    reader.loads[source] = reader.loads.get(source, set()) | places
                    readers[source].append(reader)
    return recomputed


def _same_iteration(reader: Statement, producer: Statement, all_producers: list[Statement]) -> bool:
    """Whether all that ``reader`` reads of the producer's array was made by the same iteration."""
    return (
        len(all_producers) == 1
        and producer.combine is None
        and producer.call is None
        and not reader.scattered
        and producer.domain == reader.domain
        and reader.loads.get(producer.array) == {producer.store(producer.indices)}
    )


def _order(nest: Nest) -> tuple[Axis, ...]:
    axes = nest.statements[0].axes
    if len(axes) < 2:
        return axes
    inner = min(reversed(axes), key=lambda axis: _cost(nest, axis))
    return (*(axis for axis in axes if axis != inner), inner)


def _cost(nest: Nest, inner: Axis) -> float:
    """Rough time of one iteration if ``inner`` is the innermost loop."""
    own = {s.array for s in nest.statements}
    memory, work = 0.0, 0.0
    for statement in nest.statements:
        work += statement.work
        for array, places in statement.loads.items():
            if array not in own:
                memory += sum(_reach(array, array.offset(i).stride(inner)) for i in places)
        offset = statement.array.offset(statement.store(statement.indices))
        reduced = inner in {statement.axes[k] for k in statement.reduced}
        if statement.combine is not None:
            memory += 0.0 if reduced else 2.0
        elif statement.array.order is not None:
            memory += _reach(statement.array, offset.stride(inner))
    extent = max(1, inner.extent)  # a loop over nothing has an extent of 0
    lanes = min(_VECTOR, extent)
    return memory / (1 if lanes == 1 else lanes) + work / lanes + _VECTOR / extent


def _reach(array: Array, stride: int | None) -> float:
    if stride in (0, 1):
        return 0.1 if stride == 0 else 1.0
    return _NEAR if array.size * array.dtype.itemsize <= _CACHE else _FAR


def _lay_out(nest: Nest) -> None:
    """Give the arrays that the nest writes the order in which it writes them."""
    for statement in nest.statements:
        array = statement.array
        if array.order is not None or array.kind != "temporary" or statement.scattered:
            continue
        if statement.call is not None:  # zeros, in any order
            continue
        depth = {axis: position for position, axis in enumerate(nest.order)}
        indices = statement.store(statement.indices)

        def outside_in(dim: int, indices=indices, depth=depth) -> int:
            return max((depth.get(axis, -1) for axis in indices[dim].axes), default=-1)

        array.order = tuple(sorted(range(len(array.shape)), key=outside_in))


def _aliases(program: Program, place: dict[Statement, int], num_state: int) -> set[int]:
    """Outputs that may be written over the input that they replace."""
    writers = {s.array: s for s in program.statements}
    aliased = set()
    for position in range(num_state):
        source, target = program.inputs[position], program.outputs[position]
        writer = writers[target]
        where = place[writer]
        own = {writer.store(writer.indices)}
        if writer.combine is None and all(
            place[s] < where or (place[s] == where and s.combine is None and s.loads[source] == own)
            for s in program.statements
            if source in s.loads
        ):
            target.name = source.name
            aliased.add(position)
    return aliased
