"""The ELBO from samples of any guide: ``Trace_ELBO``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsvi import poutine
from fastsvi.infer.checks import check_if_enumerated, check_model_guide_match, check_site_shape
from fastsvi.infer.elbo.base import ELBO
from fastsvi.infer.util import MultiFrameTensor, get_plate_stacks, is_validation_enabled
from fastsvi.poutine.util import prune_subsample_sites


class Trace_ELBO(ELBO):
    """Minus the evidence lower bound, estimated from samples of the guide.

    With ``z ~ q`` the loss is the mean over particles of ``log q(z) - log p(x, z)``. Its gradient
    flows through the draws of reparameterised sites. For the others it uses the score function,
    with the terms of the loss that a site cannot influence left out as far as plates tell (partial
    Rao-Blackwellisation).

    Sources: Wingate and Weber, "Automated variational inference in probabilistic programming",
    2013; Ranganath, Gerrish and Blei, "Black box variational inference", AISTATS 2014.

    The arguments are those of :class:`ELBO`: particles, all at once or in chunks.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))
    >>> def guide():
    ...     pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5**0.5))
    >>> round(Trace_ELBO().loss(model, guide), 4)  # the guide is exact: no noise is left
    1.2655
    """

    _takes_densities = True

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        model_trace, guide_trace = importance_traces(
            model, guide, args, kwargs, self.max_plate_nesting
        )
        if is_validation_enabled():
            check_if_enumerated(guide_trace)
        return model_trace, guide_trace

    def _differentiable_loss_particle(
        self, model_trace: Any, guide_trace: Any
    ) -> tuple[Tensor, Tensor]:
        elbo: Any = 0.0
        for site in model_trace.nodes.values():
            if site["type"] == "sample":
                elbo = elbo + site["log_prob_sum"]
        surrogate = elbo
        rest = None  # what each site may influence, by plates; computed once if needed
        for site in guide_trace.nodes.values():
            if site["type"] != "sample":
                continue
            elbo = elbo - site["log_prob_sum"]
            log_prob, score_function, entropy_term = site["score_parts"]
            if entropy_term is log_prob:
                surrogate = surrogate - site["log_prob_sum"]
            elif not _is_zero(entropy_term):
                surrogate = surrogate - entropy_term.sum()
            if not _is_zero(score_function):
                if rest is None:
                    rest = _log_ratio(model_trace, guide_trace)
                influenced = rest.sum_to(site["cond_indep_stack"])
                surrogate = surrogate + (influenced * score_function).sum()
        return as_loss(elbo).detach(), as_loss(surrogate)


class JitTrace_ELBO(Trace_ELBO):
    """Pyro's name for a compiled :class:`Trace_ELBO`; here the engine compiles, so they are one."""


def importance_traces(
    model: Any, guide: Any, args: Any, kwargs: Any, max_plate_nesting: float = float("inf")
) -> tuple[Any, Any]:
    """Traces of a guide and of the model run on its values, with log-densities computed.

    In a checked run the two are compared, and the shapes of all sites checked.
    """
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        for trace in (model_trace, guide_trace):
            for site in prune_subsample_sites(trace).nodes.values():
                if site["type"] == "sample":
                    check_site_shape(site, max_plate_nesting)
    return model_trace, guide_trace


def _log_ratio(model_trace: Any, guide_trace: Any) -> MultiFrameTensor:
    """The terms of log p - log q, detached, by the plates that they stand in."""
    ratio = MultiFrameTensor()
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        stacks = get_plate_stacks(trace)
        for name, stack in stacks.items():
            ratio.add((stack, sign * trace.nodes[name]["log_prob"].detach()))
    return ratio


def _is_zero(term: Any) -> bool:
    return isinstance(term, (int, float)) and term == 0


def as_loss(elbo: Any) -> Tensor:
    """Minus ``elbo``; a program without any sample site has the loss zero."""
    return -elbo if isinstance(elbo, Tensor) else torch.zeros(()) - elbo
