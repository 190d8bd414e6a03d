"""Bernoulli, Categorical, Poisson and the other families over integers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property, logits_to_probs, probs_to_logits
from torch.nn.functional import logsigmoid, softplus

from fastsvi.distributions.elementwise import Elementwise, Operand, parameter
from fastsvi.distributions.noise import (
    bernoulli,
    categorical,
    current_source,
    inside_transform,
    open_uniform,
)
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import Lenient, as_tensor
from fastsvi.errors import ShapeError, describe

__all__ = ["Bernoulli", "Categorical", "Geometric", "Poisson"]


def exactly_one(family: str, **given: Any) -> None:
    """Raise unless one and only one of the arguments was given."""
    present = [name for name, value in given.items() if value is not None]
    if len(present) != 1:
        found = " and ".join(present) if present else "neither"
        raise ValueError(f"{family} takes either {' or '.join(given)}, found {found}")


class _Binary(Elementwise):
    """A family with one parameter, given as ``probs`` or ``logits``."""

    probs: Any = parameter("Probability of 1, at the batch shape.")
    logits: Any = parameter("Log-odds of 1, at the batch shape.")

    def __init__(
        self,
        probs: Operand | None = None,
        logits: Operand | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if logits is None and probs is not None:
            self._bind(validate_args, probs=probs)
        else:
            exactly_one(type(self).__name__, probs=probs, logits=logits)
            self._params = ("logits",)
            self._bind(validate_args, logits=logits)

    @lazy_property
    def _logits(self) -> Tensor:
        return probs_to_logits(self._tensor(self._probs), is_binary=True)

    @lazy_property
    def _probs(self) -> Tensor:
        return logits_to_probs(self._tensor(self._logits), is_binary=True)

    def _tensor(self, operand: Operand) -> Tensor:
        if isinstance(operand, Tensor):
            return operand
        return torch.tensor(operand, **self._options())

    @property
    def _param(self) -> Tensor:  # type: ignore[override]
        return getattr(self, self._params[0])

    @property
    def param_shape(self) -> torch.Size:
        """Shape of ``probs``: the batch shape."""
        return self._batch_shape


class Bernoulli(_Binary, torch.distributions.Bernoulli, TorchDistribution):  # type: ignore[override]
    """1 with probability ``probs``, or with log-odds ``logits``; else 0.

    >>> Bernoulli(0.25).log_prob(1.0).exp()
    tensor(0.2500)
    >>> Bernoulli(logits=torch.zeros(3)).enumerate_support(expand=False).shape
    torch.Size([2, 1])
    """

    _params = ("probs",)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of zeros and ones, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return bernoulli(self.probs.expand(self._size(sample_shape)))

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        logits = self._tensor(self._logits)
        # x l - log(1 + e^l) = log sigmoid(l) + (x - 1) l, in which nothing large cancels for x = 1.
        return torch.addcmul(logsigmoid(logits), value - 1, logits)


class Geometric(_Binary, torch.distributions.Geometric, TorchDistribution):
    """Number of failures before the first success, which has probability ``probs`` per trial.

    >>> Geometric(0.5).log_prob(0.0).exp()
    tensor(0.5000)
    """

    _params = ("probs",)
    # torch refuses 0 too, but by a branch of its own that vmap cannot take.
    arg_constraints: ClassVar = {  # type: ignore[misc]
        "probs": constraints.interval(torch.finfo(torch.float32).tiny, 1.0),
        "logits": constraints.real,
    }

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            noise = open_uniform(self._size(sample_shape), **self._options())
            return (noise.log() / (-self.probs).log1p()).floor()

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        logits = self._tensor(self._logits)
        return logsigmoid(logits) - value * softplus(logits)  # log p + k log(1 - p)


class Poisson(Elementwise, torch.distributions.Poisson, TorchDistribution):
    """Poisson distribution with mean ``rate >= 0``.

    ``is_sparse=True`` promises that most values are zero, and computes the terms of the others
    only (which needs to look at the values).

    >>> Poisson(2.0).log_prob(0.0)
    tensor(-2.)
    """

    _params = ("rate",)
    _rate: Operand
    rate = parameter("Mean, at the batch shape.")

    def __init__(
        self, rate: Operand, *, is_sparse: bool = False, validate_args: bool | None = None
    ) -> None:
        self.is_sparse = is_sparse
        self._bind(validate_args, rate=rate)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return torch.poisson(self.rate.expand(self._size(sample_shape)))

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        if self.is_sparse and not inside_transform():
            rate, value = torch.broadcast_tensors(self.rate, value)
            seen = value > 0
            terms = value[seen] * rate[seen].log() - (value[seen] + 1).lgamma()
            return torch.zeros_like(rate).masked_scatter(seen, terms) - rate
        return torch.xlogy(value, self._rate) - (value + 1).lgamma() - self._rate


class Categorical(Lenient, torch.distributions.Categorical, TorchDistribution):
    """Category ``0 .. K-1`` with probabilities ``probs`` or log-weights ``logits``, ``(..., K)``.

    Both are normalised over the last dimension.

    >>> Categorical(torch.tensor([1.0, 3.0])).log_prob(1).exp()
    tensor(0.7500)
    """

    arg_constraints: ClassVar = {  # type: ignore[misc]
        "probs": constraints.simplex,
        "logits": constraints.real_vector,
    }

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        exactly_one("Categorical", probs=probs, logits=logits)
        given = logits if probs is None else probs
        if not isinstance(given, Tensor) or given.dim() < 1:
            name = "logits" if probs is None else "probs"
            raise ShapeError(
                f"Categorical: {name} must be a tensor whose last dimension runs over the "
                f"categories, found {describe(given)}"
            )
        if probs is not None:
            self._param = self.probs = probs / probs.sum(-1, keepdim=True)
        else:
            self._param = self.logits = torch.log_softmax(given, -1)
        self._num_events = self._param.shape[-1]
        TorchDistribution.__init__(self, self._param.shape[:-1], SCALAR, validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        if _instance is None and type(self).__init__ is Categorical.__init__:
            _instance = object.__new__(type(self))
        return super().expand(batch_shape, _instance)

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of categories, int64, shape ``sample_shape + batch_shape``."""
        source = current_source()
        if source is None:
            return super().sample(torch.Size(sample_shape))
        return categorical(self.probs, self.shape(sample_shape), source)

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        logits, index = self.logits, value.long().unsqueeze(-1)
        if value.shape != self._batch_shape:
            shape = torch.broadcast_shapes(value.shape, self._batch_shape)
            logits, index = logits.expand((*shape, -1)), index.expand((*shape, 1))
        return logits.gather(-1, index).squeeze(-1)
