"""The step of many fits: captured for one of them, taken by all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi import settings
from fastsvi.engine.graph import Graph
from fastsvi.engine.native import NativeStep
from fastsvi.engine.native_fits import NativeFits
from fastsvi.engine.record import record
from fastsvi.engine.replay import ReplayStep, replay
from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer import captured
from fastsvi.infer.device_steps import block_step, record_generated
from fastsvi.infer.fit_data import FitData
from fastsvi.infer.graphed_fits import GraphedFits
from fastsvi.infer.pure_step import PureStep
from fastsvi.infer.util import checking
from fastsvi.kernels import dispatch

if TYPE_CHECKING:
    from fastsvi.engine.cuda.block_fits import BlockFits
    from fastsvi.engine.cuda.block_step import BlockStep
    from fastsvi.infer.svi import SVI


class FitsStep:
    """The step of ``svi`` for ``data`` and all that have their form.

    The param store holds the example whose arguments the step is recorded with.

    Args:
        svi: what is fitted.
        data: of all fits.
        native: whether to compile it; else, and where that fails, it is replayed, on a GPU as a
            CUDA graph.

    Attributes:
        pure: the step of one fit.
        form: "native", "block" (a kernel for a GPU) or "replay".
        obstacle: why it is not native though it was to be; None if it is, or if it is a graph.
        passed_over: why no kernel could be generated for a GPU; None if one could.
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
        self.passed_over: str | None = None
        self.compile_seconds = 0.0
        start = time.perf_counter()
        self.pure = self._make_pure()
        self._compiled = self._compile() if native else None
        self._graph = self._record() if self._compiled is None else self._compiled.graph
        self._replay = self._make_replay()
        self.capture_seconds = time.perf_counter() - start - self.compile_seconds
        self._fits: Any = None  # of the compiled step: the latest, with its state and only batch
        self._graphed: GraphedFits | None = None  # on a GPU, of the replay
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

    def _compile(self) -> NativeStep | BlockStep | None:
        """The step as native loops, or as a kernel; None if it is to be replayed."""
        pure = self.pure
        compiled: NativeStep | BlockStep
        try:
            if pure.kind == "cpu":
                with checking(False):
                    compiled = NativeStep(pure, pure.state, pure.inputs, pure.aliases)
            elif pure.kind == "cuda" and settings.get("cuda_steps") in ("auto", "block"):
                compiled = block_step(pure)
            else:
                return None
            start = time.perf_counter()
            compiled.build()
            self.compile_seconds = time.perf_counter() - start
        except CaptureError as error:
            if self._has_choice:
                self.passed_over = str(error)
            else:
                self.obstacle = str(error)
            return None
        return compiled

    @property
    def _has_choice(self) -> bool:
        """Whether a graph will do as well, for there is a GPU and nobody asked for kernels."""
        return self.pure.kind == "cuda" and settings.get("cuda_steps") == "auto"

    def _record(self) -> Graph:
        pure = self.pure
        inputs = [*pure.state, *pure.inputs]
        if self.form == "block":
            return record_generated(pure)
        if self.form == "native":
            with checking(False):
                return record(pure, inputs, pure.aliases)
        if pure.kind == "cuda":
            pure.refuse_rounds()
        # The reference is pure, Triton's Adam writes in place.
        with checking(False), dispatch.use("torch"):
            return record(pure, inputs, pure.aliases, decomposed=False)

    def _make_replay(self) -> ReplayStep:
        own = [True] * len(self.pure.state) + [False] * self._num_others + list(self.data.is_own)
        return ReplayStep(self._graph, len(self.pure.state), own)

    @property
    def _num_others(self) -> int:
        """How many inputs are no arguments: keys and learning rates."""
        return len(self.pure.inputs) - len(self.data.lifted)

    @property
    def form(self) -> str:
        """What it runs as."""
        if self._compiled is None:
            return "replay"
        return "native" if isinstance(self._compiled, NativeStep) else "block"

    @property
    def is_native(self) -> bool:
        """Whether it runs in compiled form, and is not replayed."""
        return self._compiled is not None

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

        A generated kernel that does not agree gives way to the replay.

        Raises:
            Disagreement: they differ.
        """
        try:
            self._compare()
        except CaptureError as error:
            if self.form != "block" or not self._has_choice:
                raise
            self._compiled, self.passed_over = None, str(error)
            self._graph = self._record()
            self._replay = self._make_replay()
            self._compare()
            if isinstance(error, captured.Disagreement):
                warnings.warn(
                    f"SVI.run: generated kernels are not used for these fits, because {error}",
                    FastSVIWarning,
                    stacklevel=8,
                )

    def _compare(self) -> None:
        pure = self.pure
        live = [*pure.state, *pure.plan.state]
        before = [tensor.clone() for tensor in live]
        noise_step = pure.noise_step

        def take(state: list[Tensor]) -> Tensor:
            if self._compiled is not None:
                return self._compiled.run(1, state=state)
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

    def compiled_fits(
        self, state: Sequence[Tensor], batches: Sequence[FitData]
    ) -> NativeFits | BlockFits:
        """The compiled step of all fits, with one batch for all steps or one for each."""
        known = self._fits
        if known is not None and known[0] is state and len(batches) == 1 and known[1] is batches[0]:
            return known[2]
        inputs, is_stepped = self._inputs(batches)
        is_own = [False] * self._num_others + list(self.data.is_own)
        fits: NativeFits | BlockFits
        if isinstance(self._compiled, NativeStep):
            fits = NativeFits(self._compiled, state, inputs, is_own, is_stepped)
        elif self._compiled is not None:
            from fastsvi.engine.cuda.block_fits import BlockFits

            fits = BlockFits(self._compiled, state, inputs, is_own, is_stepped)
        else:
            raise CaptureError("the step of these fits is not compiled")
        self._fits = (state, batches[0], fits) if len(batches) == 1 else None
        return fits

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

        if self.pure.kind != "cuda":
            return lambda step: take(rows(step))
        if self._graphed is None or not self._graphed.serves(state, inputs, is_stepped):
            self._graphed = GraphedFits(take, state, inputs, is_stepped)
            self.obstacle = self._graphed.obstacle or self.obstacle
        graphed = self._graphed
        return lambda step: graphed.take(rows(step))
