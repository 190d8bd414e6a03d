"""Broadcasting: a site's distribution is expanded to the sizes of the plates around it."""

from __future__ import annotations

import torch
from torch.distributions import Distribution

from fastsvi.errors import ShapeError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger


def broadcast_site(msg: Message) -> None:
    """Expand the distribution of a sample site to the batch shape that its plates ask for."""
    fn = msg.fn
    if msg.type != "sample" or msg.done or not isinstance(fn, Distribution):
        return
    actual = fn.batch_shape
    target = list(actual)
    for frame in msg.cond_indep_stack:
        dim, size = frame.dim, frame.size
        if dim is None or size == -1:
            continue
        if len(target) < -dim:
            target = [1] * (-dim - len(target)) + target
        if target[dim] != size:
            if target[dim] != 1:
                raise ShapeError(
                    f"shape mismatch at site {msg.name!r}: batch shape {tuple(actual)} but plate "
                    f"{frame.name!r} has size {size} at dim {dim}; give the distribution's "
                    f"parameters size {size} (or 1) along dim {dim}, open the plate with another "
                    "dim, or declare the dimension part of the event by .to_event(...)"
                )
            target[dim] = size
    if len(target) == len(actual) and tuple(target) == actual:
        return
    msg.fn = fn.expand(torch.Size(target))
    if msg.fn.has_rsample != fn.has_rsample:
        msg.fn.has_rsample = fn.has_rsample  # may be set on the instance


class BroadcastMessenger(Messenger):
    """Expands distributions under ``IndepMessenger`` contexts, as :class:`~fastsvi.plate` does."""

    @staticmethod
    def _pyro_sample(msg: Message) -> None:
        broadcast_site(msg)
