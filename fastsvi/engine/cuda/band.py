"""Passes that go along one long axis, done by blocks band after band of it, as one kernel.

A regression reads its data twice: for the predictions, and for the gradient, which is made from
these. A block that does both for some rows before it goes on to others reads them from memory once,
and finds them in its cache the second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsvi.engine.cuda.passes import WARP, Part, Pass, Placed
from fastsvi.engine.cuda.sums import digits
from fastsvi.engine.cuda.write import Inside, Writer, placed_lines
from fastsvi.engine.loops.combine import start_of
from fastsvi.engine.loops.index import Axis, Index
from fastsvi.engine.loops.ir import Array

# Shorter axes are not worth it; a block should have many bands, and a band fit in a cache.
_SHORTEST = 1 << 15
_CACHE = 26 << 10
_BLOCKS = 1056  # eight for each multiprocessor of a large GPU; results round by their number
_FEWEST, _MOST = 16, 256  # rows of a band


@dataclass(eq=False)
class _Member:
    """A pass of a band: along its long axis it sums ("sums"), or it sums for each row ("rows")."""

    one: Pass
    part: Part
    axis: Axis
    kind: str  # "rows", "each" (of the axis alone) or "sums" (over the axis, for some columns)


def with_bands(writer: Writer, groups: list[list[Pass]]) -> list[Pass] | None:
    """All passes, those of a band as one; None if there is no band."""
    passes = [one for group in groups for one in group]
    members = [m for m in map(_member, passes) if m is not None]
    for extent in sorted({m.axis.extent for m in members}, reverse=True):
        band = _connected([m for m in members if m.axis.extent == extent], passes)
        width = _shared_width(band, extent)
        if width is None:
            continue
        made = _write(writer, band, extent, width)
        inside = {m.one for m in band}
        first = next(k for k, one in enumerate(passes) if one in inside)
        # What the band waits for comes before it: none of that waits for the band.
        waited = _needed(passes[first:], inside)
        before = [*passes[:first], *(one for one in passes[first:] if one in waited)]
        rest = [one for one in passes[first:] if one not in waited and one not in inside]
        return [*before, made, *rest]
    return None


def _member(one: Pass) -> _Member | None:
    part = one.part
    if part is None or one.phase != 0 or part.short:
        return None
    axes = [axis for axis in (*part.kept, *part.reduced) if axis.extent >= _SHORTEST]
    if len(axes) != 1:
        return None
    (axis,) = axes
    if part.kept == (axis,):
        return _Member(one, part, axis, "rows" if part.reduced else "each")
    threads = part.rows
    if part.reduced == (axis,) and threads <= _MOST and all(x.into for x in _summed(part)):
        if part.kept and len(_summed(part)) < len(part.placed):
            return None
        return _Member(one, part, axis, "sums" if part.kept else "each")
    return None


def _summed(part: Part) -> list[Placed]:
    return [placed for placed in part.placed if placed.statement.reduced]


def _connected(members: list[_Member], passes: Sequence[Pass]) -> list[_Member]:
    """Those that hand values on row by row, and wait for nobody in between."""
    kept: list[_Member] = []
    written: dict[str, Array] = {}
    blocked: set[str] = set()  # what depends on the band from outside of it
    known = {m.one: m for m in members}
    for one in passes:
        member = known.get(one)
        names = {array.name for array in written.values()}
        outside = one.reads & blocked or one.writes & (names | blocked)
        if member is not None and not outside and _is_row_by_row(member, written):
            kept.append(member)
            for placed in member.part.placed:
                if placed.into is None:
                    written[placed.statement.array.name] = placed.statement.array
                else:
                    blocked.add(placed.into.name)
        elif one.reads & (names | blocked) or one.takes & blocked:
            blocked |= one.writes | one.gives
    return kept


def _is_row_by_row(member: _Member, written: dict[str, Array]) -> bool:
    """Whether it reads of the band's arrays its own row only, and writes rows only."""
    row = Index(((member.axis, 1),))
    for array, places in member.one.loads.items():
        if array.name in written and {array.offset(place) for place in places} != {row}:
            return False
    for placed in member.part.placed:
        array = placed.statement.array
        if placed.into is not None:
            continue
        stored = placed.statement.store(placed.indices)
        is_own = array.kind == "temporary" and array.offset(stored) == row
        if not is_own or not placed.statement.fresh:
            return False
    return True


