"""The empirical distribution of weighted samples."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions.discrete import Categorical
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.errors import ShapeError

__all__ = ["Empirical"]


class Empirical(TorchDistribution):
    """Weighted samples as a distribution.

    ``samples`` has shape ``batch_shape + (n,) + event_shape`` and ``log_weights`` (unnormalised)
    ``batch_shape + (n,)``.

    >>> d = Empirical(torch.tensor([1.0, 2.0, 2.0]), torch.zeros(3))
    >>> d.mean, d.log_prob(torch.tensor(2.0)).exp()
    (tensor(1.6667), tensor(0.6667))
    """

    arg_constraints: ClassVar = {}
    support = constraints.real
    has_enumerate_support = True

    def __init__(
        self, samples: Tensor, log_weights: Tensor, validate_args: bool | None = None
    ) -> None:
        shape = log_weights.shape
        if not shape or samples.shape[: len(shape)] != shape:
            raise ShapeError(
                "Empirical: log_weights must have the leftmost dimensions of samples, found "
                f"log_weights {tuple(shape)} and samples {tuple(samples.shape)}"
            )
        self._samples, self._log_weights = samples, log_weights
        self._categorical = Categorical(logits=log_weights, validate_args=False)
        super().__init__(shape[:-1], samples.shape[len(shape) :], validate_args)

    @property
    def sample_size(self) -> int:
        """Number of samples, over the whole batch."""
        return self._log_weights.numel()

    @property
    def log_weights(self) -> Tensor:
        """The weights as they were given, ``batch_shape + (n,)``."""
        return self._log_weights

    def _by_sample(self, weights: Tensor) -> Tensor:
        return weights.reshape(weights.shape + (1,) * self.event_dim)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A resampled value, shape ``sample_shape + batch_shape + event_shape``."""
        shape = torch.Size(sample_shape)
        index = self._categorical.sample(shape)
        axis = len(shape) + len(self.batch_shape)
        index = self._by_sample(index).unsqueeze(axis)
        samples = self._samples.expand(shape + self._samples.shape)
        index = index.expand(index.shape[: axis + 1] + self.event_shape)
        return samples.gather(axis, index).squeeze(axis)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the weight of all samples equal to ``value``; shape ``batch_shape``.

        ``value`` has shape ``batch_shape + event_shape``, with no sample dimensions.
        """
        if self._validate_args and value.shape != self.shape():
            raise ShapeError(
                f"Empirical: the value must have shape {tuple(self.shape())} (no sample "
                f"dimensions), found {tuple(value.shape)}"
            )
        equal = self._samples == value.unsqueeze(len(self.batch_shape))
        if self.event_dim:
            equal = equal.flatten(-self.event_dim).all(-1)
        return (self._categorical.probs * equal).sum(-1).log()

    def _weighted_mean(self, values: Tensor) -> Tensor:
        return (self._by_sample(self._categorical.probs) * values).sum(len(self.batch_shape))

    def _require_float(self, what: str) -> None:
        if not self._samples.is_floating_point():
            raise ValueError(
                f"Empirical: the {what} of {self._samples.dtype} samples is not defined. Convert "
                "them with .double(); for categories use one-hot vectors"
            )

    @property
    def mean(self) -> Tensor:
        """Weighted mean, ``batch_shape + event_shape``."""
        self._require_float("mean")
        return self._weighted_mean(self._samples)

    @property
    def variance(self) -> Tensor:
        """Weighted variance, ``batch_shape + event_shape``."""
        self._require_float("variance")
        return self._weighted_mean(
            (self._samples - self.mean.unsqueeze(len(self.batch_shape))) ** 2
        )

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The samples themselves; there is no batch to expand over."""
        return self._samples
