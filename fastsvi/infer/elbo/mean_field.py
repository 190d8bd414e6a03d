"""The ELBO with analytic divergences where there are any: ``TraceMeanField_ELBO``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from fastsvi.distributions import kl_divergence
from fastsvi.distributions.util import scale_and_mask
from fastsvi.errors import FastSVIWarning, MissingSiteError
from fastsvi.infer.checks import check_fully_reparametrized
from fastsvi.infer.elbo.trace_elbo import Trace_ELBO, as_loss
from fastsvi.infer.util import is_validation_enabled
from fastsvi.poutine.util import site_is_subsample


class TraceMeanField_ELBO(Trace_ELBO):
    """Minus the ELBO, with the exact KL divergence of each site where torch knows it.

    The loss is the sum over latent sites of ``KL(q || p)`` minus the log-density of the
    observations, at samples of the guide. A site whose divergence has no formula is estimated from
    the sample, as in :class:`Trace_ELBO`; so are the sites of automatic guides, which are Deltas
    around auxiliary sites.

    It is right if the guide is a mean field, or more precisely if the prior of no site depends in
    the model on sites that depend on it in the guide. All sites must be reparameterised.

    The arguments are those of :class:`ELBO`: particles, all at once or in chunks.

    Raises:
        SiteError: in a checked run, a site of the guide is not reparameterised.
    """

    # The fast path serves automatic guides, whose sites have no divergence but the sampled one.
    _takes_densities = True

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        if is_validation_enabled():
            _check_same_order(model_trace, guide_trace)
        return model_trace, guide_trace

    def _differentiable_loss_particle(
        self, model_trace: Any, guide_trace: Any
    ) -> tuple[Tensor, Tensor]:
        elbo: Any = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            if site["is_observed"]:
                elbo = elbo + site["log_prob_sum"]
                continue
            guide_site = guide_trace.nodes.get(name)
            if guide_site is None:
                raise MissingSiteError(
                    f"site {name!r} of the model is not in the guide; TraceMeanField_ELBO needs a "
                    f"distribution for it there. Sample it in the guide, or use Trace_ELBO."
                )
            elbo = elbo - _divergence(site, guide_site)
        for name, guide_site in guide_trace.nodes.items():
            if guide_site["type"] != "sample" or site_is_subsample(guide_site):
                continue
            if is_validation_enabled():
                check_fully_reparametrized(guide_site)
            if name not in model_trace.nodes:
                elbo = elbo - guide_site["log_prob_sum"]
        loss = as_loss(elbo)
        return loss.detach(), loss


class JitTraceMeanField_ELBO(TraceMeanField_ELBO):
    """Pyro's name for a compiled :class:`TraceMeanField_ELBO`; here they are one."""


def _divergence(site: Any, guide_site: Any) -> Any:
    """``KL(guide || model)`` of a site, scaled and summed; or a one-sample estimate of it."""
    fn = guide_site["fn"]
    if not _is_point(fn):
        try:
            divergence = kl_divergence(fn, site["fn"])
        except NotImplementedError:
            pass
        else:
            divergence = divergence.expand(fn.batch_shape)
            return scale_and_mask(divergence, guide_site["scale"], guide_site["mask"]).sum()
    return guide_site["log_prob_sum"] - site["log_prob_sum"]


def _is_point(fn: Any) -> bool:
    """Whether ``fn`` is a Delta.

    A Delta may carry the log-density of what its value came from. Formulas for its divergence do
    not know of that, and a guide made of transformed samples would lose its Jacobians.
    """
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ == "Delta"


def _check_same_order(model_trace: Any, guide_trace: Any) -> None:
    """Warn if the order of sites does not show that the guide is a mean field."""

    def common(trace: Any, other: Any) -> list[str]:
        return [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and name in other.nodes and not site_is_subsample(site)
        ]

    in_model, in_guide = common(model_trace, guide_trace), common(guide_trace, model_trace)
    if in_model != in_guide:
        warnings.warn(
            f"TraceMeanField_ELBO cannot see that the guide is a mean field: sites come in the "
            f"order {in_model} in the model and {in_guide} in the guide. Write the guide's sites "
            f"in the model's order, or use Trace_ELBO if the guide's sites depend on each other.",
            FastSVIWarning,
            stacklevel=4,
        )
