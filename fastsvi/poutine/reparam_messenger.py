"""Reparameterizing sites: ``poutine.reparam``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from fastsvi.errors import ShapeError, describe
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.runtime import effectful
from fastsvi.poutine.util import site_is_subsample


@effectful(type="get_init_messengers")
def _get_init_messengers() -> list[Messenger]:
    """Handlers that give initial values and want to see sites before they are reparameterized."""
    return []


class ReparamMessenger(Messenger):
    """Replaces sites by auxiliary sites and a deterministic function of them.

    ``config`` maps names to reparameterizers, or is a function from a site to one or ``None``. A
    reparameterizer has a method ``apply(msg)`` that takes a dict with ``name``, ``fn``, ``value``
    and ``is_observed`` and returns a dict with the new ``fn``, ``value`` and ``is_observed``; while
    it runs, its ``args_kwargs`` are the model's arguments (if the model is called through this
    handler). See Gorinova, Moore and Hoffman, "Automatic Reparameterisation of Probabilistic
    Programs" (2019).
    """

    def __init__(self, config: Mapping[str, Any] | Callable[[Message], Any]) -> None:
        super().__init__()
        if not (isinstance(config, Mapping) or callable(config)):
            raise HandlerError(
                "reparam: config must be a dict or a function of the site, found "
                f"{describe(config)}"
            )
        self.config = config
        self._args_kwargs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, fn: Callable[..., Any]) -> ReparamHandler:
        if not callable(fn):
            super().__call__(fn)  # raises
        return ReparamHandler(self, fn)

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        config = self.config
        reparam = config.get(msg.name) if isinstance(config, Mapping) else config(msg)
        if reparam is None:
            return
        # A model and its initial values are reparameterized together: the initializers, which
        # stand further out, must see the site as the user wrote it. They will see it again, but
        # do not overwrite values.
        for messenger in _get_init_messengers():
            messenger._process_message(msg)
        reparam.args_kwargs = self._args_kwargs
        try:
            new = reparam.apply(
                {
                    "name": msg.name,
                    "fn": msg.fn,
                    "value": msg.value,
                    "is_observed": msg.is_observed,
                }
            )
        finally:
            reparam.args_kwargs = None
        if new["value"] is not None:
            _check_value(msg, new["value"], type(reparam).__name__)
        msg.fn, msg.value, msg.is_observed = new["fn"], new["value"], new["is_observed"]


def _check_value(msg: Message, value: Any, reparam: str) -> None:
    """Check the new value against the distribution and the value that the site had."""
    if getattr(msg.fn, "_validation_enabled", False):
        msg.fn._validate_sample(value)
    if msg.value is None or msg.value is value:
        return
    if msg.value.shape != value.shape:
        raise ShapeError(
            f"at site {msg.name!r}: {reparam} changed the initial value's shape from "
            f"{tuple(msg.value.shape)} to {tuple(value.shape)}"
        )
    if getattr(msg.value, "_pyro_custom_init", True):
        warnings.warn(
            f"at site {msg.name!r}: {reparam} cannot use the initial value given; the default one "
            "is used",
            RuntimeWarning,
            stacklevel=5,
        )


class ReparamHandler:
    """A function with reparameterized sites, whose arguments the reparameterizers may see."""

    def __init__(self, msngr: ReparamMessenger, fn: Callable[..., Any]) -> None:
        self.msngr = msngr
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.msngr._args_kwargs = args, kwargs
        try:
            with self.msngr:
                return self.fn(*args, **kwargs)
        finally:
            self.msngr._args_kwargs = None
