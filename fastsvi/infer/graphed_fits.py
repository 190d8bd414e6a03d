"""The replayed step of many fits as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsvi.engine import cuda_graph


class GraphedFits:
    """A step of all fits as a CUDA graph, or as it is where a graph cannot hold it."""

    def __init__(
        self,
        take: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        is_stepped: Sequence[bool],
    ) -> None:
        self.obstacle: str | None = None
        self._state, self._is_stepped = state, list(is_stepped)
        pairs = zip(inputs, is_stepped, strict=True)
        # What it reads. A number on the host would be read once, when the graph is captured.
        device = state[0].device
        self._held = [
            x[0].to(device, copy=True) if stepped else x.to(device) for x, stepped in pairs
        ]
        outcome: list[Tensor] = []  # lies in the graph's memory

        def launch() -> None:
            outcome[:] = take(self._held)

        self._launch: Callable[[], None] = launch
        self._outcome = outcome
        before = [tensor.clone() for tensor in state]
        try:
            with torch.cuda.device_of(before[0]):
                self._launch = cuda_graph.capture(launch)
        except RuntimeError as error:
            cause = cuda_graph.reason(error)
            self.obstacle = f"a CUDA graph cannot hold the step: {cause}"
        finally:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

    def serves(
        self, state: Sequence[Tensor], inputs: Sequence[Tensor], is_stepped: Sequence[bool]
    ) -> bool:
        """Whether it reads these tensors, or such as are copied to where it does."""
        pairs = zip(self._held, inputs, is_stepped, strict=True)
        return (
            state is self._state
            and list(is_stepped) == self._is_stepped
            and all(stepped or held is given for held, given, stepped in pairs)
        )

    def take(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One step with these inputs."""
        for held, given, stepped in zip(self._held, inputs, self._is_stepped, strict=True):
            if stepped:
                held.copy_(given)
        self._launch()
        loss, halts = self._outcome
        return loss, halts
