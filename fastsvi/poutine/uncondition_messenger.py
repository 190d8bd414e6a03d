"""Removing observations: ``poutine.uncondition``."""

from __future__ import annotations

from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger


class UnconditionMessenger(Messenger):
    """Samples observed sites; their data stays in ``infer["obs"]``."""

    def _pyro_sample(self, msg: Message) -> None:
        if msg.is_observed:
            msg.is_observed = False
            msg.infer["was_observed"] = True
            msg.infer["obs"] = msg.value
            msg.value = None
            msg.done = False
