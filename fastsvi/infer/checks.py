"""What can be wrong with a model and a guide, found by looking at their traces once.

Mistakes that no program can mean are errors; those that are legal but rarely meant are warnings,
as in Pyro. Every message names the site and what to change.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from fastsvi.errors import FastSVIWarning, ShapeError, SiteError
from fastsvi.poutine.util import site_is_subsample


def check_model_guide_match(
    model_trace: Any, guide_trace: Any, max_plate_nesting: float = float("inf")
) -> None:
    """Compare the latent sites of a model with the sites of its guide.

    Warns about sites that only one of the two has, and about plates that only the guide has.

    Raises:
        ShapeError: the two disagree on the shape or the event dimension of a site.
        SiteError: a ``factor`` in the guide does not say whether it is reparameterised.
    """
    guide_sites = _sample_sites(guide_trace, subsample=False)
    auxiliary = {name for name, site in guide_sites.items() if site["infer"].get("is_auxiliary")}
    model_sites = {
        name: site
        for name, site in _sample_sites(model_trace, subsample=False).items()
        if not site["is_observed"]
    }

    if both := auxiliary & model_sites.keys():
        _warn(
            f"auxiliary sites of the guide also stand in the model: {_names(both)}. They are "
            f"treated as ordinary latent sites; drop infer={{'is_auxiliary': True}} or rename them."
        )
    if extra := guide_sites.keys() - model_sites.keys() - auxiliary:
        _warn(
            f"sites in the guide but not in the model: {_names(extra, model_sites)}. Their "
            f"log-density still counts in the loss. Remove them from the guide, or mark them "
            f"infer={{'is_auxiliary': True}} if they are auxiliary variables."
        )
    if missing := model_sites.keys() - guide_sites.keys():
        _warn(
            f"sites in the model but not in the guide: {_names(missing, guide_sites)}. They are "
            f"drawn from the prior and never learnt. Sample them in the guide, or observe them."
        )
    for name in model_sites.keys() & guide_sites.keys():
        _check_same_shape(name, model_sites[name], guide_sites[name], max_plate_nesting)

    plates = _sample_sites(guide_trace, subsample=True).keys()
    if extra := plates - _sample_sites(model_trace, subsample=True).keys():
        _warn(f"plates in the guide but not in the model: {_names(extra)}. Name them alike.")

    for name in auxiliary:
        fn = guide_sites[name]["fn"]
        if type(fn).__name__ == "Unit" and "has_rsample" not in vars(fn):
            raise SiteError(
                f"factor {name!r} in the guide does not say how its value depends on the guide's "
                f"samples. Pass has_rsample=True to pyro.factor if it comes from reparameterised "
                f"sampling, has_rsample=False otherwise."
            )


def _check_same_shape(
    name: str, model_site: Any, guide_site: Any, max_plate_nesting: float
) -> None:
    model_fn, guide_fn = model_site["fn"], guide_site["fn"]
    if not (hasattr(model_fn, "event_dim") and hasattr(guide_fn, "event_dim")):
        return
    if model_fn.event_dim != guide_fn.event_dim:
        raise ShapeError(
            f"model and guide disagree on the event dimension of site {name!r}: "
            f"{model_fn.event_dim} in the model, {guide_fn.event_dim} in the guide. Use "
            f".to_event(n) so that both count the same rightmost dimensions as one event."
        )
    shapes = [
        tuple(site["fn"].shape(*site["args"], **site["kwargs"]))
        for site in (model_site, guide_site)
    ]
    # Dimensions left of max_plate_nesting belong to whoever set it and may broadcast.
    keep = max_plate_nesting + model_fn.event_dim
    trimmed = [shape if len(shape) <= keep else shape[len(shape) - int(keep) :] for shape in shapes]
    pairs = zip_longest(*(reversed(shape) for shape in trimmed), fillvalue=1)
    if any(model_size != guide_size for model_size, guide_size in pairs):
        raise ShapeError(
            f"model and guide disagree on the shape of site {name!r}: {shapes[0]} in the model, "
            f"{shapes[1]} in the guide. Give the guide's distribution that shape, or put both "
            f"statements in the same plates."
        )


def check_site_shape(site: Any, max_plate_nesting: float = float("inf")) -> None:
    """Check that the log-density of a sample site has one dimension per plate and no other.

    Raises:
        ShapeError: a batch dimension stands in no plate, has another size than its plate, or two
            plates share a dimension.
    """
    expected: list[int | None] = []
    for frame in site["cond_indep_stack"]:
        if frame.dim is None:
            continue
        expected[:0] = [None] * (-frame.dim - len(expected))
        if expected[frame.dim] is not None:
            raise ShapeError(
                f"at site {site['name']!r}: plate {frame.name!r} uses dim {frame.dim}, which an "
                f"enclosing plate has taken. Give the plates different dims, plate(..., dim=-2)."
            )
        expected[frame.dim] = frame.size
    if len(expected) > max_plate_nesting:
        raise ShapeError(
            f"at site {site['name']!r}: {len(expected)} nested plates, but max_plate_nesting is "
            f"{max_plate_nesting}. fastsvi needs no max_plate_nesting: leave it out."
        )
    actual = list(site["log_prob"].shape)
    if len(actual) > max_plate_nesting:
        actual = actual[len(actual) - int(max_plate_nesting) :]
    for actual_size, size in zip_longest(reversed(actual), reversed(expected), fillvalue=1):
        # A plate of unknown size (-1) takes any.
        if size not in (None, -1) and actual_size != size:
            raise ShapeError(
                f"at site {site['name']!r}: its log-density has shape {tuple(actual)}, its plates "
                f"ask for {tuple(1 if n is None else n for n in expected)}. Either put the "
                f"batched tensor in a plate, or make the dimension part of the event with "
                f".to_event(n), or permute the data so that plates and dimensions line up."
            )


def check_if_enumerated(guide_trace: Any) -> None:
    """Warn if the guide marks sites for enumeration, which sampling estimators do not do."""
    marked = [
        name
        for name, site in _sample_sites(guide_trace, subsample=False).items()
        if site["infer"].get("enumerate")
    ]
    if marked:
        _warn(
            f"sites marked for enumeration are sampled instead: {_names(marked)}. This loss does "
            f"not enumerate; remove infer={{'enumerate': ...}} to silence this."
        )


def check_fully_reparametrized(guide_site: Any) -> None:
    """Raise unless the guide's distribution at a site is reparameterised in full."""
    score_function = guide_site["score_parts"].score_function
    if not (isinstance(score_function, (int, float)) and score_function == 0):
        raise SiteError(
            f"guide site {guide_site['name']!r} ({type(guide_site['fn']).__name__}) is not "
            f"reparameterised, and TraceMeanField_ELBO has no score-function term for it. Use "
            f"Trace_ELBO, or a distribution with has_rsample=True."
        )


def _sample_sites(trace: Any, *, subsample: bool) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site) == subsample
    }


def _names(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """The names in order, each with the nearest of ``others``: most mismatches are misspelt."""
    parts = []
    for name in sorted(names):
        near = difflib.get_close_matches(name, list(others), n=1)
        parts.append(f"{name!r} (near {near[0]!r})" if near else repr(name))
    return ", ".join(parts)


def _warn(message: str) -> None:
    warnings.warn(message, FastSVIWarning, stacklevel=3)
