"""Guides that treat all latent sites as one vector of unconstrained coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastsvi.distributions as dist
import fastsvi.primitives as pyro
from fastsvi import poutine
from fastsvi.distributions import biject_to, constraints, noise
from fastsvi.errors import ConstraintError, NonFiniteError, SiteError, describe
from fastsvi.infer.autoguide.base import AutoGuide
from fastsvi.infer.autoguide.initialization import (
    InitMessenger,
    helpful_support_errors,
    init_to_median,
)
from fastsvi.infer.autoguide.normal import (
    as_shape,
    check_init_scale,
    normal_quantiles,
    sample_image,
)
from fastsvi.nn import PyroParam


class AutoContinuous(AutoGuide):
    """Base of guides with one distribution over the packed vector of all latent sites.

    The vector ``[latent_dim]`` is in unconstrained space, sites one after another in the order of
    the model. A derived class makes parameters in ``_setup_prototype`` and returns a distribution
    over the vector from :meth:`get_posterior`, or its two parts from :meth:`get_base_dist` and
    :meth:`get_transform`. The guide samples it as ``_<class>_latent``, an auxiliary site.

    Plates must not subsample latent sites, for the vector has one length: there use
    :class:`AutoNormal`.

    Source: Kucukelbir, Tran, Ranganath, Gelman and Blei, "Automatic differentiation variational
    inference", JMLR 2017.

    Args:
        model: a model whose latent sites are all continuous.
        init_loc_fn: a strategy of :mod:`fastsvi.infer.autoguide.initialization`.
    """

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[..., Any] = init_to_median
    ) -> None:
        super().__init__(InitMessenger(init_loc_fn)(model))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._unconstrained_shapes: dict[str, torch.Size] = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with helpful_support_errors(site):
                unconstrained = biject_to(site["fn"].support).inv(site["value"].detach())
            self._unconstrained_shapes[name] = unconstrained.shape
        self.latent_dim = sum(math.prod(shape) for shape in self._unconstrained_shapes.values())
        if not self.latent_dim:
            raise SiteError(
                f"{type(self).__name__} found no latent sites in the model. Give such a model an "
                f"empty guide, lambda *args, **kwargs: None."
            )

    def _init_loc(self) -> Tensor:
        """The initial values of all sites, packed."""
        return torch.cat(
            [
                biject_to(site["fn"].support).inv(site["value"].detach()).reshape(-1)
                for _, site in self.prototype_trace.iter_stochastic_nodes()
            ]
        )

    def get_base_dist(self) -> Any:
        """Distribution that :meth:`get_transform` is applied to; free of the model's arguments."""
        raise NotImplementedError

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """Transform of the base distribution, which may depend on the model's arguments."""
        raise NotImplementedError

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The distribution over the packed vector ``[latent_dim]``, in unconstrained space."""
        return dist.TransformedDistribution(
            self.get_base_dist(), self.get_transform(*args, **kwargs)
        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the packed vector."""
        return pyro.sample(
            f"_{self._pyro_name}_latent",
            self.get_posterior(*args, **kwargs),
            infer={"is_auxiliary": True},
        )

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Sites with their unconstrained values, from packed vectors ``[*batch, latent_dim]``."""
        sizes = [math.prod(shape) for shape in self._unconstrained_shapes.values()]
        for (name, site), part in zip(
            self.prototype_trace.iter_stochastic_nodes(), latent.split(sizes, dim=-1), strict=True
        ):
            shape = self._unconstrained_shapes[name]
            event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
            # The batch of an enclosing plate stands left of the site's own plates.
            batch = tuple(latent.shape[:-1])
            shape = torch.broadcast_shapes(shape, batch + (1,) * event_dim) if batch else shape
            yield site, part.reshape(shape)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; returns constrained values by site name."""
        self._latent_sites(args, kwargs)
        latent = self.sample_latent(*args, **kwargs)
        self._create_plates(*args, **kwargs)
        result = {}
        for site, unconstrained in self._unpack_latent(latent):
            with self._plates_of(site):
                result[site["name"]] = sample_image(site, unconstrained)
        return result

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Marginal mean and standard deviation of each coordinate, both ``[latent_dim]``."""
        raise NotImplementedError

    def _constrained(self, latents: Tensor) -> dict[str, Tensor]:
        """Packed vectors ``[*batch, latent_dim]`` to values ``[*batch, *shape]`` by site name."""
        sizes = [math.prod(shape) for shape in self._unconstrained_shapes.values()]
        parts = latents.split(sizes, dim=-1)
        return {
            name: biject_to(site["fn"].support)(
                part.reshape(latents.shape[:-1] + self._unconstrained_shapes[name])
            )
            for (name, site), part in zip(
                self.prototype_trace.iter_stochastic_nodes(), parts, strict=True
            )
        }

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Image of the posterior median of the packed vector, by site name."""
        self._latent_sites(args, kwargs)
        return self._constrained(self._loc_scale(*args, **kwargs)[0].clone())

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles ``[Q, *shape]`` of each latent site; see :meth:`AutoNormal.quantiles`."""
        self._latent_sites(args, kwargs)
        return self._constrained(normal_quantiles(quantiles, *self._loc_scale(*args, **kwargs)))

    @torch.no_grad()
    def sample_posterior(
        self, sample_shape: Any = (), *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Independent draws ``[*sample_shape, *shape]`` from the guide, by site name."""
        self._latent_sites(args, kwargs)
        posterior = self.get_posterior(*args, **kwargs)
        return self._constrained(posterior.sample(as_shape(sample_shape)))


