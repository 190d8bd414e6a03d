"""Small questions about sites and traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastsvi.poutine.validation import enable_validation, is_validation_enabled

if TYPE_CHECKING:
    from fastsvi.poutine.message import Message
    from fastsvi.poutine.trace_struct import Trace

__all__ = [
    "all_escape",
    "discrete_escape",
    "enable_validation",
    "enum_extend",
    "is_validation_enabled",
    "mc_extend",
    "prune_subsample_sites",
    "site_is_factor",
    "site_is_subsample",
]


def site_is_subsample(site: Message) -> bool:
    """True for the site at which a plate draws its indices."""
    return site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample"


def site_is_factor(site: Message) -> bool:
    """True for a site made by ``factor``."""
    return site["type"] == "sample" and type(site["fn"]).__name__ == "Unit"


def prune_subsample_sites(trace: Trace) -> Trace:
    """A copy of ``trace`` without the sites at which plates draw their indices."""
    trace = trace.copy()
    for name, site in list(trace.nodes.items()):
        if site_is_subsample(site):
            trace.remove_node(name)
    return trace


def enum_extend(trace: Trace, msg: Message, num_samples: int | None = None) -> list[Trace]:
    """Copies of ``trace``, each with one value of the support of ``msg`` added as a site.

    ``num_samples`` bounds their number; negative or ``None`` means the whole support.
    """
    values = list(msg.fn.enumerate_support(*msg.args, **msg.kwargs))
    if num_samples is not None and num_samples >= 0:
        values = values[: num_samples + 1]  # one more than asked for, as Pyro gives
    return [_extended(trace, msg, value) for value in values]


def mc_extend(trace: Trace, msg: Message, num_samples: int | None = None) -> list[Trace]:
    """Copies of ``trace``, each with one draw at ``msg`` added as a site."""
    count = 1 if num_samples is None else num_samples
    return [_extended(trace, msg, msg.fn(*msg.args, **msg.kwargs)) for _ in range(count)]


def _extended(trace: Trace, msg: Message, value: Any) -> Trace:
    site = msg.copy()
    site.value = value
    longer = trace.copy()
    longer.add_site(site)
    return longer


def all_escape(trace: Trace, msg: Message) -> bool:
    """True at a latent site that ``trace`` lacks."""
    return msg.type == "sample" and not msg.is_observed and msg.name not in trace


def discrete_escape(trace: Trace, msg: Message) -> bool:
    """True at a latent site that ``trace`` lacks and whose support can be enumerated."""
    return all_escape(trace, msg) and getattr(msg.fn, "has_enumerate_support", False)
