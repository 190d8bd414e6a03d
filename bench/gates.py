"""What a fit must have reached for its time to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.workloads import Array, Case, Size

# Of the way down that the loss has come: fits differ by this much on their way, by noise alone.
_ON_THE_WAY = 0.05
_ERRORS = 4.0  # standard errors of the evaluator
# So many times the mean gap: of few numbers it varies by half of itself, and some fits still move.
_GAPS = 3.0
# The law of Adam's iterates is that of a small learning rate: with one particle and 0.01 their
# spread has been found up to a tenth larger, and their tails are a little heavier.
_SLACK = 1.25


def final(elbo: float, error: float, one: Case, others: Sequence[float] = ()) -> str | None:
    """Why a whole fit does not count, or None if it does.

    Its ELBO is held against the best there is, by the table of workloads: it cannot be above, nor
    below by more than noise explains. Where that is not known it is held against the one in the
    table, or else against the median of what the other libraries reached.
    """
    if not np.isfinite(elbo):
        return f"the final ELBO is {elbo}"
    size = one.size
    if size.elbo is not None and size.gap is not None:
        return _below_the_best(elbo, error, size.elbo, size.gap / one.particles**0.5)
    expected, where = size.elbo, "expected"
    if expected is None:
        if not others:
            return None
        expected, where = float(np.median(others)), "reached by the others"
    allowed = size.allowed(expected)
    if abs(elbo - expected) <= allowed + _ERRORS * error:
        return None
    return f"final ELBO {elbo:.6g} where {expected:.6g} +- {allowed:.2g} is {where}"


def _below_the_best(elbo: float, error: float, best: float, gap: float) -> str | None:
    allowed = _ERRORS * error + 1e-6 * abs(best)  # the best stands in the table rounded
    if elbo > best + allowed:
        return f"final ELBO {elbo:.8g} where {best:.8g} is the best there is"
    if best - elbo > _GAPS * gap + allowed:
        return (
            f"final ELBO {elbo:.6g}, {best - elbo:.2g} below the best there is, where noise "
            f"explains {gap:.2g} on average"
        )
    return None


def posterior(apart: Mapping[str, Any]) -> str | None:
    """Why a guide is not NumPyro's up to noise, or None if it is.

    ``apart`` is what :func:`bench.agreement.apart` found of the two.
    """
    if apart["errors"] <= _SLACK * apart["bound"]:
        return None
    return (
        f"its guide is {apart['errors']:.3g} Monte Carlo errors from NumPyro's at "
        f"{apart['site']!r}, where {_SLACK * apart['bound']:.2g} are allowed"
    )


def partial(
    found: Mapping[str, Any], wholes: Sequence[Mapping[str, Any]], size: Size
) -> str | None:
    """Why a fit that was stopped early does not count, or None if it does.

    The last quarter of its losses is held against the losses of whole fits at the same steps.
    """
    curve, middles = _curve(found)
    last = len(curve) * 3 // 4
    loss = curve[last:].mean()
    if not np.isfinite(loss):
        return f"the loss after {found['steps_taken']} steps is {loss}"
    if not wholes:
        fell = loss < curve[0]
        return None if fell else f"the loss did not fall in {found['steps_taken']} steps"
    expected, descent = [], []
    for whole in wholes:
        losses, at = _curve(whole)
        expected.append(np.interp(middles[last:], at, losses).mean())
        descent.append(losses.max() - losses.min())
    allowed = _ON_THE_WAY * np.mean(descent) + size.allowed(float(np.mean(expected)))
    if abs(loss - np.mean(expected)) <= allowed:
        return None
    return (
        f"mean loss {loss:.6g} of the latest of {found['steps_taken']} steps, where whole fits "
        f"had {np.mean(expected):.6g} +- {allowed:.2g}"
    )


def _curve(found: Mapping[str, Any]) -> tuple[Array, Array]:
    """Mean losses of windows, and the steps in their middles."""
    losses = np.array(found["curve"])
    return losses, (np.arange(len(losses)) + 0.5) * found["window"]
