"""Tying sites together: ``poutine.equalize``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastsvi.distributions import Delta
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger


class EqualizeMessenger(Messenger):
    """Gives all sites of ``type`` whose names match ``sites`` the value of the first of them.

    ``sites`` is a regular expression, or several, that must match the whole name. Later sites
    become deterministic; with ``keep_dist=True`` they keep their distributions, which conditions
    the model on the values being equal (the density is right up to a constant, but running the
    model does not sample from it).

    >>> import torch, fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(): return [pyro.sample(f"{k}_std", dist.Exponential(1.0)) for k in "ab"]
    >>> a, b = pyro.poutine.equalize(model, ".+_std")()
    >>> a is b
    True
    """

    def __init__(
        self,
        sites: str | Sequence[str],
        type: str | None = "sample",
        keep_dist: bool | None = False,
    ) -> None:
        super().__init__()
        self.sites = [sites] if isinstance(sites, str) else list(sites)
        self.type = type
        self.keep_dist = keep_dist
        self.value: Any = None

    def __enter__(self) -> Any:
        self.value = None
        return super().__enter__()

    def _is_matching(self, msg: Message) -> bool:
        return (
            msg.type == self.type
            and msg.name is not None
            and any(re.fullmatch(site, msg.name) for site in self.sites)
        )

    def _process_message(self, msg: Message) -> None:
        if self.value is None or not self._is_matching(msg):
            return
        msg.value = self.value
        if msg.type == "sample":
            msg.is_observed = True
            if not self.keep_dist:
                msg.infer = {"_deterministic": True}
                msg.fn = Delta(self.value, event_dim=msg.fn.event_dim).mask(False)

    def _postprocess_message(self, msg: Message) -> None:
        if self.value is None and self._is_matching(msg):
            self.value = msg.value
