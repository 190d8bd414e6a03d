"""Counts with more zeros than their distribution explains."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property, logits_to_probs, probs_to_logits
from torch.nn.functional import logsigmoid

from fastsvi.distributions import validation
from fastsvi.distributions.discrete import Poisson, exactly_one
from fastsvi.distributions.noise import bernoulli
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.torch_families import NegativeBinomial
from fastsvi.distributions.util import SCALAR, Shape, broadcast_shape
from fastsvi.distributions.values import as_tensor, prototype
from fastsvi.errors import ShapeError

__all__ = ["ZeroInflatedDistribution", "ZeroInflatedNegativeBinomial", "ZeroInflatedPoisson"]


class ZeroInflatedDistribution(TorchDistribution):
    """Zero with probability ``gate`` (or log-odds ``gate_logits``), else a draw of ``base_dist``.

    >>> from fastsvi.distributions import Poisson
    >>> ZeroInflatedDistribution(Poisson(2.0), gate=0.5).log_prob(0.0).exp()
    tensor(0.5677)
    """

    arg_constraints: ClassVar = {"gate": constraints.unit_interval, "gate_logits": constraints.real}

    def __init__(
        self,
        base_dist: Any,
        *,
        gate: Tensor | float | None = None,
        gate_logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        family = type(self).__name__
        exactly_one(family, gate=gate, gate_logits=gate_logits)
        if base_dist.event_shape:
            raise ShapeError(
                f"{family}: base_dist must be over single numbers, found event shape "
                f"{tuple(base_dist.event_shape)}"
            )
        name = "gate_logits" if gate is None else "gate"
        given = validation.as_operand(family, name, gate_logits if gate is None else gate)
        given = validation.as_value(family, given, prototype(base_dist))
        shape = broadcast_shape(given.shape, base_dist.batch_shape)
        setattr(self, name, given.expand(shape))
        self.base_dist = base_dist.expand(shape)
        super().__init__(shape, SCALAR, validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Support of the base distribution."""
        return self.base_dist.support

    @lazy_property
    def gate(self) -> Tensor:
        """Probability of an extra zero, at the batch shape."""
        return logits_to_probs(self.gate_logits, is_binary=True)

    @lazy_property
    def gate_logits(self) -> Tensor:
        """Log-odds of an extra zero, at the batch shape."""
        return probs_to_logits(self.gate, is_binary=True)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        shape = torch.Size(batch_shape)
        name = "gate" if "gate" in vars(self) else "gate_logits"
        gate = {name: getattr(self, name).expand(shape)}
        base_dist = self.base_dist.expand(shape)
        ZeroInflatedDistribution.__init__(new, base_dist, **gate, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            extra = bernoulli(self.gate.expand(self.shape(sample_shape))).bool()
            return torch.where(extra, 0.0, self.base_dist.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.base_dist.log_prob(value)
        is_zero = value == 0
        # Elsewhere the zero branch sees 0, as an underflow there would give NaN gradients.
        at_zero = torch.where(is_zero, log_prob, 0.0)
        if "gate" in vars(self):
            gate = self.gate
            zero = (gate + (1 - gate) * at_zero.exp()).log()
            return torch.where(is_zero, zero, (-gate).log1p() + log_prob)
        zero = torch.logaddexp(
            logsigmoid(self.gate_logits), logsigmoid(-self.gate_logits) + at_zero
        )
        return torch.where(is_zero, zero, logsigmoid(-self.gate_logits) + log_prob)

    @property
    def mean(self) -> Tensor:
        """Mean, at the batch shape."""
        return (1 - self.gate) * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance, at the batch shape."""
        base = self.base_dist
        return (1 - self.gate) * (base.mean**2 + base.variance) - self.mean**2


class ZeroInflatedPoisson(ZeroInflatedDistribution):
    """Poisson counts of mean ``rate`` with extra zeros.

    >>> ZeroInflatedPoisson(2.0, gate=0.5).mean
    tensor(1.)
    """

    arg_constraints: ClassVar = {
        "rate": constraints.positive,
        "gate": constraints.unit_interval,
        "gate_logits": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        rate: Tensor | float,
        *,
        gate: Tensor | float | None = None,
        gate_logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        base_dist = Poisson(rate, validate_args=False)
        super().__init__(base_dist, gate=gate, gate_logits=gate_logits, validate_args=validate_args)

    @property
    def rate(self) -> Tensor:
        """Mean of the Poisson part, at the batch shape."""
        return self.base_dist.rate


class ZeroInflatedNegativeBinomial(ZeroInflatedDistribution):
    """Negative binomial counts with extra zeros.

    >>> ZeroInflatedNegativeBinomial(3.0, probs=0.5, gate=0.5).mean
    tensor(1.5000)
    """

    arg_constraints: ClassVar = {
        "total_count": constraints.greater_than_eq(0),
        "probs": constraints.half_open_interval(0.0, 1.0),
        "logits": constraints.real,
        "gate": constraints.unit_interval,
        "gate_logits": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        total_count: Tensor | float,
        *,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        gate: Tensor | float | None = None,
        gate_logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        base_dist = NegativeBinomial(total_count, probs, logits, validate_args=False)
        super().__init__(base_dist, gate=gate, gate_logits=gate_logits, validate_args=validate_args)

    @property
    def total_count(self) -> Tensor:
        """Number of failures at which the count stops, at the batch shape."""
        return self.base_dist.total_count

    @property
    def probs(self) -> Tensor:
        """Probability of a success, at the batch shape."""
        return self.base_dist.probs

    @property
    def logits(self) -> Tensor:
        """Log-odds of a success, at the batch shape."""
        return self.base_dist.logits
