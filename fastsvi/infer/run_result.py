"""What a run reached, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastsvi.errors import ConstraintError
from fastsvi.infer.convergence import Verdict, assess

_MAX_MARKS = 1024


@dataclass(frozen=True)
class Timings:
    """Where the time of a run went, in seconds.

    Attributes:
        total: from the call of ``run`` to its end.
        first_step: until the first loss was there: parameters are made and the program is checked.
        capture: recording the step.
        compile: compiling it.
        steps_per_second: over the second half of the steps, when everything is warm.
    """

    total: float = 0.0
    first_step: float = 0.0
    capture: float = 0.0
    compile: float = 0.0
    steps_per_second: float = 0.0


class BestFit(NamedTuple):
    """One of many fits.

    Attributes:
        fit: its number.
        loss: its loss, averaged over the last steps.
        params: its constrained parameters, by name.
    """

    fit: int
    loss: float
    params: dict[str, Tensor]


@dataclass(frozen=True, repr=False)
class SVIRunResult:
    """What :meth:`SVI.run` reached.

    Attributes:
        losses: loss of each step, a tensor ``[steps]`` (``[steps, F]`` of ``F`` fits) on the device
            of the parameters.
        params: constrained values of all parameters of the store, by name, detached copies.
        interrupted: whether Ctrl-C ended the run early.
        native_steps: how many of the steps were taken in compiled form.
        obstacle: why not all could be, with the statement at fault; None if all might have been.
        stopped: whether ``stop_when_converged`` ended the run early, after ``len(losses)`` steps.
        timings: where the time went.
        skipped: of a run of ``F`` fits, how many steps of each were left out, since ``svi`` was
            made, because they were not finite: int64 ``[F]``. None for a run of one, which ends at
            such a step.
        ends: of a run of ``F`` fits that ``stop_when_converged`` watched, after how many steps each
            was left alone, int64 ``[F]``; its further losses are NaN. Else None.
    """

    losses: Tensor
    params: dict[str, Tensor]
    interrupted: bool = False
    native_steps: int = 0
    obstacle: str | None = None
    stopped: bool = False
    timings: Timings = Timings()
    skipped: Tensor | None = None
    ends: Tensor | None = None

    @cached_property
    def converged(self) -> Verdict:
        """Whether the losses say that the fit has converged, with the evidence.

        True or false like a bool; see :func:`fastsvi.infer.convergence.assess`. Synchronises.
        """
        return assess(self.losses, self.ends)

    def best(self) -> BestFit:
        """The fit with the lowest loss, over the last tenth of its steps, of a run of several.

        Losses that are not finite do not count as low. Synchronises.

        Raises:
            ConstraintError: the run was of one fit, has no steps, or no fit ended well.
        """
        if self.losses.dim() != 2 or not len(self.losses):
            raise ConstraintError(
                "best() chooses among the fits of a run with num_fits=...; this run has losses of "
                f"shape {tuple(self.losses.shape)}"
            )
        last = self._last_tenth()
        last = torch.where(last.isfinite(), last, torch.inf)
        fit = int(last.argmin())
        if not bool(last[fit].isfinite()):
            raise ConstraintError("no fit ended with finite losses; look at skipped and the data")
        params = {name: value[fit] for name, value in self.params.items()}
        return BestFit(fit, float(last[fit]), params)

    def _last_tenth(self) -> Tensor:
        """Mean of the losses over the last tenth of the steps of each fit, ``[F]`` or ``[]``."""
        if self.ends is None:
            return self.losses[-max(1, len(self.losses) // 10) :].double().mean(0)
        ends = self.ends.to(self.losses.device)
        step = torch.arange(len(self.losses), device=ends.device).unsqueeze(1)
        is_last = (step < ends) & (step >= ends - (ends // 10).clamp(min=1))
        return torch.where(is_last, self.losses.double(), 0.0).sum(0) / is_last.sum(0)

    def __repr__(self) -> str:
        steps = len(self.losses)
        fits = f" of {self.losses.shape[1]} fits" if self.losses.dim() == 2 else ""
        lines = [f"SVIRunResult: {steps} steps{fits}{self._end()}, {len(self.params)} params"]
        if steps:
            last = self._last_tenth()
            where = f"mean of the last {max(1, steps // 10)}"
            lines.append(f"loss {last[last.isfinite()].mean():.6g}, {where}")
        if self.timings.total:
            lines.append(self._pace())
        if steps:
            verdict = self.converged
            word = f"converged since step {verdict.step}" if verdict else "not converged"
            lines.append(f"{word}: {verdict.evidence}")
        return "\n    ".join(lines)

    def _end(self) -> str:
        if self.interrupted:
            return " (interrupted)"
        return " (stopped, converged)" if self.stopped else ""

    def _pace(self) -> str:
        pace = f"{self.timings.total:.3g} s, finally {self.timings.steps_per_second:,.0f} steps/s"
        if self.native_steps:
            return f"{pace}, {self.native_steps} steps compiled"
        return f"{pace}, eager" + (f": {self.obstacle}" if self.obstacle else "")


class Stopwatch:
    """Takes the time of a run."""

    def __init__(self) -> None:
        self._marks = [(0, time.perf_counter())]
        self._apart = 1  # laps between marks
        self._laps = 0
        self.first_step = 0.0

    def skip(self, steps: int) -> None:
        """Note that ``steps`` steps were there already."""
        self._marks[0] = (steps, self._marks[0][1])

    def lap(self, steps: int) -> None:
        """Note that ``steps`` steps are done."""
        self._laps += 1
        if self._laps == 1:
            self.first_step = time.perf_counter() - self._marks[0][1]
        if self._laps % self._apart == 0:
            self._marks.append((steps, time.perf_counter()))
            if len(self._marks) > _MAX_MARKS:
                del self._marks[1::2]
                self._apart *= 2

    def stop(self, steps: int, capture: float, compile: float) -> Timings:
        """The timings, now that ``steps`` steps are done."""
        begin, end = self._marks[0], (steps, time.perf_counter())
        middle = next(mark for mark in [*self._marks, end] if 2 * mark[0] >= begin[0] + steps)
        middle = middle if middle[0] < steps else begin
        seconds = end[1] - middle[1]
        pace = (steps - middle[0]) / seconds if seconds > 0 else 0.0
        return Timings(end[1] - begin[1], self.first_step, capture, compile, pace)