class _ScaledNormal(AutoContinuous):
    """What the three normals share: parameters ``loc`` and ``scale``, both ``[latent_dim]``."""

    scale_constraint = constraints.softplus_positive

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        self._init_scale = check_init_scale(init_scale)
        super().__init__(model, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        self.loc: Any = nn.Parameter(loc)
        self.scale: Any = PyroParam(torch.full_like(loc, self._init_scale), self.scale_constraint)


class AutoDiagonalNormal(_ScaledNormal):
    """A normal with diagonal covariance; parameters ``loc`` and ``scale``, both ``[latent_dim]``.

    The same family as :class:`AutoNormal`, which names its parameters after the sites.

    Args:
        init_scale: initial standard deviation of each unconstrained coordinate.
    """

    def get_base_dist(self) -> Any:
        """A standard normal."""
        return _standard_normal(self.loc)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """``loc + scale * x``."""
        loc, scale = self._loc_scale()
        return dist.transforms.AffineTransform(loc, scale, event_dim=1)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The diagonal normal over the packed vector."""
        return dist.Normal(*self._loc_scale()).to_event(1)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale


class AutoMultivariateNormal(_ScaledNormal):
    """A normal with full covariance.

    Parameters: ``loc`` and ``scale``, ``[latent_dim]``, and a unit lower triangular ``scale_tril``;
    the Cholesky factor of the covariance is ``scale[:, None] * scale_tril``, initially diagonal.

    Args:
        init_scale: initial standard deviation of each unconstrained coordinate.
    """

    scale_tril_constraint = constraints.unit_lower_cholesky

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()  # reading self.loc would be a param statement
        identity = torch.eye(self.latent_dim, dtype=loc.dtype, device=loc.device)
        self.scale_tril: Any = PyroParam(identity, self.scale_tril_constraint)

    def _cholesky(self) -> Tensor:
        return self.scale[..., None] * self.scale_tril

    def get_base_dist(self) -> Any:
        """A standard normal."""
        return _standard_normal(self.loc)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """``loc + scale_tril @ x``."""
        return dist.transforms.LowerCholeskyAffine(self.loc, scale_tril=self._cholesky())

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The multivariate normal over the packed vector."""
        return dist.MultivariateNormal(self.loc, scale_tril=self._cholesky())

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self._cholesky().pow(2).sum(-1).sqrt()


class AutoLowRankMultivariateNormal(_ScaledNormal):
    """A normal whose correlations have low rank.

    Parameters: ``loc`` and ``scale``, ``[latent_dim]``, and ``cov_factor``, ``[latent_dim, rank]``;
    the covariance is ``diag(scale) (I + cov_factor cov_factor^T) diag(scale)``.

    Args:
        init_scale: approximate initial standard deviation of each unconstrained coordinate.
        rank: columns of ``cov_factor``; by default the square root of ``latent_dim``, rounded.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        rank: int | None = None,
    ) -> None:
        if rank is not None and (not isinstance(rank, int) or rank <= 0):
            raise ConstraintError(f"rank must be a positive integer or None, found {rank!r}")
        self.rank = rank
        super().__init__(model, init_loc_fn, init_scale)
        # Half of the initial variance is on the diagonal, half (on average) in the factor.
        self._init_scale *= 0.5**0.5

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        if self.rank is None:
            self.rank = round(self.latent_dim**0.5)
        loc = self._init_loc()  # reading self.loc would be a param statement
        factor = noise.normal((self.latent_dim, self.rank), loc.dtype, loc.device)
        self.cov_factor = nn.Parameter(factor * self.rank**-0.5)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The low-rank multivariate normal over the packed vector."""
        scale = self.scale
        factor = self.cov_factor * scale.unsqueeze(-1)
        return dist.LowRankMultivariateNormal(self.loc, factor, scale * scale)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale * (self.cov_factor.pow(2).sum(-1) + 1).sqrt()


class AutoLaplaceApproximation(AutoContinuous):
    """A point estimate in unconstrained space, from which a normal is made at the end.

    Train it as any guide, then call :meth:`laplace_approximation`.
    """

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc: Any = nn.Parameter(self._init_loc())

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """A point mass."""
        return dist.Delta(self.loc).to_event(1)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, torch.zeros_like(self.loc)

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> AutoMultivariateNormal:
        """The normal with the curvature of the log-density at the point estimate.

        Returns:
            A guide whose ``loc``, ``scale`` and ``scale_tril`` are buffers, no parameters.

        Raises:
            NonFiniteError: the log-density is not strictly concave at the point estimate.
        """

        def loss(loc: Tensor) -> Tensor:
            # By a direct substitution of the point, so that second derivatives exist.
            values = {
                site["name"]: biject_to(site["fn"].support)(unconstrained)
                for site, unconstrained in self._unpack_latent(loc)
            }
            log_det = sum(
                biject_to(site["fn"].support)
                .log_abs_det_jacobian(unconstrained, values[site["name"]])
                .sum()
                for site, unconstrained in self._unpack_latent(loc)
            )
            with poutine.block():
                given = poutine.condition(self.model, data=values)
                trace = poutine.trace(given).get_trace(*args, **kwargs)
            return -(trace.log_prob_sum() + log_det)

        point = self.loc.detach().clone()
        hessian = torch.autograd.functional.hessian(loss, point)
        precision_factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed or not torch.isfinite(hessian).all():
            raise NonFiniteError(
                f"no Laplace approximation: the Hessian of the negative log-density at the point "
                f"estimate is not positive definite (smallest entry of its diagonal "
                f"{hessian.diagonal().min().item():g}; Hessian: {describe(hessian)}). Train the "
                f"guide until it has converged; some direction may also be unbounded."
            )
        covariance = torch.cholesky_inverse(precision_factor)
        scale = covariance.diagonal().sqrt()
        correlation = covariance / scale[:, None] / scale[None, :]
        result = AutoMultivariateNormal(self.model)
        result._setup_prototype(*args, **kwargs)
        cholesky = torch.linalg.cholesky(correlation)
        for name, value in (("loc", point), ("scale", scale), ("scale_tril", cholesky)):
            delattr(result, name)
            result.register_buffer(name, value)
        return result


def _standard_normal(like: Tensor) -> Any:
    return dist.Normal(torch.zeros_like(like), torch.ones_like(like)).to_event(1)
