"""The flat update as a pure function, for back ends that compile a step instead of replaying it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastsvi.kernels.adam import adam_
from fastsvi.optim.flat import FlatPlan


class PureUpdate:
    """What ``plan.launch`` does, without writing to anything.

    Attributes:
        moments: step counts per run and both moments: what an update changes besides the
            parameters and the count of skipped steps.
        rates: the learning rates, which ``plan.refresh`` keeps up to date.
        skipped: count of steps that were left out because a gradient was not finite.
        sees_all: whether one launch looks at the whole gradient, so that it is left out as a whole.
    """

    def __init__(self, plan: FlatPlan) -> None:
        self._plan = plan
        self.moments = plan.state[:3]
        *self.rates, self.skipped = plan.state[3:]
        self.sees_all = len(plan._launches) == 1

    def __call__(
        self, flat: Tensor, grad: Tensor, moments: Sequence[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        """New ``flat``, moments and ``skipped``, from the gradient ``grad``, all unconstrained."""
        # adam_ writes in place, so it is given copies; a recorded copy costs nothing.
        copies = [tensor.clone() for tensor in (flat, *moments, skipped)]
        param, steps, exp_avg, exp_avg_sq, count = copies
        for launch in self._plan._launches:  # one for each set of options
            *_, segments = launch.args
            options = {**launch.keywords, "skipped": count}
            adam_(param, grad, exp_avg, exp_avg_sq, steps, segments, **options)
        return copies
