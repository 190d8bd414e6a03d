"""Masking log-densities: ``poutine.mask``."""

from __future__ import annotations

import torch

from fastsvi.errors import describe
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger


class MaskMessenger(Messenger):
    """Counts the log-density of sites only where ``mask`` is true.

    ``mask`` is a bool, or a bool tensor that broadcasts with the sites' log-densities. Nested masks
    are combined by "and". ``True`` costs nothing.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(): pyro.sample("x", dist.Delta(torch.zeros(()), log_density=-1.5))
    >>> pyro.poutine.trace(pyro.poutine.mask(model, mask=False)).get_trace().log_prob_sum()
    tensor(0.)
    """

    def __init__(self, mask: bool | torch.Tensor) -> None:
        is_bool = mask.dtype == torch.bool if isinstance(mask, torch.Tensor) else mask in (0, 1)
        if not is_bool:
            raise HandlerError(
                f"mask must be a bool or a bool tensor, found {describe(mask)}; convert it by "
                "mask.bool(), and for weights use poutine.scale"
            )
        super().__init__()
        self.mask = mask if isinstance(mask, torch.Tensor) else bool(mask)

    def _process_message(self, msg: Message) -> None:
        msg.mask = self.mask if msg.mask is None else msg.mask & self.mask
