"""Turning params into random variables: ``poutine.lift``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsvi.distributions import Distribution
from fastsvi.errors import DtypeError, describe
from fastsvi.params.names import user_param_name
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.param_hits import ParamHits

# A torch family with our mixin alone is a distribution too.
_DISTRIBUTION = (Distribution, torch.distributions.Distribution)


class LiftMessenger(Messenger):
    """Samples params from ``prior`` instead of reading them from the store.

    ``prior`` is a distribution for all params, a dict of them by param name (params that it lacks
    stay params), or a function to call in place of the param.

    >>> import torch, fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(): return pyro.param("s", torch.tensor(0.5))
    >>> lifted = pyro.poutine.lift(model, prior={"s": dist.Exponential(0.3)})
    >>> pyro.poutine.trace(lifted).get_trace().nodes["s"].type
    'sample'
    """

    def __init__(self, prior: Distribution | Callable[..., Any] | Mapping[str, Any]) -> None:
        super().__init__()
        if not (isinstance(prior, (*_DISTRIBUTION, Mapping)) or callable(prior)):
            raise DtypeError(
                f"lift: prior must be a distribution, a dict of distributions or a function, found "
                f"{describe(prior)}"
            )
        self.prior = prior
        self._drawn: dict[str | None, Message] = {}
        self._params = ParamHits()

    def __enter__(self) -> Any:
        self._drawn = {}
        self._params = ParamHits()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._drawn = {}
        super().__exit__(*exception)
        if isinstance(self.prior, Mapping):
            self._params.warn_of_unused(self.prior, "the prior given to lift")

    def _pyro_param(self, msg: Message) -> None:
        prior = self.prior
        if isinstance(prior, Mapping):
            name = user_param_name(msg.name)
            self._params.note(name, name in prior)
            if name not in prior:
                return
            prior = prior[name]
        elif not isinstance(prior, _DISTRIBUTION):
            msg.stop = True  # a function may have sample sites of its own: hide this one
        msg.fn = prior
        if isinstance(prior, _DISTRIBUTION):
            msg.args, msg.kwargs, msg.infer = (), {}, {}
        else:
            msg.args = msg.args[1:]  # without the name
        msg.type = "sample"
        first = self._drawn.setdefault(msg.name, msg)
        if first is not msg:  # a second statement for the same param has the same value
            msg.value = first.value
            msg.is_observed = True
            msg.stop = True