def _shared_width(band: list[_Member], extent: int) -> int | None:
    """Bytes per row of what is read for rows and for sums again; None if nothing is."""
    read = [
        {array for array in m.one.loads if array.size >= 4 * extent and array.kind != "temporary"}
        for m in band
        if m.kind != "each"
    ]
    kinds = {m.kind for m in band}
    twice = {
        array for k, one in enumerate(read) for other in read[k + 1 :] for array in one & other
    }
    if kinds != {"rows", "each", "sums"} and kinds != {"rows", "sums"}:
        return None
    return sum(x.size * x.dtype.itemsize // extent for x in twice) if twice else None


def _needed(passes: Sequence[Pass], inside: set[Pass]) -> set[Pass]:
    """The passes among these that a band waits for."""
    reads: set[str] = set()
    takes: set[str] = set()
    needed: set[Pass] = set()
    for one in reversed(passes):
        if one in inside or one.writes & reads or one.gives & takes:
            needed.add(one)
            reads, takes = reads | one.reads, takes | one.takes
    return needed - inside


# ---- the kernel


def _write(writer: Writer, band: list[_Member], extent: int, width: int) -> Pass:
    threads = writer.team.threads
    rows = _MOST
    while rows > _FEWEST and rows * width > _CACHE:
        rows //= 2
    tiles = -(-extent // rows)
    blocks = min(_BLOCKS, tiles)
    for m in band:
        for placed in _summed(m.part):
            if placed.into is not None:
                blocks = min(blocks, m.part.shape.chunks)
    written: set[str] = set()
    declared: list[str] = []
    lines: list[str] = []
    ends: list[str] = []
    reads: set[str] = set()
    takes: set[str] = set()
    integer = "int32_t"
    level = -1
    for k, m in enumerate(band):
        each = -(-extent // (blocks * _share(m, threads)))
        found = writer.inside(m.part, each if m.kind != "rows" else m.part.terms, f"band{k}_")
        if found.index_type([extent + threads]) == "int64_t":
            integer = "int64_t"
        reads |= found.reads - written
        written |= {array.name for array in found.written}
        takes |= found.body.taken
        if m.one.level > level >= 0:
            lines.append("__syncthreads();")
        level = m.one.level
        if m.kind == "rows":
            lines += _rows(m, found)
            continue
        declared += [x.declared for x in found.sums]
        lines += _each(m, found) if m.kind == "each" else _columns(m, found, threads)
        ends += _ends(m, found, blocks, threads)
    text = [
        "{",
        f"typedef {integer} long_t;",
        *declared,
        f"if (blockIdx.x < {blocks})",
        f"for (long_t tile = blockIdx.x; tile < {tiles}; tile += {blocks}) {{",
        f"const long_t first = tile * {rows};",
        f"const long_t last = first + {rows} < {extent} ? first + {rows} : {extent};",
        *lines,
        "__syncthreads();",
        "}",
        *ends,
        "}",
    ]
    work = sum(m.one.work for m in band)
    return Pass(text, reads, written, takes, threads=blocks * threads, work=work, blocks=blocks)


def _share(m: _Member, threads: int) -> int:
    """Threads of a block that go through the rows together, for each column."""
    return max(1, threads // m.part.rows)


def _rows(m: _Member, found: Inside) -> list[str]:
    """A sum for each row, by lanes that are neighbours."""
    lanes = m.part.shape.lanes
    outside, inside = placed_lines(found.body, set(m.part.reduced))
    return [
        "{",
        f"const int lane = threadIdx.x % {lanes};",
        f"for (long_t base = first; base < last; base += THREADS / {lanes}) {{",
        f"const long_t item = base + threadIdx.x / {lanes};",
        "const bool live = item < last;",
        f"const long_t {m.axis.name} = live ? item : first;",
        *outside,
        *(x.declared for x in found.sums),
        "#pragma unroll 4",
        f"for (int term = live ? lane : {m.part.terms}; term < {m.part.terms}; term += {lanes}) {{",
        *digits("term", m.part.reduced, "int"),
        *inside,
        *found.stores,
        *(x.added for x in found.sums),
        "}",
        *(x.exchanged(lanes) for x in found.sums if lanes > 1),
        "if (live && lane == 0) {",
        *found.after,
        "}",
        "}",
        "}",
    ]


def _each(m: _Member, found: Inside) -> list[str]:
    """One row after the other, with sums over them that go on from band to band."""
    name = m.axis.name
    return [
        f"for (long_t {name} = first + threadIdx.x; {name} < last; {name} += THREADS) {{",
        *(line for line, _ in found.body.lines),
        *found.stores,
        *(x.added for x in found.sums),
        "}",
    ]


def _columns(m: _Member, found: Inside, threads: int) -> list[str]:
    """A sum for each column: threads are columns, and several go through the rows together."""
    share, name = _share(m, threads), m.axis.name
    outside, inside = placed_lines(found.body, {m.axis})
    return [
        f"if (threadIdx.x < {share * m.part.rows}) {{",
        f"const int row = threadIdx.x % {m.part.rows}, part = threadIdx.x / {m.part.rows};",
        *digits("row", m.part.kept, "int"),
        *outside,
        "#pragma unroll 4",
        f"for (long_t {name} = first + part; {name} < last; {name} += {share}) {{",
        *inside,
        *(x.added for x in found.sums),
        "}",
        "}",
    ]


def _ends(m: _Member, found: Inside, blocks: int, threads: int) -> list[str]:
    """Leave the sums of a block where a later pass adds them up."""
    lines: list[str] = []
    rows = m.part.rows
    for x in found.sums:
        placed = x.placed
        if placed.into is None:
            continue
        into, kind, held = placed.into.name, placed.into.ctype, f"{x.name}_held"
        if m.kind == "each":
            entries, apart = threads // WARP, 1
            give = [
                x.exchanged(WARP),
                f"if (threadIdx.x % {WARP} == 0) {held}[threadIdx.x / {WARP}] = {x.name};",
            ]
        else:
            entries, apart = _share(m, threads) * rows, rows
            give = [f"if (threadIdx.x < {entries}) {held}[threadIdx.x] = {x.name};"]
        lines += [
            "{",
            f"__shared__ {x.kind} {held}[{entries}];",
            *give,
            "__syncthreads();",
            f"if (threadIdx.x < {rows} && blockIdx.x < {blocks}) {{",
            f"{x.name} = {held}[threadIdx.x];",
            f"for (int k = threadIdx.x + {apart}; k < {entries}; k += {apart}) {{",
            x.with_value(f"{held}[k]"),
            "}",
            f"const long_t place = threadIdx.x * {placed.many} + {placed.first} + blockIdx.x;",
            f"{into}[place] = ({kind}){x.name};",
            "}",
            "}",
        ]
        rest = m.part.shape.chunks - blocks  # places for chunks that nobody has
        if rest:
            place = f"(k / {rest}) * {placed.many} + {placed.first + blocks} + k % {rest}"
            lines += [
                f"for (long_t k = RANK; k < {rest * rows}; k += TEAM)",
                f"{into}[{place}] = {start_of(x.statement)};",
            ]
    return lines
