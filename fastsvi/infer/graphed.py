"""Steps on an accelerator as a CUDA graph, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine import cuda_graph
from fastsvi.engine.graph import Graph
from fastsvi.engine.launches import Launches
from fastsvi.engine.record import record
from fastsvi.errors import CaptureError
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking

Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Steps in one graph: what a launch costs is shared by so many, but for long steps, of which it is
# little and whose graphs would take long to make.
_STEPS = 16
_MOST_OPERATIONS = 4096


class GraphedLoop:
    """The steps of ``pure``, which change its live state in place.

    Loss and gradient are recorded as operations on the device; the graph is of these, followed by
    the optimizer's own launch. The interface is that of
    :class:`~fastsvi.engine.native.NativeStep`. A step that is not finite is left out and counted
    in ``pure.skipped``; the run goes on.

    Args:
        pure: the step.
        capture: makes a graph of launches; another one can be given for tests.

    Attributes:
        graph: the recording.

    Raises:
        CaptureError: the step cannot be recorded; the message names the statement.
    """

    def __init__(self, pure: PureStep, capture: Capture | None = None) -> None:
        self._pure = pure
        self._capture = capture
        device = pure.buffer.device
        self.graph = self.record()
        self._count = max(1, min(_STEPS, _MOST_OPERATIONS // max(1, len(self.graph.nodes))))
        self._losses = torch.empty(self._count, dtype=pure.buffer.dtype, device=device)
        self._launches = Launches(self.graph, device)
        # Inputs that the program has on the host, such as floats and batches of a DataLoader, are
        # read on the device: a graph would keep the numbers that it was captured with.
        self._inputs = [tensor.to(device) for tensor in pure.inputs]
        self._one: Callable[[], None] | None = None
        self._many: Callable[[], None] | None = None
        self._launched: Any = None  # event behind the latest run

    def record(self) -> Graph:
        """Record loss and gradient."""
        pure = self._pure
        with checking(False):
            return record(
                pure.loss_and_gradient,
                [*pure.state, *pure.inputs],
                pure.aliases,
                decomposed=False,
                computes=True,  # its kernels are compiled when they are first run
            )

    def build(self) -> None:
        """Capture the graphs; the state stays as it is.

        Raises:
            CaptureError: a graph cannot hold the step.
        """
        if self._many is not None:
            return
        before = [tensor.clone() for tensor in self._live()]
        try:
            with torch.cuda.device_of(self._losses):
                capture = self._capture or cuda_graph.Capturer()
                self._one = capture(lambda: self._take(1))
                self._many = capture(lambda: self._take(self._count))
        except RuntimeError as error:
            cause = cuda_graph.reason(error)
            raise CaptureError(f"a CUDA graph cannot hold the step: {cause}") from error
        finally:
            self._put(before)
            self._leave()

    def _take(self, count: int) -> None:
        for k in range(count):
            loss, *pieces = self._launches([*self._live(), *self._inputs])
            self._pure.update(loss, pieces)
            self._losses[k].copy_(loss)

    def run(
        self,
        num_steps: int,
        state: Sequence[Tensor] | None = None,
        inputs: Sequence[Tensor] | None = None,
        stepped: Collection[int] = (),
    ) -> Tensor:
        """Take steps; returns their losses ``[num_steps]`` without waiting for them.

        Args:
            num_steps: how many.
            state: is used, and changed, in place of the live one.
            inputs, stepped: as for :meth:`~fastsvi.engine.native.NativeStep.run`.
        """
        self.build()
        if self._one is None or self._many is None:
            raise CaptureError("a step was run before it was captured")
        before = None if state is None else [tensor.clone() for tensor in self._live()]
        if state is not None:
            self._put(state)
        with torch.cuda.device_of(self._losses):
            losses = self._steps(self._one, self._many, num_steps, inputs, stepped)
            if state is not None and before is not None:
                for tensor, live in zip(state, self._live(), strict=True):
                    tensor.copy_(live)
                self._put(before)
            self._leave()
            self._keep_pace()
        return losses

    def _steps(
        self,
        one: Callable[[], None],
        many: Callable[[], None],
        num_steps: int,
        inputs: Sequence[Tensor] | None,
        stepped: Collection[int],
    ) -> Tensor:
        given = self._pure.inputs if inputs is None else inputs
        rows = {position: given[position].to(self._losses.device) for position in stepped}
        for position, (own, tensor) in enumerate(zip(self._inputs, given, strict=True)):
            if position not in rows and own is not tensor:
                own.copy_(tensor)
        losses = self._losses.new_empty(num_steps)
        done = 0
        while done < num_steps:
            count = self._count if num_steps - done >= self._count and not rows else 1
            for position, row in rows.items():
                self._inputs[position].copy_(row[done])
            (many if count == self._count else one)()
            losses[done : done + count].copy_(self._losses[:count])
            done += count
        return losses

    def _live(self) -> list[Tensor]:
        return self._pure.state

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for live, value in zip(self._live(), values, strict=True):
                live.copy_(value)

    def _leave(self) -> None:
        """Eager steps add to the flat gradient: leave it as they do."""
        self._pure.buffer.zero_grad()

    def _keep_pace(self) -> None:
        """Wait for the run before the latest: the host stays one run ahead, and not further."""
        if self._losses.device.type != "cuda":
            return
        previous, self._launched = self._launched, torch.cuda.Event()
        self._launched.record()
        if previous is not None:
            previous.synchronize()
