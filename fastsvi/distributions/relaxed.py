"""Discrete samples with the gradients of their relaxation (straight-through estimators)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.utils import clamp_probs

from fastsvi.distributions.torch_families import RelaxedBernoulli, RelaxedOneHotCategorical
from fastsvi.distributions.transformed import DrawnDirectly
from fastsvi.distributions.util import SCALAR, Shape

__all__ = ["RelaxedBernoulliStraightThrough", "RelaxedOneHotCategoricalStraightThrough"]


class RelaxedOneHotCategoricalStraightThrough(RelaxedOneHotCategorical, DrawnDirectly):
    """One-hot samples with the gradient of :class:`RelaxedOneHotCategorical`.

    ``log_prob`` of a sample is that of the relaxed value it was rounded from (Jang et al. 2016).

    >>> d = RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), probs=torch.ones(3))
    >>> d.rsample().sum()
    tensor(1.)
    """

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A one-hot draw, shape ``sample_shape + batch_shape + (K,)``."""
        soft = clamp_probs(super().rsample(sample_shape))
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return _straight_through(hard, soft)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of the relaxed value; shape ``sample_shape + batch_shape``."""
        return super().log_prob(getattr(value, "_unquantize", value))


class RelaxedBernoulliStraightThrough(RelaxedBernoulli, DrawnDirectly):
    """Samples 0 and 1 with the gradient of :class:`RelaxedBernoulli`.

    ``log_prob`` of a sample is that of the relaxed value it was rounded from (Jang et al. 2016).

    >>> d = RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor(1.0))
    >>> d.rsample()
    tensor(1.)
    """

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of zeros and ones, shape ``sample_shape + batch_shape``."""
        soft = clamp_probs(super().rsample(sample_shape))
        return _straight_through(soft.round(), soft)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of the relaxed value; shape ``sample_shape + batch_shape``."""
        return super().log_prob(getattr(value, "_unquantize", value))


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    value = hard.detach() + (soft - soft.detach())  # hard in value, soft in gradient
    value._unquantize = soft  # type: ignore[attr-defined]
    return value
