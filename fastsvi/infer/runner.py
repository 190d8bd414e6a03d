"""Takes the steps of a long run, each in the fastest form that is ready.

A run starts eagerly and at once. If it is long enough, its step is captured after the first one and
compiled; once checked, it takes over. When that happens depends on numbers of steps and sizes
alone, never on a clock, for eager and compiled steps round differently: so a run with the same seed
gives the same bits again. Nothing is lost by waiting for the compiler: the few steps that could be
taken meanwhile are compiled ones in no time.
"""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fastsvi.engine.pages import blocks_apart
from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.batches import Batches, varying
from fastsvi.infer.captured import CapturedStep, Disagreement
from fastsvi.infer.captures import TooManyCaptures
from fastsvi.infer.progress import Losses
from fastsvi.infer.pure_step import WIDE
from fastsvi.infer.targets import Undo
from fastsvi.infer.util import zero_grads
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

Compile = Literal["auto"] | bool
COMPILE = ("auto", True, False)

# Recording, compiling and checking a step pays off where eager steps would take about so long, and
# looking whether a step of an earlier run still serves where they would take so long.
_WORTH_SECONDS = 0.3
_WORTH_A_LOOK = 0.1
# What an eager step takes, roughly: for its operations, and for each element of each particle.
_SECONDS_PER_STEP, _SECONDS_PER_ELEMENT = 2e-3, 2e-8
_FEW = 5  # steps that are taken eagerly, however long they take
# A native chunk is as long as Ctrl-C and the progress bar may wait.
_CHUNK_SECONDS = 0.1
_FIRST_CHUNK = 16


