"""Stores at places that are looked up, without races: in the order of the sources.

Where the places are constant, each target has a list of its sources, made here. Where they vary,
each target looks through all sources, or one thread goes through them in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsvi.engine.cuda.passes import WARP, Pass, Threads, count
from fastsvi.engine.cuda.sums import digits, index_type, sum_over_lanes
from fastsvi.engine.cuda.write import Writer
from fastsvi.engine.loops.combine import JOIN
from fastsvi.engine.loops.index import Axis, Index, Opaque
from fastsvi.engine.loops.ir import Array, Indices, Statement
from fastsvi.errors import CaptureError

# Iterations that one thread may do one after the other.
SERIAL = 1 << 16
# A look at a source costs about so much less than adding to memory, which waits for the last time.
_LOOKS = 10
# Longer lists are cut into pieces, whose sums are added up.
_LONG = 1024


def scatter(writer: Writer, statement: Statement) -> list[Pass]:
    """The passes of a scattered statement."""
    if math.prod(statement.domain) == 0:
        return []
    body = writer.threads()
    where = statement.store_offset(body)
    apart = _apart(where, statement.axes)
    looked_up = {axis for index in where for axis in _axes_of_lookups(index)}
    free = tuple(axis for axis in apart if axis not in looked_up)
    keys = _constant_keys(writer, statement, body, where, free)
    if keys is not None:
        return _Lists(writer, statement, free, keys).passes()
    scan = _scan(writer, statement, apart)
    return [_serial(writer, statement, apart) if scan is None else scan]


def _apart(where: Indices, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes of which every step goes to another place, whatever the others do."""
    alone = set()
    for index in where:
        if len(index.terms) == 1:
            ((atom, _),) = index.terms
            if isinstance(atom, Axis):
                alone.add(atom)
    return tuple(axis for axis in axes if axis in alone)


def _axes_of_lookups(index: Index) -> set[Axis]:
    opaque = [atom for atom, _ in index.terms if isinstance(atom, Opaque)]
    return {axis for atom in opaque for axis in atom.axes}


