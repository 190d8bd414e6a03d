"""Evaluating one site's density, with errors that name the site."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributions import Distribution

from fastsvi.errors import ConstraintError, ShapeError, SiteError, describe
from fastsvi.poutine.message import Message
from fastsvi.poutine.shapes import format_shapes


def evaluate(site: Message, method: str, name: str, nodes: Mapping[str, Message]) -> Any:
    """``site.fn.<method>`` at the site's value; ``method`` is ``log_prob`` or ``score_parts``.

    ``nodes`` are the sites visited so far: an error shows their shapes.
    """
    function = getattr(site.fn, method, None)
    if function is None:
        raise SiteError(
            f"site {name!r} was sampled from {describe(site.fn)}, which has no {method}; give "
            "sample a distribution, or hide the site by poutine.block"
        )
    try:
        return function(as_tensor_for(site.fn, site.value), *site.args, **site.kwargs)
    except (ValueError, RuntimeError) as error:
        explained = _explain(name, site, method, error)
        if explained is None:
            raise
        table = format_shapes(nodes, last_site=name)
        raise type(explained)(f"{explained}\n{table}") from error


def as_tensor_for(fn: Any, value: Any) -> Any:
    """``value`` as ``fn.log_prob`` takes it: a number or array becomes a tensor of its dtype."""
    if isinstance(value, torch.Tensor) or not isinstance(fn, Distribution):
        return value
    if not (isinstance(value, numbers.Number) or hasattr(value, "__array__")):
        return value
    like = _any_parameter(fn)
    value = torch.as_tensor(value)
    return value if like is None else value.to(like.device, like.dtype)


def _any_parameter(fn: Any) -> torch.Tensor | None:
    """Some floating tensor that ``fn`` is made of, for its dtype and device."""
    for item in vars(fn).values():
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            return item
        if isinstance(item, Distribution):
            found = _any_parameter(item)
            if found is not None:
                return found
    return None


def _explain(name: str, site: Message, method: str, error: Exception) -> Exception | None:
    """The error to raise instead of what ``fn.log_prob`` raised; None to leave it alone."""
    fn, value = site.fn, site.value
    found = f"Error while computing {method} at site {name!r}: {error}"
    shape = tuple(fn.batch_shape) + tuple(fn.event_shape) if isinstance(fn, Distribution) else None
    if shape is not None and isinstance(value, torch.Tensor):
        try:
            torch.broadcast_shapes(shape, value.shape)
        except RuntimeError:
            source = "obs" if site.is_observed else "value"
            return ShapeError(
                f"{found}\nthe {source} has shape {tuple(value.shape)} but the distribution has "
                f"batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}; "
                "reshape one of them, or open a plate over the dimension in which they differ"
            )
    if isinstance(error, ValueError):
        return ConstraintError(
            f"{found}\nfound {describe(value)}; the value must lie in the support of the "
            "distribution: check the data, or choose a family with the right support"
        )
    return None
