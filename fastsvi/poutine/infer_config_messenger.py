"""Setting inference options of sites: ``poutine.infer_config``."""

from __future__ import annotations

from collections.abc import Callable

from fastsvi.poutine.message import InferDict, Message
from fastsvi.poutine.messenger import Messenger


class InferConfigMessenger(Messenger):
    """Updates the ``infer`` dict of each sample and param site by ``config_fn(site)``.

    >>> import torch, fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(): pyro.sample("x", dist.Bernoulli(torch.tensor(0.5)))
    >>> config = lambda site: {"enumerate": "parallel"}
    >>> trace = pyro.poutine.trace(pyro.poutine.infer_config(model, config)).get_trace()
    >>> trace.nodes["x"].infer
    {'enumerate': 'parallel'}
    """

    def __init__(self, config_fn: Callable[[Message], InferDict]) -> None:
        super().__init__()
        self.config_fn = config_fn

    def _pyro_sample(self, msg: Message) -> None:
        msg.infer.update(self.config_fn(msg))

    def _pyro_param(self, msg: Message) -> None:
        msg.infer.update(self.config_fn(msg))
