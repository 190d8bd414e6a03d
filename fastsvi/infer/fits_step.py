"""The step of many fits: captured for one of them, taken by all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.engine import cuda_graph
from fastsvi.engine.graph import Graph
from fastsvi.engine.native import NativeStep
from fastsvi.engine.native_fits import NativeFits
from fastsvi.engine.record import record
from fastsvi.engine.replay import ReplayStep, replay
from fastsvi.errors import CaptureError
from fastsvi.infer import captured
from fastsvi.infer.fit_data import FitData
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking
from fastsvi.kernels import dispatch

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI


class FitsStep:
    """The step of ``svi`` for ``data`` and all that have their form.

    The param store holds the example whose arguments the step is recorded with.

    Args:
        svi: what is fitted.
        data: of all fits.
        native: whether to compile it; else, and where that fails, it is replayed.

    Attributes:
        pure: the step of one fit.
        obstacle: why it is not native though it was to be; None if it is.
        capture_seconds, compile_seconds: what capturing and compiling took.

    Raises:
        CaptureError: the step cannot be captured.
    """

    def __init__(self, svi: SVI, data: FitData, native: bool) -> None:
        self._svi = svi
        self.data = data
        self._example = data.of(data.first_finite())
        self.asked_native = native
        self.obstacle: str | None = None
        self.compile_seconds = 0.0
        start = time.perf_counter()
        self.pure = self._make_pure()
        self._native = self._make_native() if native else None
        self._graph = self._record() if self._native is None else self._native.graph
        self.capture_seconds = time.perf_counter() - start - self.compile_seconds
        own = [True] * len(self.pure.state) + [False] * self._num_others + list(data.is_own)
        self._replay = ReplayStep(self._graph, len(self.pure.state), own)
        self._native_fits: Any = None  # the latest, with its state and its only batch
        self._graphed: Any = None  # on a GPU: launch, inputs, and what a launch gives
        self._look_seconds = self.capture_seconds
        self._seconds_since = 0.0  # in steps, since the latest look

    def _make_pure(self) -> PureStep:
        svi, example = self._svi, self._example
        noise = svi._program.noise if svi._program is not None else None
        step = 0 if noise is None else noise.step
        svi._accumulate(example.args, example.kwargs)  # makes the store's parameters, too
        svi._targets.zero_grad()
        if noise is not None:
            noise.step = step  # as if nothing had been drawn
        return PureStep(svi, example, self.data.lifted)

    def _make_native(self) -> NativeStep | None:
        pure = self.pure
        if pure.buffer.device.type != "cpu":
            return None
        try:
            with checking(False):
                native = NativeStep(pure, pure.state, pure.inputs, pure.aliases)
            start = time.perf_counter()
            native.build()
            self.compile_seconds = time.perf_counter() - start
        except CaptureError as error:
            self.obstacle = str(error)
            return None
        return native

    def _record(self) -> Graph:
        pure = self.pure
        inputs = [*pure.state, *pure.inputs]
        if self._native is not None:
            with checking(False):
                return record(pure, inputs, pure.aliases)
        # The reference is pure, Triton's Adam writes in place.
        with checking(False), dispatch.use("torch"):
            return record(pure, inputs, pure.aliases, decomposed=False)

    @property
    def _num_others(self) -> int:
        """How many inputs are no arguments: keys and learning rates."""
        return len(self.pure.inputs) - len(self.data.lifted)

    @property
    def is_native(self) -> bool:
        """Whether it runs as native loops, and is not replayed."""
        return self._native is not None

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of the losses."""
        return self._graph.outputs[-2].dtype

    # ------------------------------------------------------------------------------- is it right

    def serves(self, data: FitData) -> bool:
        """Whether it may be taken with these arguments, as far as tensors tell."""
        return data.has_form_of(self.data) and self.pure.is_current() and self._graph.is_current()

    def check(self) -> None:
        """Compare a captured with an eager step of the example, and take both back.

        Raises:
            Disagreement: they differ.
        """
        pure = self.pure
        live = [*pure.state, *pure.plan.state]
        before = [tensor.clone() for tensor in live]
        noise_step = pure.noise_step

        def take(state: list[Tensor]) -> Tensor:
            if self._native is not None:
                return self._native.run(1, state=state)
            outputs = replay(self._graph, [*state, *pure.inputs])
            for old, new in zip(state, outputs, strict=False):
                old.copy_(new)
            return outputs[-2]

        try:
            captured.compare(pure, self._example, take, self._step_eagerly)
        finally:
            with torch.no_grad():
                for tensor, value in zip(live, before, strict=True):
                    tensor.copy_(value)
            pure.buffer.touch()
            pure.noise_step = noise_step

    def _step_eagerly(self) -> Tensor:
        args, kwargs = self._example.args, self._example.kwargs
        loss: Tensor = self._svi._advance(args, kwargs, by_counter=True)
        return loss

    def is_due(self) -> bool:
        """Whether to look for a :meth:`difference`: in a twentieth of the time."""
        return self._seconds_since > captured.LOOKS_APART * self._look_seconds

    def difference(self) -> str | None:
        """The first statement that would be recorded otherwise now; None if there is none."""
        start, self._seconds_since = time.perf_counter(), 0.0
        try:
            anew = self._record()
        except CaptureError as error:
            return str(error)
        difference = self._graph.difference(anew)
        self._look_seconds = time.perf_counter() - start
        return difference

    def has_run(self, seconds: float) -> None:
        """Note that its steps took so long."""
        self._seconds_since += seconds

    # ----------------------------------------------------------------------------------- running

    def native_fits(self, state: Sequence[Tensor], batches: Sequence[FitData]) -> NativeFits:
        """The native step of all fits, with one batch for all steps or one for each."""
        if self._native is None:
            raise CaptureError("the step of these fits is not native")
        known = self._native_fits
        if known is not None and known[0] is state and len(batches) == 1 and known[1] is batches[0]:
            return known[2]
        inputs, is_stepped = self._inputs(batches)
        is_own = [False] * self._num_others + list(self.data.is_own)
        native = NativeFits(self._native, state, inputs, is_own, is_stepped)
        self._native_fits = (state, batches[0], native) if len(batches) == 1 else None
        return native

    def _inputs(self, batches: Sequence[FitData]) -> tuple[list[Tensor], list[bool]]:
        """Inputs of the step, and which have an axis of steps in front."""
        others = self.pure.inputs[: self._num_others]
        if len(batches) == 1:
            return [*others, *batches[0].inputs()], [False] * len(self.pure.inputs)
        stacks = [torch.stack(rows) for rows in zip(*(b.inputs() for b in batches), strict=True)]
        is_stepped = [False] * self._num_others + [True] * len(stacks)
        return [*others, *stacks], is_stepped

    def replayed(
        self, state: Sequence[Tensor], batches: Sequence[FitData]
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """A function of the number of a step that takes it with all fits.

        It gives losses ``[F]``, and which were left out; the state is overwritten.
        """
        inputs, is_stepped = self._inputs(batches)

        def take(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            following = state[-1][:, 1] + 1  # the noise goes on where a step is left out too
            outcome = self._replay.step(state, given)
            state[-1][:, 1] = following
            return outcome

        def rows(step: int) -> list[Tensor]:
            pairs = zip(inputs, is_stepped, strict=True)
            return [x[step] if stepped else x for x, stepped in pairs]

        if self.pure.buffer.device.type != "cuda":
            return lambda step: take(rows(step))
        if self._graphed is None or not self._graphed.serves(state, inputs, is_stepped):
            self._graphed = _Graphed(take, state, inputs, is_stepped)
            self.obstacle = self._graphed.obstacle or self.obstacle
        graphed = self._graphed
        return lambda step: graphed.take(rows(step))


class _Graphed:
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
