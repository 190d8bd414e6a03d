"""Conditioning: ``condition``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsvi.errors import DtypeError, describe
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.trace_struct import Trace


class ConditionMessenger(Messenger):
    """Observes sites: as if ``obs=data[name]`` were written at each sample site in ``data``.

    ``data`` maps names to values (tensors or numbers), or is a trace. A value of ``None`` makes the
    site latent. Names that the model does not have are ignored; :attr:`unused` lists them.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def scale(guess):
    ...     weight = pyro.sample("weight", dist.Normal(guess, 1.0))
    ...     return pyro.sample("measurement", dist.Normal(weight, 0.75))
    >>> pyro.condition(scale, data={"measurement": 9.5})(8.5)
    9.5
    """

    def __init__(self, data: Mapping[str, Any] | Trace) -> None:
        super().__init__()
        if not isinstance(data, (Mapping, Trace)):
            raise DtypeError(
                f"condition: data must be a dict of values or a trace, found {describe(data)}"
            )
        self.data = data
        self._used: set[str] = set()

    @property
    def unused(self) -> set[str]:
        """Names in ``data`` that no sample site has had so far."""
        if isinstance(self.data, Trace):
            names = {name for name, site in self.data.nodes.items() if site.type == "sample"}
        else:
            names = set(self.data)
        return names - self._used

    def _pyro_sample(self, msg: Message) -> None:
        name = msg.name
        if name in self.data:
            data = self.data
            msg.value = data.nodes[name].value if isinstance(data, Trace) else data[name]
            msg.is_observed = msg.value is not None
            self._used.add(name)
