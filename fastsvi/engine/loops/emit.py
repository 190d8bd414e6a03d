"""Write a scheduled program as C++."""

from __future__ import annotations

from fastsvi.engine.loops.index import Axis
from fastsvi.engine.loops.ir import Array, Body, Expr, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.prelude import PRELUDE
from fastsvi.engine.loops.schedule import Nest, Schedule

# A float32 sum runs over this many terms before it is added to a float64 total.
_BLOCK = 256
ALIGNMENT = 64

_JOIN = {"+": "{0} + {1}", "max": "larger({0}, {1})", "min": "smaller({0}, {1})"}


def emit(program: Program, plan: Schedule, num_state: int) -> tuple[str, int]:
    """C++ of the whole program, and the bytes of working memory that it needs.

    ``run(inputs, constants, arena, losses, steps, stop, blas)`` makes ``steps`` steps: each
    replaces the first ``num_state`` inputs by the outputs of the same position and appends the
    next output to ``losses``. It looks at ``*stop`` before each step, and a step whose last output
    is true is the last and does not count. Returns the number of steps made.
    """
    lines = [
        PRELUDE,
        'extern "C" int64_t run(void** inputs, const void** constants, char* arena, void* losses,',
        "                       int64_t steps, const volatile int* stop, void** blas) {",
    ]
    for position, array in enumerate(program.inputs):
        lines.append(_pointer(array, f"inputs[{position}]"))
    for position, (array, _) in enumerate(program.constants):
        lines.append(_pointer(array, f"constants[{position}]", "const "))
    offset, seen = 0, {array.name for array in program.inputs}
    for statement in program.statements:
        array = statement.array
        if array.name not in seen and array not in plan.private:
            seen.add(array.name)
            lines.append(_pointer(array, f"(arena + {offset})"))
            offset += -(-array.size * array.dtype.itemsize // ALIGNMENT) * ALIGNMENT
    lines.append("for (int64_t step = 0; step < steps; ++step) {")
    lines.append("if (*stop) return step;")
    for nest in plan.nests:
        lines += _nest(nest, plan)
    for position in range(num_state):
        if position not in plan.aliased:
            source, target = program.outputs[position], program.inputs[position]
            lines.append(f"std::copy_n({source.name}, {source.size}, {target.name});")
    loss = program.outputs[num_state]
    lines.append(
        f"std::copy_n({loss.name}, {loss.size}, ({loss.ctype}*)losses + step * {loss.size});"
    )
    halt = program.outputs[num_state + 1]
    lines += [f"if ({halt.name}[0]) return step;", "}", "return steps;", "}", ""]
    return "\n".join(lines), offset


def _pointer(array: Array, source: str, qualifier: str = "") -> str:
    kind = f"{qualifier}{array.ctype}*"
    return f"{kind} __restrict__ {array.name} = ({kind}){source};"


def _nest(nest: Nest, plan: Schedule) -> list[str]:
    first = nest.statements[0]
    if first.call is not None:
        return [first.call()]
    order = nest.order
    inner = order[-1] if order else None
    body, stores, sums = Body(), [], []
    fills = []
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
            sums.append((statement, value, target, gone == {inner}))
        else:
            stores.append(f"{target} = {_JOIN[statement.combine].format(target, value.text)};")
        if statement.fresh and not (in_register and gone == {inner}):
            start = _start(statement)
            fills.append(f"std::fill_n({name}, {statement.array.size}, {start});")
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
    kind = statement.array.ctype
    if statement.combine == "+":
        return f"({kind})0"
    sign = "-" if statement.combine == "max" else ""
    if statement.array.dtype.is_floating_point:
        return f"({kind}){sign}INFINITY"
    limit = "lowest" if statement.combine == "max" else "max"
    return f"std::numeric_limits<{kind}>::{limit}()"


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
        if combine == "+":
            pragma += f" reduction(+:sum{k})"
        result = f"sum{k}" if complete else _JOIN[combine].format(target, f"sum{k}")
        after.append((f"{target} = {result};", combine, k))
    if any(statement.combine != "+" for statement, *_ in sums) or scattered:
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
        f"const int64_t end = std::min<int64_t>(block + {_BLOCK}, {inner.extent});",
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
