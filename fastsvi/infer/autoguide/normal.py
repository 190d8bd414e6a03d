"""Mean-field guides that keep one distribution per site: ``AutoNormal`` and ``AutoDelta``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastsvi.distributions as dist
import fastsvi.primitives as pyro
from fastsvi import poutine
from fastsvi.distributions import biject_to, constraints
from fastsvi.errors import ConstraintError
from fastsvi.infer.autoguide.base import AutoGuide, repeat_to_full_size
from fastsvi.infer.autoguide.fused import FusedNormal, Slot, is_subsampled
from fastsvi.infer.autoguide.initialization import (
    InitMessenger,
    helpful_support_errors,
    init_to_feasible,
    init_to_median,
)
from fastsvi.infer.autoguide.utils import deep_getattr, deep_setattr
from fastsvi.kernels.normal import ScaleMap
from fastsvi.nn import PyroModule, PyroParam
from fastsvi.nn.leaves import SUFFIX
from fastsvi.poutine.runtime import PARAM_STORE

# What the sampling kernel can make of an unconstrained scale, by constraint.
_SCALE_MAPS: dict[Any, ScaleMap] = {
    constraints.softplus_positive: "softplus",
    constraints.positive: "exp",
}


# Of sites with so many elements the prototype keeps the shape of the initial value only.
_MANY = 1 << 19


class AutoNormal(AutoGuide):
    """A normal with diagonal covariance over the unconstrained coordinates of every latent site.

    The parameters of site ``x`` are ``AutoNormal.locs.x`` and ``AutoNormal.scales.x``. The guide
    samples ``x_unconstrained``, an auxiliary normal site, and ``x``, its image in the support of
    the prior, as a ``Delta`` that carries the log-density of the change of variables.

    Args:
        model: a model whose latent sites are all continuous.
        init_loc_fn: a strategy of :mod:`fastsvi.infer.autoguide.initialization`.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: see :class:`AutoGuide`.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...     pyro.sample("count", dist.Poisson(rate), obs=torch.tensor(4.0))
    >>> guide = AutoNormal(model)
    >>> guide()["rate"] > 0
    tensor(True)
    >>> "AutoNormal.locs.rate" in pyro.get_param_store()
    True
    """

    scale_constraint = constraints.softplus_positive

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Any = None,
    ) -> None:
        self._init_scale = check_init_scale(init_scale)
        self.init_loc_fn = init_loc_fn
        self._fused: Any = None  # not known yet
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._fused = None
        self._event_dims: dict[str, int] = {}  # of the unconstrained site
        self.locs = PyroModule()
        self.scales = PyroModule()
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with helpful_support_errors(site):
                loc = biject_to(site["fn"].support).inv(site["value"].detach()).detach()
            # A simplex of 3 has 2 unconstrained coordinates, a Cholesky factor of [3, 3] has 6.
            event_dim = site["fn"].event_dim + loc.dim() - site["value"].dim()
            self._event_dims[name] = event_dim
            loc = repeat_to_full_size(loc, site, event_dim)
            scale = torch.full_like(loc, self._init_scale)
            deep_setattr(self.locs, name, PyroParam(loc, constraints.real, event_dim))
            deep_setattr(self.scales, name, PyroParam(scale, self.scale_constraint, event_dim))
            if site["value"].numel() >= _MANY:
                site["value"] = site["value"].new_zeros(()).expand(site["value"].shape)

    def _get_loc_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        """Parameters of a site, in unconstrained space; subsampled inside of its plates."""
        return deep_getattr(self.locs, name), deep_getattr(self.scales, name)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; returns constrained values by site name."""
        sites = self._latent_sites(args, kwargs)
        self._create_plates(*args, **kwargs)
        result = {}
        for site in sites:
            name = site["name"]
            with self._plates_of(site):
                loc, scale = self._get_loc_and_scale(name)
                unconstrained = pyro.sample(
                    f"{name}_unconstrained",
                    dist.Normal(loc, scale).to_event(self._event_dims[name]),
                    infer={"is_auxiliary": True},
                )
                result[name] = sample_image(site, unconstrained)
        return result

    def fused(self) -> FusedNormal | None:
        """This guide's fast way to draw all sites at once, or None if it must run as a program.

        Used by :class:`~fastsvi.infer.Trace_ELBO`. A guide that is part of another, has hooks,
        overrides how it samples, or has latent sites in subsampled plates runs as a program.
        """
        if self.prototype_trace is None or self.master is not None or not self._is_plain():
            return None
        if self._fused is None:
            self._fused = self._make_fused() or False
        return self._fused if self._fused and self._fused.refresh() else None

    def _make_fused(self) -> FusedNormal | None:
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        subsampled = any(is_subsampled(site["cond_indep_stack"]) for site in sites.values())
        scale_map = _SCALE_MAPS.get(self.scale_constraint)
        if not sites or subsampled or scale_map is None or self.create_plates is not None:
            return None
        slots = [
            Slot(
                name,
                loc=f"{self._pyro_name}.locs.{name}",
                scale=f"{self._pyro_name}.scales.{name}",
                shape=self._own_leaf(f"locs.{name}").shape,
                transform=biject_to(site["fn"].support),
                plates=site["cond_indep_stack"],
            )
            for name, site in sites.items()
        ]
        return FusedNormal(slots, scale_map, self._are_own)

    def _own_leaf(self, path: str) -> Tensor:
        return self.get_parameter(f"{path}{SUFFIX}")

    def _are_own(self, names: Sequence[str], leaves: Sequence[Tensor]) -> bool:
        """Whether the store's leaves are this guide's own, constrained as it made them."""
        prefix = len(self._pyro_name) + 1
        for name, leaf in zip(names, leaves, strict=True):
            path = name[prefix:]
            expected = self.scale_constraint if path.startswith("scales.") else constraints.real
            try:
                own = self._own_leaf(path)
            except AttributeError:  # no longer a PyroParam: somebody has made it something else
                return False
            if own is not leaf or not _are_alike(PARAM_STORE.constraint(name), expected):
                return False
        return True

    def _is_plain(self) -> bool:
        """Whether nobody has changed how this guide samples."""
        cls = type(self)
        return (
            cls.forward is AutoNormal.forward
            and cls._get_loc_and_scale is AutoNormal._get_loc_and_scale
            and not self._forward_hooks
            and not self._forward_pre_hooks
        )

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each latent site, in constrained space."""
        return {
            site["name"]: biject_to(site["fn"].support)(
                self._get_loc_and_scale(site["name"])[0].clone()
            )
            for site in self._latent_sites(args, kwargs)
        }

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of each latent site, in constrained space.

        Args:
            quantiles: probabilities, a list or tensor ``[Q]``.

        Returns:
            By site name, tensors ``[Q, *shape]``. Quantiles are taken coordinate by coordinate in
            unconstrained space; of sites such as simplices they are no quantiles of the entries.
        """
        return {
            site["name"]: biject_to(site["fn"].support)(
                normal_quantiles(quantiles, *self._get_loc_and_scale(site["name"]))
            )
            for site in self._latent_sites(args, kwargs)
        }

    @torch.no_grad()
    def sample_posterior(
        self, sample_shape: Any = (), *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Independent draws from the guide, without running the model.

        Args:
            sample_shape: a shape, or a number of draws.

        Returns:
            By site name, constrained tensors ``[*sample_shape, *shape]``.
        """
        shape = as_shape(sample_shape)
        posterior = self.get_posterior(*args, **kwargs)
        return {name: fn.sample(shape) for name, fn in posterior.items()}

    def get_posterior(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The guide's distribution of each latent site over its constrained values, by name."""
        posterior = {}
        for site in self._latent_sites(args, kwargs):
            name = site["name"]
            unconstrained = dist.Normal(*self._get_loc_and_scale(name))
            unconstrained = unconstrained.to_event(self._event_dims[name])
            support = biject_to(site["fn"].support)
            posterior[name] = dist.TransformedDistribution(unconstrained, support)
        return posterior

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fused": None}


class AutoDelta(AutoGuide):
    """A point estimate of every latent site: maximum a posteriori, in constrained space.

    The parameter of site ``x`` is ``AutoDelta.x``. Arguments are those of :class:`AutoNormal`.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> guide = AutoDelta(lambda: pyro.sample("x", dist.Gamma(2.0, 1.0)))
    >>> sorted(guide()), "AutoDelta.x" in pyro.get_param_store()
    (['x'], True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_median,
        *,
        create_plates: Any = None,
    ) -> None:
        self.init_loc_fn = init_loc_fn
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            event_dim = site["fn"].event_dim
            value = repeat_to_full_size(site["value"].detach(), site, event_dim)
            with helpful_support_errors(site):
                deep_setattr(self, name, PyroParam(value, site["fn"].support, event_dim))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The current estimates, as deterministic sample sites, by site name."""
        sites = self._latent_sites(args, kwargs)
        self._create_plates(*args, **kwargs)
        result = {}
        for site in sites:
            with self._plates_of(site):
                value = deep_getattr(self, site["name"])
                point = dist.Delta(value, event_dim=site["fn"].event_dim)
                result[site["name"]] = pyro.sample(site["name"], point)
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The estimates."""
        return {name: value.detach() for name, value in self(*args, **kwargs).items()}


def sample_image(site: Any, unconstrained: Tensor) -> Tensor:
    """Sample ``site`` at the image of ``unconstrained``, with the density of the transform."""
    transform = biject_to(site["fn"].support)
    value = transform(unconstrained)
    event_dim = site["fn"].event_dim
    log_density: Any = 0.0
    # Where everything is masked out, as under Predictive, the Jacobian need not be computed.
    if poutine.get_mask() is not False:
        log_det = transform.log_abs_det_jacobian(unconstrained, value)
        surplus = log_det.dim() - value.dim() + event_dim
        log_density = -(log_det.sum(tuple(range(-surplus, 0))) if surplus else log_det)
    return pyro.sample(
        site["name"], dist.Delta(value, log_density=log_density, event_dim=event_dim)
    )


def normal_quantiles(quantiles: Any, loc: Tensor, scale: Tensor) -> Tensor:
    """Quantiles ``[Q, *shape]`` of a normal."""
    levels = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device)
    levels = levels.reshape((-1,) + (1,) * loc.dim())
    return loc + scale * torch.special.ndtri(levels)


def as_shape(sample_shape: Any) -> torch.Size:
    """A shape from a shape or a number of draws."""
    return torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)


def _are_alike(constraint: Any, other: Any) -> bool:
    """Whether two constraints are the same; one from a file is another object."""
    return type(constraint) is type(other) and vars(constraint) == vars(other)


def check_init_scale(init_scale: Any) -> float:
    """``init_scale`` if it is a positive number."""
    if isinstance(init_scale, bool) or not isinstance(init_scale, (int, float)) or init_scale <= 0:
        raise ConstraintError(f"init_scale must be a positive number, found {init_scale!r}")
    return float(init_scale)
