"""Gamma, Chi2, Exponential, Dirichlet and Beta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from fastsvi.distributions.elementwise import (
    Elementwise,
    Operand,
    derived,
    lgamma,
    log,
    minus_product,
    parameter,
)
from fastsvi.distributions.gamma_noise import dirichlet_draw, log_gamma_draw, source_for
from fastsvi.distributions.noise import dirichlet, exponential
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import Lenient

__all__ = ["Beta", "Chi2", "Dirichlet", "Exponential", "Gamma"]


class Gamma(Elementwise, torch.distributions.Gamma, TorchDistribution):
    """Gamma distribution with shape ``concentration > 0`` and inverse scale ``rate > 0``.

    >>> Gamma(2.0, 1.0).log_prob(1.0)
    tensor(-1.)
    """

    _params = ("concentration", "rate")
    _concentration: Operand
    _rate: Operand
    concentration = parameter("Shape parameter, at the batch shape.")
    rate = parameter("Inverse scale, at the batch shape.")

    def __init__(
        self, concentration: Operand, rate: Operand, validate_args: bool | None = None
    ) -> None:
        self._bind(validate_args, concentration=concentration, rate=rate)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        shape = self._size(sample_shape)
        source = source_for(shape)
        if source is not None:
            value = log_gamma_draw(self.concentration.expand(shape), source).exp() / self._rate
            return value.clamp(min=torch.finfo(value.dtype).tiny)
        value = torch._standard_gamma(self.concentration.expand(shape)) / self._rate
        # Small concentrations underflow to 0, where the density is infinite. (clamp_ has no rule
        # for vmap; the gradient is not clamped.)
        value.detach().clamp_min_(torch.finfo(value.dtype).tiny)
        return value

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        concentration, rate = self._concentration, self._rate
        normalizer = concentration * log(rate) - lgamma(concentration)
        return minus_product(torch.xlogy(concentration - 1.0, value) + normalizer, value, rate)


class Chi2(torch.distributions.Chi2, Gamma):
    """Chi-squared distribution with ``df > 0`` degrees of freedom: ``Gamma(df / 2, 1 / 2)``.

    >>> Chi2(2.0).log_prob(0.0)
    tensor(-0.6931)
    """

    _params = ("df",)  # type: ignore[assignment]
    _df: Operand
    df = parameter("Degrees of freedom, at the batch shape.")
    expand = Gamma.expand  # torch.distributions.Chi2 has one of its own, which comes first.

    def __init__(self, df: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, df=df)

    @lazy_property  # A property would be computed without gradient if read under no_grad first.
    def _concentration(self) -> Operand:  # type: ignore[override]
        return 0.5 * self._df

    @property
    def _rate(self) -> float:  # type: ignore[override]
        return 0.5


class Exponential(Elementwise, torch.distributions.Exponential, TorchDistribution):
    """Exponential distribution with ``rate > 0``.

    >>> Exponential(2.0).log_prob(0.0)
    tensor(0.6931)
    """

    _params = ("rate",)
    _rate: Operand
    rate = parameter("Inverse mean, at the batch shape.")

    def __init__(self, rate: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, rate=rate)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``rate``, shape ``sample_shape + batch_shape``."""
        noise = exponential(self._size(sample_shape), **self._options())
        return noise / self._rate

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        return minus_product(log(self._rate), self._prepare(value), self._rate)


class Dirichlet(Lenient, torch.distributions.Dirichlet, TorchDistribution):
    """Dirichlet distribution over the simplex; ``concentration > 0`` has shape ``(..., K)``.

    >>> Dirichlet(torch.ones(3)).log_prob(torch.tensor([0.2, 0.3, 0.5]))
    tensor(0.6931)
    """

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``concentration``, ``sample_shape + batch_shape + (K,)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        source = source_for(shape)
        if source is not None:
            return dirichlet_draw(self.concentration.expand(shape), source)
        return dirichlet(self.concentration.expand(shape))

    @classmethod
    def infer_shapes(cls, concentration: Any) -> Any:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(concentration)
        return shape[:-1], shape[-1:]


class Beta(Elementwise, torch.distributions.Beta, TorchDistribution):
    """Beta distribution, density ``x**(concentration1 - 1) * (1 - x)**(concentration0 - 1)``.

    >>> Beta(1.0, 1.0).log_prob(0.3)
    tensor(0.)
    """

    _params = ("concentration1", "concentration0")
    _concentration1: Operand
    _concentration0: Operand
    concentration1 = parameter("Concentration at 1, at the batch shape.")
    concentration0 = parameter("Concentration at 0, at the batch shape.")

    def __init__(
        self,
        concentration1: Operand,
        concentration0: Operand,
        validate_args: bool | None = None,
    ) -> None:
        self._bind(validate_args, concentration1=concentration1, concentration0=concentration0)

    @derived
    def _dirichlet(self) -> Dirichlet:
        both = torch.stack([self.concentration1, self.concentration0], -1)
        return Dirichlet(both, validate_args=False)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        return self._dirichlet.rsample(sample_shape).select(-1, 0)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        a, b = self._concentration1, self._concentration0
        normalizer = lgamma(a + b) - lgamma(a) - lgamma(b)
        heads = torch.xlogy(a - 1.0, value)
        return heads + torch.special.xlog1py(b - 1.0, -value) + normalizer
