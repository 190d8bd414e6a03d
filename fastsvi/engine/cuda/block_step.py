"""A pure step as one CUDA kernel that takes many steps, a thread block for each fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastsvi.engine.cuda import driver
from fastsvi.engine.cuda.emit import BlockSource, emit_block
from fastsvi.engine.graph import Graph
from fastsvi.engine.graph_loop import Pace, to_device
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.pure import Step, check_states, distinct
from fastsvi.engine.record import Aliases, record
from fastsvi.errors import CaptureError
from fastsvi.kernels import dispatch

# Working memory of all blocks of a launch; more fits are taken in turns.
_MOST_MEMORY = 256 << 20


def recorded(step: Step, tensors: Sequence[Tensor], aliases: Aliases = ()) -> Graph:
    """The recording that kernels are generated from, as NativeStep's: in ATen's simple words."""
    with dispatch.use("torch"):  # Triton's kernels could not be looked into
        return record(step, distinct(tensors), aliases)


def check_form(graph: Graph, state: Sequence[Tensor]) -> None:
    """Raise an error if new states cannot be written over the old ones."""
    check_states(graph, state)
    for position, tensor in enumerate(state):
        if not tensor.is_contiguous():
            raise CaptureError(
                f"state {position} of a step must be contiguous, found strides {tensor.stride()} "
                f"of shape {tuple(tensor.shape)}"
            )


class BlockStep:
    """``step(*state, *inputs) -> (*new_state, loss, halt)`` on a GPU, recorded once and compiled.

    The twin of :class:`~fastsvi.engine.native.NativeStep`, for steps whose arrays are small. A step
    whose ``halt`` is true counts like any other: it must see to it itself that its new state is
    what the next one is to begin with.

    Nothing waits for the device: losses lie there, and are there when it gets so far.

    Args:
        step: a pure function; every new state has the shape and dtype of the old.
        state: contiguous tensors on one device; :meth:`run` overwrites them.
        inputs: read at each step; those on the host are copied when a run begins.
        aliases: see :func:`~fastsvi.engine.record.record`.
        graph: the recording, where there is one already: see :func:`recorded`.

    Raises:
        CaptureError: the step cannot be recorded, uses an operation that is not known here, or is
            too large for a block.
    """

    def __init__(
        self,
        step: Step,
        state: Sequence[Tensor],
        inputs: Sequence[Tensor] = (),
        aliases: Aliases = (),
        graph: Graph | None = None,
    ) -> None:
        self._state, self._inputs = list(state), list(inputs)
        self.device = self._state[0].device
        self.graph = graph or recorded(step, [*state, *inputs], aliases)
        check_form(self.graph, self._state)
        self.form = [(node.shape, node.dtype) for node in self.graph.inputs]
        program = Program(self.graph, products="loops")
        plan = schedule(program, len(self._state))
        most = driver.most_shared_bytes(self.device)
        self.emitted: BlockSource = emit_block(program, plan, len(self._state), most_shared=most)
        self._constants = [tensor for _, tensor in program.constants] + self.emitted.tables
        self._loss = self.graph.outputs[-2]
        self._kernel: driver.Kernel | None = None
        self._held: list[Tensor] = []  # constants on the device
        self._places: Tensor | None = None  # their addresses
        self._arena: Tensor | None = None
        # The latest table of addresses, and the tensors that it is of.
        self._table: tuple[list[Tensor], list[int], Tensor, Tensor] | None = None
        self._pace = Pace(self.device)

    @property
    def num_state(self) -> int:
        """How many tensors a step replaces."""
        return len(self._state)

    @property
    def source(self) -> str:
        """The CUDA source."""
        return self.emitted.source

    @property
    def arena_bytes(self) -> int:
        """Working memory of a fit."""
        return self.emitted.arena_bytes

    def build(self) -> None:
        """Compile, or find the compiled form, and bring it to the device.

        Raises:
            CaptureError: it cannot be compiled.
        """
        if self._kernel is None:
            kernels = driver.load(self.source, self.device)
            self._held = [to_device(x.detach(), self.device) for x in self._constants]
            self._places = driver.numbers([x.data_ptr() for x in self._held] or [0], self.device)
            self._kernel = kernels.kernel("run")

    def run(
        self,
        num_steps: int,
        state: Sequence[Tensor] | None = None,
        inputs: Sequence[Tensor] | None = None,
        stepped: Collection[int] = (),
    ) -> Tensor:
        """Take steps; returns the losses ``[num_steps, *loss shape]`` without waiting for them.

        Args:
            num_steps: how many.
            state, inputs: tensors like those that the step was made for, in their place.
            stepped: positions of inputs with an axis of steps in front, of which each step reads
                the row of its number.

        Raises:
            CaptureError: a tensor has another shape or dtype, or a state is not contiguous.
        """
        own = self._state if state is None else list(state)
        given = self._inputs if inputs is None else list(inputs)
        with torch.cuda.device_of(self._state[0]):
            tensors = [*own, *self.placed(given)]
            rows = {len(own) + position for position in stepped}
            table, strides = self._addresses(tensors, rows, num_steps)
            losses, _ = self.launch(table, strides, num_steps)
            self._pace.keep()
        torch.autograd.graph.increment_version(own)
        return losses[0]

    def placed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs where a kernel reads them: dense and on the device."""
        return [to_device(x, self.device).contiguous() for x in inputs]

    def _addresses(
        self, tensors: list[Tensor], rows: set[int], num_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Where the step finds its tensors, and by how much each moves on per step, in bytes."""
        values = [x.data_ptr() for x in tensors]
        strides = [
            x.stride(0) * x.element_size() if k in rows else 0 for k, x in enumerate(tensors)
        ]
        known, numbers = self._table, values + strides
        if known is not None and known[1] == numbers:
            return known[2], known[3]
        self._compare(tensors, rows)
        if any(len(tensors[k]) < num_steps for k in rows):
            raise CaptureError(f"an input has a row for each step, but too few for {num_steps}")
        both = driver.numbers(numbers, self.device)
        table, moves = both[: len(values)].unsqueeze(0), both[len(values) :]
        # Batches are others each time, and not to be kept.
        self._table = None if rows else (tensors, numbers, table, moves)
        return table, moves

    def _compare(self, tensors: Sequence[Tensor], rows: Collection[int]) -> None:
        if len(tensors) != len(self.form):
            raise CaptureError(
                f"a step of {len(self.form)} states and inputs was given {len(tensors)}"
            )
        for position, (new, (shape, dtype)) in enumerate(zip(tensors, self.form, strict=True)):
            found = tuple(new.shape[1:] if position in rows else new.shape)
            if found != shape or new.dtype != dtype or new.device != self.device:
                raise CaptureError(
                    f"argument {position} of a step was {shape}, {dtype} on {self.device} when it "
                    f"was compiled, found {found}, {new.dtype} on {new.device}"
                )
            if not new.is_contiguous():
                raise CaptureError(
                    f"argument {position} of a step must be contiguous, found strides "
                    f"{new.stride()} of shape {tuple(new.shape)}"
                )

    def launch(self, table: Tensor, strides: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Take steps with some fits at once, each of which has a row in a table of addresses.

        Args:
            table: int64 ``[F, n]``, on the device like all else.
            strides: int64 ``[n]``, bytes from step to step.
            num_steps: how many.

        Returns:
            Losses ``[F, steps, *loss shape]``, and which steps halted, ``[F, steps]``.
        """
        self.build()
        if self._kernel is None or self._places is None:
            raise CaptureError("a step was run before it was compiled")
        emitted, fits = self.emitted, len(table)
        losses = torch.empty(
            (fits, num_steps, *self._loss.shape), dtype=self._loss.dtype, device=self.device
        )
        halts = torch.empty((fits, num_steps), dtype=torch.bool, device=self.device)
        at_once = self._room(fits)
        row = num_steps * math.prod(self._loss.shape) * losses.element_size()
        for first in range(0, fits, at_once):
            arguments = [
                table[first].data_ptr(),
                table.shape[1],
                strides.data_ptr(),
                self._places.data_ptr(),
                0 if self._arena is None else self._arena.data_ptr(),
                emitted.arena_bytes,
                losses.data_ptr() + first * row,
                row,
                halts.data_ptr() + first * num_steps,
                num_steps,
            ]
            blocks = min(at_once, fits - first)
            shared = emitted.arena_bytes if emitted.in_shared else 0
            self._kernel(blocks, emitted.threads, arguments, shared)
        return losses, halts

    def _room(self, fits: int) -> int:
        """Make working memory for blocks, where it is not shared memory; for how many there is."""
        if self.emitted.in_shared or not self.emitted.arena_bytes:
            return max(1, fits)
        at_once = max(1, min(fits, _MOST_MEMORY // self.emitted.arena_bytes))
        if self._arena is None or len(self._arena) < at_once * self.emitted.arena_bytes:
            self._arena = None  # first let go, then ask anew
            size = at_once * self.emitted.arena_bytes
            self._arena = torch.empty(size, dtype=torch.uint8, device=self.device)
        return at_once

    def release(self) -> None:
        """Let go of the working memory; the next run asks for it anew."""
        self._arena = None
