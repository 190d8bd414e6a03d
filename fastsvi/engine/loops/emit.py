"""Write a scheduled program as C++."""

from __future__ import annotations

import re

import torch

from fastsvi.engine.loops import memory
from fastsvi.engine.loops.index import Axis
from fastsvi.engine.loops.ir import Array, Body, Expr, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.pointwise import number
from fastsvi.engine.loops.prelude import prelude_for
from fastsvi.engine.loops.schedule import Nest, Schedule

# A float32 sum runs over this many terms before it is added to a float64 total.
_BLOCK = 256

_JOIN = {
    "+": "{0} + {1}",
    "*": "{0} * {1}",
    "max": "fn::larger({0}, {1})",
    "min": "fn::smaller({0}, {1})",
    "put": "{1}",
}

# As ``run``, for many fits one after the other: a row of inputs and a row of losses for each.
_RUN_MANY = """
extern "C" void run_many(int64_t fits, void** inputs, int64_t count, const int64_t* strides,
                         void** constants, char* arena, char* losses, int64_t loss_bytes,
                         int64_t steps, const volatile int* stop, void** blas, int64_t* done) {
  for (int64_t fit = 0; fit < fits; ++fit)
    done[fit] = run(inputs + fit * count, strides, constants, arena, losses + fit * loss_bytes,
                    steps, stop, blas);
}""".splitlines()


