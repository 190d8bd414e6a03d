"""Log-concave families with exponential tails: logistic and relatives of Laplace's distribution."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from fastsvi.distributions.elementwise import Elementwise, Operand, parameter
from fastsvi.distributions.noise import exponential, normal, open_uniform
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape

__all__ = ["AsymmetricLaplace", "Logistic", "SkewLogistic", "SoftAsymmetricLaplace", "SoftLaplace"]


class _LocationScale(Elementwise):
    """What the families of this file share; densities are those of ``z = (x - loc) / scale``."""

    _loc: Operand
    _scale: Operand
    loc = parameter("Location, at the batch shape.")
    scale = parameter("Scale, at the batch shape.")
    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def _z(self, value: Tensor) -> Tensor:
        return (value - self.loc) / self.scale

    def _uniform(self, sample_shape: Shape) -> Tensor:
        # Not torch.rand: a 0 would be mapped to minus infinity.
        return open_uniform(self._size(sample_shape), **self._options())


class Logistic(_LocationScale, TorchDistribution):
    """Logistic distribution; its cdf is ``sigmoid(z)``.

    >>> Logistic(0.0, 1.0).log_prob(0.0).exp()
    tensor(0.2500)
    """

    _params = ("loc", "scale")

    def __init__(self, loc: Operand, scale: Operand, *, validate_args: bool | None = None) -> None:
        self._bind(validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``loc`` and ``scale``, shape ``sample_shape + batch_shape``."""
        return self.icdf(self._uniform(sample_shape))

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        z = self._z(self._prepare(value))
        return logsigmoid(z) + logsigmoid(-z) - self.scale.log()

    def cdf(self, value: Any) -> Tensor:
        """Probability of at most ``value``."""
        return self._z(self._prepare(value)).sigmoid()

    def icdf(self, value: Any) -> Tensor:
        """Value below which the probability is ``value``."""
        return self.loc + self.scale * self._as_value(value).logit()

    @property
    def mean(self) -> Tensor:
        """``loc``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """``(pi * scale)**2 / 3``."""
        return self.scale**2 * (math.pi**2 / 3)

    def entropy(self) -> Tensor:
        """Entropy, at the batch shape."""
        return self.scale.log() + 2


class SkewLogistic(_LocationScale, TorchDistribution):
    """Logistic distribution, skewed right if ``asymmetry > 1``; cdf ``sigmoid(z)**asymmetry``.

    >>> SkewLogistic(0.0, 1.0, 1.0).log_prob(0.0).exp()
    tensor(0.2500)
    """

    _params = ("loc", "scale", "asymmetry")
    _asymmetry: Operand
    asymmetry = parameter("Exponent of the cdf, at the batch shape.")
    arg_constraints: ClassVar = {
        **_LocationScale.arg_constraints,
        "asymmetry": constraints.positive,
    }

    def __init__(
        self,
        loc: Operand,
        scale: Operand,
        asymmetry: Operand = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self._bind(validate_args, loc=loc, scale=scale, asymmetry=asymmetry)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, shape ``sample_shape + batch_shape``."""
        return self.icdf(self._uniform(sample_shape))

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        z, a = self._z(self._prepare(value)), self.asymmetry
        return a.log() + a * logsigmoid(z) + logsigmoid(-z) - self.scale.log()

    def cdf(self, value: Any) -> Tensor:
        """Probability of at most ``value``."""
        return self._z(self._prepare(value)).sigmoid().pow(self.asymmetry)

    def icdf(self, value: Any) -> Tensor:
        """Value below which the probability is ``value``."""
        root = self._as_value(value).pow(self.asymmetry.reciprocal())
        return self.loc + self.scale * root.logit()


