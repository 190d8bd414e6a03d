"""Distributions pushed through transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsvi.distributions.torch_distribution import HasRsampleOfBase, TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import as_tensor

__all__ = ["DrawnDirectly", "TransformedDistribution"]


class TransformedDistribution(torch.distributions.TransformedDistribution, TorchDistribution):
    """Distribution of ``f(x)`` for ``x`` from a base distribution and a chain ``f`` of transforms.

    >>> from torch.distributions.transforms import AffineTransform, ExpTransform
    >>> base = torch.distributions.Normal(0.0, 1.0)
    >>> d = TransformedDistribution(base, [AffineTransform(1.0, 2.0), ExpTransform()])
    >>> d.log_prob(1.0)
    tensor(-1.7371)
    """

    has_rsample = HasRsampleOfBase()  # type: ignore[assignment]

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        return super().log_prob(as_tensor(self, value))

    def cdf(self, value: Any) -> Tensor:
        """Probability of at most ``value``."""
        return super().cdf(as_tensor(self, value))

    def icdf(self, value: Any) -> Tensor:
        """Value below which the probability is ``value``."""
        return super().icdf(as_tensor(self, value))

    def clear_cache(self) -> None:
        """Forget the values that transforms with ``cache_size=1`` hold."""
        for transform in self.transforms:
            if transform._cache_size == 1:
                transform._cached_x_y = None, None


class DrawnDirectly(TransformedDistribution):
    """A transformed distribution whose ``rsample`` does not go through its base distribution."""

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw without gradient; shape ``self.shape(sample_shape)``."""
        with torch.no_grad():
            return self.rsample(torch.Size(sample_shape))

    def _push(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x