class Runner:
    """Takes steps of ``svi``.

    Args:
        svi: the fit.
        args, kwargs: arguments of every step.
        num_steps: how many steps will be asked for.
        compile: see :meth:`SVI.run`.
        batches: an iterable of what changes from step to step.

    Attributes:
        obstacle: why the steps are taken eagerly; None if they are not, or might not be.
        native_steps: steps taken in native form so far.
        most: how many steps may be taken at once.
        capture_seconds, compile_seconds: what capturing and compiling took.
    """

    def __init__(
        self,
        svi: SVI,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_steps: int,
        compile: Compile,
        batches: Any = None,
    ) -> None:
        self.svi = svi
        self.compile = compile
        self.obstacle = None if compile else "compile=False"
        self.native_steps = 0
        self.most = num_steps
        self.capture_seconds = 0.0
        self.compile_seconds = 0.0
        self.hopeless = None  # these are the steps of one fit
        # What another step left there is no part of this run, be its steps eager or compiled.
        zero_grads(leaf for _, leaf in PARAM_STORE.named_parameters())
        self._batches = None if batches is None else Batches(batches, args, kwargs)
        self._shared = args, kwargs
        self._arguments = Arguments(args, kwargs)
        self._remaining = num_steps
        self._num_steps = num_steps
        self._eager_steps = 0
        self._step: CapturedStep | None = None  # served the latest step
        self._seen: dict[CapturedStep, bool] = {}  # of earlier runs: whether they still serve
        self._chunk = _FIRST_CHUNK

    def advance(self, losses: Losses, *, read: bool = True) -> Any:
        """Take one or more steps, append their losses and return the last.

        ``read`` says whether an eager step may look at its loss, for which it waits.
        """
        undo, program = Undo(), self.svi._program
        try:
            with undo:
                return self._advance(losses, read=read)
        finally:
            if undo.has_removed and program is not None:
                program.rehearsed = False

    def _advance(self, losses: Losses, *, read: bool) -> Any:
        if self._batches is not None:
            self._arguments = self._batches.next()
        step = self._native() if self.obstacle is None else None
        if step is None:
            loss = self._advance_eagerly(read=read)
        elif not step.is_checked:
            loss = self._take_over(step)
        else:
            several = self._advance_native(step)
            losses.extend(several)
            return several[-1]
        losses.append(loss)
        return loss

    # -------------------------------------------------------------------------------- resuming

    @property
    def is_native(self) -> bool:
        """Whether the steps are taken in native form at present."""
        return self._step is not None and self._step.is_checked

    def skip(self, done: int) -> Arguments:
        """Begin after ``done`` steps, taken by another process; arguments of the step to come."""
        self._remaining -= done
        self._eager_steps = done
        if self._batches is not None:
            for _ in range(done):
                self._batches.next()
            self._arguments = self._batches.peek()
        return self._arguments

    def release(self) -> None:
        """Let go of what steps need and their result does not."""
        if self._step is not None:
            with self._large_apart():  # which ends with a look for memory to give back
                self._step.release()

    def retire(self, fits: Tensor) -> None:
        """Of one fit there is none to leave out."""

    def take_up(self) -> None:
        """Have native steps ready and checked; parameters, optimizer and noise stay as they are."""
        if self.obstacle is not None:
            return
        try:
            step = self._step = self._capture()
            state = [tensor.clone() for tensor in step.pure.state]
            args, kwargs = self._arguments.args, self._arguments.kwargs
            try:
                step.check(
                    self._arguments, lambda: self.svi._advance(args, kwargs, by_counter=True)
                )
            finally:
                for tensor, value in zip(step.pure.state, state, strict=True):
                    tensor.copy_(value)
                step.pure.buffer.touch()
        except CaptureError as error:
            self._give_up(error)

    # ----------------------------------------------------------------------------------- eager

    def _advance_eagerly(self, *, read: bool = True) -> Any:
        args, kwargs = self._arguments.args, self._arguments.kwargs
        loss = self.svi._advance(args, kwargs, read=read, by_counter=True)
        self._eager_steps += 1
        self._remaining -= 1
        return loss

    def _is_worth(self, seconds: float) -> bool:
        """Whether eager steps would take longer, by what does not change from run to run."""
        if self.compile is True:
            return True
        elbo = self.svi.elbo
        sizes = [leaf.numel() for leaf in self.svi._targets.leaves]
        sizes += [leaf.numel() for leaf in self._arguments.leaves if isinstance(leaf, Tensor)]
        elements = sum(sizes) * (1 if elbo is None else elbo.num_particles)
        step = _SECONDS_PER_STEP + _SECONDS_PER_ELEMENT * elements
        return step * self._num_steps > seconds

    # ---------------------------------------------------------------------------------- native

    def _native(self) -> CapturedStep | None:
        """A captured step for the arguments, if there is one that is built."""
        step = self._step
        try:
            if step is not None and not step.is_current():
                if self._batches is None:
                    raise CaptureError("parameters or the optimizer changed during the run")
                self._step = None
                return None  # an eager step sees what parameters there are now
            if step is None or not step.accepts(self._arguments):
                step = self._earlier()
            if step is None:
                if self._step is not None and self._batches is None:
                    raise CaptureError("a tensor that the program reads was changed during the run")
                # An eager step first: it makes what parameters the program has today.
                has_begun = self._eager_steps > 0 or self._begins_wide()
                if not (has_begun and self._is_worth(_WORTH_SECONDS)):
                    return None
                step = self._capture()
        except CaptureError as error:
            self._give_up(error)
            return None
        self._step = step
        return step

    def _begins_wide(self) -> bool:
        """Make the parameters without a step; whether the first is to be a compiled one.

        Where there are millions, the two steps that are compared are the first ones of the fit:
        all others would need copies of the optimizer's state.
        """
        program = self.svi._program
        if program is None or program.rehearsed or self._num_steps < _FEW:
            return False
        # How wide it is shows afterwards; but the data of wide models are rarely few.
        data = sum(x.numel() for x in self._arguments.leaves if isinstance(x, Tensor))
        with blocks_apart() if data >= WIDE // 4 else nullcontext():
            self.svi._rehearse(self._arguments.args, self._arguments.kwargs)
        return self._is_wide()

    def _is_wide(self) -> bool:
        return sum(leaf.numel() for leaf in self.svi._targets.leaves) >= WIDE

    def _large_apart(self) -> AbstractContextManager[None]:
        return blocks_apart() if self._is_wide() else nullcontext()

    def _earlier(self) -> CapturedStep | None:
        """A captured step that serves the arguments and is still what the program does."""
        captures = self.svi._captures
        for step in captures.serving(self._arguments):
            if step not in self._seen and self._is_worth(_WORTH_A_LOOK):
                self._seen[step] = captures.is_as_captured(step)
            if self._seen.get(step, False):
                return step
        return None

    def _capture(self) -> CapturedStep:
        lifted: frozenset[int] = frozenset()
        if self._batches is not None:
            lifted = varying(self._arguments, *self._shared)
        start = time.perf_counter()
        with self._large_apart():
            step = self.svi._captures.capture(self._arguments, lifted)
        self._seen[step] = True
        captured = time.perf_counter()
        self.capture_seconds += captured - start
        try:
            step.build()
        except CaptureError:
            self.svi._captures.forget(step)
            raise
        self.compile_seconds += time.perf_counter() - captured
        return step

    def _take_over(self, step: CapturedStep) -> Any:
        """Compare one native with one eager step; from here on, steps are native."""
        try:
            with self._large_apart():
                return step.check(self._arguments, self._advance_eagerly)
        except Disagreement as error:
            self._give_up(error)
            return error.loss
        except CaptureError as error:
            self._give_up(error)
            return self._advance_eagerly()

    def _advance_native(self, step: CapturedStep) -> Tensor:
        if step.is_due():
            try:
                step.check_again()
            except CaptureError as error:
                self._give_up(error)
                return self._advance_eagerly().reshape(1)
        steps = min(self._chunk, self._remaining, self.most)
        start = time.perf_counter()
        if self._batches is None:
            losses = step.run(steps, self._arguments)
        else:
            taken = [self._arguments, *self._batches.alike(steps - 1, step.accepts)]
            steps = len(taken)
            step.pure.lifted.forget()  # a batch may be the last one's memory, filled anew
            losses = step.run_batches(taken)
            # The first one that was not taken is taken eagerly now if it is this step's.
            self._batches.give_back(taken[len(losses) or 1 :])
        seconds = time.perf_counter() - start
        if len(losses) < steps:
            # The next step is not finite. Taken eagerly it says which site is at fault.
            self._chunk = _FIRST_CHUNK
            if not len(losses):
                return self._advance_eagerly().reshape(1)
        elif seconds < _CHUNK_SECONDS / 4:
            self._chunk *= 2
        elif seconds > _CHUNK_SECONDS:
            self._chunk = max(1, self._chunk // 2)
        self.native_steps += len(losses)
        self._remaining -= len(losses)
        return losses

    def _give_up(self, error: CaptureError) -> None:
        if self._step is not None:
            self.svi._captures.forget(self._step)
            self._step = None
        self.obstacle = str(error)
        if self.compile is True or isinstance(error, TooManyCaptures):
            warnings.warn(
                f"SVI.run: the steps are taken eagerly, because {error}",
                FastSVIWarning,
                stacklevel=6,
            )
