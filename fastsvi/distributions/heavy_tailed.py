"""Cauchy, HalfCauchy, Laplace and StudentT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import AbsTransform

from fastsvi.distributions.elementwise import (
    Elementwise,
    Operand,
    derived,
    lgamma,
    log,
    minus,
    minus_log,
    parameter,
    standardize,
)
from fastsvi.distributions.gamma import Chi2
from fastsvi.distributions.noise import cauchy, laplace, normal
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.transformed import TransformedDistribution
from fastsvi.distributions.util import SCALAR, Shape

__all__ = ["Cauchy", "HalfCauchy", "Laplace", "StudentT"]


def _log_cauchy(value: Tensor, loc: Operand, scale: Operand, constant: float) -> Tensor:
    """``constant - log scale - log(1 + z**2)`` with ``z = (value - loc) / scale``."""
    z = standardize(value, loc, scale)
    return minus(minus_log(scale, constant), z.square().log1p())


class Cauchy(Elementwise, torch.distributions.Cauchy, TorchDistribution):
    """Cauchy distribution with median ``loc`` and half width at half maximum ``scale > 0``.

    >>> Cauchy(0.0, 1.0).log_prob(0.0)
    tensor(-1.1447)
    """

    _params = ("loc", "scale")
    _loc: Operand
    _scale: Operand
    loc = parameter("Median, at the batch shape.")
    scale = parameter("Half width at half maximum, at the batch shape.")

    def __init__(self, loc: Operand, scale: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``loc`` and ``scale``, shape ``sample_shape + batch_shape``."""
        noise = cauchy(self._size(sample_shape), **self._options())
        return self._loc + noise * self._scale

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        return _log_cauchy(self._prepare(value), self._loc, self._scale, -math.log(math.pi))


class HalfCauchy(Elementwise, torch.distributions.HalfCauchy, TransformedDistribution):
    """Distribution of ``|x|`` for ``x ~ Cauchy(0, scale)``.

    >>> HalfCauchy(5.0).log_prob(0.0)
    tensor(-2.0610)
    """

    _params = ("scale",)
    _scale: Operand
    scale = parameter("Scale of the Cauchy distribution that is folded, at the batch shape.")

    def __init__(self, scale: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, scale=scale)

    @derived
    def base_dist(self) -> Cauchy:
        """The Cauchy distribution that is folded."""
        return Cauchy(0.0, self._scale).expand(self._batch_shape)

    @derived
    def transforms(self) -> list[Transform]:
        """The absolute value."""
        return [AbsTransform()]

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``scale``, shape ``sample_shape + batch_shape``."""
        noise = cauchy(self._size(sample_shape), **self._options())
        return (noise * self._scale).abs()

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``, ``-inf`` below 0; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        log_prob = _log_cauchy(value, 0.0, self._scale, math.log(2 / math.pi))
        return log_prob.masked_fill(value < 0, -math.inf)


class Laplace(Elementwise, torch.distributions.Laplace, TorchDistribution):
    """Laplace distribution with mean ``loc`` and mean absolute deviation ``scale > 0``.

    >>> Laplace(0.0, 1.0).log_prob(0.0)
    tensor(-0.6931)
    """

    _params = ("loc", "scale")
    _loc: Operand
    _scale: Operand
    loc = parameter("Mean, at the batch shape.")
    scale = parameter("Mean absolute deviation, at the batch shape.")

    def __init__(self, loc: Operand, scale: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``loc`` and ``scale``, shape ``sample_shape + batch_shape``."""
        noise = laplace(self._size(sample_shape), **self._options())
        return self._loc + noise * self._scale

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        distance = standardize(self._prepare(value), self._loc, 1.0).abs()
        scale, normalizer = self._scale, minus_log(self._scale, -math.log(2))
        if isinstance(scale, Tensor):
            return normalizer - distance / scale
        return torch.rsub(distance, normalizer, alpha=1 / scale if scale else math.nan)


class StudentT(Elementwise, torch.distributions.StudentT, TorchDistribution):
    """Student's t with ``df > 0`` degrees of freedom, moved by ``loc`` and stretched by ``scale``.

    >>> StudentT(3.0).log_prob(0.0)
    tensor(-1.0009)
    """

    _params = ("df", "loc", "scale")
    _df: Operand
    _loc: Operand
    _scale: Operand
    df = parameter("Degrees of freedom, at the batch shape.")
    loc = parameter("Centre, at the batch shape.")
    scale = parameter("Scale, at the batch shape.")

    def __init__(
        self,
        df: Operand,
        loc: Operand = 0.0,
        scale: Operand = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self._bind(validate_args, df=df, loc=loc, scale=scale)

    @derived
    def _chi2(self) -> Chi2:
        return Chi2(self.df, validate_args=False)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, shape ``sample_shape + batch_shape``."""
        noise = normal(self._size(sample_shape), **self._options())
        y = noise * torch.rsqrt(self._chi2.rsample(sample_shape) / self.df)
        return self._loc + y * self._scale

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        df = self._df
        z = standardize(self._prepare(value), self._loc, self._scale)
        half_df = 0.5 * df
        half = half_df + 0.5
        normalizer = lgamma(half) - lgamma(half_df) - 0.5 * log(df)
        normalizer = minus_log(self._scale, -0.5 * math.log(math.pi)) + normalizer
        return minus(normalizer, torch.log1p(z.square() / df) * half)
