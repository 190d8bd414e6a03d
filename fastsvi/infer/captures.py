"""The captured steps of a fit, and when to capture another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsvi.errors import CaptureError
from fastsvi.infer.arguments import Arguments, can_be_lifted
from fastsvi.infer.captured import CapturedStep
from fastsvi.infer.targets import Undo

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

# Every form of the arguments costs a capture, a second or so. From here on something is wrong.
MAX_CAPTURES = 8


class TooManyCaptures(CaptureError):
    """Something changes from run to run that costs a capture each time."""


class Captures:
    """The captured steps of ``svi``, by the form of their arguments.

    Attributes:
        count: how many times a step was captured.
    """

    def __init__(self, svi: SVI) -> None:
        self._svi = svi
        self._steps: list[CapturedStep] = []
        self.count = 0
        self._latest: Arguments | None = None  # at the latest capture
        self._lifted: frozenset[int] = frozenset()  # what has varied since
        self._changed = "the layout of the parameters or the optimizer"

    def serving(self, arguments: Arguments) -> list[CapturedStep]:
        """The steps that serve these arguments, as far as tensors tell; the latest first."""
        self._steps = [step for step in self._steps if step.is_current()]
        return [step for step in reversed(self._steps) if step.accepts(arguments)]

    def is_as_captured(self, step: CapturedStep) -> bool:
        """Whether the program would be captured as ``step`` today.

        It runs once. Python values that it reads may have changed since: an attribute, a flag, a
        module that was in training mode.
        """
        with Undo() as undo:
            difference = step.difference()
            undo.remove_new()  # parameters are made by eager steps
        if difference is not None:
            self._changed = f"something outside of the tensors ({difference})"
            return False
        step.pure.lifted.forget()
        return step.is_current()

    def capture(self, arguments: Arguments, lifted: frozenset[int] = frozenset()) -> CapturedStep:
        """Capture a step for these arguments, with ``lifted`` and those that varied as inputs.

        Raises:
            CaptureError: the step cannot be captured, or was too often.
        """
        self._lifted = lifted = lifted | self._varied(arguments)
        if self.count >= MAX_CAPTURES:
            raise TooManyCaptures(
                f"the step has been captured {self.count} times already, because "
                f"{self._changed} changes from run to run. Tensors of one shape and floats may "
                "vary; for what varies otherwise, use SVIs of their own, or compile=False"
            )
        self.count += 1
        step = CapturedStep(self._svi, arguments, sorted(lifted))
        self._steps.append(step)
        return step

    @property
    def form(self) -> str | None:
        """Of the step that was captured last; see :class:`CapturedStep`. None if there is none."""
        return self._steps[-1].form if self._steps else None

    @property
    def passed_over(self) -> str | None:
        """Why the step that was captured last is not made of generated kernels, on a GPU."""
        return self._steps[-1].passed_over if self._steps else None

    def forget(self, step: CapturedStep) -> None:
        """Use a step no more."""
        self._steps = [kept for kept in self._steps if kept is not step]

    def _varied(self, arguments: Arguments) -> frozenset[int]:
        """Positions of the arguments that have been others, or were written to, at a capture."""
        latest, self._latest = self._latest, arguments
        if latest is None:
            return frozenset()
        if not arguments.has_form_of(latest):
            self._changed, self._lifted = "the number of arguments", frozenset()
            return frozenset()
        differing = arguments.differing(latest)
        if differing:
            self._changed = arguments.name(differing[-1])
        self._lifted |= {k for k in differing if can_be_lifted(arguments.leaves[k])}
        return self._lifted
