"""Leaving a model in the middle: ``poutine.escape``."""

from __future__ import annotations

from collections.abc import Callable

from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.runtime import NonlocalExit


def _leave(msg: Message) -> None:
    raise NonlocalExit(msg)


class EscapeMessenger(Messenger):
    """Raises :class:`NonlocalExit` with the site's message at the first sample site for which
    ``escape_fn(msg)`` is true.
    """

    def __init__(self, escape_fn: Callable[[Message], bool]) -> None:
        super().__init__()
        self.escape_fn = escape_fn

    def _pyro_sample(self, msg: Message) -> None:
        if self.escape_fn(msg):
            msg.done = True
            msg.stop = True
            msg.continuation = _leave
