"""What a fit must have reached for its time to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.workloads import Array, Size

# Of the way down that the loss has come: fits differ by this much on their way, by noise alone.
_ON_THE_WAY = 0.05
_ERRORS = 4.0  # standard errors of the evaluator


def final(elbo: float, error: float, size: Size, others: Sequence[float] = ()) -> str | None:
    """Why a whole fit does not count, or None if it does.

    Its ELBO is held against the one in the table of workloads; without one there, against the
    median of what the other libraries reached.
    """
    if not np.isfinite(elbo):
        return f"the final ELBO is {elbo}"
    expected, where = size.elbo, "expected"
    if expected is None:
        if not others:
            return None
        expected, where = float(np.median(others)), "reached by the others"
    allowed = size.allowed(expected)
    if abs(elbo - expected) <= allowed + _ERRORS * error:
        return None
    return f"final ELBO {elbo:.6g} where {expected:.6g} +- {allowed:.2g} is {where}"


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
