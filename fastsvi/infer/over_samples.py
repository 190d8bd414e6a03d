"""One function, many samples: in a loop, or at once by ``vmap``.

A program that is written for one sample needs no plate to run on many: ``torch.func.vmap`` adds
the axis. Not every program can be run so (branches on values, ``.item()``, some samplers of torch);
such a one runs in a loop, after a warning that quotes the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsvi.errors import FastSVIWarning, ShapeError
from fastsvi.infer.util import checking

# What vmap raises, on the way in or out of a program that it cannot run. A program that fails by
# itself fails again in the loop, and that error reaches the user.
REFUSALS = (RuntimeError, ValueError, TypeError)


def over_samples(
    fn: Callable[[dict[str, Tensor]], Any],  # one sample of each -> tensors, in any nesting
    samples: dict[str, Tensor],  # [num_samples, *site] each
    num_samples: int,
    *,
    parallel: bool,
) -> Any:  # as fn's result, each tensor [num_samples, *its shape]
    """``fn`` of every sample, stacked; with ``parallel`` all at once where ``vmap`` can."""
    if parallel:
        try:
            return _at_once(fn, samples, num_samples)
        except REFUSALS as refusal:
            reason = str(refusal).strip().split("\n")[0]
            warnings.warn(
                f"cannot run all {num_samples} samples at once, so they run one after another. "
                f"torch.func.vmap says: {reason}",
                FastSVIWarning,
                stacklevel=3,
            )
    return _stack(
        [fn({name: value[i] for name, value in samples.items()}) for i in range(num_samples)]
    )


def _at_once(fn: Callable, samples: dict[str, Tensor], num_samples: int) -> Any:
    # The index gives vmap its axis when there are no samples at all (draws from the prior).
    mapped = torch.func.vmap(lambda sample, _: fn(sample), randomness="different")
    # Checking a distribution's arguments is a branch on their values, which vmap refuses.
    with checking(False), warnings.catch_warnings():
        # Some of torch's samplers lack a rule for vmap, which then loops inside and warns of it:
        # right all the same, and nothing the caller could change.
        warnings.filterwarnings("ignore", ".*batching rule", UserWarning)
        return mapped(samples, torch.arange(num_samples))


def _stack(results: list[Any], name: str = "the result") -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        shapes = sorted({tuple(each.shape) for each in results})
        if len(shapes) > 1:
            raise ShapeError(
                f"{name} has another shape in every other sample, so the samples cannot be "
                f"stacked: found {', '.join(map(str, shapes))}"
            )
        return torch.stack(results)
    if isinstance(first, dict):
        return {key: _stack([each[key] for each in results], repr(key)) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_stack(list(part), name) for part in zip(*results, strict=True))
    return results
