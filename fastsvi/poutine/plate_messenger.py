"""The plate: independence, subsampling and broadcasting in one context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastsvi.poutine.broadcast_messenger import broadcast_site
from fastsvi.poutine.errors import PlateError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger, MutedMessenger, block_messengers
from fastsvi.poutine.runtime import STACK
from fastsvi.poutine.subsample_messenger import SubsampleMessenger


class PlateMessenger(SubsampleMessenger):
    """What :class:`fastsvi.plate` is; see there."""

    _broadcasts = True

    def __enter__(self) -> Any:
        # A plate right outside of us will see every message after us and expand the distribution
        # for both: one expansion a site, however deep the plates are nested.
        outer = STACK[-1] if STACK else None
        if isinstance(outer, MutedMessenger):
            outer = outer.muted
        super().__enter__()
        self._broadcasts = not (
            isinstance(outer, PlateMessenger)
            and type(outer)._process_message is PlateMessenger._process_message
        )
        has_indices = self._indices is not None or self._shows_all
        return self.indices if self._vectorized and has_indices else None

    def _process_message(self, msg: Message) -> None:
        super()._process_message(msg)
        if self._broadcasts:
            broadcast_site(msg)

    def _stand_in(self) -> MutedMessenger:
        return MutedPlate(self)


class MutedPlate(MutedMessenger):
    """A muted plate still expands distributions for the plates right inside of it."""

    def _process_message(self, msg: Message) -> None:
        broadcast_site(msg)


@contextmanager
def block_plate(
    name: str | None = None, dim: int | None = None, *, strict: bool = True
) -> Iterator[None]:
    """Mute one enclosing plate, chosen by name or dim, for the length of a ``with`` block.

    Draws variables inside of a plate that are shared by all its parts::

        with pyro.plate("data", len(data)):
            with block_plate("data"):
                scale = pyro.sample("scale", dist.LogNormal(0, 1))  # one, not len(data)

    ``strict=False`` allows that there is no such plate. Raises :class:`PlateError` otherwise.
    """
    if (name is None) == (dim is None):
        raise PlateError("block_plate takes either name or dim, and not both")

    def matches(messenger: Messenger) -> bool:
        if not isinstance(messenger, PlateMessenger):
            return False
        return messenger.name == name if dim is None else messenger.dim == dim

    with block_messengers(matches) as muted:
        if strict and len(muted) != 1:
            which = f"name {name!r}" if dim is None else f"dim {dim}"
            raise PlateError(
                f"block_plate found {len(muted)} enclosing plates with {which}, not one; remove "
                "block_plate or set strict=False"
            )
        yield
