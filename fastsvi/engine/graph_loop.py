"""Steps on an accelerator as a CUDA graph, replayed without the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine import cuda_graph
from fastsvi.errors import CaptureError

Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Steps in one graph: what a launch costs is shared by so many, but for long steps, of which it is
# little and whose graphs would take long to make.
_STEPS = 16
_MOST_OPERATIONS = 4096


class GraphLoop:
    """Steps that change live state in place; what a step launches is for its subclasses to say.

    The interface is that of :class:`~fastsvi.engine.native.NativeStep`, but that a step that is not
    finite counts like any other: the run goes on.

    Args:
        state: what a step changes.
        inputs: what it reads besides. Such as lie on the host, as floats and batches of a
            DataLoader do, are copied to the device when a run begins.
        loss: the dtype of the loss, a scalar.
        operations: about how many launches a step has.
        capture: makes a graph of launches; another one can be given for tests.
    """

    def __init__(
        self,
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        loss: torch.dtype,
        operations: int,
        capture: Capture | None = None,
    ) -> None:
        device = state[0].device
        self._state, self._given = state, inputs
        self._capture = capture
        self._count = max(1, min(_STEPS, _MOST_OPERATIONS // max(1, operations)))
        self._losses = torch.empty(self._count, dtype=loss, device=device)
        # A graph would keep the numbers of the host that it was captured with.
        self._inputs: list[Tensor] = []
        for tensor in inputs:
            own = to_device(tensor, device).contiguous()
            is_given_twice = any(own is other for other in self._inputs)
            self._inputs.append(own.clone() if is_given_twice else own)
        self._one: Callable[[], None] | None = None
        self._many: Callable[[], None] | None = None
        self._pace = Pace(device)

    def _take(self, count: int) -> None:
        """Launch so many steps, which leave their losses in ``self._losses``."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Leave behind what eager steps would."""

    def build(self) -> None:
        """Capture the graphs; the state stays as it is.

        Raises:
            CaptureError: a graph cannot hold the step.
        """
        if self._many is not None:
            return
        before = [tensor.clone() for tensor in self._state]
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
        before = None if state is None else [tensor.clone() for tensor in self._state]
        if state is not None:
            self._put(state)
        with torch.cuda.device_of(self._losses):
            losses = self._steps(self._one, self._many, num_steps, inputs, stepped)
            if state is not None and before is not None:
                for tensor, live in zip(state, self._state, strict=True):
                    tensor.copy_(live)
                self._put(before)
            self._leave()
            self._pace.keep()
        return losses

    def _steps(
        self,
        one: Callable[[], None],
        many: Callable[[], None],
        num_steps: int,
        inputs: Sequence[Tensor] | None,
        stepped: Collection[int],
    ) -> Tensor:
        given = self._given if inputs is None else inputs
        device = self._losses.device
        rows = {position: to_device(given[position], device) for position in stepped}
        for position, (own, tensor) in enumerate(zip(self._inputs, given, strict=True)):
            if position not in rows and own is not tensor:
                own.copy_(to_device(tensor, device))
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

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for live, value in zip(self._state, values, strict=True):
                live.copy_(value)


class Pace:
    """Keeps the host one run ahead of the device, and not further."""

    def __init__(self, device: torch.device) -> None:
        self._is_ahead = device.type == "cuda"
        self._launched: Any = None  # event behind the latest run

    def keep(self) -> None:
        """Wait for the run before the latest, which has just been launched."""
        if not self._is_ahead:
            return
        previous, self._launched = self._launched, torch.cuda.Event()
        self._launched.record()
        if previous is not None:
            previous.synchronize()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on the device, without waiting for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
