"""Giving params other values: ``poutine.substitute``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsvi.errors import DtypeError, describe
from fastsvi.params.names import user_param_name
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.param_hits import ParamHits


class SubstituteMessenger(Messenger):
    """Gives the params named in ``data`` the values there (constrained); the store is not changed.

    >>> import torch, fastsvi as pyro
    >>> def model(): return pyro.param("a", torch.tensor(0.5))
    >>> pyro.poutine.substitute(model, data={"a": torch.tensor(0.25)})()
    tensor(0.2500)
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(data, Mapping):
            raise DtypeError(f"substitute: data must be a dict of values, found {describe(data)}")
        self.data = data
        self._params = ParamHits()

    def __enter__(self) -> Any:
        self._params = ParamHits()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._params.warn_of_unused(self.data, "the data given to substitute")

    def _pyro_param(self, msg: Message) -> None:
        name = user_param_name(msg.name)
        self._params.note(name, name in self.data)
        if name in self.data:
            msg.value = self.data[name]