class SoftLaplace(_LocationScale, TorchDistribution):
    """Smooth distribution with the tails of Laplace's: density ``sech(z) / (pi * scale)``.

    >>> SoftLaplace(0.0, 1.0).log_prob(0.0).exp()
    tensor(0.3183)
    """

    _params = ("loc", "scale")

    def __init__(self, loc: Operand, scale: Operand, *, validate_args: bool | None = None) -> None:
        self._bind(validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``loc`` and ``scale``, shape ``sample_shape + batch_shape``."""
        return self.icdf(self._uniform(sample_shape))

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        z = self._z(self._prepare(value))
        return math.log(2 / math.pi) - self.scale.log() - torch.logaddexp(z, -z)

    def cdf(self, value: Any) -> Tensor:
        """Probability of at most ``value``."""
        return self._z(self._prepare(value)).exp().atan() * (2 / math.pi)

    def icdf(self, value: Any) -> Tensor:
        """Value below which the probability is ``value``."""
        return self.loc + self.scale * (self._as_value(value) * (math.pi / 2)).tan().log()

    @property
    def mean(self) -> Tensor:
        """``loc``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """``(pi / 2 * scale)**2``."""
        return (math.pi / 2 * self.scale) ** 2


class _TwoSided(_LocationScale):
    """Tails of scale ``scale * asymmetry`` on the left and ``scale / asymmetry`` on the right."""

    _asymmetry: Operand
    asymmetry = parameter("Square root of the ratio of left to right scale, at the batch shape.")
    arg_constraints: ClassVar = {
        **_LocationScale.arg_constraints,
        "asymmetry": constraints.positive,
    }

    @property
    def left_scale(self) -> Tensor:
        """Scale of the left tail."""
        return self.scale * self.asymmetry

    @property
    def right_scale(self) -> Tensor:
        """Scale of the right tail."""
        return self.scale / self.asymmetry

    def _two_exponentials(self, sample_shape: Shape) -> Tensor:
        both = torch.Size((2,)) + self._size(sample_shape)
        left, right = exponential(both, **self._options())
        return self.right_scale * right - self.left_scale * left

    @property
    def mean(self) -> Tensor:
        """Mean, at the batch shape."""
        return self.loc + self.right_scale - self.left_scale

    @property
    def variance(self) -> Tensor:
        """Variance, at the batch shape."""
        return self.left_scale**2 + self.right_scale**2


class AsymmetricLaplace(_TwoSided, TorchDistribution):
    """Two exponential tails that meet at ``loc``, of different scales.

    >>> AsymmetricLaplace(0.0, 1.0, 1.0).log_prob(0.0).exp()
    tensor(0.5000)
    """

    _params = ("loc", "scale", "asymmetry")

    def __init__(
        self,
        loc: Operand,
        scale: Operand,
        asymmetry: Operand,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self._bind(validate_args, loc=loc, scale=scale, asymmetry=asymmetry)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, shape ``sample_shape + batch_shape``."""
        return self.loc + self._two_exponentials(sample_shape)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        left, right = self.left_scale, self.right_scale
        z = self._prepare(value) - self.loc
        return -z.abs() / torch.where(z < 0, left, right) - (left + right).log()


class SoftAsymmetricLaplace(_TwoSided, TorchDistribution):
    """Sum of an asymmetric Laplace variable and ``Normal(0, scale * softness)``; smooth everywhere.

    >>> SoftAsymmetricLaplace(0.0, 1.0).variance
    tensor(3.)
    """

    _params = ("loc", "scale", "asymmetry", "softness")
    _softness: Operand
    softness = parameter("Standard deviation of the normal part in units of scale.")
    arg_constraints: ClassVar = {**_TwoSided.arg_constraints, "softness": constraints.positive}

    def __init__(
        self,
        loc: Operand,
        scale: Operand,
        asymmetry: Operand = 1.0,
        softness: Operand = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self._bind(validate_args, loc=loc, scale=scale, asymmetry=asymmetry, softness=softness)

    @property
    def soft_scale(self) -> Tensor:
        """Standard deviation of the normal part."""
        return self.scale * self.softness

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, shape ``sample_shape + batch_shape``."""
        noise = normal(self._size(sample_shape), **self._options())
        return self.loc + self.soft_scale * noise + self._two_exponentials(sample_shape)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        x, s = self._prepare(value) - self.loc, self.soft_scale
        left, right = self.left_scale, self.right_scale
        # Each tail is an integral of exponential times normal, so a normal cdf.
        of_left = _log_convolution(-x, left, s)
        of_right = _log_convolution(x, right, s)
        return torch.logaddexp(of_left, of_right) - (left + right).log()

    @property
    def variance(self) -> Tensor:
        """Variance, at the batch shape."""
        return super().variance + self.soft_scale**2


def _log_convolution(x: Tensor, tail: Tensor, s: Tensor) -> Tensor:
    """Log of the integral over ``t > 0`` of ``exp(-t / tail)`` times ``Normal(x - t; 0, s)``."""
    ratio = s / tail
    return 0.5 * ratio**2 - x / tail + _log_ndtr(x / s - ratio)


def _log_ndtr(x: Tensor) -> Tensor:
    """Log of the standard normal cdf; torch's own has no rule for vmap."""
    left = x.clamp(max=0.0) * -math.sqrt(0.5)
    below = (0.5 * torch.special.erfcx(left)).log() - left.square()
    above = (-0.5 * torch.special.erfc(x * math.sqrt(0.5))).log1p()
    return torch.where(x < 0, below, above)
