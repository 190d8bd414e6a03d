"""Interventions: ``do``."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from fastsvi.errors import DtypeError, describe
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.runtime import apply_stack


class DoMessenger(Messenger):
    """Sets sites to values, from outside: Pearl's do-operator.

    At a site in ``data`` the program goes on with the given value, as if it were a constant. The
    site itself stays in the model as a variable that nothing depends on (a single-world
    intervention graph, Richardson and Robins 2013), so that composed with ``condition`` it gives
    counterfactuals. Unlike an observation, an intervention says nothing about the site's causes.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     return pyro.sample("y", dist.Delta(z))
    >>> pyro.do(model, data={"z": 3.0})()
    tensor(3.)
    """

    def __init__(self, data: Mapping[str, torch.Tensor | numbers.Number]) -> None:
        super().__init__()
        if not isinstance(data, Mapping):
            raise DtypeError(f"do: data must be a dict of values, found {describe(data)}")
        self.data = data

    def _pyro_sample(self, msg: Message) -> None:
        intervention = self.data.get(msg.name)
        earlier = msg.get("_interveners", ())
        if intervention is None or self in earlier:
            return
        value = _as_value(msg.name, intervention)
        if earlier:
            warnings.warn(
                f"two do handlers intervene on site {msg.name!r}; only the inner one has an effect",
                RuntimeWarning,
                stacklevel=4,
            )

        # The site's own variable goes through the whole stack afresh, including the plates, scales
        # and masks inside of us that have seen this message: it must not keep their marks.
        own = msg.copy()
        own["_interveners"] = (*earlier, self)
        own.cond_indep_stack = ()
        own.scale = 1.0
        own.mask = None
        apply_stack(own)

        # What the program goes on with is hidden from the handlers outside of us.
        msg.name = f"{msg.name}__CF"
        msg.value = value
        msg.is_observed = True
        msg.stop = True


def _as_value(name: Any, intervention: Any) -> torch.Tensor:
    if isinstance(intervention, torch.Tensor):
        return intervention
    if isinstance(intervention, numbers.Number):
        return torch.tensor(intervention)
    raise DtypeError(
        f"do: an intervention on {name!r} must be a tensor or a number, found "
        f"{describe(intervention)}"
    )
