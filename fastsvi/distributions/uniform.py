"""The continuous uniform distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions.elementwise import Elementwise, Operand, log, parameter
from fastsvi.distributions.noise import uniform
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape

__all__ = ["Uniform"]


class Uniform(Elementwise, torch.distributions.Uniform, TorchDistribution):
    """Uniform distribution on ``[low, high)``.

    >>> Uniform(0.0, 2.0).log_prob(1.0)
    tensor(-0.6931)
    """

    _params = ("low", "high")
    _low: Operand
    _high: Operand
    low = parameter("Lower bound, at the batch shape.")
    high = parameter("Upper bound, at the batch shape.")

    def __init__(self, low: Operand, high: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, low=low, high=high)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:  # type: ignore[override]
        """``low < high``."""
        return {
            "low": constraints.less_than(self._high),
            "high": constraints.greater_than(self._low),
        }

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval, with the bounds as they were given (numbers stay numbers)."""
        return constraints.interval(self._low, self._high)

    @classmethod
    def infer_shapes(cls, low: Any, high: Any) -> Any:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        return torch.broadcast_shapes(tuple(low), tuple(high)), SCALAR

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both bounds, shape ``sample_shape + batch_shape``."""
        noise = uniform(self._size(sample_shape), **self._options())
        return noise * (self._high - self._low) + self._low

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``, ``-inf`` outside; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        inside = (value >= self._low) & (value < self._high)
        height = -log(self._high - self._low)
        if isinstance(height, Tensor):
            return torch.where(inside, height, -math.inf)
        return torch.full_like(value, -math.inf).masked_fill(inside, height)
