"""From a program to its passes, and the frame of generated text: common to both forms."""

from __future__ import annotations

from dataclasses import replace

from fastsvi.engine.cuda.passes import Pass, parts_of
from fastsvi.engine.cuda.prelude import prelude_for
from fastsvi.engine.cuda.scatter import scatter
from fastsvi.engine.cuda.write import Store, Writer
from fastsvi.engine.loops.ir import Array, Statement
from fastsvi.engine.loops.products import LAUNCHED


def is_round(statement: Statement) -> bool:
    """Whether a call notes the number of the round."""
    call = statement.call
    is_number = call is not None and statement.array.size == 1 and not statement.loads
    return is_number and call is not None and call().endswith("[0] = round;")


def passes_of(writer: Writer) -> list[Pass]:
    """All passes of the nests, in an order in which they may be done."""
    passes: list[Pass] = []
    launched = writer.program.shared.get(LAUNCHED, {})
    for nest in writer.plan.nests:
        first = nest.statements[0]
        if first.array in launched:
            reads, name = {x.name for x in first.loads}, first.array.name
            passes.append(Pass([], reads, {name}, phase=first.phase, product=first.array))
        elif is_round(first):
            name = first.array.name
            stores = [Store(f"{name}[0] = round;", "round", name, set())]
            if first.array not in writer.registers or first.array in writer.in_memory:
                passes += writer.stored(stores, first.phase)
        elif first.call is not None:
            passes.append(_call(first))
        elif first.scattered:
            passes += scatter(writer, first)
        else:
            passes += writer.write(parts_of(nest, writer.plan, writer.team, writer.pieces))
    return passes


def joined(writer: Writer, groups: list[list[Pass]]) -> list[list[Pass]]:
    """The groups, with passes that loop over the same as one: what they share is read once."""
    return [_joined(writer, group) for group in groups]


def _joined(writer: Writer, group: list[Pass]) -> list[Pass]:
    alike: dict[object, list[Pass]] = {}
    for one in group:
        part = one.part
        key = one if part is None else (part.kept, part.reduced, part.shape, part.short)
        # Where the last of them stands: registers that any of them takes have been made by then.
        alike[key] = [*alike.pop(key, []), one]
    passes = []
    for same in alike.values():
        parts = [one.part for one in same if one.part is not None]
        if len(parts) < 2:
            passes += same
            continue
        first = parts[0]
        placed = [placed for part in parts for placed in part.placed]
        one = writer.loops(replace(first, placed=placed))
        one.level = same[0].level
        passes.append(one)
    return passes


def _call(statement: Statement) -> Pass:
    """A routine that the whole team goes through."""
    text = statement.call() if statement.call is not None else ""
    written = {array.name for array in (statement.array, *statement.also)}
    size = statement.array.size
    return Pass(
        [text],
        {array.name for array in statement.loads},
        written,
        phase=statement.phase,
        threads=size,
        work=size,
    )


def ends_of(writer: Writer, num_state: int) -> list[Pass]:
    """New state that is not in its place yet, and in the block form the loss and the flag."""
    program = writer.program
    phase = 2 if writer.plan.loop else 0
    passes = []
    targets = [
        (source, target.name)
        for k, (source, target) in enumerate(
            zip(program.outputs[:num_state], program.inputs, strict=False)
        )
        if k not in writer.plan.aliased and k not in writer.kept
    ]
    if writer.team.is_block:
        loss, halt = program.outputs[num_state : num_state + 2]
        targets += [(loss, "loss"), (halt, "halt")]
    for source, name in targets:
        register = writer.registers.get(source)
        if register is not None:
            store = Store(f"{name}[0] = {register};", register, name, set())
            passes += writer.stored([store], phase)
        elif source.size:
            line = f"fn::copy({source.name}, {source.size}, {name});"
            size = source.size
            reads = {source.name}
            passes.append(Pass([line], reads, {name}, phase=phase, threads=size, work=size))
    return passes


def temporaries_of(writer: Writer, used: set[str] | None) -> list[Array]:
    """Arrays that need memory of the step's own: those of the program, and of its passes."""
    program = writer.program
    known = {array.name for array in program.inputs}
    known |= {array.name for array, _ in [*program.constants, *writer.tables]}
    return [x for x in writer.arrays() if x.name not in known and (used is None or x.name in used)]


def pointer(array: Array, source: str) -> str:
    """Declare the pointer to an array."""
    qualifier = "const " if array.kind == "constant" else ""
    kind = f"{qualifier}{array.ctype}*"
    restrict = " __restrict__" if array.kind == "constant" else ""
    return f"{kind}{restrict} {array.name} = ({kind}){source};"


def macros(threads: int, *, is_block: bool) -> str:
    if is_block:
        rank, team = "((int)threadIdx.x)", "THREADS"
        sync = "__syncthreads()"
    else:
        rank = "((int64_t)blockIdx.x * THREADS + threadIdx.x)"
        team = "((int64_t)gridDim.x * THREADS)"
        sync = ""
    return "".join(
        f"#define {name} {text}\n"
        for name, text in (
            ("THREADS", str(threads)),
            ("RANK", rank),
            ("TEAM", team),
            ("SYNC()", sync),
            ("TEAM_IS_BLOCK", str(int(is_block))),
        )
    )


def source_of(head: str, body: str) -> str:
    """The whole program: macros, what it builds on, and its kernels."""
    return head + prelude_for(head + body) + body
