"""Replaying: ``poutine.replay``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastsvi.errors import DtypeError, SiteError, describe
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.trace_struct import Trace


class ReplayMessenger(Messenger):
    """Gives latent sites the values that they have in ``trace``, and params those in ``params``.

    Sites that are observed, or that the trace lacks, stay as they are. ``params`` maps names to
    constrained values that carry ``.unconstrained``.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(): return pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> trace = pyro.poutine.trace(model).get_trace()
    >>> pyro.poutine.replay(model, trace=trace)() is trace.nodes["x"]["value"]
    True
    """

    def __init__(
        self, trace: Trace | None = None, params: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        if trace is None and params is None:
            raise HandlerError("replay needs a trace or params to replay")
        self.trace = trace
        self.params = params

    def _pyro_sample(self, msg: Message) -> None:
        if self.trace is None or msg.is_observed:
            return
        recorded = self.trace.nodes.get(msg.name)
        if recorded is None:
            return
        if recorded.type != "sample" or recorded.is_observed:
            kind = "observed" if recorded.type == "sample" else f"a {recorded.type} site"
            raise SiteError(
                f"site {msg.name!r} must be sampled in the trace that is replayed, but there it is "
                f"{kind}; rename one of the two, or remove the observation from the guide"
            )
        msg.done = True
        msg.value = recorded.value
        msg.infer = recorded.infer

    def _pyro_param(self, msg: Message) -> None:
        if self.params is None or msg.name not in self.params:
            return
        value = self.params[msg.name]
        if not hasattr(value, "unconstrained"):
            raise DtypeError(
                f"replay: param {msg.name!r} needs the constrained value that pyro.param returns, "
                f"which carries .unconstrained, found {describe(value)}; to put in any tensor use "
                "poutine.substitute"
            )
        msg.done = True
        msg.value = value
