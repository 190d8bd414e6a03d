"""A pure step, compiled to a native loop over steps that updates its state in place."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastsvi.engine.loops import blas, build, team
from fastsvi.engine.loops.emit import emit
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.memory import ALIGNMENT
from fastsvi.engine.loops.prelude_team import TEAM
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.pure import Step, check_states, distinct
from fastsvi.engine.record import Aliases, record
from fastsvi.errors import CaptureError


class NativeStep:
    """``step(*state, *inputs) -> (*new_state, loss, halt)``, recorded once and compiled.

    A step whose ``halt``, a bool scalar, is true ends the run and is not counted; the step itself
    must see to it that its new state is the old one then.

    What the step reads without being given it is taken for constant: large tensors are read where
    they lie, but numbers and whatever was computed from constants are frozen. ``graph.is_current``
    says whether any has been written to since.

    Large loops and products are divided among ``torch.get_num_threads()`` threads; results have the
    same bits for any number of them. Calls of :meth:`run` in several threads run at the same time,
    each in working memory of its own, as long as they are given different states; the team of
    threads serves one of them at a time.

    Args:
        step: a pure function; every new state has the shape and dtype of the old.
        state: CPU tensors, contiguous; :meth:`run` overwrites them.
        inputs: CPU tensors, contiguous; read at each step.
        aliases: see :func:`~fastsvi.engine.record.record`.

    Raises:
        CaptureError: the step cannot be recorded, or uses an operation that is not known here, or
            there is no C++ compiler.

    >>> count, total = torch.zeros(()), torch.zeros(3)
    >>> def step(count, total, x):
    ...     total = total + x
    ...     return count + 1, total, total.sum(), total.isnan().any()
    >>> native = NativeStep(step, [count, total], [torch.ones(3)])
    >>> native.run(4)
    tensor([ 3.,  6.,  9., 12.])
    >>> total
    tensor([4., 4., 4.])
    """

    def __init__(
        self,
        step: Step,
        state: Sequence[Tensor],
        inputs: Sequence[Tensor] = (),
        aliases: Aliases = (),
    ) -> None:
        self._tensors = [*state, *inputs]
        self._state = list(state)
        for position, tensor in enumerate(self._tensors):
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise CaptureError(
                    f"argument {position} of a native step must be a contiguous CPU tensor, found "
                    f"shape {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device}"
                )
        self.graph = graph = record(step, distinct(self._tensors), aliases)
        check_states(graph, self._state)
        program = Program(graph)
        plan = schedule(program, len(state))
        self.source, size = emit(program, plan, len(state))
        self.arena_bytes = size
        self._constants = [tensor for _, tensor in program.constants]
        self._constant_pointers = _pointers(self._constants)
        self._arenas: list[Tensor] = []  # those that no thread is using
        self._form = [(x.shape, x.dtype) for x in self._tensors]
        self._standing = (ctypes.c_int64 * (len(self._tensors) + 1))()  # no input is stepped
        self._loss = graph.outputs[-2]
        self._is_divided = TEAM in self.source
        self._library: ctypes.CDLL | None = None

    @property
    def is_built(self) -> bool:
        """Whether the compiled form is in the cache on disk."""
        return build.library_path(self.source).exists()

    def build(self) -> None:
        """Compile, or find the compiled form; may run in a thread of its own."""
        if self._library is None:
            self._library = build.load(build.compile_source(self.source))
            if self._is_divided and torch.get_num_threads() > 1:
                team.share()

    def run(
        self,
        num_steps: int,
        stop: ctypes.c_int | None = None,
        state: Sequence[Tensor] | None = None,
        inputs: Sequence[Tensor] | None = None,
        stepped: Collection[int] = (),
    ) -> Tensor:
        """Take steps; returns the losses ``[steps made, *loss shape]``.

        Args:
            num_steps: how many.
            stop: a value other than 0, set by a signal handler or another thread, ends the run
                after the current step.
            state, inputs: tensors like those that the step was made for, in their place.
            stepped: positions of inputs with an axis of steps in front, of which each step reads
                the row of its number: batches that were stacked, say.

        Raises:
            CaptureError: a tensor has another shape or dtype, or is not contiguous.

        >>> total = torch.zeros(2)
        >>> def step(total, x):
        ...     return total + x, total.sum(), total.isnan().any()
        >>> native = NativeStep(step, [total], [torch.ones(2)])
        >>> native.run(3, inputs=[torch.arange(6.0).view(3, 2)], stepped=[0])
        tensor([0., 1., 6.])
        """
        if self._library is None:
            self.build()
        count = len(self._state)
        own = self._state if state is None else state
        given = self._tensors[count:] if inputs is None else inputs
        tensors = [*own, *given]
        strides = self._standing
        if state is not None or inputs is not None or stepped:
            self._compare(tensors, len(own), num_steps, stepped)
        if stepped:
            strides = type(strides)()
            for position in stepped:
                row = given[position]
                strides[count + position] = row.stride(0) * row.element_size()
        threads = torch.get_num_threads() if self._is_divided else 1
        share = team.share() if threads > 1 else None
        losses = torch.empty((num_steps, *self._loss.shape), dtype=self._loss.dtype)
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = torch.empty(self.arena_bytes + ALIGNMENT, dtype=torch.uint8)
        done = self._library.run(  # type: ignore[union-attr]
            _pointers(tensors),
            strides,
            self._constant_pointers,
            -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT,
            losses.data_ptr(),
            num_steps,
            stop if stop is not None else _NEVER,
            blas.pointers(),
            threads if share else 1,
            share,
        )
        self._arenas.append(arena)
        torch.autograd.graph.increment_version(own)
        return losses if done == num_steps else losses[:done]

    def release(self) -> None:
        """Let go of the working memory; the next run asks for it anew."""
        self._arenas.clear()

    def _compare(
        self, tensors: Sequence[Tensor], num_state: int, num_steps: int, stepped: Collection[int]
    ) -> None:
        if num_state != len(self._state) or len(tensors) != len(self._tensors):
            raise CaptureError(
                f"a native step of {len(self._state)} states and "
                f"{len(self._tensors) - len(self._state)} inputs was given {num_state} and "
                f"{len(tensors) - num_state}"
            )
        rows = {num_state + position for position in stepped}
        for position, (new, (shape, dtype)) in enumerate(zip(tensors, self._form, strict=True)):
            found = new.shape
            if position in rows:
                if new.dim() == 0 or len(new) < num_steps:
                    raise CaptureError(
                        f"argument {position} of a native step has a row for each step: "
                        f"{num_steps} steps need more than shape {tuple(found)}"
                    )
                found = found[1:]
            if found != shape or new.dtype != dtype or not (new.is_cpu and new.is_contiguous()):
                raise CaptureError(
                    f"argument {position} of a native step was {tuple(shape)}, {dtype} when it was "
                    f"compiled, found {tuple(found)}, {new.dtype}, strides {new.stride()} on "
                    f"{new.device}; record the step anew"
                )


_NEVER = ctypes.c_int(0)  # a run that nobody stops


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(tensors)))(*[t.data_ptr() for t in tensors])
