"""The block form: a thread block takes all steps of a fit, with barriers between passes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastsvi.engine.cuda.emission import (
    ends_of,
    is_round,
    joined,
    macros,
    passes_of,
    pointer,
    source_of,
    temporaries_of,
)
from fastsvi.engine.cuda.levels import Layout, levels, place
from fastsvi.engine.cuda.passes import Pass, Team
from fastsvi.engine.cuda.write import Writer
from fastsvi.engine.loops.ir import Array, Statement
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import Schedule
from fastsvi.errors import CaptureError

# What one block may go through in a pass: elements that it stores, or terms that it adds up.
_MOST_ELEMENTS, _MOST_TERMS = 1 << 16, 1 << 18
# And of arrays so large that they lie far away, which many blocks read sooner than one.
_MOST_FAR = 1 << 14
_MOST_SHARED = 200 << 10


@dataclass
class BlockSource:
    """The block form: ``run`` takes steps with ``threads`` threads per fit."""

    source: str
    threads: int
    arena_bytes: int
    in_shared: bool
    tables: list[Tensor]  # further constants, on the CPU
    barriers: int = 0  # per step, those of the loop over rounds counted once
    passes: int = 0


def emit_block(
    program: Program, plan: Schedule, num_state: int, most_shared: int = _MOST_SHARED
) -> BlockSource:
    """The block form of a program that was lowered without calls for products.

    ``run(inputs, count, strides, constants, arena, arena_bytes, losses, loss_bytes, halts,
    steps)``: block ``b`` has the row ``b`` of ``inputs`` [blocks, count], of ``losses`` and of
    ``halts`` [blocks, steps]. Step ``s`` reads its input ``k`` at ``inputs[b, k] + s *
    strides[k]``.

    Raises:
        CaptureError: a step is too large for one block.
    """
    threads = _threads(program, plan)
    writer = Writer(program, plan, Team(threads, is_block=True))
    _find_registers(writer, num_state)
    passes = [*passes_of(writer), *ends_of(writer, num_state)]
    groups = joined(writer, levels(passes))
    text = "\n".join(line for group in groups for one in group for line in one.lines)
    used = set(re.findall(r"\ba\d+\b", text))
    temporaries = temporaries_of(writer, used)
    state = [x for x in program.inputs[:num_state] if x.name in used]
    layout = place([*state, *temporaries], _with_state(groups, state), (), 16)
    in_shared = layout.size <= most_shared
    if not in_shared:
        layout = place(temporaries, groups, (), 16)
    lines = _block_kernel(writer, groups, layout, num_state, in_shared, used)
    return BlockSource(
        source_of(macros(threads, is_block=True), "\n".join([*lines, ""])),
        threads,
        layout.size,
        in_shared,
        [tensor for _, tensor in writer.tables],
        len(groups),
        sum(map(len, groups)),
    )


def _threads(program: Program, plan: Schedule) -> int:
    """Threads of a block: as many as the widest pass has a few iterations for each."""
    widest = 1
    for nest in plan.nests:
        first = nest.statements[0]
        elements = math.prod(first.domain)
        if first.call is not None:
            elements = first.array.size
        only_sums = all(s.reduced or s.array in plan.private for s in nest.statements)
        most = _MOST_TERMS if only_sums else _MOST_ELEMENTS
        if any(array.size > _MOST_ELEMENTS for s in nest.statements for array in s.loads):
            most = _MOST_FAR
        if elements > most:
            raise CaptureError(
                f"a pass of this step has {elements} iterations, more than the {most} that one "
                "thread block is left to do"
            )
        widest = max(widest, elements)
    for most, threads in ((64, 32), (128, 64), (512, 128), (4096, 256), (1 << 14, 512)):
        if widest <= most:
            return threads
    return 1024


def _find_registers(writer: Writer, num_state: int) -> None:
    """Single numbers are kept by all threads, and in memory only for calls and for the state."""
    program = writer.program
    writers: dict[Array, list[Statement]] = {}
    called: set[Array] = set()
    for statement in program.statements:
        for array in (statement.array, *statement.also):
            writers.setdefault(array, []).append(statement)
        if statement.call is not None:
            called.update(statement.loads)
    for array, (first, *more) in writers.items():
        if is_round(first):
            writer.registers[array] = "round"
        elif (
            array.size == 1
            and array not in writer.plan.private
            and not more
            and first.call is None
            and not first.scattered
            and (first.fresh or first.combine is None)
            and len(first.reduced) == len(first.domain)
        ):
            writer.registers[array] = writer.register(array.ctype)
        else:
            continue
        state = [program.outputs[k] for k in writer.plan.aliased]
        if array in called or array in state:
            writer.in_memory.add(array)
    for k, (source, target) in enumerate(zip(program.inputs, program.outputs, strict=False)):
        in_registers = target in writer.registers and source.size == 1
        if k < num_state and in_registers and not called & {source, target}:
            writer.kept[k] = writer.registers[source] = f"s{k}"
            writer.in_memory.discard(target)


def _with_state(groups: list[list[Pass]], state: Sequence[Array]) -> list[list[Pass]]:
    """The groups, with all state in use from beginning to end: the next step needs it again."""
    names = {array.name for array in state}
    ends = Pass([], reads=names, phase=2)
    return [[*groups[0], ends], *groups[1:-1], [*groups[-1], ends]] if groups else [[ends]]


def _block_kernel(
    writer: Writer,
    groups: list[list[Pass]],
    layout: Layout,
    num_state: int,
    in_shared: bool,
    used: set[str],
) -> list[str]:
    program = writer.program
    inputs = program.inputs
    loss, halt = program.outputs[num_state : num_state + 2]
    homes = [x for x in inputs[:num_state] if x in layout.offsets and x.size]
    constants = [*program.constants, *writer.tables]
    lines = [
        'extern "C" __global__ void __launch_bounds__(THREADS)',
        "run(void* const* inputs, int64_t count, const int64_t* strides, void* const* constants,",
        "    char* arena, int64_t arena_bytes, char* losses, int64_t loss_bytes, bool* halts,",
        "    int64_t steps) {",
        "inputs += (int64_t)blockIdx.x * count;",
    ]
    if in_shared:
        lines.append("extern __shared__ __align__(128) char shared_arena[];")
        memory = "shared_arena"
    else:
        lines.append("char* const memory = arena + (int64_t)blockIdx.x * arena_bytes;")
        memory = "memory"
    lines += [
        f"{loss.ctype}* loss = ({loss.ctype}*)(losses + (int64_t)blockIdx.x * loss_bytes);",
        f"{halt.ctype}* halt = halts + (int64_t)blockIdx.x * steps;",
    ]
    for k, array in enumerate(inputs[:num_state]):
        name = f"{array.name}_home" if in_shared or k in writer.kept else array.name
        lines.append(f"{array.ctype}* const {name} = ({array.ctype}*)inputs[{k}];")
        if k in writer.kept:
            lines.append(f"{array.ctype} {writer.kept[k]} = {name}[0];")
    for k, (array, _) in enumerate(constants):
        if array.name in used:
            lines.append(pointer(array, f"constants[{k}]"))
    lines += [pointer(array, f"({memory} + {at})") for array, at in layout.offsets.items()]
    lines += [f"fn::copy({x.name}_home, {x.size}, {x.name});" for x in homes]
    lines += ["SYNC();"] if homes else []
    lines.append("for (int64_t step = 0; step < steps; ++step) {")
    for k, array in enumerate(inputs):
        if k >= num_state and array.name in used:
            lines.append(pointer(array, f"((char*)inputs[{k}] + step * strides[{k}])"))
    lines += [f"{kind} {name} = 0;" for kind, name in writer.held]
    inside = [k for k, group in enumerate(groups) if any(one.phase == 1 for one in group)]
    for k, group in enumerate(groups):
        if inside and k == inside[0]:
            lines.append(f"for (int64_t round = 0; round < {program.rounds}; ++round) {{")
        lines += [line for one in group for line in one.lines]
        lines.append("SYNC();")
        if inside and k == inside[-1]:
            lines.append("}")
    lines.append(f"loss += {loss.size};")
    lines.append(f"halt += {halt.size};")
    for k, name in writer.kept.items():
        lines.append(f"{name} = {writer.registers[program.outputs[k]]};")
    lines.append("}")
    for k, name in writer.kept.items():
        lines.append(f"if (RANK == 0) {inputs[k].name}_home[0] = {name};")
    lines += [f"fn::copy({x.name}, {x.size}, {x.name}_home);" for x in homes]
    return [*lines, "}"]
