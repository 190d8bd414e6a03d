"""From a loss that is not finite back to the site at fault.

Looking is done only after something went wrong, so it may be slow: the model and the guide run
once more, without gradients, with the latent values that gave the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsvi import poutine
from fastsvi.errors import describe
from fastsvi.infer.util import checking, is_finite
from fastsvi.poutine import Messenger
from fastsvi.poutine.util import site_is_subsample


class Given(Messenger):
    """Give the latent sites that are named in ``values`` those values."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def explain_non_finite(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    particles: Iterable[Mapping[str, Any]] = ({},),
) -> str | None:
    """The first site of model or guide whose log-density is not finite, in words, or None.

    Args:
        particles: for each particle the values that its latent sites had, as far as known.
    """
    for particle, values in enumerate(particles):
        with torch.no_grad(), checking(False), poutine.block():
            guide_trace = poutine.trace(Given(values)(guide)).get_trace(*args, **kwargs)
            latent = {name: site["value"] for name, site in guide_trace.iter_stochastic_nodes()}
            if not latent.keys() <= values.keys():
                # An automatic guide: its auxiliary sites were drawn anew and do not fit.
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(Given({**latent, **values})(model)).get_trace(
                *args, **kwargs
            )
            in_guide, in_model = map(_first_fault, (guide_trace, model_trace))
        # A guide whose parameters have diverged drags every site of the model along.
        role = "guide" if in_model is None or _has_diverged(in_guide) else "model"
        site = in_guide if role == "guide" else in_model
        if site is not None:
            where = f" (particle {particle})" if particle else ""
            return f"{role} {_describe_site(site)}{where}"
    return None


def first_non_finite_site(trace: Any) -> str | None:
    """The first sample site of ``trace`` with a NaN or infinite log-density, in words, or None."""
    site = _first_fault(trace)
    return None if site is None else _describe_site(site)


def _first_fault(trace: Any) -> Any:
    with checking(False):
        trace.compute_log_prob()
    sites = (s for s in trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s))
    return next((s for s in sites if not is_finite(torch.as_tensor(s["log_prob_sum"]))), None)


def _has_diverged(site: Any) -> bool:
    return site is not None and not all(map(_all_finite, _parameters(site["fn"]).values()))


def _describe_site(site: Any) -> str:
    name, fn = site["name"], site["fn"]
    word = "observed " if site["is_observed"] else ""
    lines = [
        f"site {name!r} ({word}{_family(fn)}) has log-density {describe(site['log_prob'])}",
        f"    value: {describe(site['value'])}",
    ]
    parameters = _parameters(fn)
    lines += [f"    {key}: {describe(value)}" for key, value in parameters.items()]
    lines.append(f"    likely cause: {_likely_cause(site, parameters)}")
    return "\n".join(lines)


def _likely_cause(site: Any, parameters: dict[str, Any]) -> str:
    broken = [key for key, value in parameters.items() if not _all_finite(value)]
    if broken:
        return (
            f"{' and '.join(broken)} of its distribution not finite; what it is computed from has "
            f"overflowed or diverged. A lower learning rate, ClippedAdam, or a wider prior helps"
        )
    if not _all_finite(site["value"]):
        what = "the data" if site["is_observed"] else "the value drawn for it"
        return f"{what} not finite"
    support = getattr(site["fn"], "support", None)
    if support is not None and not bool(support.check(torch.as_tensor(site["value"])).all()):
        return f"its value lies outside of the support {support}"
    return "its value has no density under these parameters, or the density overflows"


def _family(fn: Any) -> str:
    return type(_innermost(fn)).__name__


def _innermost(fn: Any) -> Any:
    """The distribution under ``to_event``, ``mask`` and ``expand``."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return fn


def _parameters(fn: Any) -> dict[str, Any]:
    """The parameters that ``fn`` was given; derived ones (logits of probs) are left out."""
    fn = _innermost(fn)
    given = getattr(fn, "__dict__", {})
    # Our families keep what they were given under "_loc" and broadcast it to "loc" when asked.
    return {
        name: given.get(name, given.get(f"_{name}"))
        for name in getattr(fn, "arg_constraints", {})
        if name in given or f"_{name}" in given
    }


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    return math.isfinite(value) if isinstance(value, (int, float)) else True
