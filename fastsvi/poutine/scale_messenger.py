"""Scaling log-densities: ``poutine.scale``."""

from __future__ import annotations

import numbers

import torch

from fastsvi.errors import describe
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.validation import is_validation_enabled


class ScaleMessenger(Messenger):
    """Multiplies the log-density of every site by a positive ``scale``.

    A tensor must broadcast with the sites' log-densities; its entries are checked only where
    validation is ``"always"``, for that reads it back to the host.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(): pyro.sample("x", dist.Delta(torch.zeros(()), log_density=-1.5))
    >>> pyro.poutine.trace(pyro.poutine.scale(model, scale=2.0)).get_trace().log_prob_sum()
    tensor(-3.)
    """

    def __init__(self, scale: float | torch.Tensor) -> None:
        if isinstance(scale, torch.Tensor):
            is_positive = not is_validation_enabled() or bool((scale > 0).all())
        else:
            is_positive = isinstance(scale, numbers.Real) and scale > 0
        if not is_positive:
            raise HandlerError(
                f"scale must be positive, found {describe(scale)}; to leave sites out use "
                "poutine.mask"
            )
        super().__init__()
        self.scale = scale

    def _process_message(self, msg: Message) -> None:
        msg.scale = self.scale * msg.scale
