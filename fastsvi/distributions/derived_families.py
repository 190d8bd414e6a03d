"""Families made from another one: folded, extended, affine, and with missing values."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions.transforms import AbsTransform, AffineTransform

from fastsvi.distributions import constraints
from fastsvi.distributions.conjugate import BetaBinomial, log_beta, log_binomial
from fastsvi.distributions.elementwise import Operand
from fastsvi.distributions.gamma import Beta
from fastsvi.distributions.normal import Normal
from fastsvi.distributions.torch_families import Binomial, MultivariateNormal
from fastsvi.distributions.transformed import DrawnDirectly, TransformedDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import as_tensor
from fastsvi.errors import ShapeError

__all__ = [
    "AffineBeta",
    "ExtendedBetaBinomial",
    "ExtendedBinomial",
    "FoldedDistribution",
    "NanMaskedMultivariateNormal",
    "NanMaskedNormal",
]


class FoldedDistribution(TransformedDistribution):
    """Distribution of ``|x|`` for ``x`` from a univariate ``base_dist``.

    >>> from fastsvi.distributions import Normal
    >>> FoldedDistribution(Normal(0.0, 1.0)).log_prob(0.0)
    tensor(-0.2258)
    """

    support = constraints.nonnegative

    def __init__(self, base_dist: Any, validate_args: bool | None = None) -> None:
        if base_dist.event_shape:
            raise ShapeError(
                "FoldedDistribution: base_dist must be over single numbers, found event shape "
                f"{tuple(base_dist.event_shape)}"
            )
        super().__init__(base_dist, AbsTransform(), validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        return super().expand(batch_shape, new)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        return torch.logaddexp(self.base_dist.log_prob(value), self.base_dist.log_prob(-value))


class AffineBeta(DrawnDirectly):
    """Distribution of ``loc + scale * x`` for ``x ~ Beta(concentration1, concentration0)``.

    Samples stay off the two ends, where the density may be infinite.

    >>> AffineBeta(1.0, 1.0, -1.0, 2.0).log_prob(0.0).exp()
    tensor(0.5000)
    """

    arg_constraints: ClassVar = {  # type: ignore[misc]
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    base_dist: Beta

    def __init__(
        self,
        concentration1: Operand,
        concentration0: Operand,
        loc: Operand,
        scale: Operand,
        validate_args: bool | None = None,
    ) -> None:
        base = Beta(concentration1, concentration0, validate_args=validate_args)
        super().__init__(base, AffineTransform(loc, scale), validate_args)

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls, concentration1: Any, concentration0: Any, loc: Any, scale: Any
    ) -> Any:
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shapes = (concentration1, concentration0, loc, scale)
        return torch.broadcast_shapes(*map(tuple, shapes)), SCALAR

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        return super().expand(batch_shape, new)

    def _inside(self, x: Tensor) -> Tensor:
        margin = torch.finfo(x.dtype).eps * self.scale
        return torch.min(torch.max(x, self.low + margin), self.high - margin)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, shape ``sample_shape + batch_shape``."""
        return self._inside(super().rsample(torch.Size(sample_shape)))

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The interval from ``loc`` to ``loc + scale``."""
        return constraints.interval(self.low, self.high)

    @property
    def concentration1(self) -> Tensor:
        """Concentration at the upper end."""
        return self.base_dist.concentration1

    @property
    def concentration0(self) -> Tensor:
        """Concentration at the lower end."""
        return self.base_dist.concentration0

    @property
    def sample_size(self) -> Tensor:
        """Sum of the concentrations."""
        return self.concentration1 + self.concentration0

    @property
    def _affine(self) -> AffineTransform:
        return self.transforms[0]  # type: ignore[return-value]

    def _bound(self, x: Operand) -> Tensor:
        like = self.concentration1
        return (
            x if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)
        )

    @property
    def loc(self) -> Tensor:
        """Lower end."""
        return self._bound(self._affine.loc)

    @property
    def scale(self) -> Tensor:
        """Width."""
        return self._bound(self._affine.scale)

    @property
    def low(self) -> Tensor:
        """Lower end."""
        return self.loc

    @property
    def high(self) -> Tensor:
        """Upper end."""
        return self.loc + self.scale

    @property
    def mean(self) -> Tensor:
        """Mean, at the batch shape."""
        return self.loc + self.scale * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance, at the batch shape."""
        return self.scale**2 * self.base_dist.variance


class ExtendedBinomial(Binomial):
    """Binomial defined for any integer value and ``total_count``; ``-inf`` outside the range.

    >>> ExtendedBinomial(2, torch.tensor(0.5)).log_prob(torch.tensor([-1.0, 1.0])).exp()
    tensor([0.0000, 0.5000])
    """

    arg_constraints: ClassVar = {  # type: ignore[misc]
        "total_count": constraints.integer,
        "probs": constraints.unit_interval,
        "logits": constraints.real,
    }
    support = constraints.integer

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        log_prob = super().log_prob(value)
        outside = (value < 0) | (value > self.total_count)
        return torch.where(outside, -math.inf, log_prob)


class ExtendedBetaBinomial(BetaBinomial):
    """Beta-binomial defined for any integer value and ``total_count``; ``-inf`` outside the range.

    >>> ExtendedBetaBinomial(1.0, 1.0, 3).log_prob(torch.tensor([-1.0, 1.0])).exp()
    tensor([0.0000, 0.2500])
    """

    arg_constraints: ClassVar = {
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
        "total_count": constraints.integer,
    }
    support = constraints.integer

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = self._prepare(value)
        a, b = self.concentration1, self.concentration0
        n = self.total_count.to(a.dtype)
        outside = (value < 0) | (value > n)
        n = n.clamp(min=0)
        k = torch.where(outside, 0.0, value)
        log_prob = log_binomial(n, k) + log_beta(k + a, n - k + b) - log_beta(a, b)
        return torch.where(outside, -math.inf, log_prob)


class NanMaskedNormal(Normal):
    """Normal whose log-density is 0 for values that are missing (not finite).

    >>> NanMaskedNormal(0.0, 1.0).log_prob(torch.tensor([0.0, float("nan")]))
    tensor([-0.9189,  0.0000])
    """

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of the values that are there; shape ``sample_shape + batch_shape``."""
        value = self._as_value(value)
        there = value.isfinite()
        return torch.where(there, super().log_prob(torch.where(there, value, 0.0)), 0.0)


class NanMaskedMultivariateNormal(MultivariateNormal):
    """Multivariate normal marginalised over the entries of a value that are missing (not finite).

    >>> d = NanMaskedMultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> d.log_prob(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]))
    tensor([-1.8379, -0.9189])
    """

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of the entries that are there; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        there = value.isfinite()
        filled = torch.where(there, value, 0.0)
        if self._validate_args:
            self._validate_sample(filled)
        # A missing entry becomes a standard normal one at its mean, independent of the others.
        # It adds -log(2 pi) / 2, which is taken off again.
        both = there.unsqueeze(-1) & there.unsqueeze(-2)
        eye = torch.eye(value.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        scale_tril = torch.linalg.cholesky(torch.where(both, self.covariance_matrix, eye))
        centred = torch.where(there, filled - self.loc, 0.0).unsqueeze(-1)
        z = torch.linalg.solve_triangular(scale_tril, centred, upper=False).squeeze(-1)
        log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        count = there.sum(-1).to(z.dtype)
        return -0.5 * (z.square().sum(-1) + count * math.log(2 * math.pi)) - log_det
