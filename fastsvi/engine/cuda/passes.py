"""Take loop nests apart into passes: what the threads of a team can do between two barriers.

A pass has rows, which are independent, and terms, which are summed over for each row. Threads take
rows, or several of them share a row as neighbouring lanes, or the terms of a row are cut into
chunks whose sums a later pass adds up. Which it is follows from the extents alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastsvi.engine.cuda.pieces import Pieces, inside
from fastsvi.engine.loops.index import Axis, Index
from fastsvi.engine.loops.ir import Array, Body, Expr, Indices, Statement, of_array
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import Nest, Schedule
from fastsvi.errors import CaptureError

WARP = 32
# Rough cycles: of a term, of an exchange between lanes, of a barrier.
_TERM, _EXCHANGE, _BARRIER = 12, 30, 100
# One row of up to so many terms is summed by every warp for itself: all threads then have the
# result, and nobody waits.
_EVERYWHERE = 128
# Threads that keep a GPU busy, and terms that a thread should have before a row is cut.
_BUSY, _WORTH_CUTTING = 1 << 17, 4


def count(axes: Iterable[Axis]) -> int:
    """How many iterations axes make together."""
    return math.prod([axis.extent for axis in axes])


class Shape(NamedTuple):
    """How a pass is shared: ``lanes`` per row and chunk, ``chunks`` per row.

    What is done ``everywhere`` is done by each warp, and the result is in all threads.
    """

    lanes: int = 1
    chunks: int = 1
    everywhere: bool = False


@dataclass(frozen=True)
class Team:
    """The threads that share a pass: those of a block, or of as many blocks as there is work for.

    Of a block all threads may hold what is a single number: ``registers``.
    """

    threads: int
    is_block: bool


@dataclass(eq=False)
class Placed:
    """A statement, where in its domain an iteration is, and what the iteration has at hand.

    Of a sum that is added up later, ``into`` is where its parts go, from ``first`` on, of ``many``.
    """

    statement: Statement
    indices: Indices
    at_hand: dict[Array, Statement]
    into: Array | None = None
    first: int = 0
    many: int = 1


@dataclass(eq=False)
class Part:
    """Statements that share kept and reduced axes, and how their work is shared."""

    placed: list[Placed]
    kept: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    shape: Shape
    phase: int
    short: tuple[Axis, ...] = ()  # that a thread goes through for each term

    @property
    def rows(self) -> int:
        return count(self.kept)

    @property
    def terms(self) -> int:
        return count(self.reduced)


class Threads(Body):
    """The inside of a pass: what a thread reads from memory, and what it has or computes itself."""

    def __init__(
        self,
        plan: Schedule,
        registers: dict[Array, str],
        pieces: dict[Array, Pieces],
    ) -> None:
        super().__init__()
        self._plan, self._registers, self._pieces = plan, registers, pieces
        self.recomputed = plan.recomputed
        self.touched: set[Array] = set()
        self.taken: set[str] = set()
        self.places: dict[str, tuple[Array, Index]] = {}  # where a local was read from

    def value(self, placed: Placed) -> Expr:
        """The value of a statement for an iteration."""
        return self._with(placed.at_hand, placed.statement, placed.indices)

    def _with(
        self, at_hand: dict[Array, Statement], statement: Statement, indices: Indices
    ) -> Expr:
        before, self.recomputed = self.recomputed, self._plan.recomputed | at_hand
        found = statement.value(indices, self)
        self.recomputed = before
        return found

    def read(self, array: Array, indices: Indices) -> Expr:
        known = self.known.get((array, indices))
        if known is not None:
            return known
        computed = self._computed(array, indices)
        if computed is not None:
            self.known[array, indices] = computed
            return computed
        register = self._registers.get(array)
        if register is not None:
            self.taken.add(register)
            return Expr(register, frozenset())
        self.touched.add(array)
        found = super().read(array, indices)
        self.places.setdefault(found.text, (array, array.offset(indices)))
        return found

    def _computed(self, array: Array, indices: Indices) -> Expr | None:
        """What is not read but computed, where it is."""
        pieces = self._pieces.get(array)
        if pieces is not None:
            k = pieces.piece_at(indices)
            if k is None:
                raise CaptureError(f"a piece of {array.name} is read at {indices}")
            writer = pieces.writers[k]
            return self._with(pieces.at_hand[k], writer, writer.indices)
        maker = self.recomputed.get(array)
        if maker is None:
            return None
        own = maker.indices
        return maker.value(indices if maker.store(own) == own else own, self)

    def is_called(self, name: str, ctype: str, text: str) -> bool:
        """Whether the local of that name holds ``text``."""
        found = self._locals.get((ctype, text))
        return found is not None and found.text == name


@dataclass(eq=False)
class Pass:
    """Lines of CUDA C++ that a team does, and what has to be done before.

    ``reads`` and ``writes`` are names of arrays in memory; ``takes`` and ``gives`` of registers,
    for which nobody waits. ``product`` is an array that cuBLAS computes, instead of lines.
    """

    lines: list[str]
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    takes: set[str] = field(default_factory=set)
    gives: set[str] = field(default_factory=set)
    phase: int = 0
    threads: int = 1  # that have something to do
    work: int = 1  # iterations
    blocks: int = 0  # the least number of blocks that it needs, if not any will do
    product: Array | None = None
    part: Part | None = None  # what it was written from, if it may be joined with others
    loads: dict[Array, set[Indices]] = field(default_factory=dict)
    level: int = 0


# ---- how work is shared


def shape_of(rows: int, terms: int, along: bool, team: Team) -> Shape:
    """The shape for so many rows and terms; ``along``: neighbouring terms are so in memory.

    >>> shape_of(1, 64, True, Team(256, True))
    Shape(lanes=32, chunks=1, everywhere=True)
    >>> shape_of(1_000_000, 100, True, Team(256, False))
    Shape(lanes=8, chunks=1, everywhere=False)
    """
    if terms <= 1 or rows == 0:
        return Shape(everywhere=team.is_block and rows == 1)
    if team.is_block:
        return _of_block(rows, terms, along, team.threads)
    if rows * terms <= SMALL:  # one block may do it together with others that are small
        return _of_block(rows, terms, along, team.threads)._replace(everywhere=False)
    return _of_grid(rows, terms, along)


# Sums over an axis of this length, for up to so many particles, are done for all of them at once.
_LONG_AXIS, _FEW = 1 << 15, 16
# Passes of up to so many iterations are left to one block.
SMALL = 1 << 14


def _of_block(rows: int, terms: int, along: bool, threads: int) -> Shape:
    if rows == 1 and (terms <= _EVERYWHERE or threads == WARP):
        return Shape(_power(min(terms, WARP)), 1, True)

    def cost(lanes: int, chunks: int) -> float:
        turns = -(-rows * lanes * chunks // threads)
        each = -(-terms // (lanes * chunks)) * _TERM * (1 if along or lanes == 1 else 2)
        later = _BARRIER + chunks * _TERM if chunks > 1 else 0
        return turns * (each + math.log2(lanes) * _EXCHANGE) + later

    options = [(lanes, 1) for lanes in (1, 2, 4, 8, 16, 32) if lanes < 2 * terms]
    chunks = threads // (rows * WARP)
    if chunks > 1 and terms > WARP:
        options.append((WARP, min(chunks, -(-terms // WARP))))
    lanes, chunks = min(options, key=lambda option: cost(*option))
    return Shape(WARP, 1, True) if rows == 1 and chunks == 1 else Shape(lanes, chunks)


def _of_grid(rows: int, terms: int, along: bool) -> Shape:
    # Eight lanes read a whole sector of memory; more are needed where rows are few, or long.
    if terms <= 8:
        lanes = 1
    elif along:
        lanes = 8 if rows * 8 >= 2 * _BUSY and terms <= 256 else _power(min(terms, WARP))
    else:
        lanes = WARP if rows < WARP else 1
    threads = rows * lanes
    chunks = 1
    if threads < _BUSY:
        chunks = max(1, min(-(-_BUSY // threads), terms // (lanes * _WORTH_CUTTING)))
    return Shape(lanes, chunks)


def _power(n: int) -> int:
    """The least power of two from ``n``."""
    return 1 << (n - 1).bit_length()


# ---- what stands in a pass


def parts_of(
    nest: Nest, plan: Schedule, team: Team, pieces: dict[Array, Pieces] | None = None
) -> list[Part]:
    """The passes of a nest of loops: sums first, for what is stored may be written over."""
    first = nest.statements[0]
    if 0 in first.domain and not any(s.combine for s in nest.statements):
        return []
    pieces = pieces or {}
    at_hand = {s.array: s for s in nest.statements if s.combine is None and s.array not in pieces}
    skipped = plan.private | pieces.keys()
    plain = [s for s in nest.statements if not s.reduced and s.array not in skipped]
    sums: dict[tuple[int, ...], list[Statement]] = {}
    for statement in nest.statements:
        if statement.reduced:
            sums.setdefault(statement.reduced, []).append(statement)
    read = {array for statement in nest.statements for array in statement.loads}
    apart = next((pieces[array] for array in read if array in pieces), None)
    if apart is not None:
        wanted = [*plain, *(s for those in sums.values() for s in those)]
        return _along_pieces([s for s in nest.statements if s in wanted], at_hand, apart, team)
    mixed = None if team.is_block else _mixed(nest, sums, plain, at_hand, team)
    if mixed is not None:
        return [mixed]
    parts = []
    for reduced, statements in sums.items():
        gone = {first.axes[k] for k in reduced}
        kept = tuple(axis for axis in nest.order if axis not in gone)
        over = tuple(axis for axis in nest.order if axis in gone)
        rows, terms = count(kept), count(over)
        shape = shape_of(rows, terms, nest.order[-1] in gone, team)
        if plain and len(sums) == 1 and _keeps_busy(shape, rows, terms, team):
            statements, plain = [s for s in nest.statements if s in plain or s.reduced], []
        placed = [Placed(s, s.indices, at_hand) for s in statements]
        parts.append(Part(placed, kept, over, shape, first.phase))
    if plain and 0 not in first.domain:
        shape = shape_of(count(nest.order), 1, True, team)
        placed = [Placed(s, s.indices, at_hand) for s in plain]
        parts.append(Part(placed, nest.order, (), shape, first.phase))
    return parts


def _mixed(
    nest: Nest,
    sums: dict[tuple[int, ...], list[Statement]],
    plain: list[Statement],
    at_hand: dict[Array, Statement],
    team: Team,
) -> Part | None:
    """All of a nest with one long axis and few particles, say; None if it is another.

    Sums along the long axis would read everything once for each particle.
    """
    axes = nest.statements[0].axes
    long = [k for k, axis in enumerate(axes) if axis.extent >= _LONG_AXIS]
    short = tuple(axis for axis in nest.order if axis.extent < _LONG_AXIS)
    if len(long) != 1 or not 2 <= count(short) <= _FEW:
        return None
    others = tuple(k for k in range(len(axes)) if k not in long)
    along = {tuple(long), tuple(range(len(axes)))}
    if tuple(long) not in sums or not sums.keys() <= along | {others}:
        return None
    axis = axes[long[0]]
    wanted = [*plain, *(s for those in sums.values() for s in those)]
    placed = [Placed(s, s.indices, at_hand) for s in nest.statements if s in wanted]
    shape = shape_of(1, axis.extent, True, team)
    return Part(placed, (), (axis,), shape, nest.statements[0].phase, short)


def _keeps_busy(shape: Shape, rows: int, terms: int, team: Team) -> bool:
    """Whether elementwise work may be done along with sums of that shape."""
    wanted = min(rows * terms, team.threads if team.is_block else _BUSY)
    return not shape.everywhere and 2 * rows * shape.lanes * shape.chunks >= wanted


def _along_pieces(
    statements: list[Statement], at_hand: dict[Array, Statement], pieces: Pieces, team: Team
) -> list[Part]:
    """Parts for the pieces of each length: sums over them, and what is stored."""
    parts = []
    phase = statements[0].phase
    for is_sum in (True, False):
        these = [s for s in statements if bool(s.reduced) == is_sum]
        for extent, starts in pieces.groups() if these else ():
            axes = (Axis("i0", extent),) if extent > 1 else ()
            placed = [
                Placed(s, (inside(extent, start),), at_hand) for start in starts for s in these
            ]
            if is_sum:
                shape = shape_of(1, extent, True, team)._replace(everywhere=False)
                parts.append(Part(placed, (), axes, shape, phase))
            else:
                parts.append(Part(placed, axes, (), Shape(), phase))
    return parts


def finish(
    program: Program, statement: Statement, kept: tuple[Axis, ...], many: int
) -> tuple[Array, Part]:
    """Memory for so many parts of each sum ``[*kept, many]``, and the pass that adds them up."""
    shape = tuple(axis.extent for axis in kept)
    scratch = program.array((*shape, many), statement.array.dtype)
    scratch.order = tuple(range(len(scratch.shape)))
    # In terms of the axes that are kept; those that are reduced are not part of it.
    place = statement.store(statement.indices)
    partial = of_array(scratch)
    last = Axis("part", many)
    added = _Added(
        statement.array,
        (*shape, many),
        partial.load,
        lambda indices: place,
        (len(shape),),
        statement.combine,
        fresh=statement.fresh,
        phase=statement.phase,
    )
    added.moving = (*kept, last)
    placed = Placed(added, added.indices, {})
    return scratch, Part([placed], kept, (last,), Shape(), statement.phase)


@dataclass(eq=False)
class _Added(Statement):
    """A sum over its parts, under the axes of the nest that it finishes."""

    moving: tuple[Axis, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.moving