def emit(program: Program, plan: Schedule, num_state: int) -> tuple[str, int]:
    """C++ of the whole program, and the bytes of working memory that it needs.

    ``run(inputs, strides, constants, arena, losses, steps, stop, blas)`` makes ``steps`` steps:
    each replaces the first ``num_state`` inputs by the outputs of the same position and appends the
    next output to ``losses``. The other inputs move on by ``strides`` bytes per step. It looks at
    ``*stop`` before each step, and a step whose last output is true is the last and does not
    count. Returns the number of steps made.
    """
    layout = memory.place(program, plan, num_state)
    arrays = {array.name: array for array in layout.offsets}
    arrays |= {array.name: array for array, _ in program.constants}
    arrays |= {array.name: array for array in program.inputs}
    functions: list[str] = []
    steps: list[str] = []
    loop = plan.loop
    for position, nest in enumerate(plan.nests):
        if loop and position == loop[0]:
            steps.append(f"for (int64_t round = 0; round < {program.rounds}; ++round) {{")
        lines = _nest(nest, plan)
        used = [arrays[name] for name in dict.fromkeys(re.findall(r"\ba\d+\b", "\n".join(lines)))]
        if nest.statements[0].call is None and layout.shared.intersection(used):
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
    lines = [
        *functions,
        'extern "C" int64_t run(void** inputs, const int64_t* strides, void** constants,',
        "                       char* arena, void* losses, int64_t steps,",
        "                       const volatile int* stop, void** blas) {",
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
    return prelude_for(text) + text, layout.size


def _type(array: Array, restrict: bool = True) -> str:
    qualifier = "const " if array.kind == "constant" else ""
    return f"{qualifier}{array.ctype}*{' __restrict__' if restrict else ''}"


def _pointer(array: Array, source: str, restrict: bool = True) -> str:
    return f"{_type(array, restrict)} {array.name} = ({_type(array, False)}){source};"


def _function(name: str, used: list[Array], lines: list[str]) -> list[str]:
    parameters = ", ".join(f"{_type(array)} {array.name}" for array in used)
    return [f"static __attribute__((noinline)) void {name}({parameters}) {{", *lines, "}"]


def _nest(nest: Nest, plan: Schedule) -> list[str]:
    first = nest.statements[0]
    if first.call is not None:
        return [first.call()]
    order = nest.order
    inner = order[-1] if order else None
    body, stores, sums = Body(), [], []
    fills = []
    body.recomputed = plan.recomputed
    for statement in nest.statements:
        value = statement.value(statement.indices, body)
        where = statement.store_offset(body)
        name, offset = statement.array.name, statement.array.offset(where)
        target = f"{name}[{offset.text}]"
        if statement.combine is None:
            body.known[statement.array, where] = value
            if statement.array not in plan.private:
                stores.append(f"{target} = {value.text};")
            continue
        gone = {statement.axes[k] for k in statement.reduced}
        in_register = inner in gone and not statement.scattered
        if in_register:
            sums.append((statement, value, target, gone == {inner} and statement.fresh))
        else:
            stores.append(f"{target} = {_JOIN[statement.combine].format(target, value.text)};")
        if statement.fresh and not (in_register and gone == {inner}):
            start = _start(statement)
            fills.append(f"fn::fill({name}, {statement.array.size}, {start});")
    depth = {axis: position for position, axis in enumerate(order)}
    at: list[list[str]] = [[] for _ in range(len(order) + 1)]
    for line, axes in body.lines:
        at[max((depth[axis] + 1 for axis in axes), default=0)].append(line)
    lines = ["{", *fills, *at[0]]
    for position, axis in enumerate(order[:-1]):
        lines += [_loop(axis), *at[position + 1]]
    if inner is None:
        lines += stores
    else:
        lines += _innermost(inner, at[-1] + stores, sums, scattered=first.scattered)
    return lines + ["}"] * (len(order[:-1]) + 1)


def _start(statement: Statement) -> str:
    """What an accumulation starts from."""
    kind, dtype = statement.array.ctype, statement.array.dtype
    if statement.combine in ("+", "*"):
        return f"({kind}){0 if statement.combine == '+' else 1}"
    least = statement.combine == "max"
    if dtype.is_floating_point:
        return f"({kind}){'-' if least else ''}INFINITY"
    if dtype == torch.bool:
        return number(not least, dtype)
    info = torch.iinfo(dtype)
    return f"({kind}){number(info.min if least else info.max, dtype)}"


def _loop(axis: Axis, start: str = "0", end: str | None = None) -> str:
    name = axis.name
    return f"for (int64_t {name} = {start}; {name} < {end or axis.extent}; ++{name}) {{"


def _innermost(
    inner: Axis,
    body: list[str],
    sums: list[tuple[Statement, Expr, str, bool]],
    scattered: bool,
) -> list[str]:
    """The innermost loop, with sums over it held in registers."""
    pragma, before, after = "#pragma omp simd", [], []
    for k, (statement, value, target, complete) in enumerate(sums):
        kind, combine = statement.array.ctype, statement.combine or "+"
        before.append(f"{kind} sum{k} = {_start(statement)};")
        body = [*body, f"sum{k} = {_JOIN[combine].format(f'sum{k}', value.text)};"]
        if combine in ("+", "*"):
            pragma += f" reduction({combine}:sum{k})"
        result = f"sum{k}" if complete else _JOIN[combine].format(target, f"sum{k}")
        after.append((f"{target} = {result};", combine, k))
    if any(statement.combine not in ("+", "*") for statement, *_ in sums) or scattered:
        pragma = ""  # a maximum written as a comparison is vectorised without being told
    long = inner.extent > _BLOCK and any(
        s.combine == "+" and s.array.ctype == "float" for s, *_ in sums
    )
    start = [pragma] if pragma else []
    if not long:
        return [*before, *start, _loop(inner), *body, "}", *(line for line, *_ in after)]
    # Blocks of float32 sums, added up in float64: neither drifts over 1e8 terms nor costs a thing.
    totals = [f"double total{k} = 0;" for _, combine, k in after if combine == "+"]
    gather = [f"total{k} += sum{k};" for _, combine, k in after if combine == "+"]
    return [
        *totals,
        *(line for line, (_, combine, _) in zip(before, after, strict=True) if combine != "+"),
        f"for (int64_t block = 0; block < {inner.extent}; block += {_BLOCK}) {{",
        f"const int64_t end = fn::least(block + {_BLOCK}, {inner.extent});",
        *(line for line, (_, combine, _) in zip(before, after, strict=True) if combine == "+"),
        *start,
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
