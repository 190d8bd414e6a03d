"""Compound families, in which the parameter of a count distribution is integrated out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions.elementwise import Elementwise, Operand, derived, parameter
from fastsvi.distributions.gamma import Beta, Dirichlet, Gamma
from fastsvi.distributions.noise import draw, inside_transform
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.torch_families import Multinomial
from fastsvi.distributions.util import SCALAR, Shape, broadcast_shape
from fastsvi.distributions.values import as_tensor

__all__ = ["BetaBinomial", "DirichletMultinomial", "GammaPoisson"]


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    """Logarithm of the beta function."""
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


def log_binomial(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the binomial coefficient."""
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()


class BetaBinomial(Elementwise, TorchDistribution):
    """Binomial with ``total_count`` trials whose probability is beta distributed.

    >>> BetaBinomial(1.0, 1.0, 3).log_prob(2.0).exp()
    tensor(0.2500)
    """

    _params = ("concentration1", "concentration0", "total_count")
    _concentration1: Operand
    _concentration0: Operand
    _total_count: Operand
    concentration1 = parameter("Beta concentration at 1, at the batch shape.")
    concentration0 = parameter("Beta concentration at 0, at the batch shape.")
    total_count = parameter("Number of trials, at the batch shape.")
    arg_constraints: ClassVar = {
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
        "total_count": constraints.nonnegative_integer,
    }
    has_enumerate_support = True

    def __init__(
        self,
        concentration1: Operand,
        concentration0: Operand,
        total_count: Operand = 1,
        validate_args: bool | None = None,
    ) -> None:
        self._bind(
            validate_args,
            concentration1=concentration1,
            concentration0=concentration0,
            total_count=total_count,
        )

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Integers up to ``total_count``."""
        return constraints.integer_interval(0, self._total_count)

    @derived
    def _beta(self) -> Beta:
        return Beta(self.concentration1, self.concentration0, validate_args=False)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            probs = self._beta.sample(sample_shape)
            return draw(torch.binomial, self.total_count.to(probs.dtype).expand_as(probs), probs)

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        k, a, b = self._prepare(value), self.concentration1, self.concentration0
        n = self.total_count.to(a.dtype)
        return log_binomial(n, k) + log_beta(k + a, n - k + b) - log_beta(a, b)

    @property
    def mean(self) -> Tensor:
        """Mean, at the batch shape."""
        return self._beta.mean * self.total_count

    @property
    def variance(self) -> Tensor:
        """Variance, at the batch shape."""
        n, total = self.total_count, self.concentration1 + self.concentration0
        return self._beta.variance * n * (total + n)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """See :meth:`Distribution.enumerate_support`; ``total_count`` must be the same for all."""
        n = int(self.total_count.max())
        if int(self.total_count.min()) != n:
            raise NotImplementedError("BetaBinomial enumerates only if all total_count are equal")
        values = torch.arange(1 + n, **self._options())
        values = values.reshape((-1,) + (1,) * len(self._batch_shape))
        return values.expand((-1, *self._batch_shape)) if expand else values


class DirichletMultinomial(TorchDistribution):
    """Multinomial with ``total_count`` trials whose probabilities are Dirichlet distributed.

    ``concentration`` has shape ``(..., K)``. ``is_sparse=True`` promises that most counts are
    zero, and computes the terms of the others only (which needs to look at the values).

    >>> DirichletMultinomial(torch.ones(2), 3).log_prob(torch.tensor([1.0, 2.0])).exp()
    tensor(0.2500)
    """

    arg_constraints: ClassVar = {
        "concentration": constraints.independent(constraints.positive, 1),
        "total_count": constraints.nonnegative_integer,
    }

    def __init__(
        self,
        concentration: Tensor,
        total_count: Tensor | int = 1,
        is_sparse: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        batch_shape = concentration.shape[:-1]
        self._count = None if isinstance(total_count, Tensor) else int(total_count)
        if not isinstance(total_count, Tensor):
            total_count = concentration.new_tensor(total_count)
        batch_shape = broadcast_shape(batch_shape, total_count.shape)
        self.concentration = concentration.expand((*batch_shape, -1))
        self.total_count = total_count.expand(batch_shape)
        self.is_sparse = is_sparse
        super().__init__(batch_shape, concentration.shape[-1:], validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Counts that add up to at most ``total_count``."""
        return constraints.multinomial(self.total_count)

    @classmethod
    def infer_shapes(cls, concentration: Any, total_count: Any = ()) -> Any:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(concentration)
        return broadcast_shape(shape[:-1], total_count), shape[-1:]

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(DirichletMultinomial, _instance)
        shape = torch.Size(batch_shape)
        concentration = self.concentration.expand((*shape, -1))
        count = self.total_count.expand(shape)
        DirichletMultinomial.__init__(new, concentration, count, self.is_sparse, False)
        new._count = self._count
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, ``sample_shape + batch_shape + (K,)``; all totals must be equal."""
        count = self._count
        if count is None:
            count = int(self.total_count.max())
            if int(self.total_count.min()) != count:
                raise NotImplementedError(
                    "DirichletMultinomial samples only if all total_count are equal"
                )
        with torch.no_grad():
            probs = Dirichlet(self.concentration, validate_args=False).sample(sample_shape)
            return Multinomial(count, probs, validate_args=False).sample()

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        # The sparse way depends on the values, which neither vmap nor a capture allows.
        sparse = self.is_sparse and not inside_transform()
        term = _log_beta_one_sparse if sparse else _log_beta_one
        total = term(self.concentration.sum(-1), value.sum(-1))
        return total - term(self.concentration, value).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean counts, ``batch_shape + (K,)``."""
        probs = self.concentration / self.concentration.sum(-1, keepdim=True)
        return probs * self.total_count.unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, ``batch_shape + (K,)``."""
        n, total = self.total_count.unsqueeze(-1), self.concentration.sum(-1, keepdim=True)
        probs = self.concentration / total
        return n * probs * (1 - probs) * (n + total) / (1 + total)


def _log_beta_one(alpha: Tensor, count: Tensor) -> Tensor:
    """``log count! + log Gamma(alpha) - log Gamma(alpha + count)``."""
    return (1 + count).lgamma() + alpha.lgamma() - (count + alpha).lgamma()


def _log_beta_one_sparse(alpha: Tensor, count: Tensor) -> Tensor:
    alpha, count = torch.broadcast_tensors(alpha, count)
    seen = count != 0
    terms = _log_beta_one(alpha[seen], count[seen])
    return torch.zeros_like(alpha).masked_scatter(seen, terms)


class GammaPoisson(Elementwise, TorchDistribution):
    """Poisson whose rate is gamma distributed: a negative binomial in other parameters.

    >>> GammaPoisson(1.0, 1.0).log_prob(0.0).exp()
    tensor(0.5000)
    """

    _params = ("concentration", "rate")
    _concentration: Operand
    _rate: Operand
    concentration = parameter("Shape of the gamma distribution, at the batch shape.")
    rate = parameter("Inverse scale of the gamma distribution, at the batch shape.")
    arg_constraints: ClassVar = {
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self, concentration: Operand, rate: Operand, validate_args: bool | None = None
    ) -> None:
        self._bind(validate_args, concentration=concentration, rate=rate)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            gamma = Gamma(self.concentration, self.rate, validate_args=False)
            return torch.poisson(gamma.sample(sample_shape))

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        k, a, b = self._prepare(value), self.concentration, self.rate
        coefficient = (a + k).lgamma() - a.lgamma() - (k + 1).lgamma()
        return coefficient - a * b.reciprocal().log1p() - k * b.log1p()

    @property
    def mean(self) -> Tensor:
        """Mean, at the batch shape."""
        return self.concentration / self.rate

    @property
    def variance(self) -> Tensor:
        """Variance, at the batch shape."""
        return self.mean * (1 + self.rate.reciprocal())
