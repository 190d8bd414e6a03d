"""The launches of a recorded step as a CUDA graph: what runs where no kernels can be generated."""

from __future__ import annotations

from fastsvi.engine.graph import Graph
from fastsvi.engine.graph_loop import Capture, GraphLoop
from fastsvi.engine.launches import Launches
from fastsvi.engine.record import record
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking


class GraphedLoop(GraphLoop):
    """The steps of ``pure``, which change its live state in place.

    Loss and gradient are recorded as operations on the device; the graph is of these, followed by
    the optimizer's own launch. A step that is not finite is left out and counted in
    ``pure.skipped``; the run goes on.

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
        self.graph = self.record()
        operations = len(self.graph.nodes)
        super().__init__(pure.state, pure.inputs, pure.buffer.dtype, operations, capture)
        self._launches = Launches(self.graph, pure.buffer.device)

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

    def _take(self, count: int) -> None:
        for k in range(count):
            loss, *pieces = self._launches([*self._state, *self._inputs])
            self._pure.update(loss, pieces)
            self._losses[k].copy_(loss)

    def _leave(self) -> None:
        """Eager steps add to the flat gradient: leave it as they do."""
        self._pure.buffer.zero_grad()
