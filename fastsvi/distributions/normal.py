"""Normal, LogNormal and HalfNormal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import AbsTransform, ExpTransform

from fastsvi.distributions.elementwise import (
    Elementwise,
    Operand,
    derived,
    half_inverse_square,
    log,
    parameter,
    standardize,
)
from fastsvi.distributions.noise import normal
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.transformed import TransformedDistribution
from fastsvi.distributions.util import SCALAR, Shape

__all__ = ["HalfNormal", "LogNormal", "Normal"]

_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


def _log_density(value: Tensor, loc: Operand, scale: Operand, constant: float) -> Tensor:
    """``constant - log scale - z**2 / 2`` with ``z = (value - loc) / scale``."""
    if isinstance(scale, Tensor):
        z = standardize(value, loc, scale)
        return torch.addcmul(torch.rsub(scale.log(), constant), z, z, value=-0.5)
    if isinstance(loc, Tensor) or loc != 0.0:
        value = value - loc
    # A factor inside the subtraction costs less than an operation of its own.
    normalizer = constant - log(scale)
    return torch.rsub(value.square(), normalizer, alpha=half_inverse_square(scale))


def _draw(loc: Operand, scale: Operand, noise: Tensor) -> Tensor:
    """``loc + scale * noise``."""
    if isinstance(loc, Tensor) and isinstance(scale, Tensor):
        return torch.addcmul(loc, noise, scale)
    if isinstance(scale, Tensor) or scale != 1.0:
        noise = noise * scale
    return noise if not isinstance(loc, Tensor) and loc == 0.0 else noise + loc


class Normal(Elementwise, torch.distributions.Normal, TorchDistribution):
    """Normal distribution with mean ``loc`` and standard deviation ``scale > 0``.

    >>> Normal(0.0, 1.0).log_prob(0.0)
    tensor(-0.9189)
    >>> Normal(torch.zeros(3), 2.0).expand([4, 3]).to_event(1).batch_shape
    torch.Size([4])
    """

    _params = ("loc", "scale")
    _loc: Operand
    _scale: Operand
    loc = parameter("Mean, at the batch shape.")
    scale = parameter("Standard deviation, at the batch shape.")

    def __init__(self, loc: Operand, scale: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``loc`` and ``scale``, shape ``sample_shape + batch_shape``."""
        noise = normal(self._size(sample_shape), **self._options())
        return _draw(self._loc, self._scale, noise)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        return _log_density(self._prepare(value), self._loc, self._scale, -_LOG_ROOT_2PI)


class LogNormal(Elementwise, torch.distributions.LogNormal, TransformedDistribution):
    """Distribution of ``exp(x)`` for ``x ~ Normal(loc, scale)``.

    >>> LogNormal(0.0, 1.0).log_prob(1.0)
    tensor(-0.9189)
    """

    _params = ("loc", "scale")
    _loc: Operand
    _scale: Operand
    loc = parameter("Mean of the logarithm, at the batch shape.")
    scale = parameter("Standard deviation of the logarithm, at the batch shape.")

    def __init__(self, loc: Operand, scale: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, loc=loc, scale=scale)

    @derived
    def base_dist(self) -> Normal:
        """The normal distribution of the logarithm."""
        return Normal(self._loc, self._scale).expand(self._batch_shape)

    @derived
    def transforms(self) -> list[Transform]:
        """The exponential."""
        return [ExpTransform()]

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``loc`` and ``scale``, shape ``sample_shape + batch_shape``."""
        noise = normal(self._size(sample_shape), **self._options())
        return _draw(self._loc, self._scale, noise).exp()

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        x = self._prepare(value).log()
        return _log_density(x, self._loc, self._scale, -_LOG_ROOT_2PI) - x


class HalfNormal(Elementwise, torch.distributions.HalfNormal, TransformedDistribution):
    """Distribution of ``|x|`` for ``x ~ Normal(0, scale)``.

    >>> HalfNormal(1.0).log_prob(0.0)
    tensor(-0.2258)
    """

    _params = ("scale",)
    _scale: Operand
    scale = parameter("Scale of the normal distribution that is folded, at the batch shape.")

    def __init__(self, scale: Operand, validate_args: bool | None = None) -> None:
        self._bind(validate_args, scale=scale)

    @derived
    def base_dist(self) -> Normal:
        """The normal distribution that is folded."""
        return Normal(0.0, self._scale).expand(self._batch_shape)

    @derived
    def transforms(self) -> list[Transform]:
        """The absolute value."""
        return [AbsTransform()]

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``scale``, shape ``sample_shape + batch_shape``."""
        noise = normal(self._size(sample_shape), **self._options())
        return _draw(0.0, self._scale, noise).abs()

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``, ``-inf`` below 0; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        log_prob = _log_density(value, 0.0, self._scale, math.log(2) - _LOG_ROOT_2PI)
        return log_prob.masked_fill(value < 0, -math.inf)
