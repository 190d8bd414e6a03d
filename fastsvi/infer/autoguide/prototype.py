"""One run of the model from which an automatic guide learns its structure and where to start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsvi import poutine, settings
from fastsvi.distributions import transform_to
from fastsvi.errors import NonFiniteError
from fastsvi.infer.autoguide.initialization import InitMessenger
from fastsvi.infer.nonfinite import first_non_finite_site
from fastsvi.infer.util import checking
from fastsvi.poutine.messenger import HandledFunction
from fastsvi.poutine.util import site_is_subsample

# A start at which the model's log-density is not finite is tried again: twice as it is, for
# strategies that draw, then with ever larger random shifts of the unconstrained coordinates.
_SHIFTS = (0.0, 0.0, 0.0, 0.1, 0.3, 1.0, 2.0, 2.0)


def hide_all_but_latent_sites(msg: Any) -> bool:
    """Whether an automatic guide has nothing to do with the site ``msg``."""
    return msg["type"] != "sample" or msg["is_observed"] or site_is_subsample(msg)


def run_prototype(
    model: Callable[..., Any],
    hide: Callable[[Any], bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Trace of ``model`` at its initial values, with only the sites that ``hide`` leaves.

    Run without gradients, so that the guide can be copied, and keeps no graph alive.

    Raises:
        NonFiniteError: the log-density is not finite there, nor at any other start that was tried.
    """
    bad = None
    for shift in _SHIFTS:
        # Unchecked: a bad argument or value shows in the log-density, and the next start may do.
        with torch.no_grad(), checking(False), poutine.block(), _shifted(model, shift):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            if settings.get("validate") != "never":
                bad = first_non_finite_site(trace)
        if bad is None:
            break
        if not trace.stochastic_nodes:
            break  # nothing to move
    if bad is not None:
        raise NonFiniteError(
            f"the model's log-density is not finite at the initial values of the guide, nor at "
            f"{len(_SHIFTS) - 1} starts nearby: {bad}. Check the data and the priors of that "
            f"site, or start elsewhere with init_loc_fn=init_to_value(values={{...}})."
        )
    for name, site in list(trace.nodes.items()):
        # The arguments and the result go too: a guide should not keep the data alive.
        if hide(site):
            trace.remove_node(name)
        site.log_prob = site.unscaled_log_prob = None
    return trace


@contextmanager
def _shifted(model: Callable[..., Any], radius: float) -> Iterator[None]:
    """Let the strategy that ``model`` is wrapped in miss its values by up to ``radius``."""
    messenger = model.messenger if isinstance(model, HandledFunction) else None
    if not radius or not isinstance(messenger, InitMessenger):
        yield
        return
    strategy = messenger.init_fn
    messenger.init_fn = functools.partial(_shift, strategy, radius)
    try:
        yield
    finally:
        messenger.init_fn = strategy


def _shift(strategy: Callable[[Any], Any], radius: float, site: Any) -> Tensor:
    value = torch.as_tensor(strategy(site))
    if not site["fn"].has_rsample and site["fn"].support.is_discrete:
        return value
    transform = transform_to(site["fn"].support)
    unconstrained = transform.inv(value)
    return transform(unconstrained + torch.empty_like(unconstrained).uniform_(-radius, radius))
