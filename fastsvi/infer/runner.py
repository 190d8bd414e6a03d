"""Takes the steps of a long run, each in the fastest form that is ready.

A run starts eagerly and at once. If it is worth it, the step is captured after a few steps and
compiled in a thread while eager steps go on; once compiled and checked, it takes over.
"""

from __future__ import annotations

import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.batches import Batches, varying
from fastsvi.infer.captured import CapturedStep, Disagreement
from fastsvi.infer.captures import TooManyCaptures
from fastsvi.infer.progress import Losses

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

Compile = Literal["auto"] | bool
COMPILE = ("auto", True, False)

# Eager steps before a capture: the first makes parameters and checks the program, the others
# tell how long a step takes.
_WARM_UP = 5
# Recording and checking a step takes about this long; compiling it goes on in the background.
_WORTH_SECONDS = 0.3
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
        self._batches = None if batches is None else Batches(batches, args, kwargs)
        self._shared = args, kwargs
        self._arguments = Arguments(args, kwargs)
        self._remaining = num_steps
        self._eager_steps = 0
        self._eager_seconds = 0.0
        self._step: CapturedStep | None = None  # served the latest step
        self._builder: threading.Thread | None = None
        self._failure: CaptureError | None = None
        self._chunk = _FIRST_CHUNK

    def advance(self, losses: Losses, *, read: bool = True) -> Any:
        """Take one or more steps, append their losses and return the last.

        ``read`` says whether an eager step may look at its loss, for which it waits.
        """
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
        self._eager_steps = min(done, 1)  # the first, which does more than a step
        if self._batches is not None:
            for _ in range(done):
                self._batches.next()
            self._arguments = self._batches.peek()
        return self._arguments

    def retire(self, fits: Tensor) -> None:
        """Of one fit there is none to leave out."""

    def take_up(self) -> None:
        """Have native steps ready and checked; parameters, optimizer and noise stay as they are."""
        if self.obstacle is not None:
            return
        try:
            step = self._step = self._capture()
            if self._builder is not None:
                self._builder.join()
                self._builder = None
            if self._failure is not None:
                raise self._failure
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
        start = time.perf_counter()
        args, kwargs = self._arguments.args, self._arguments.kwargs
        loss = self.svi._advance(args, kwargs, read=read, by_counter=True)
        if self._eager_steps:  # the first step does more than a step
            self._eager_seconds += time.perf_counter() - start
        self._eager_steps += 1
        self._remaining -= 1
        return loss

    def _is_worth_it(self) -> bool:
        if self.compile is True:
            program = self.svi._program
            return self._eager_steps > 0 or (program is not None and program.rehearsed)
        if self._eager_steps < _WARM_UP:
            return False
        step = self._eager_seconds / (self._eager_steps - 1)
        return step * self._remaining > _WORTH_SECONDS

    # ---------------------------------------------------------------------------------- native

    def _native(self) -> CapturedStep | None:
        """A captured step for the arguments, if there is one that is built."""
        if self._builder is not None and not self._is_built():
            return None
        step = self._step
        if step is None or not (step.is_current() and step.accepts(self._arguments)):
            step = self.svi._captures.find(self._arguments)
        try:
            if self._failure is not None:
                raise self._failure
            if step is None:
                if self._step is not None and self._batches is None:
                    raise CaptureError("parameters or the optimizer changed during the run")
                if not self._is_worth_it():
                    return None
                step = self._capture()
        except CaptureError as error:
            self._give_up(error)
            return None
        self._step = step
        return step if self._builder is None or self._is_built() else None

    def _capture(self) -> CapturedStep:
        lifted: frozenset[int] = frozenset()
        if self._batches is not None:
            lifted = varying(self._arguments, *self._shared)
        start = time.perf_counter()
        step = self.svi._captures.capture(self._arguments, lifted)
        self.capture_seconds += time.perf_counter() - start
        if step.builds_aside:
            self._builder = threading.Thread(target=self._build, args=(step,), daemon=True)
            self._builder.start()
        else:
            self._build(step)
        return step

    def _build(self, step: CapturedStep) -> None:
        start = time.perf_counter()
        try:
            step.loop.build()
        except CaptureError as error:
            self._failure = error
        self.compile_seconds += time.perf_counter() - start

    def _is_built(self) -> bool:
        if self._builder is not None:
            self._builder.join(timeout=None if self.compile is True else 0.0)
            if self._builder.is_alive():
                return False
            self._builder = None
        return True

    def _take_over(self, step: CapturedStep) -> Any:
        """Compare one native with one eager step; from here on, steps are native."""
        try:
            if self._failure is not None:
                raise self._failure
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
