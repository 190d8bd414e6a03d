"""Write a scheduled program as C++."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastsvi.engine.loops import blas, divide, memory
from fastsvi.engine.loops.combine import JOIN, start_of
from fastsvi.engine.loops.index import Axis, of_axis
from fastsvi.engine.loops.ir import Array, Body, Expr, Indices, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.prelude import prelude_for
from fastsvi.engine.loops.schedule import Nest, Schedule

# A float32 sum runs over this many terms before it is added to a float64 total.
_BLOCK = 256

# As ``run``, for many fits one after the other: a row of inputs and a row of losses for each.
_RUN_MANY = """
extern "C" void run_many(int64_t fits, void** inputs, int64_t count, const int64_t* strides,
                         void** constants, char* arena, char* losses, int64_t loss_bytes,
                         int64_t steps, const volatile int* stop, void** blas, int64_t* done) {
  for (int64_t fit = 0; fit < fits; ++fit)
    done[fit] = run(inputs + fit * count, strides, constants, arena, losses + fit * loss_bytes,
                    steps, stop, blas, 1, nullptr);
}""".splitlines()


def emit(program: Program, plan: Schedule, num_state: int) -> tuple[str, int]:
    """C++ of the whole program, and the bytes of working memory that it needs.

    ``run(inputs, strides, constants, arena, losses, steps, stop, blas, threads, share)`` makes
    ``steps`` steps: each replaces the first ``num_state`` inputs by the outputs of the same
    position and appends the next output to ``losses``. The other inputs move on by ``strides``
    bytes per step. It looks at ``*stop`` before each step, and a step whose last output is true is
    the last and does not count. Returns the number of steps made. What is large is divided among
    ``threads``, by the function at ``share``; results do not depend on how many they are.
    """
    layout = memory.place(program, plan, num_state)
    arrays = {array.name: array for array in layout.offsets}
    arrays |= {array.name: array for array, _ in program.constants}
    arrays |= {array.name: array for array in program.inputs}
    functions: list[str] = []
    steps: list[str] = []
    loop, apart = plan.loop, 0
    for position, nest in enumerate(plan.nests):
        if loop and position == loop[0]:
            steps.append(f"for (int64_t round = 0; round < {program.rounds}; ++round) {{")
        written = _nest(nest, plan)
        lines, sums = written.lines, written.sums
        used = [arrays[name] for name in dict.fromkeys(re.findall(r"\ba\d+\b", "\n".join(lines)))]
        if written.parts > 1:
            own = [f"{x.array.ctype}* __restrict__ {x.name}" for x in sums]
            functions += _function(f"nest{position}", used, lines, [*own, "const int64_t part"])
            lines, bytes_apart = _divided(f"nest{position}", used, written, layout.size)
            apart = max(apart, bytes_apart)
        elif nest.statements[0].call is None and layout.shared.intersection(used):
            functions += _function(f"nest{position}", used, lines)
            lines = [f"nest{position}({', '.join(array.name for array in used)});"]
        steps += lines
        if loop and position == loop[-1]:
            steps.append("}")
    for position in range(num_state):
        if position not in plan.aliased:
            source, target = program.outputs[position], program.inputs[position]
            steps.append(f"fn::copy({source.name}, {source.size}, {target.name});")
    loss, halt = program.outputs[num_state : num_state + 2]
    steps.append(f"fn::copy({loss.name}, {loss.size}, ({loss.ctype}*)losses + step * {loss.size});")
    steps.append(f"if ({halt.name}[0]) return step;")
    declared = [
        *(_pointer(x, f"inputs[{k}]") for k, x in enumerate(program.inputs[:num_state])),
        *(_pointer(x, f"constants[{k}]") for k, (x, _) in enumerate(program.constants)),
        *(
            _pointer(x, f"(arena + {offset})", restrict=x not in layout.shared)
            for x, offset in layout.offsets.items()
        ),
    ]
    moving = [
        _pointer(x, f"((char*)inputs[{k}] + step * strides[{k}])")
        for k, x in enumerate(program.inputs)
        if k >= num_state
    ]
    body = "\n".join(steps)
    single = f"blas[{blas.THREADS}]"
    if "matrix_matrix<" in body:
        declared.append(f"const matrix_alone alone({single});")
    if "team" in body:
        declared.append(f"const Team team = {{threads, (Share)share, (int (*)(int)){single}}};")
    lines = [
        *functions,
        'extern "C" int64_t run(void** inputs, const int64_t* strides, void** constants,',
        "                       char* arena, void* losses, int64_t steps,",
        "                       const volatile int* stop, void** blas, int64_t threads,",
        "                       void* share) {",
        *declared,
        "for (int64_t step = 0; step < steps; ++step) {",
        "if (*stop) return step;",
        *moving,
        *steps,
        "}",
        "return steps;",
        "}",
        *_RUN_MANY,
        "",
    ]
    text = "\n".join(lines)
    return prelude_for(text) + text, layout.size + apart


def _type(array: Array, restrict: bool = True) -> str:
    qualifier = "const " if array.kind == "constant" else ""
    return f"{qualifier}{array.ctype}*{' __restrict__' if restrict else ''}"


def _pointer(array: Array, source: str, restrict: bool = True) -> str:
    return f"{_type(array, restrict)} {array.name} = ({_type(array, False)}){source};"


def _function(
    name: str, used: list[Array], lines: list[str], more: Sequence[str] = ()
) -> list[str]:
    parameters = ", ".join([*(f"{_type(array)} {array.name}" for array in used), *more])
    return [f"static __attribute__((noinline)) void {name}({parameters}) {{", *lines, "}"]


@dataclass
class _Apart:
    """A sum that each part of a divided nest has of its own, under ``name``."""

    statement: Statement
    name: str

    @property
    def array(self) -> Array:
        return self.statement.array

    @property
    def apart(self) -> int:
        """Elements from one part's to the next: whole cache lines."""
        line = memory.ALIGNMENT // self.array.dtype.itemsize
        return -(-self.array.size // line) * line


@dataclass
class _Written:
    """The lines of a nest; of a divided one, those of one part, and what is to be added up."""

    lines: list[str]
    parts: int = 1
    sums: list[_Apart] = field(default_factory=list)


def _divided(name: str, used: list[Array], nest: _Written, offset: int) -> tuple[list[str], int]:
    """What does all parts of a nest, with the bytes behind ``offset`` that their sums take."""
    start, lines, given = offset, [], []
    for x in nest.sums:
        kind = x.array.ctype
        lines.append(f"{kind}* {x.name} = ({kind}*)(arena + {offset});")
        given.append(f"{x.name} + part * {x.apart}")
        offset += x.apart * nest.parts * x.array.dtype.itemsize
    arguments = ", ".join([*(array.name for array in used), *given, "part"])
    body = f"[=](int64_t part) {{ {name}({arguments}); }}"
    lines.append(f"team_each(team, {nest.parts}, {body});")
    for x in nest.sums:
        array, combine = x.array, x.statement.combine or "+"
        is_long = combine == "+" and array.ctype == "float"
        begin = start_of(x.statement) if x.statement.fresh else f"{array.name}[i]"
        joined = JOIN[combine].format("sum", f"{x.name}[i + part * {x.apart}]")
        lines += [
            f"for (int64_t i = 0; i < {array.size}; ++i) {{",
            f"{'double' if is_long else array.ctype} sum = {begin};",
            f"for (int64_t part = 0; part < {nest.parts}; ++part) sum = {joined};",
            f"{array.name}[i] = sum;",
            "}",
        ]
    return ["{", *lines, "}"], offset - start


def _nest(nest: Nest, plan: Schedule) -> _Written:
    first = nest.statements[0]
    if first.call is not None:
        return _Written([divide.shared_call(first.call(), first.work)])
    order = nest.order
    inner = order[-1] if order else None
    body = Body()
    body.recomputed = plan.recomputed
    values = []
    for statement in nest.statements:
        value = statement.value(statement.indices, body)
        where = statement.store_offset(body)
        values.append((statement, value, where))
        if statement.combine is None:
            body.known[statement.array, where] = value
    depth = {axis: position for position, axis in enumerate(order)}
    at: list[list[str]] = [[] for _ in range(len(order) + 1)]
    for line, axes in body.lines:
        at[max((depth[axis] + 1 for axis in axes), default=0)].append(line)
    gone = {statement: _gone(statement, where) for statement, _, where in values}
    cut = divide.cut(order, _work(order, at, len(values)), [_apart(s, gone[s]) for s in gone])
    bounds = {cut.axis: cut.bounds} if cut else {}
    written = _Written([], cut.parts if cut else 1)
    stores, fills = [], []
    sums: list[tuple[Statement, Expr, str, bool]] = []
    for statement, value, where in values:
        name, offset = statement.array.name, statement.array.offset(where)
        if statement.combine is None:
            if statement.array not in plan.private:
                stores.append(f"{name}[{offset.text}] = {value.text};")
            continue
        is_apart = cut is not None and cut.axis in gone[statement]
        if is_apart:
            name = f"own{len(written.sums)}"
            written.sums.append(_Apart(statement, name))
        target = f"{name}[{offset.text}]"
        in_register = inner in gone[statement] and not statement.scattered
        complete = in_register and gone[statement] == {inner}
        if in_register:
            fresh = statement.fresh or is_apart
            sums.append((statement, value, target, complete and fresh))
        else:
            stores.append(f"{target} = {JOIN[statement.combine].format(target, value.text)};")
        if complete or not (statement.fresh or is_apart):
            continue
        if is_apart or cut is None:
            fills.append(f"fn::fill({name}, {statement.array.size}, {start_of(statement)});")
        else:  # the part's own piece
            kept = [axis for axis in order if axis not in gone[statement]]
            loops = " ".join(_for(axis, *bounds.get(axis, ())) for axis in kept)
            fills.append(f"{loops} {target} = {start_of(statement)};")
    lines = ["{", *(cut.lines if cut else []), *fills, *at[0]]
    for position, axis in enumerate(order[:-1]):
        lines += [_loop(axis, *bounds.get(axis, ())), *at[position + 1]]
    if inner is None:
        lines += stores
    else:
        lines += _innermost(inner, at[-1] + stores, sums, first.scattered, *bounds.get(inner, ()))
    written.lines = lines + ["}"] * (len(order[:-1]) + 1)
    return written


def _gone(statement: Statement, where: Indices) -> set[Axis]:
    """The axes along which stores may meet."""
    if not statement.scattered:
        return {statement.axes[k] for k in statement.reduced}
    plain = {axis for index in where for axis in index.axes if index == of_axis(axis)}
    meeting = {axis for index in where for axis in index.axes if index != of_axis(axis)}
    return {axis for axis in statement.axes if axis not in plain or axis in meeting}


def _apart(statement: Statement, gone: set[Axis]) -> tuple[frozenset[Axis], float]:
    """What parts of these axes have to keep apart; what is put in order cannot be."""
    size = math.inf if statement.combine == "put" else float(statement.array.size)
    return frozenset(gone), size


def _work(order: tuple[Axis, ...], at: list[list[str]], stores: int) -> float:
    """Rough operations of all iterations."""
    trips = divide.trips(order)
    lines = sum(
        count * sum(10.0 if "fn::" in line else 1.0 for line in some)
        for count, some in zip(trips, at, strict=True)
    )
    return lines + stores * trips[-1]


def _for(axis: Axis, start: str = "0", end: str | None = None) -> str:
    name = axis.name
    return f"for (int64_t {name} = {start}; {name} < {end or axis.extent}; ++{name})"


def _loop(axis: Axis, start: str = "0", end: str | None = None) -> str:
    return f"{_for(axis, start, end)} {{"


def _innermost(
    inner: Axis,
    body: list[str],
    sums: list[tuple[Statement, Expr, str, bool]],
    scattered: bool,
    start: str = "0",
    end: str | None = None,
) -> list[str]:
    """The innermost loop, with sums over it held in registers."""
    pragma, before, after = "#pragma omp simd", [], []
    for k, (statement, value, target, complete) in enumerate(sums):
        kind, combine = statement.array.ctype, statement.combine or "+"
        before.append(f"{kind} sum{k} = {start_of(statement)};")
        body = [*body, f"sum{k} = {JOIN[combine].format(f'sum{k}', value.text)};"]
        if combine in ("+", "*"):
            pragma += f" reduction({combine}:sum{k})"
        result = f"sum{k}" if complete else JOIN[combine].format(target, f"sum{k}")
        after.append((f"{target} = {result};", combine, k))
    if any(statement.combine not in ("+", "*") for statement, *_ in sums) or scattered:
        pragma = ""  # a maximum written as a comparison is vectorised without being told
    long = inner.extent > _BLOCK and any(
        s.combine == "+" and s.array.ctype == "float" for s, *_ in sums
    )
    told = [pragma] if pragma else []
    if not long:
        loop = [*told, _loop(inner, start, end), *body, "}"]
        return [*before, *loop, *(line for line, *_ in after)]
    # Blocks of float32 sums, added up in float64: neither drifts over 1e8 terms nor costs a thing.
    totals = [f"double total{k} = 0;" for _, combine, k in after if combine == "+"]
    gather = [f"total{k} += sum{k};" for _, combine, k in after if combine == "+"]
    return [
        *totals,
        *(line for line, (_, combine, _) in zip(before, after, strict=True) if combine != "+"),
        f"for (int64_t block = {start}; block < {end or inner.extent}; block += {_BLOCK}) {{",
        f"const int64_t end = fn::least(block + {_BLOCK}, {end or inner.extent});",
        *(line for line, (_, combine, _) in zip(before, after, strict=True) if combine == "+"),
        *told,
        _loop(inner, "block", "end"),
        *body,
        "}",
        *gather,
        "}",
        *(
            line.replace(f"sum{k}", f"total{k}") if combine == "+" else line
            for line, combine, k in after
        ),
    ]
