"""Steps on an accelerator as a CUDA graph, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine import cuda_graph
from fastsvi.errors import CaptureError
from fastsvi.infer.pure_step import PureStep

Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Steps in one graph: what a launch costs is shared by so many.
_STEPS = 16


class GraphedLoop:
    """The steps of ``pure``, which change its live state in place.

    The interface is that of :class:`~fastsvi.engine.native.NativeStep`. A step that is not finite
    is left out and counted in ``pure.skipped``; the run goes on.

    Args:
        pure: the step.
        capture: makes a graph of launches; another one can be given for tests.
    """

    def __init__(self, pure: PureStep, capture: Capture = cuda_graph.capture) -> None:
        self._pure = pure
        self._capture = capture
        self._losses = torch.empty(_STEPS, dtype=pure.buffer.dtype, device=pure.buffer.device)
        self._one: Callable[[], None] | None = None
        self._many: Callable[[], None] | None = None
        self._launched: Any = None  # event behind the latest run

    def build(self) -> None:
        """Capture the graphs; the state stays as it is.

        Raises:
            CaptureError: a graph cannot hold the step.
        """
        if self._one is not None:
            return
        before = [tensor.clone() for tensor in self._live()]
        try:
            self._one = self._capture(lambda: self._take(1))
            self._many = self._capture(lambda: self._take(_STEPS))
        except RuntimeError as error:
            self._one = None
            raise CaptureError(f"a CUDA graph cannot hold the step: {error}") from error
        finally:
            self._put(before)

    def _take(self, count: int) -> None:
        for k in range(count):
            self._losses[k].copy_(self._pure.take())

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
        losses = self._losses.new_empty(num_steps)
        done = 0
        while done < num_steps:
            count = _STEPS if num_steps - done >= _STEPS and not stepped else 1
            if inputs is not None:
                for position in stepped:
                    self._pure.inputs[position].copy_(inputs[position][done])
            (self._many if count == _STEPS else self._one)()
            losses[done : done + count].copy_(self._losses[:count])
            done += count
        if state is not None and before is not None:
            for tensor, live in zip(state, self._live(), strict=True):
                tensor.copy_(live)
            self._put(before)
        self._keep_pace()
        return losses

    def _live(self) -> list[Tensor]:
        return self._pure.state

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for live, value in zip(self._live(), values, strict=True):
                live.copy_(value)

    def _keep_pace(self) -> None:
        """Wait for the run before the latest: the host stays one run ahead, and not further."""
        if self._losses.device.type != "cuda":
            return
        previous, self._launched = self._launched, torch.cuda.Event()
        self._launched.record()
        if previous is not None:
            previous.synchronize()
