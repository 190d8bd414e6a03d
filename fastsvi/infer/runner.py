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
from fastsvi.infer.captured import CapturedStep, Disagreement
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
    """Takes steps of ``svi`` with fixed arguments.

    Attributes:
        obstacle: why the steps are taken eagerly; None if they are not, or might not be.
        native_steps: steps taken in native form so far.
    """

    def __init__(
        self,
        svi: SVI,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_steps: int,
        compile: Compile,
    ) -> None:
        self.svi = svi
        self.args = args
        self.kwargs = kwargs
        self.compile = compile
        self.obstacle = None if compile else "compile=False"
        self.native_steps = 0
        self._remaining = num_steps
        self._eager_steps = 0
        self._eager_seconds = 0.0
        self._captured: CapturedStep | None = None
        self._builder: threading.Thread | None = None
        self._failure: CaptureError | None = None
        self._ready = False
        self._chunk = _FIRST_CHUNK

    def advance(self, losses: Losses, *, read: bool = True) -> Any:
        """Take one or more steps, append their losses and return the last.

        ``read`` says whether an eager step may look at its loss, for which it waits.
        """
        if self.obstacle is None and self._captured is None and self._is_worth_it():
            self._capture()
        if self._captured is not None and self._ready:
            several = self._advance_native(self._captured)
            losses.extend(several)
            return several[-1]
        if self._captured is not None and self._is_built():
            loss = self._take_over(self._captured)
        else:
            loss = self._advance_eagerly(read=read)
        losses.append(loss)
        return loss

    # ----------------------------------------------------------------------------------- eager

    def _advance_eagerly(self, *, read: bool = True) -> Any:
        start = time.perf_counter()
        loss = self.svi._advance(self.args, self.kwargs, read=read)
        if self._eager_steps:  # the first step does more than a step
            self._eager_seconds += time.perf_counter() - start
        self._eager_steps += 1
        self._remaining -= 1
        return loss

    def _is_worth_it(self) -> bool:
        kept = self.svi._captured
        if kept is not None and kept.serves(self.args, self.kwargs):
            return True
        if self.compile is True:
            return self._eager_steps > 0
        if self._eager_steps < _WARM_UP:
            return False
        step = self._eager_seconds / (self._eager_steps - 1)
        return step * self._remaining > _WORTH_SECONDS

    # ---------------------------------------------------------------------------------- native

    def _capture(self) -> None:
        kept = self.svi._captured
        if kept is not None and kept.serves(self.args, self.kwargs):
            self._captured = kept
            return
        try:
            self._captured = CapturedStep(self.svi, self.args, self.kwargs)
        except CaptureError as error:
            self._give_up(error)
            return
        self.svi._captured = self._captured
        self._builder = threading.Thread(target=self._build, args=(self._captured,), daemon=True)
        self._builder.start()

    def _build(self, captured: CapturedStep) -> None:
        try:
            captured.native.build()
        except CaptureError as error:
            self._failure = error

    def _is_built(self) -> bool:
        if self._builder is not None:
            self._builder.join(timeout=None if self.compile is True else 0.0)
            if self._builder.is_alive():
                return False
            self._builder = None
            if self._failure is not None:
                self._give_up(self._failure)
                return False
        return True

    def _take_over(self, captured: CapturedStep) -> Any:
        """Compare one native with one eager step; from here on, steps are native."""
        try:
            if not captured.is_current():
                raise CaptureError("parameters, their layout or the optimizer changed meanwhile")
            loss = captured.check(self._advance_eagerly)
        except Disagreement as error:
            self._give_up(error)
            return error.loss
        except CaptureError as error:
            self._give_up(error)
            return self._advance_eagerly()
        self._ready = True
        return loss

    def _advance_native(self, captured: CapturedStep) -> Tensor:
        if not captured.is_current():
            self._give_up(CaptureError("parameters or the optimizer changed during the run"))
            return self._advance_eagerly().reshape(1)
        steps = min(self._chunk, self._remaining)
        start = time.perf_counter()
        losses = captured.run(steps)
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
        self._captured = self.svi._captured = None
        self._ready = False
        self.obstacle = str(error)
        if self.compile is True:
            warnings.warn(
                f"SVI.run: the steps are taken eagerly, because {error}",
                FastSVIWarning,
                stacklevel=6,
            )
