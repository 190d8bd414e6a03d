"""A pure step, compiled to a native loop over steps that updates its state in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsvi.engine.loops import build, products
from fastsvi.engine.loops.emit import ALIGNMENT, emit
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.record import Aliases, Graph, record
from fastsvi.errors import CaptureError

Step = Callable[..., Sequence[Tensor]]


class NativeStep:
    """``step(*state, *inputs) -> (*new_state, loss, halt)``, recorded once and compiled.

    A step whose ``halt``, a bool scalar, is true ends the run and is not counted; the step itself
    must see to it that its new state is the old one then.

    What the step reads without being given it is taken for constant: large tensors are read where
    they lie, but numbers and whatever was computed from constants are frozen. ``graph.is_current``
    says whether any has been written to since.

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
        self.graph = graph = record(step, self._tensors, aliases)
        self._check(graph)
        program = Program(graph)
        plan = schedule(program, len(state))
        self.source, size = emit(program, plan, len(state))
        self._constants = [tensor for _, tensor in program.constants]
        self._arena = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        self._loss = graph.outputs[-2].value
        self._library: ctypes.CDLL | None = None

    def _check(self, graph: Graph) -> None:
        if len(graph.outputs) != len(self._state) + 2:
            raise CaptureError(
                f"a step must return its {len(self._state)} states, a loss and whether to halt, "
                f"found {len(graph.outputs)} tensors"
            )
        for position, (old, new) in enumerate(zip(self._state, graph.outputs, strict=False)):
            if new.shape != tuple(old.shape) or new.dtype != old.dtype:
                raise CaptureError(
                    f"state {position} was {tuple(old.shape)}, {old.dtype} before the step and "
                    f"{new.shape}, {new.dtype} after it"
                )

    @property
    def is_built(self) -> bool:
        """Whether the compiled form is in the cache on disk."""
        return build.library_path(self.source).exists()

    def build(self) -> None:
        """Compile, or find the compiled form; may run in a thread of its own."""
        if self._library is None:
            self._library = build.load(build.compile_source(self.source))

    def run(
        self,
        num_steps: int,
        stop: ctypes.c_int | None = None,
        state: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Take steps; returns the losses ``[steps made, *loss shape]``.

        A value other than 0 in ``stop``, set by a signal handler or another thread, ends the run
        after the current step. ``state``, tensors of the same shapes, is used in place of the
        step's own if given.
        """
        own = self._state if state is None else list(state)
        self.build()
        if self._library is None:
            raise CaptureError("a native step was run before it was built")
        losses = torch.empty((num_steps, *self._loss.shape), dtype=self._loss.dtype)
        base = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        done = self._library.run(
            _pointers([*own, *self._tensors[len(own) :]]),
            _pointers(self._constants),
            ctypes.c_void_p(base),
            ctypes.c_void_p(losses.data_ptr()),
            ctypes.c_int64(num_steps),
            ctypes.byref(stop if stop is not None else ctypes.c_int(0)),
            products.pointers(),
        )
        torch.autograd.graph.increment_version(own)
        return losses[:done]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
