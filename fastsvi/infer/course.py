"""What goes on beside the steps of a run: the bar, Ctrl-C, the file, looks at the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from fastsvi import settings
from fastsvi.errors import NonFiniteError
from fastsvi.infer.convergence import EarlyStop
from fastsvi.infer.deferred import DeferredChecks
from fastsvi.infer.interrupts import Interrupts
from fastsvi.infer.progress import Losses, Progress
from fastsvi.infer.run_result import Stopwatch, Timings

if TYPE_CHECKING:
    from fastsvi.infer.saving import Saving


class Steps(Protocol):
    """Takes the steps of a run.

    Attributes:
        most: how many steps may be taken at once.
        capture_seconds, compile_seconds: what capturing and compiling the step took so far.
    """

    most: int
    capture_seconds: float
    compile_seconds: float

    @property
    def hopeless(self) -> Tensor | None:
        """Which of several fits have failed for good, bool ``[F]``; None for a single one."""

    def retire(self, fits: Tensor) -> None:
        """Take no more steps with these of several fits, bool ``[F]``."""

    def advance(self, losses: Losses, *, read: bool = True) -> Any:
        """Take one or more steps, append their losses and return the last."""


class Ending(NamedTuple):
    """How a run ended."""

    interrupted: bool
    stopped: bool
    timings: Timings
    ends: Tensor | None  # of several fits, at how many steps each was left alone


class Course:
    """The course of a run.

    Args:
        num_steps: how many losses there shall be.
        losses: those so far; steps append to them.
        show: whether to show a bar.
        early: says when the run may end early.
        is_elbo: whether the loss is minus an ELBO.
        saving: keeps the file of the run.
        optim: the optimizer, whose state is taken back to the last look after a bad loss; None if
            the steps see to losses that are not finite themselves.
    """

    def __init__(
        self,
        num_steps: int,
        losses: Losses,
        *,
        show: bool,
        is_elbo: bool,
        early: EarlyStop | None,
        saving: Saving | None,
        optim: Any | None,
    ) -> None:
        self._losses = losses
        self._bar = Progress(num_steps, losses, show, is_elbo=is_elbo)
        self._early = early
        self._saving = saving
        self._optim = optim
        self._deferred: DeferredChecks | None = None

    def follow(self, steps: Steps, watch: Stopwatch) -> Ending:
        """Take all steps, or as many as the fit needs, or until Ctrl-C.

        Raises:
            NonFiniteError: see :meth:`fastsvi.infer.SVI.run`.
        """
        interrupts, stopped = Interrupts(), False
        try:
            with interrupts, self._bar as going:
                for done in going:
                    if self._early is not None:
                        steps.most = max(1, self._early.next_look - done)
                    loss = steps.advance(self._losses, read=self._deferred is None)
                    watch.lap(len(self._losses))
                    self._attend(loss, steps)
                    stopped = self._has_converged(steps)
                    if stopped or interrupts.noted:
                        break
        except KeyboardInterrupt:
            interrupts.noted = True
        finally:
            self._end()  # whatever happened: a step that failed has changed nothing
        count = len(self._losses)
        timings = watch.stop(count, steps.capture_seconds, steps.compile_seconds)
        ends = None if self._early is None else self._early.ends(count)
        return Ending(interrupts.noted, stopped, timings, ends)

    def _has_converged(self, steps: Steps) -> bool:
        early = self._early
        if early is None:
            return False
        reached = early.is_reached(steps.hopeless)
        if early.done is not None and steps.hopeless is not None:
            steps.retire(early.done)
        return reached

    def _attend(self, loss: Any, steps: Any) -> None:
        saving = self._saving
        if saving is not None:
            saving.note(steps)
        is_due = saving is not None and saving.is_due()
        if self._deferred is not None:
            if is_due or self._deferred.is_due():
                self._look()
        elif self._optim is not None and _waits_for_device(loss):
            self._deferred = DeferredChecks(self._losses, self._optim)
        if saving is not None and is_due:
            saving.save()

    def _end(self) -> None:
        if self._deferred is not None:
            self._look()
        if self._saving is not None:
            self._saving.save()

    def _look(self) -> None:
        step = None if self._deferred is None else self._deferred.look()
        if step is not None:
            # The losses since the last look are not those of the state that was gone back to.
            self._deferred = self._saving = None
            raise NonFiniteError(
                f"SVI.run: the loss of step {step} is not finite; parameters and optimizer are "
                f"those of the last look before it. Take single steps, svi.step(...), "
                f"from here to have the site named."
            )


def _waits_for_device(loss: Any) -> bool:
    """Whether reading ``loss`` would wait for an accelerator."""
    is_elsewhere = isinstance(loss, Tensor) and loss.device.type != "cpu"
    return is_elsewhere and settings.get("validate") != "never"
