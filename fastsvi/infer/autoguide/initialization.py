"""Where an automatic guide starts: strategies that give every latent site an initial value.

A strategy is a function of a site (a message with ``name`` and ``fn``) that returns a value in the
support of ``site["fn"]``, in constrained space. Called without a site but with options, it returns
a strategy with those options, so both ``init_loc_fn=init_to_median`` and
``init_loc_fn=init_to_median(num_samples=50)`` can be written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsvi.distributions import noise, transform_to
from fastsvi.errors import ShapeError, SiteError, describe
from fastsvi.poutine import Messenger
from fastsvi.poutine.util import site_is_subsample

Strategy = Callable[..., Any]


class UnsupportedSiteError(SiteError, ValueError):
    """A continuous guide meets a latent site that has no unconstrained coordinates."""


class InitializationError(SiteError, ValueError):
    """No initialization strategy applies to a site."""


def init_to_feasible(site: Any = None) -> Any:
    """The image of zero in unconstrained space: a point of the support, whatever the prior says.

    >>> init_to_feasible({"name": "rate", "fn": torch.distributions.Exponential(2.0)})
    tensor(1.)
    """
    if site is None:
        return init_to_feasible
    return init_to_uniform(site, radius=0.0)


def init_to_sample(site: Any = None) -> Any:
    """A draw from the prior."""
    if site is None:
        return init_to_sample
    return site["fn"].sample().detach()


def init_to_median(
    site: Any = None, num_samples: int = 15, *, fallback: Strategy | None = init_to_feasible
) -> Any:
    """The median of ``num_samples`` prior draws, or ``fallback`` for events of several numbers.

    Raises:
        InitializationError: there is no median and ``fallback`` is None.
    """
    if site is None:
        return functools.partial(init_to_median, num_samples=num_samples, fallback=fallback)
    fn = site["fn"]
    # A coordinatewise median of, say, points on a simplex need not lie on the simplex.
    if all(size == 1 for size in fn.event_shape):
        try:
            value = fn.sample((num_samples,)).median(dim=0)[0]
        except RuntimeError:  # no median for this dtype
            return _fall_back(fallback, site, "its draws have no median")
        if _is_inside(fn, value):
            return value
    return _fall_back(fallback, site, "its prior has no median inside the support")


def init_to_mean(site: Any = None, *, fallback: Strategy | None = init_to_median) -> Any:
    """The prior mean, or ``fallback`` where there is none, as for a Cauchy.

    Raises:
        InitializationError: there is no mean and ``fallback`` is None.
    """
    if site is None:
        return functools.partial(init_to_mean, fallback=fallback)
    try:
        value = site["fn"].mean.detach()
    except NotImplementedError:
        return _fall_back(fallback, site, "its prior has no mean")
    if _is_inside(site["fn"], value):
        return value
    return _fall_back(fallback, site, "the mean of its prior is not a point of the support")


def init_to_uniform(site: Any = None, radius: float = 2.0) -> Any:
    """A uniform draw from ``(-radius, radius)`` in each unconstrained coordinate."""
    if site is None:
        return functools.partial(init_to_uniform, radius=radius)
    fn = site["fn"]
    with helpful_support_errors(site):
        transform = transform_to(fn.support)
        try:
            # Only its shape and dtype matter: how many unconstrained coordinates there are.
            unconstrained = torch.zeros_like(transform.inv(fn.sample().detach()))
        except NotImplementedError:  # an improper prior
            unconstrained = torch.zeros(transform.inverse_shape(fn.shape()))
        if radius:
            if noise.current_source() is None:
                unconstrained.uniform_(-radius, radius)
            else:  # for many fits at once, each with its own
                u = noise.uniform(unconstrained.shape, unconstrained.dtype, unconstrained.device)
                unconstrained = (2 * u - 1) * radius
        return transform(unconstrained)


def init_to_value(
    site: Any = None,
    values: Mapping[str, Any] | None = None,
    *,
    fallback: Strategy | None = init_to_uniform,
) -> Any:
    """The given constrained values by site name, or ``fallback`` for sites that have none.

    Raises:
        InitializationError: a site has no value and ``fallback`` is None.
    """
    values = {} if values is None else values
    if site is None:
        return functools.partial(init_to_value, values=values, fallback=fallback)
    if site["name"] in values:
        return values[site["name"]]
    return _fall_back(fallback, site, f"values are given for {sorted(values)} only")


def init_to_generated(
    site: Any = None, generate: Callable[[], Strategy] = lambda: init_to_uniform
) -> Any:
    """Ask ``generate()`` for a fresh strategy once per run of the model.

    Like :func:`init_to_value`, but with other (say, random) values in each run of the model.
    """
    strategy = _Generated(generate)
    return strategy if site is None else strategy(site)


class _Generated:
    """A strategy that is generated anew whenever a site comes round again: a new run began."""

    def __init__(self, generate: Callable[[], Strategy]) -> None:
        self.generate = generate
        self._strategy: Strategy | None = None
        self._seen: set[str] = set()

    def __call__(self, site: Any) -> Any:
        if self._strategy is None or site["name"] in self._seen:
            self._strategy = self.generate()
            self._seen = set()
        self._seen.add(site["name"])
        return self._strategy(site)


class InitMessenger(Messenger):
    """Give every latent site the value of a strategy in place of a draw from the prior.

    Args:
        init_fn: the strategy.
    """

    def __init__(self, init_fn: Strategy) -> None:
        super().__init__()
        self.init_fn = init_fn

    def _pyro_sample(self, msg: Any) -> None:
        # An inner handler that has given the site a value knows better than a default.
        if msg["value"] is not None or site_is_subsample(msg):
            return
        with torch.no_grad():
            value = torch.as_tensor(self.init_fn(msg))
        msg["value"] = _expand(value, msg) if hasattr(msg["fn"], "event_shape") else value

    def _pyro_get_init_messengers(self, msg: Any) -> None:
        msg["value"] = [*(msg["value"] or ()), self]


@contextmanager
def helpful_support_errors(site: Any) -> Iterator[None]:
    """Turn torch's "no transform" into an error that names the site and the way out."""
    try:
        yield
    except NotImplementedError as error:
        name, support = site["name"], site["fn"].support
        if support.is_discrete:
            raise UnsupportedSiteError(
                f"latent site {name!r} is discrete ({type(site['fn']).__name__}); a continuous "
                f"guide has no coordinates for it. Sum it out in the model, or give it a guide of "
                f"its own: AutoNormal(poutine.block(model, hide=[{name!r}]))."
            ) from error
        if "sphere" in repr(support).lower():
            raise UnsupportedSiteError(
                f"latent site {name!r} lives on a sphere, which no unconstrained space covers. "
                f"Use a ProjectedNormal prior with a reparameterizer for {name!r}."
            ) from error
        raise


def _expand(value: Tensor, site: Any) -> Tensor:
    """``value`` at the shape of the site, so that each element gets parameters of its own."""
    shape = tuple(site["fn"].shape(*site["args"], **site["kwargs"]))
    if tuple(value.shape) == shape:
        return value
    try:
        return value.expand(shape).clone()
    except RuntimeError:
        raise ShapeError(
            f"the initial value of site {site['name']!r} is a {describe(value)}, but the site has "
            f"shape {shape}. Make init_loc_fn return a value of that shape."
        ) from None


def _is_inside(fn: Any, value: Tensor) -> bool:
    # A nan is in no support, but only checks that compare ordered values notice it.
    return not bool(value.isnan().any()) and bool(fn.support.check(value).all())


def _fall_back(fallback: Strategy | None, site: Any, why: str) -> Any:
    if fallback is not None:
        return fallback(site)
    raise InitializationError(
        f"no initial value for site {site['name']!r}: {why}, and fallback=None. Give it a value "
        f"with init_to_value(values={{{site['name']!r}: ...}}) or name a fallback."
    )
