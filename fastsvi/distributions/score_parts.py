"""The three terms from which ELBO gradient estimators are put together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastsvi.distributions.util import scale_and_mask

__all__ = ["ScoreParts"]


class ScoreParts(NamedTuple):
    """Terms of a gradient estimator that mixes pathwise and score function estimates.

    ``log_prob``
        log-density of the value, shape ``sample_shape + batch_shape``.
    ``score_function``
        multiplies the downstream cost in REINFORCE; the number 0 if the sample is fully
        reparameterized.
    ``entropy_term``
        the part of ``log_prob`` that must be differentiated; the number 0 if it has zero mean
        gradient (no reparameterization; Roeder, Wu and Duvenaud 2017, arXiv:1703.09194).
    """

    log_prob: Tensor
    score_function: Tensor | float
    entropy_term: Tensor | float

    def scale_and_mask(
        self, scale: Tensor | float = 1.0, mask: Tensor | bool | None = None
    ) -> ScoreParts:
        """The parts of a subsampled or masked site.

        ``score_function`` stays as it is: it multiplies a cost that is scaled already.
        """
        return ScoreParts(
            scale_and_mask(self.log_prob, scale, mask),
            self.score_function,
            scale_and_mask(self.entropy_term, scale, mask),
        )
