"""Hiding sites: ``poutine.block``."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger

SitePredicate = Callable[[Message], "bool | None"]


class BlockMessenger(Messenger):
    """Hides sites from the handlers outside of it; by default, all sites.

    Either a rule ``hide_fn(msg)`` or ``expose_fn(msg)`` decides alone, or the lists do. A site is
    hidden if its name is in ``hide``, if its type is in ``hide_types``, or if it is in none of the
    lists and the rest is hidden. The last given of ``hide``, ``expose``, ``hide_types``,
    ``expose_types`` decides about the rest: a list of what to hide exposes it, and the other way
    round. Without lists ``hide_all`` decides. The type of an observed sample site is ``"observe"``
    here.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     pyro.sample("a", dist.Normal(0.0, 1.0))
    ...     pyro.sample("b", dist.Normal(0.0, 1.0))
    >>> poutine = pyro.poutine
    >>> poutine.trace(poutine.block(model, hide=["a"])).get_trace().stochastic_nodes
    ['b']
    """

    def __init__(
        self,
        hide_fn: SitePredicate | None = None,
        expose_fn: SitePredicate | None = None,
        hide_all: bool = True,
        expose_all: bool = False,
        hide: Collection[str] | None = None,
        expose: Collection[str] | None = None,
        hide_types: Collection[str] | None = None,
        expose_types: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        if hide_fn is not None and expose_fn is not None:
            raise HandlerError("block takes hide_fn or expose_fn, not both")
        if hide_fn is not None:
            self.hide_fn = hide_fn
        elif expose_fn is not None:
            self.hide_fn = lambda msg: not expose_fn(msg)
        else:
            self.hide_fn = _hide_by_lists(
                hide_all, expose_all, hide, expose, hide_types, expose_types
            )

    def _process_message(self, msg: Message) -> None:
        msg.stop = bool(self.hide_fn(msg))


def _hide_by_lists(
    hide_all: bool,
    expose_all: bool,
    hide: Collection[str] | None,
    expose: Collection[str] | None,
    hide_types: Collection[str] | None,
    expose_types: Collection[str] | None,
) -> Callable[[Message], bool]:
    if hide_all and expose_all:
        raise HandlerError("block: hide_all and expose_all exclude each other; set hide_all=False")
    for kind, hidden, exposed in (("", hide, expose), ("_types", hide_types, expose_types)):
        both = set(hidden or ()) & set(exposed or ())
        if both:
            raise HandlerError(
                f"block: {sorted(both)} stand both in hide{kind} and in expose{kind}; remove them "
                "from one"
            )
    for names, hides_rest in (
        (hide, False),
        (expose, True),
        (hide_types, False),
        (expose_types, True),
    ):
        if names is not None:
            hide_all = hides_rest
    hide, expose = frozenset(hide or ()), frozenset(expose or ())
    hide_types, expose_types = frozenset(hide_types or ()), frozenset(expose_types or ())

    def hides(msg: Message) -> bool:
        kind = "observe" if msg.type == "sample" and msg.is_observed else msg.type
        if msg.name in hide or kind in hide_types:
            return True
        return hide_all and msg.name not in expose and kind not in expose_types

    return hides
