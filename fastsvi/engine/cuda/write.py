"""Write a part of a nest as what one thread of a team does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fastsvi.engine.cuda.passes import (
    Part,
    Pass,
    Placed,
    Team,
    Threads,
    count,
    finish,
    shape_of,
)
from fastsvi.engine.cuda.pieces import Pieces
from fastsvi.engine.cuda.sums import Sum, digits, index_type, joined
from fastsvi.engine.loops.combine import start_of
from fastsvi.engine.loops.index import Axis
from fastsvi.engine.loops.ir import Array, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import Schedule


@dataclass(eq=False)
class Writer:
    """What all passes of a program are written with.

    ``registers`` are arrays of one number that all threads hold, by the name of the register, and
    ``in_memory`` those of them that somebody reads from memory all the same.
    """

    program: Program
    plan: Schedule
    team: Team
    registers: dict[Array, str] = field(default_factory=dict)
    in_memory: set[Array] = field(default_factory=set)
    held: list[tuple[str, str]] = field(default_factory=list)  # types and names of registers
    kept: dict[int, str] = field(default_factory=dict)  # of states, by position, from step to step
    tables: list[tuple[Array, Tensor]] = field(default_factory=list)  # made here
    scratch: list[Array] = field(default_factory=list)
    pieces: dict[Array, Pieces] = field(default_factory=dict)  # that are not stored
    _count: int = 0

    def arrays(self) -> list[Array]:
        """All arrays that statements and passes read or write."""
        found: dict[Array, None] = {}
        for statement in self.program.statements:
            for array in (statement.array, *statement.also, *statement.loads):
                found[array] = None
        return [*found, *self.scratch]

    def threads(self) -> Threads:
        """The inside of a pass."""
        return Threads(self.plan, self.registers, self.pieces)

    def register(self, kind: str) -> str:
        """A new register, which all threads have."""
        self._count += 1
        self.held.append((kind, f"r{self._count}"))
        return f"r{self._count}"

    # ---- passes of parts

    def write(self, parts: Sequence[Part]) -> list[Pass]:
        """The passes of the parts of a nest, and those that add up what they leave in parts."""
        parts = [part for part in parts if part.rows]
        uses: dict[Statement, list[tuple[Part, Placed]]] = {}
        for part in parts:
            for placed in part.placed:
                if placed.statement.reduced and not (part.short and is_short(part, placed)):
                    uses.setdefault(placed.statement, []).append((part, placed))
        later: list[Part] = []
        for statement, those in uses.items():
            many = sum(part.shape.chunks for part, _ in those)
            part, placed = those[0]
            if many == 1 and not part.short:
                continue
            kept = part.kept
            if part.short and len(statement.reduced) == 1:
                kept = part.short
            scratch, added = finish(self.program, statement, kept, many)
            self.scratch.append(scratch)
            added.shape = shape_of(count(kept), many, True, self.team)
            later.append(added)
            first = 0
            for part, placed in those:
                placed.into, placed.first, placed.many = scratch, first, many
                first += part.shape.chunks
        passes: list[Pass] = []
        for part in parts:
            passes += self._everywhere(part) if part.shape.everywhere else [self.loops(part)]
        for part in later:
            passes += self.write([part])
        return passes

    def loops(self, part: Part) -> Pass:
        """Rows for threads, or for neighbouring lanes."""
        lanes, chunks, _ = part.shape
        inside = self.inside(part, -(-part.terms // (lanes * chunks)))
        return Pass(
            self._mixed(part, inside) if part.short else self._text(part, inside),
            inside.reads,
            {array.name for array in inside.written},
            takes=inside.body.taken,
            phase=part.phase,
            threads=part.rows * lanes * chunks,
            work=part.rows * max(1, part.terms) * count(part.short),
            blocks=-(-lanes * chunks // self.team.threads) if part.short else 0,
            part=part,
            loads=inside.body.loads,
        )

    def inside(self, part: Part, each: int, prefix: str = "sum") -> Inside:
        """What a thread does for one row, and for one of the ``each`` terms that it takes of it."""
        body = self.threads()
        found = Inside(body, part)
        for placed in part.placed:
            statement = placed.statement
            value = body.value(placed)
            where = statement.store(placed.indices)
            array = placed.into or statement.array
            if placed.into is None:
                offset = array.offset(where).text
            else:
                chunk = " + chunk" * (part.shape.chunks > 1)
                offset = f"row * {placed.many} + {placed.first}{chunk}"
            target = f"{array.name}[{offset}]"
            found.written.add(array)
            if not statement.fresh and placed.into is None:
                found.again.add(array.name)
            if not statement.reduced:
                if statement.combine is None:
                    body.known[array, where] = value
                    found.stores.append(f"{target} = {value.text};")
                else:
                    found.stores.append(f"{target} = {joined(statement, target, value.text)};")
                continue
            total = Sum(statement, f"{prefix}{len(found.sums)}", value, each, placed)
            found.sums.append(total)
            result = total.result
            if not statement.fresh and placed.into is None:
                result = joined(statement, target, result)
            found.after.append(f"{target} = {result};")
        return found

    def _text(self, part: Part, found: Inside) -> list[str]:
        lanes, chunks, _ = part.shape
        items = part.rows * chunks
        stores, sums, after = found.stores, found.sums, found.after
        integer = found.index_type([items * lanes, part.terms])
        outside, inside = placed_lines(found.body, set(part.reduced))
        lines = ["{"]
        shared = lanes > 1
        if shared:
            # All lanes of a warp stay together, for they exchange what they have summed.
            lines += [
                f"const {integer} lane = RANK % {lanes};",
                f"for ({integer} base = 0; base < {items}; base += TEAM / {lanes}) {{",
                f"const {integer} item = base + RANK / {lanes};",
                f"const bool live = item < {items};",
            ]
            row = "(live ? item : 0)"
        else:
            lines.append(f"for ({integer} item = RANK; item < {items}; item += TEAM) {{")
            row = "item"
        if chunks > 1:
            lines += [
                f"const {integer} row = {row} % {part.rows};",
                f"const {integer} chunk = {row} / {part.rows};",
            ]
        else:
            lines.append(f"const {integer} row = {row};")
        lines += digits("row", part.kept, integer)
        lines += outside
        lines += [x.declared for x in sums]
        if part.reduced:
            start = " + ".join(
                ["lane"] * shared + [f"chunk * {lanes}"] * (chunks > 1) or ["0"],
            )
            if shared:
                start = f"live ? {start} : {part.terms}"
            lines += self._terms(part, inside, stores, sums, start, integer)
            lines += [x.exchanged(lanes) for x in sums if shared]
        else:
            lines += [*inside, *stores, *(x.added for x in sums)]
        if after:
            lines.append("if (live && lane == 0) {" if shared else "{")
            lines += [*after, "}"]
        return [*lines, "}", "}"]

    def _mixed(self, part: Part, found: Inside) -> list[str]:
        """Lanes along a long axis, each of which goes through a short one for each term."""
        lanes, chunks, _ = part.shape
        few, moving = count(part.short), set(part.short)
        integer = found.index_type([part.terms])
        outside = [line for line, axes in found.body.lines if not axes]
        each = [line for line, axes in found.body.lines if axes and not axes & moving]
        inside = [line for line, axes in found.body.lines if axes & moving]
        over_short = [x for x in found.sums if is_short(part, x.placed)]
        many = [x for x in found.sums if x not in over_short and len(x.statement.reduced) == 1]
        one = [x for x in found.sums if x not in over_short and x not in many]
        stores = dict(zip([x.name for x in found.sums], found.after, strict=True))
        unrolled = ["#pragma unroll", f"for (int row = 0; row < {few}; ++row) {{"]
        return [
            "{",
            f"const {integer} lane = RANK % {lanes};",
            f"const {integer} chunk = RANK / {lanes};",
            *(f"{x.kind} {x.name}[{few}];" for x in many),
            *unrolled,
            *(f"{x.name}[row] = {start_of(x.statement)};" for x in many),
            "}",
            *(x.declared for x in one),
            *outside,
            f"if (chunk < {chunks})",
            f"for ({integer} {part.reduced[0].name} = chunk * {lanes} + lane; "
            f"{part.reduced[0].name} < {part.terms}; "
            f"{part.reduced[0].name} += {lanes * chunks}) {{",
            *each,
            *(x.declared for x in over_short),
            *unrolled,
            *digits("row", part.short, "int"),
            *inside,
            *found.stores,
            *(x.added for x in (*one, *over_short)),
            *(x.added.replace(x.name, f"{x.name}[row]") for x in many),
            "}",
            *(stores[x.name] for x in over_short),
            "}",
            *unrolled,
            *(x.exchanged(lanes).replace(x.name, f"{x.name}[row]") for x in many),
            f"if (lane == 0 && chunk < {chunks}) {{",
            *(stores[x.name].replace(x.name, f"{x.name}[row]") for x in many),
            "}",
            "}",
            *(x.exchanged(lanes) for x in one),
            f"if (lane == 0 && chunk < {chunks}) {{",
            "const int row = 0;",
            *(stores[x.name] for x in one),
            "}",
            "}",
        ]

    def _terms(
        self,
        part: Part,
        inside: list[str],
        stores: list[str],
        sums: list[Sum],
        start: str,
        integer: str,
    ) -> list[str]:
        """The loop of a thread over its terms."""
        if part.terms == 0:
            return []
        step = part.shape.lanes * part.shape.chunks
        # Several loads at once, where a thread does little else for long; elsewhere it only takes
        # registers, and time to compile.
        long = part.terms > 4 * step and not self.team.is_block
        cheap = not stores and not any("fn::" in line for line in inside)
        return [
            f"#pragma unroll {4 if long and cheap else 1}",
            f"for ({integer} term = {start}; term < {part.terms}; term += {step}) {{",
            *digits("term", part.reduced, integer),
            *inside,
            *stores,
            *(x.added for x in sums),
            "}",
        ]

    # ---- numbers that all threads hold

    def _everywhere(self, part: Part) -> list[Pass]:
        """What each warp does for itself: all threads have the result, one stores it if need be."""
        body = self.threads()
        sums: list[Sum] = []
        after: list[str] = []
        given: set[str] = set()
        stored: list[Store] = []
        lanes = part.shape.lanes
        each = -(-part.terms // lanes)
        for placed in part.placed:
            statement = placed.statement
            value = body.value(placed)
            where = statement.store(placed.indices)
            array = statement.array
            register = self.registers.get(array) or self.register(array.ctype)
            given.add(register)
            if statement.reduced:
                total = f"sum{len(sums)}"
                sums.append(Sum(statement, total, value, each, placed))
                after.append(f"{register} = {total};")
            else:
                if statement.combine is None:
                    body.known[array, where] = value
                after.append(f"{register} = {value.text};")
            if array not in self.registers or array in self.in_memory:
                target = f"{array.name}[{array.offset(where).text}]"
                text = register if statement.fresh else joined(statement, target, register)
                own = set() if statement.fresh else {array.name}
                stored.append(Store(f"{target} = {text};", register, array.name, own))
        outside, inside = placed_lines(body, set(part.reduced))
        lines = ["{", *outside]
        if part.reduced:
            integer = index_type([part.terms, *(array.size for array in body.touched)])
            lines.append(f"const {integer} lane = RANK % {lanes};")
            lines += [x.declared for x in sums]
            lines += self._terms(part, inside, [], sums, "lane", integer)
            lines += [x.exchanged(lanes) for x in sums]
        lines += [*after, "}"]
        reads = {array.name for array in body.touched}
        first = Pass(lines, reads, set(), body.taken - given, given, part.phase)
        return [first, *self.stored(stored, part.phase)]

    def stored(self, stores: Sequence[Store], phase: int) -> list[Pass]:
        """Passes in which one thread stores registers: others may still read what it overwrites."""
        return [
            Pass([f"if (RANK == 0) {x.line}"], x.reads, {x.name}, {x.register}, phase=phase)
            for x in stores
        ]


@dataclass
class Inside:
    """What a pass does in its loops: lines, stores, sums, and the stores of the sums."""

    body: Threads
    part: Part
    stores: list[str] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    written: set[Array] = field(default_factory=set)
    again: set[str] = field(default_factory=set)  # names of arrays that are added to

    @property
    def reads(self) -> set[str]:
        """Names of the arrays that are read."""
        return {array.name for array in self.body.touched} | self.again

    def index_type(self, counts: Iterable[int]) -> str:
        """The type that counts so far, and through all arrays."""
        arrays = {*self.body.touched, *self.written}
        return index_type([*counts, *(array.size for array in arrays)])


class Store(NamedTuple):
    """A line that stores a register, the register, and the array that is written and read."""

    line: str
    register: str
    name: str
    reads: set[str]


def is_short(part: Part, placed: Placed) -> bool:
    """Whether a sum is over the short axes alone, so that a thread has all of its terms."""
    axes = placed.statement.axes
    return all(axes[k] in part.short for k in placed.statement.reduced)


def placed_lines(body: Threads, moving: set[Axis]) -> tuple[list[str], list[str]]:
    """Lines that stand before the loop over ``moving`` axes, and those inside it."""
    outside = [line for line, axes in body.lines if not axes & moving]
    inside = [line for line, axes in body.lines if axes & moving]
    return outside, inside
