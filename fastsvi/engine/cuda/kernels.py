"""The kernel form: passes that need not wait for each other are a kernel, one after the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsvi.engine.cuda.band import with_bands
from fastsvi.engine.cuda.emission import (
    ends_of,
    joined,
    macros,
    passes_of,
    pointer,
    source_of,
    temporaries_of,
)
from fastsvi.engine.cuda.levels import Layout, levels, place
from fastsvi.engine.cuda.passes import SMALL, Pass, Team
from fastsvi.engine.cuda.pieces import find_pieces
from fastsvi.engine.cuda.write import Writer
from fastsvi.engine.loops.ir import Array, Value, of_array
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.products import LAUNCHED, place_of
from fastsvi.engine.loops.schedule import Schedule

THREADS = 256
# Blocks of a kernel; where there is more to do, threads take several rows. So many keep any GPU
# busy, and their number is part of no result.
_MOST_BLOCKS = 4096
_ALIGNMENT = 256


@dataclass
class Launch:
    """A kernel ``name(inputs, constants, arena, round)``."""

    name: str
    blocks: int
    threads: int


@dataclass
class Place:
    """Where a matrix lies: ``of`` "input", "constant" or "arena"; the rest counts elements."""

    of: str
    number: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def matrix(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Place:
        """Another view of what lies here."""
        return Place(self.of, self.number, self.offset, shape, strides)


@dataclass
class Product:
    """``out = a @ b`` by cuBLAS, of matrices or of batches of them."""

    a: Place
    b: Place
    out: Place
    dtype: torch.dtype
    add: bool = False


@dataclass
class KernelSource:
    """The kernel form: what is launched before, in and after the loop over rounds."""

    source: str
    arena_bytes: int
    tables: list[Tensor]  # further constants, on the CPU
    rounds: int
    before: list[Launch | Product] = field(default_factory=list)
    body: list[Launch | Product] = field(default_factory=list)
    after: list[Launch | Product] = field(default_factory=list)
    loss_offset: int = 0  # bytes in the arena
    halt_offset: int = 0


def emit_kernels(program: Program, plan: Schedule, num_state: int) -> KernelSource:
    """The kernel form of a program that was lowered with products for a device.

    Kernels are ``name(inputs, constants, arena, round)``. New state replaces the first
    ``num_state`` inputs; loss and flag are left in the arena.

    Raises:
        CaptureError: a step needs what generated CUDA code cannot do.
    """
    writer = Writer(program, plan, Team(THREADS, is_block=False))
    writer.pieces = find_pieces(program, plan)
    passes = [*passes_of(writer), *ends_of(writer, num_state)]
    groups = joined(writer, levels(passes))
    banded = with_bands(writer, groups)
    if banded is not None:
        groups = levels(banded)
    kernels = _kernels(groups)
    # Passes of one kernel of several levels have lives of their own, and yet one set of pointers.
    outputs = program.outputs[num_state : num_state + 2]
    layout = place(
        temporaries_of(writer, None), groups, [array.name for array in outputs], _ALIGNMENT
    )
    form = _Form(writer, layout)
    loss, halt = (layout.offsets[array] for array in outputs)
    result = KernelSource("", layout.size, [tensor for _, tensor in writer.tables], program.rounds)
    result.loss_offset, result.halt_offset = loss, halt
    lines: list[str] = []
    for number, kernel in enumerate(kernels):
        phase = kernel[0][0].phase
        where = (result.before, result.body, result.after)[phase]
        loops = [[one for one in group if one.product is None] for group in kernel]
        if any(loops):
            name = f"pass{number}"
            lines += form.kernel(name, loops)
            blocks = 1 if len(kernel) > 1 else _blocks(loops[0])
            where.append(Launch(name, blocks, THREADS))
        where += [form.product(x.product) for group in kernel for x in group if x.product]
    result.source = source_of(macros(THREADS, is_block=False), "\n".join([*lines, ""]))
    return result


def _kernels(groups: list[list[Pass]]) -> list[list[list[Pass]]]:
    """Groups that are one kernel together: neighbours of which one block does the work."""
    kernels: list[list[list[Pass]]] = []
    for group in groups:
        small = _is_small(group)
        last = kernels[-1] if kernels else None
        if last and small and _is_small(last[-1]) and last[-1][0].phase == group[0].phase:
            last.append(group)
        else:
            kernels.append([group])
    return kernels


def _is_small(group: Sequence[Pass]) -> bool:
    return all(one.product is None and not one.blocks and one.work <= SMALL for one in group)


def _blocks(group: Sequence[Pass]) -> int:
    threads = max(one.threads for one in group)
    least = max(one.blocks for one in group)
    return max(1, least, min(_MOST_BLOCKS, -(-threads // THREADS)))


class _Form:
    """Where the arrays of a program are, for kernels and for products."""

    def __init__(self, writer: Writer, layout: Layout) -> None:
        program = writer.program
        self._launched: dict[Array, tuple[Value, Value]] = program.shared.get(LAUNCHED, {})
        self._places: dict[str, tuple[str, int]] = {}
        self._pointers: dict[str, str] = {}
        constants = [array for array, _ in [*program.constants, *writer.tables]]
        for kind, arrays in (("input", program.inputs), ("constant", constants)):
            for k, array in enumerate(arrays):
                self._places[array.name] = kind, k
                self._pointers[array.name] = pointer(array, f"{kind}s[{k}]")
        for array, offset in layout.offsets.items():
            self._places[array.name] = "arena", offset // array.dtype.itemsize
            self._pointers[array.name] = pointer(array, f"(arena + {offset})")

    def kernel(self, name: str, groups: Sequence[Sequence[Pass]]) -> list[str]:
        """The text of a kernel; barriers of the block stand between its groups."""
        lines: list[str] = []
        for k, group in enumerate(groups):
            lines += ["__syncthreads();"] if k else []
            lines += [line for one in group for line in one.lines]
        used = dict.fromkeys(re.findall(r"\ba\d+\b", "\n".join(lines)))
        return [
            'extern "C" __global__ void __launch_bounds__(THREADS)',
            f"{name}(void* const* inputs, void* const* constants, char* arena, int64_t round) {{",
            *(self._pointers[array] for array in used),
            *lines,
            "}",
        ]

    def product(self, out: Array) -> Product:
        """What cuBLAS is to do for ``out``."""
        a, b = (self._place(x) for x in self._launched[out])
        result = self._place(of_array(out))
        if len(a.shape) == 3:
            batch, m, k = a.shape
            n = b.shape[2]
            # Stacked rows, or a batch of vectors, with one matrix are one product.
            if b.strides[0] == 0 and (m == 1 or a.strides[0] == m * a.strides[1]):
                row = a.strides[0] if m == 1 else a.strides[1]
                a = a.matrix((batch * m, k), (row, a.strides[2]))
                b = b.matrix((k, n), b.strides[1:])
                result = result.matrix((batch * m, n), (n, 1))
            elif a.strides[0] == 0 and n == 1:
                turned = a.matrix((k, m), (a.strides[2], a.strides[1]))
                a = b.matrix((batch, k), (b.strides[0], b.strides[1]))
                b, result = turned, result.matrix((batch, m), (m, 1))
        return Product(a, b, result, out.dtype)

    def _place(self, x: Value) -> Place:
        array, start, strides = place_of(x)
        of, number = self._places[array.name]
        if of == "arena":
            start, number = start + number, 0
        return Place(of, number, start, x.shape, tuple(strides))