def _rest(statement: Statement, some: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple(axis for axis in statement.axes if axis not in some)


# ---- places that are known


def _constant_keys(
    writer: Writer,
    statement: Statement,
    body: Threads,
    where: Indices,
    free: tuple[Axis, ...],
) -> Tensor | None:
    """Where each source goes, in elements of the array; None if that is not known beforehand."""
    tensors = dict(writer.program.constants)
    rest = _rest(statement, free)
    keys = torch.zeros([axis.extent for axis in rest], dtype=torch.int64)
    offset = statement.array.offset(where)
    for atom, coefficient in offset.terms:
        if atom in free:
            continue
        if isinstance(atom, Axis):
            keys += coefficient * _along(atom, rest)
            continue
        found = _looked_up(body, atom)
        if found is None or found[0] not in tensors:
            return None
        array, place = found
        if not all(isinstance(x, Axis) for x, _ in place.terms):
            return None
        memory = tensors[array].flatten().cpu().to(torch.int64)
        at = torch.full_like(keys, place.const)
        for axis, c in place.terms:
            at += c * _along(axis, rest)  # type: ignore[arg-type]
        values = memory[at]
        keys += coefficient * torch.where(values < 0, values + atom.extent, values)
    keys = (keys + offset.const).flatten()
    return keys if int(keys.min()) >= 0 and int(keys.max()) < statement.array.size else None


def _along(axis: Axis, axes: tuple[Axis, ...]) -> Tensor:
    """The numbers of an axis, to be broadcast over all of them."""
    shape = [axis.extent if other == axis else 1 for other in axes]
    return torch.arange(axis.extent).reshape(shape)


def _looked_up(body: Threads, atom: Opaque) -> tuple[Array, Index] | None:
    """The array and the place in it that an index was read from."""
    for local, place in body.places.items():
        text = f"({local} < 0 ? {local} + {atom.extent} : {local})"
        if body.is_called(atom.text, "int64_t", text):
            return place
    return None


@dataclass
class _Lists:
    """A scatter as sums over the list of sources of each target."""

    writer: Writer
    statement: Statement
    free: tuple[Axis, ...]
    keys: Tensor

    def passes(self) -> list[Pass]:
        """One pass, or two if a list is long."""
        order = torch.argsort(self.keys, stable=True)
        targets, counts = torch.unique_consecutive(self.keys[order], return_counts=True)
        ends = counts.cumsum(0)
        if self.statement.combine == "put":  # the last one wins
            return [self._pass(targets, None, order[ends - 1])]
        starts = torch.cat([ends.new_zeros(1), ends])
        if int(counts.max()) <= _LONG:
            return [self._pass(targets, starts, order)]
        pieces = -(-counts // _LONG)
        first = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
        owner = torch.repeat_interleave(torch.arange(len(targets)), pieces)
        begins = starts[owner] + _LONG * (torch.arange(len(owner)) - first[owner])
        begins = torch.cat([begins, starts[-1:]])
        scratch = self._array((len(owner), count(self.free)))
        return [
            self._pass(None, begins, order, into=scratch),
            self._added(targets, first, scratch),
        ]

    def _array(self, shape: tuple[int, ...]) -> Array:
        scratch = self.writer.program.array(shape, self.statement.array.dtype)
        self.writer.scratch.append(scratch)
        return scratch

    def _table(self, numbers: Tensor) -> str:
        """A constant of this program."""
        array = self.writer.program.array(numbers.shape, torch.int32, "constant")
        self.writer.tables.append((array, numbers.to(torch.int32)))
        return array.name

    def _pass(
        self,
        targets: Tensor | None,
        starts: Tensor | None,
        order: Tensor,
        into: Array | None = None,
    ) -> Pass:
        """Each list is summed over and added to its target, or stored as what it is."""
        statement, rest = self.statement, _rest(self.statement, self.free)
        body = self.writer.threads()
        value = statement.value(statement.indices, body)
        moving = set(rest)
        outside = [line for line, axes in body.lines if not axes & moving]
        inside = [line for line, axes in body.lines if axes & moving]
        is_sorted = bool((order == torch.arange(len(order))).all())
        source = "place" if is_sorted else f"{self._table(order)}[place]"
        lists = len(order) if starts is None else len(starts) - 1
        find = [f"const int32_t source = {source};", *digits("source", rest, "int32_t"), *inside]
        lanes = 1 if starts is None else self._lanes(len(order) / lists)
        reads = {array.name for array in body.touched}
        if starts is None:
            work = ["const int32_t place = list;", *outside, *find]
            result = value.text
        else:
            begin = self._table(starts)
            kind, combine = statement.array.ctype, "+"
            lane = " + lane" if lanes > 1 else ""
            step = f"place += {lanes}" if lanes > 1 else "++place"
            work = [
                *outside,
                f"{kind} sum = 0;",
                f"const int32_t end = {'live ? ' if lanes > 1 else ''}{begin}[list + 1]"
                f"{' : 0' if lanes > 1 else ''};",
                f"for (int32_t place = {begin}[list]{lane}; place < end; {step}) {{",
                *find,
                f"sum = {JOIN[combine].format('sum', value.text)};",
                "}",
            ]
            result = "sum"
        return self._over_lists(lists, lanes, work, result, reads, body, targets, into)

    def _added(self, targets: Tensor, first: Tensor, scratch: Array) -> Pass:
        """The sums of pieces, added to the targets."""
        begin, free = self._table(first), count(self.free)
        lanes = self._lanes(scratch.shape[0] / len(targets))
        lane, step = (" + lane", lanes) if lanes > 1 else ("", 1)
        live = ("live ? ", " : 0") if lanes > 1 else ("", "")
        work = [
            f"{scratch.ctype} sum = 0;",
            f"const int32_t end = {live[0]}{begin}[list + 1]{live[1]};",
            f"for (int32_t place = {begin}[list]{lane}; place < end; place += {step})",
            f"sum += {scratch.name}[place * {free} + along];",
        ]
        body = self.writer.threads()
        return self._over_lists(
            len(targets), lanes, work, "sum", {scratch.name}, body, targets, None
        )

    def _lanes(self, length: float) -> int:
        """Neighbouring threads for a list of that length."""
        if length < 4 or count(self.free) >= WARP:
            return 1
        return min(WARP, 1 << int(length - 1).bit_length())

    def _over_lists(
        self,
        lists: int,
        lanes: int,
        work: list[str],
        result: str,
        reads: set[str],
        body: Threads,
        targets: Tensor | None,
        into: Array | None,
    ) -> Pass:
        statement, free = self.statement, count(self.free)
        items = lists * free
        if items * lanes >= 1 << 31 or len(self.keys) >= 1 << 31 or statement.array.size >= 1 << 31:
            raise CaptureError("generated CUDA code scatters fewer than 2^31 elements")
        array = statement.array if into is None else into
        if targets is None:
            target = f"{array.name}[list * {free} + along]"
        else:
            offset = _offset_of_free(statement, self.writer, self.free)
            target = f"{array.name}[{self._table(targets)}[list] + {offset.text}]"
        combine = statement.combine if into is None else "put"
        store = f"{target} = {JOIN[combine or '+'].format(target, result)};"
        row = "item"
        head = [f"for (int32_t item = RANK; item < {items}; item += TEAM) {{"]
        if lanes > 1:
            head = [
                f"const int32_t lane = RANK % {lanes};",
                f"for (int32_t base = 0; base < {items}; base += TEAM / {lanes}) {{",
                f"const int32_t item = base + RANK / {lanes};",
                f"const bool live = item < {items};",
            ]
            row = "(live ? item : 0)"
            work = [*work, sum_over_lanes("sum", lanes)]
            store = f"if (live && lane == 0) {store}"
        lines = [
            "{",
            *head,
            f"const int32_t list = {row} / {free};",
            f"const int32_t along = {row} % {free};",
            *digits("along", self.free, "int32_t"),
            *work,
            store,
            "}",
            "}",
        ]
        name = array.name
        return Pass(
            lines,
            reads | ({name} if into is None else set()),
            {name},
            body.taken,
            phase=statement.phase,
            threads=items * lanes,
            work=len(self.keys) * free,
        )


def _offset_of_free(statement: Statement, writer: Writer, free: tuple[Axis, ...]) -> Index:
    """What axes that are not looked up contribute to the place of a target."""
    offset = statement.array.offset(statement.store_offset(writer.threads()))
    return Index(tuple((atom, c) for atom, c in offset.terms if atom in free))


# ---- places that vary


def _scan(writer: Writer, statement: Statement, apart: tuple[Axis, ...]) -> Pass | None:
    """Each target looks through all sources; None if there are too many targets for that."""
    rest = _rest(statement, apart)
    terms = count(rest)
    body = writer.threads()
    where = statement.store_offset(body)
    looked = [
        d for d, index in enumerate(where) if not (set(index.axes) <= set(apart) and index.terms)
    ]
    extents = [statement.array.shape[d] for d in looked]
    targets, along = math.prod(extents), count(apart)
    turns = -(-along // writer.team.threads)
    if terms > SERIAL or -(-targets * along // writer.team.threads) > _LOOKS * turns:
        return None
    looks = len(body.lines)
    value = statement.value(statement.indices, body)
    moving = set(rest)
    searched, found = body.lines[:looks], body.lines[looks:]
    axes = tuple(Axis(f"c{k}", extent) for k, extent in enumerate(extents))
    here = list(where)
    for d, axis in zip(looked, axes, strict=True):
        here[d] = Index(((axis, 1),))
    tests = [f"{where[d].text} == {axis.name}" for d, axis in zip(looked, axes, strict=True)]
    array = statement.array
    integer = index_type([targets * along, terms, *(x.size for x in (array, *body.touched))])
    kind, combine = array.ctype, statement.combine or "+"
    target = f"{array.name}[{array.offset(tuple(here)).text}]"
    lines = [
        "{",
        f"for ({integer} item = RANK; item < {targets * along}; item += TEAM) {{",
        *digits("item", (*axes, *apart), integer),
        *(line for line, used in body.lines if not used & moving),
        f"{kind} sum = 0;",
        "bool any = false;",
        f"for ({integer} term = 0; term < {terms}; ++term) {{",
        *digits("term", rest, integer),
        *(line for line, used in searched if used & moving),
        f"if ({' && '.join(tests) or 'true'}) {{",
        *(line for line, used in found if used & moving),
        f"sum = {JOIN[combine].format('sum', value.text)};",
        "any = true;",
        "}",
        "}",
        f"if (any) {target} = {JOIN[combine].format(target, 'sum')};",
        "}",
        "}",
    ]
    return _made(statement, body, lines, targets * along, targets * along * terms)


def _serial(writer: Writer, statement: Statement, apart: tuple[Axis, ...]) -> Pass:
    """Threads take axes that keep apart, and each goes through the rest in order."""
    rest = _rest(statement, apart)
    rows, terms = count(apart), count(rest)
    if terms > SERIAL:
        raise CaptureError(
            f"generated CUDA code adds up to {SERIAL} terms one after the other where the places "
            f"of a scatter vary, found {terms}"
        )
    body = writer.threads()
    where = statement.store_offset(body)
    value = statement.value(statement.indices, body)
    array = statement.array
    target = f"{array.name}[{array.offset(where).text}]"
    integer = index_type([rows, terms, array.size, *(x.size for x in body.touched)])
    moving = set(rest)
    lines = [
        "{",
        f"for ({integer} item = RANK; item < {rows}; item += TEAM) {{",
        *digits("item", apart, integer),
        *(line for line, axes in body.lines if not axes & moving),
        f"for ({integer} term = 0; term < {terms}; ++term) {{",
        *digits("term", rest, integer),
        *(line for line, axes in body.lines if axes & moving),
        f"{target} = {JOIN[statement.combine or '+'].format(target, value.text)};",
        "}",
        "}",
        "}",
    ]
    return _made(statement, body, lines, rows, rows * terms)


def _made(statement: Statement, body: Threads, lines: list[str], threads: int, work: int) -> Pass:
    name = statement.array.name
    reads = {array.name for array in body.touched} | {name}
    return Pass(lines, reads, {name}, body.taken, phase=statement.phase, threads=threads, work=work)
