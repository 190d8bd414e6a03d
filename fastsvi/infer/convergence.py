"""Whether a fit has converged, judged by its losses alone.

The losses of a fit are noisy, often heavy-tailed, and correlated from step to step, so neither the
latest loss nor a smoothed curve says much. What is asked here: did the loss still change over the
last half of the run, by more than chance, and was the run long enough to see it?

The last half is cut into batches. The mean of the middle half of each batch (its midmean) stands
for it: a few wild losses do not move it. Through these a parabola is laid; its linear part is the
change over the window, and the scatter around it, with a correction for batches that still depend
on each other, gives the standard error of that change. This is the comparison of windowed means
with standard errors from batch means (Geweke 1992; Flegal, Haran & Jones 2008), made robust, in
place of the rule of thumb that the ELBO changes little from step to step, which stops early or
never (Yao et al. 2018, "Yes, but did it work?"). To judge only a trailing window, and to ask for
enough effective samples in it before believing its mean, is the advice of Dhaka et al. (2020,
"Robust, accurate stochastic optimization for variational inference") and Welandawe et al. (2024,
"A framework for improving the reliability of black-box variational inference"), who look at the
parameters; losses need no memory, and there is one for each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastsvi.infer.progress import Losses

# Below this the batches are too short to mean anything.
_MIN_STEPS = 200
_BATCHES = 24  # of the window
# Change over standard error from which on it is no chance: about 1 in 100 flat curves, because the
# error itself is estimated from 24 batches.
_SIGNIFICANT = 3.0
# Changes below this share of the spread of single losses, or of the fall of the loss over the whole
# run, matter to nobody.
_NEGLIGIBLE_SPREAD = 0.05
_NEGLIGIBLE_FALL = 1e-4
# The change must be known to within this share of the spread: else the run says nothing.
_RESOLUTION = 0.75
_MAX_BAD = 0.05  # share of losses that may be NaN or infinite: steps that were left out
_MAX_NAMED = 5
_LOOKS_APART = 1.25  # steps at a look over steps at the one before


@dataclass(frozen=True)
class Verdict:
    """Whether a fit has converged; true or false like a bool.

    Attributes:
        converged: whether it has; of several fits, whether all have.
        evidence: what was found, in words.
        step: from which step on the loss has stayed at its final level; None if it has not. Of
            several fits, the latest.
        fits: for several fits, whether each has converged, bool ``[F]``; else None.

    >>> noise = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    >>> verdict = assess(noise + 50 * torch.exp(-torch.arange(2000) / 100))
    >>> verdict.converged, 200 < verdict.step < 1000
    (True, True)
    >>> bool(assess(noise - torch.arange(2000) / 500))
    False
    """

    converged: bool
    evidence: str
    step: int | None = None
    fits: Tensor | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return self.converged


def assess(losses: Tensor, ends: Tensor | None = None) -> Verdict:
    """The verdict on the losses of a run, ``[steps]``, or ``[steps, F]`` of ``F`` fits.

    The cost is a few passes over the losses, which are read where they lie; then it synchronises.

    Args:
        losses: those of all steps.
        ends: of several fits, how many of the losses belong to each, int64 ``[F]``; by default all.
    """
    losses = losses.detach()
    if not losses.is_floating_point():
        losses = losses.double()
    if losses.dim() == 1:
        if len(losses) < _MIN_STEPS:
            return Verdict(False, _too_few(len(losses)))
        found = _Findings.of(losses.unsqueeze(1))
        converged = bool(found.converged[0])
        return Verdict(converged, found.describe(0), int(found.since[0]) if converged else None)
    count = losses.shape[1]
    if ends is None:
        ends = torch.full((count,), len(losses))
    fits, latest, reasons = torch.zeros(count, dtype=torch.bool), 0, {}
    for end in ends.cpu().unique().tolist():
        members = (ends.cpu() == end).nonzero().flatten()
        if end < _MIN_STEPS:
            reasons.update({fit: _too_few(end) for fit in members.tolist()})
            continue
        found = _Findings.of(losses[:end, members.to(losses.device)])
        fits[members] = found.converged
        latest = max([latest, *found.since[found.converged].tolist()])
        failing = found.converged.logical_not().nonzero().flatten().tolist()
        reasons.update({int(members[k]): found.describe(k) for k in failing})
    if not reasons:
        return Verdict(True, f"all {count} fits have converged", latest, fits)
    named = [f"fit {fit}: {reasons[fit]}" for fit in sorted(reasons)[:_MAX_NAMED]]
    more = ["..."] if len(reasons) > _MAX_NAMED else []
    evidence = f"{len(reasons)} of {count} fits have not converged: {'; '.join(named + more)}"
    return Verdict(False, evidence, None, fits)


def _too_few(steps: int) -> str:
    return f"too few steps to tell: {steps}, and it takes at least {_MIN_STEPS}"


class EarlyStop:
    """Says when a run may end. Each look costs a pass over the losses, so looks become rarer.

    The looks come at fixed numbers of steps, so that it ends at the same step each time.

    Args:
        losses: of the run, appended to as it goes.

    Attributes:
        next_look: the number of steps at which the losses are looked at again.
    """

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self.next_look = _MIN_STEPS
        self._latest: Tensor | None = None  # which fits were flat at the latest look
        self._done: Tensor | None = None  # which have been so at two looks in a row
        self._ends = torch.zeros(0, dtype=torch.int64)  # at how many steps that was

    @property
    def done(self) -> Tensor | None:
        """Which fits have been found flat at two looks in a row, bool ``[F]``; None before any."""
        return self._done

    def ends(self, num_steps: int) -> Tensor | None:
        """At how many of ``num_steps`` steps each fit was done, int64 ``[F]``, or at all."""
        if self._done is None:
            return None
        return torch.where(self._done, self._ends, num_steps)

    def is_reached(self, hopeless: Tensor | None = None) -> bool:
        """Whether each fit is done, or one of those that are ``hopeless``, bool ``[F]``."""
        if len(self._losses) < self.next_look:
            return False
        losses = self._losses.stack()
        while self.next_look <= len(losses):  # also what an earlier process would have seen
            self._look(losses[: self.next_look])
            self.next_look = int(_LOOKS_APART * self.next_look)
        if self._done is None:
            return False
        return bool((self._done if hopeless is None else self._done | hopeless).all())

    def _look(self, losses: Tensor) -> None:
        verdict = assess(losses)
        flat = torch.tensor([verdict.converged]) if verdict.fits is None else verdict.fits
        if self._latest is None or self._done is None:
            self._latest = self._done = torch.zeros_like(flat)
            self._ends = torch.zeros(len(flat), dtype=torch.int64)
        newly = flat & self._latest & ~self._done
        self._ends = torch.where(newly, len(losses), self._ends)
        self._done = self._done | newly
        self._latest = flat


class _Findings(NamedTuple):
    """What the window shows, one entry for each fit, on the CPU."""

    num_steps: int
    window: int
    change: Tensor  # of the loss over the window
    error: Tensor  # its standard error
    spread: Tensor  # of single losses around the trend
    negligible: Tensor
    num_bad: Tensor  # losses that are not finite
    since: Tensor  # step from which on the loss has been at its final level

    @classmethod
    def of(cls, losses: Tensor) -> _Findings:
        """Look at losses ``[steps, F]``."""
        length = len(losses) // 2 // _BATCHES
        window = length * _BATCHES
        midmeans = _midmeans(losses, length)  # [all batches, F]
        last = midmeans[-_BATCHES:]
        line = _design().to(losses.device)
        parts = line.T @ last  # the columns of the design are orthonormal
        trend = line @ parts
        residual = last - trend
        change = parts[1] * (line[-1, 1] - line[0, 1])
        variance = residual.square().sum(0) / (_BATCHES - line.shape[1])
        error = (variance * _inflation(residual)).sqrt() * (line[-1, 1] - line[0, 1])

        latest = losses[-window:].reshape(_BATCHES, length, -1)
        away = (latest - trend.to(losses.dtype).unsqueeze(1)).abs_()
        spread = 1.4826 * away.reshape(window, -1).nan_to_num(torch.inf).median(0).values.double()
        fall = midmeans.amax(0) - midmeans.amin(0)
        level = last.mean(0)
        rounding = torch.finfo(losses.dtype).eps * level.abs()
        negligible = _NEGLIGIBLE_SPREAD * spread + _NEGLIGIBLE_FALL * fall + rounding
        limit = _SIGNIFICANT * residual.std(0) + negligible
        return cls(
            len(losses),
            window,
            change.cpu(),
            error.cpu(),
            spread.cpu(),
            negligible.cpu(),
            torch.isfinite(losses[-window:]).logical_not().sum(0).cpu(),
            _since(midmeans, level, limit, length, len(losses)).cpu(),
        )

    @property
    def is_finite(self) -> Tensor:
        return (self.num_bad <= _MAX_BAD * self.window) & torch.isfinite(self.change)

    @property
    def is_flat(self) -> Tensor:
        chance = _SIGNIFICANT * self.error
        return self.change.abs() <= torch.maximum(chance, self.negligible)

    @property
    def is_resolved(self) -> Tensor:
        return _SIGNIFICANT * self.error <= _RESOLUTION * self.spread + self.negligible

    @property
    def converged(self) -> Tensor:
        return self.is_finite & self.is_flat & self.is_resolved

    def describe(self, fit: int) -> str:
        """The evidence on one fit, in words."""
        where = f"the last {self.window} of {self.num_steps} steps"
        if not self.is_finite[fit]:
            return f"{int(self.num_bad[fit])} losses of {where} are not finite"
        change, error = float(self.change[fit]), float(self.error[fit])
        found = f"by {abs(change):.3g} ± {error:.2g} over {where}"
        spread = f"single losses spread by {float(self.spread[fit]):.3g}"
        if not self.is_flat[fit]:
            if change < 0:
                return f"the loss still fell {found}; run on"
            return f"the loss rose {found}; a lower learning rate may help"
        if not self.is_resolved[fit]:
            return (
                f"too few steps to tell: the loss changed {found}, and {spread}; run on, or use "
                "more particles"
            )
        return f"the loss changed by {change:.3g} ± {error:.2g} over {where}, while {spread}"


def _midmeans(losses: Tensor, length: int) -> Tensor:
    """Mean of the middle half of each batch of ``length`` steps, from the end; ``[batches, F]``.

    NaN counts as a large loss.
    """
    batches = len(losses) // length
    ordered = losses[len(losses) - batches * length :].reshape(batches, length, -1).sort(1).values
    cut = length // 4
    return ordered[:, cut : length - cut].double().mean(1)


def _design() -> Tensor:
    """Constant, linear and quadratic function of the batch, orthonormal, ``[batches, 3]``."""
    position = torch.linspace(-1, 1, _BATCHES, dtype=torch.float64)
    powers = torch.stack([torch.ones_like(position), position, position.square()], 1)
    basis = torch.linalg.qr(powers).Q
    return basis * torch.sign(basis[-1])  # so that the linear part rises


def _inflation(residual: Tensor) -> Tensor:
    """How much more the variance of a mean is because neighbouring batches are alike."""
    covariance = (residual[1:] * residual[:-1]).sum(0)
    rho = covariance / residual.square().sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    # Three coefficients were fitted to few batches, which hides part of the correlation.
    rho = (rho + (3 + 3 * rho) / _BATCHES).clamp(0.0, 0.8)
    return (1 + rho) / (1 - rho)


def _since(midmeans: Tensor, level: Tensor, limit: Tensor, length: int, num_steps: int) -> Tensor:
    """The step at which the last batch ends whose midmean is farther from ``level``."""
    is_off = ~((midmeans - level).abs() <= limit)
    numbers = torch.arange(1, len(midmeans) + 1, device=midmeans.device).unsqueeze(1)
    before = (is_off[:-_BATCHES] * numbers[:-_BATCHES]).amax(0)
    rest = num_steps - len(midmeans) * length
    return torch.where(before > 0, before * length + rest, 0)
