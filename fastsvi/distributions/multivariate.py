"""MultivariateStudentT and ProjectedNormal."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsvi.distributions import constraints
from fastsvi.distributions.gamma import Chi2
from fastsvi.distributions.matrix_transforms import safe_normalize
from fastsvi.distributions.noise import normal
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import as_tensor
from fastsvi.errors import ShapeError

__all__ = ["MultivariateStudentT", "ProjectedNormal"]


class MultivariateStudentT(TorchDistribution):
    """Student's t vectors: ``df > 0``, centre ``loc`` ``(..., D)``, ``scale_tril`` ``(..., D, D)``.

    The covariance is ``df / (df - 2) * scale_tril @ scale_tril.T`` for ``df > 2``.

    >>> MultivariateStudentT(3.0, torch.zeros(2), torch.eye(2)).log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    arg_constraints: ClassVar = {
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor,
        scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        event = loc.shape[-1:]
        if scale_tril.shape[-2:] != event + event:
            raise ShapeError(
                "MultivariateStudentT: loc (..., D) and scale_tril (..., D, D) must agree, found "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        if not isinstance(df, Tensor):
            df = loc.new_tensor(df)
        shape = torch.broadcast_shapes(df.shape, loc.shape[:-1], scale_tril.shape[:-2])
        self.df = df.expand(shape)
        self.loc = loc.expand(shape + event)
        self.scale_tril = scale_tril.expand(shape + event + event)
        super().__init__(shape, event, validate_args)

    @property
    def covariance_matrix(self) -> Tensor:
        """``scale_tril @ scale_tril.T``, which is not the covariance: see the class."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def precision_matrix(self) -> Tensor:
        """Inverse of :attr:`covariance_matrix`."""
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return torch.cholesky_solve(eye.expand_as(self.scale_tril), self.scale_tril)

    @classmethod
    def infer_shapes(cls, df: Any, loc: Any, scale_tril: Any) -> Any:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(loc)
        batches = (tuple(df), shape[:-1], tuple(scale_tril)[:-2])
        return torch.broadcast_shapes(*batches), shape[-1:]

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(MultivariateStudentT, _instance)
        df = self.df.expand(torch.Size(batch_shape))
        MultivariateStudentT.__init__(new, df, self.loc, self.scale_tril, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, ``sample_shape + batch_shape + (D,)``."""
        noise = normal(self.shape(sample_shape), self.loc.dtype, self.loc.device)
        chi2 = Chi2(self.df, validate_args=False).rsample(sample_shape)
        y = noise * torch.rsqrt(chi2 / self.df).unsqueeze(-1)
        return self.loc + (self.scale_tril @ y.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        dim, df = self.loc.shape[-1], self.df
        centred = (value - self.loc).unsqueeze(-1)
        z = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).squeeze(-1)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        normalizer = (
            (0.5 * (df + dim)).lgamma()
            - (0.5 * df).lgamma()
            - 0.5 * dim * (df.log() + math.log(math.pi))
            - log_det
        )
        return normalizer - 0.5 * (df + dim) * (z.square().sum(-1) / df).log1p()

    @property
    def mean(self) -> Tensor:
        """``loc``, or NaN where ``df <= 1``."""
        return torch.where((self.df > 1).unsqueeze(-1), self.loc, math.nan)

    @property
    def variance(self) -> Tensor:
        """Variances of the entries; infinite where ``df <= 2``, NaN where ``df <= 1``."""
        df = self.df.unsqueeze(-1)
        variance = self.scale_tril.square().sum(-1) * df / (df - 2)
        variance = torch.where(df > 2, variance, math.inf)
        return torch.where(df > 1, variance, math.nan)


class ProjectedNormal(TorchDistribution):
    """Direction ``x / |x|`` of a normal vector ``x`` around ``concentration`` ``(..., D)``.

    The direction of ``concentration`` is the mean direction; its length says how concentrated the
    draws are. See Hernandez-Stumpfhauser, Breidt and van der Woerd (2017).

    >>> ProjectedNormal(torch.zeros(3)).log_prob(torch.tensor([1.0, 0.0, 0.0])).exp()
    tensor(0.0796)
    """

    arg_constraints: ClassVar = {"concentration": constraints.real_vector}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, concentration: Tensor, *, validate_args: bool | None = None) -> None:
        if concentration.dim() < 1:
            raise ShapeError("ProjectedNormal: concentration must be a vector (..., D)")
        self.concentration = concentration
        super().__init__(concentration.shape[:-1], concentration.shape[-1:], validate_args)

    @classmethod
    def infer_shapes(cls, concentration: Any) -> Any:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(concentration)
        return shape[:-1], shape[-1:]

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = self._get_checked_instance(ProjectedNormal, _instance)
        concentration = self.concentration.expand((*batch_shape, -1))
        ProjectedNormal.__init__(new, concentration, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mean direction."""
        return safe_normalize(self.concentration)

    @property
    def mode(self) -> Tensor:
        """Mean direction."""
        return self.mean

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A unit vector with gradients, shape ``sample_shape + batch_shape + (D,)``."""
        loc = self.concentration
        noise = normal(self.shape(sample_shape), loc.dtype, loc.device)
        return safe_normalize(noise + loc)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value`` on the sphere; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        dim = self.concentration.shape[-1]
        along = (self.concentration * value).sum(-1)
        across = self.concentration.square().sum(-1) - along.square()
        # The radius is integrated out: moment(n) is the integral over r > 0 of r**n times the
        # normal density around `along`, and moment(n) = along * moment(n-1) + (n-1) * moment(n-2).
        density = (-0.5 * along.square()).exp() / math.sqrt(2 * math.pi)
        previous = torch.special.ndtr(along)
        moment = density + along * previous
        for n in range(2, dim):
            previous, moment = moment, along * moment + (n - 1) * previous
        radial = moment if dim > 1 else previous
        tiny = torch.finfo(radial.dtype).eps
        return radial.clamp(min=tiny).log() - 0.5 * (across + (dim - 1) * math.log(2 * math.pi))
