"""A pure step as generated kernels and products of cuBLAS, several steps in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsvi.engine.cuda import driver
from fastsvi.engine.cuda.block_step import check_form, recorded
from fastsvi.engine.cuda.emit import KernelSource, Launch, Place, Product, emit_kernels
from fastsvi.engine.graph import Graph
from fastsvi.engine.graph_loop import Capture, GraphLoop, to_device
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.pure import Step
from fastsvi.engine.record import Aliases
from fastsvi.errors import CaptureError


class KernelLoop(GraphLoop):
    """``step(*state, *inputs) -> (*new_state, loss, halt)`` on a GPU, recorded once and compiled.

    For steps with large arrays, of which each pass is spread over the whole device. ``state`` is
    changed where it lies, and a step whose ``halt`` is true counts like any other; see
    :class:`~fastsvi.engine.cuda.block_step.BlockStep`.

    Args:
        step, state, inputs, aliases, graph: see there.
        capture: makes a graph of launches; another one can be given for tests.

    Raises:
        CaptureError: the step cannot be recorded, or uses an operation that is not known here.
    """

    def __init__(
        self,
        step: Step,
        state: Sequence[Tensor],
        inputs: Sequence[Tensor] = (),
        aliases: Aliases = (),
        graph: Graph | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.device = state[0].device
        self.graph = graph or recorded(step, [*state, *inputs], aliases)
        check_form(self.graph, state)
        program = Program(self.graph, products="device")
        plan = schedule(program, len(state))
        self.emitted: KernelSource = emit_kernels(program, plan, len(state))
        emitted = self.emitted
        self._constants = [tensor for _, tensor in program.constants] + emitted.tables
        self._loss = self.graph.outputs[-2]
        if self._loss.shape:
            raise CaptureError(f"a step has one loss, found a tensor of shape {self._loss.shape}")
        launches = len(emitted.before) + len(emitted.after) + emitted.rounds * len(emitted.body)
        super().__init__(state, inputs, self._loss.dtype, launches, capture)
        self._launches: list[Callable[[], object]] = []

    @property
    def source(self) -> str:
        """The CUDA source."""
        return self.emitted.source

    @property
    def arena_bytes(self) -> int:
        """Working memory of a step."""
        return self.emitted.arena_bytes

    def build(self) -> None:
        """Compile, or find the compiled form, and capture the graphs; the state stays as it is.

        Raises:
            CaptureError: it cannot be compiled, or a graph cannot hold it.
        """
        if not self._launches:
            kernels = driver.load(self.source, self.device)
            with torch.cuda.device_of(self._losses):
                self._prepare(kernels)
        super().build()

    def _prepare(self, kernels: driver.Kernels) -> None:
        """Lay everything out in memory, where it then stays."""
        emitted, device = self.emitted, self.device
        inputs = [*self._state, *self._inputs]
        constants = [to_device(x.detach(), device) for x in self._constants]
        arena = torch.empty(max(1, emitted.arena_bytes), dtype=torch.uint8, device=device)
        given = driver.numbers([x.data_ptr() for x in inputs] or [0], device)
        fixed = driver.numbers([x.data_ptr() for x in constants] or [0], device)
        addresses = [given.data_ptr(), fixed.data_ptr(), arena.data_ptr()]

        def view(place: Place, dtype: torch.dtype) -> Tensor:
            if place.of == "arena":
                base = _flat(arena, dtype)
            else:
                base = _flat((inputs if place.of == "input" else constants)[place.number], dtype)
            # Counted from the beginning of the storage, of which an input may be a part.
            start = base.storage_offset() + place.offset
            return base.as_strided(place.shape, place.strides, start)

        def launcher(launch: Launch | Product, number: int) -> Callable[[], object]:
            if isinstance(launch, Product):
                a, b, out = (view(x, launch.dtype) for x in (launch.a, launch.b, launch.out))
                if launch.add:
                    return lambda: out.addmm_(a, b) if out.dim() == 2 else out.baddbmm_(a, b)
                return lambda: (torch.mm if out.dim() == 2 else torch.bmm)(a, b, out=out)
            kernel = kernels.kernel(launch.name)
            return lambda: kernel(launch.blocks, launch.threads, [*addresses, number])

        rounds = [(launch, k) for k in range(emitted.rounds) for launch in emitted.body]
        pairs = [(x, 0) for x in emitted.before] + rounds + [(x, 0) for x in emitted.after]
        self._launches = [launcher(launch, number) for launch, number in pairs]
        size = self._loss.dtype.itemsize
        self._found = _flat(arena, self._loss.dtype)[emitted.loss_offset // size]
        self._kept = [*inputs, *constants, arena, given, fixed]  # what the addresses are of

    def _take(self, count: int) -> None:
        with torch.no_grad():
            for k in range(count):
                for launch in self._launches:
                    launch()
                self._losses[k].copy_(self._found)


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole memory of a dense tensor as a vector, in another dtype if need be."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    if flat.dtype == dtype:
        return flat
    size = dtype.itemsize // flat.element_size()
    return flat[: len(flat) // max(1, size) * max(1, size)].view(dtype)
