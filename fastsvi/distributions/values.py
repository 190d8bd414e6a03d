"""Numbers where torch asks for tensors: values to be scored, and numpy scalars as arguments."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsvi.distributions import validation

__all__ = ["Lenient", "as_tensor", "prototype"]


class Lenient:
    """Makes a torch family take numbers; stands before torch's class in the bases."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Help and editors shall show the family's arguments, not the *args below.
        owner = next(c for c in cls.__mro__ if c is not Lenient and "__init__" in vars(c))
        of_method = inspect.signature(owner.__init__)  # type: ignore[misc]
        own = list(of_method.parameters.values())[1:]
        cls.__signature__ = of_method.replace(parameters=own)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        plain = {name: _plain(value) for name, value in kwargs.items()}
        super().__init__(*map(_plain, args), **plain)

    def _get_checked_instance(self, cls: type, _instance: Any = None) -> Any:
        # torch refuses to expand() a class whose constructor is not its own; ours only converts.
        if _instance is None and type(self).__init__ is Lenient.__init__:
            _instance = object.__new__(type(self))
        return super()._get_checked_instance(cls, _instance)  # type: ignore[misc]

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
        return super().log_prob(as_tensor(self, value))  # type: ignore[misc]

    def cdf(self, value: Any) -> Tensor:
        """Probability of at most ``value``."""
        return super().cdf(as_tensor(self, value))  # type: ignore[misc]

    def icdf(self, value: Any) -> Tensor:
        """Value below which the probability is ``value``."""
        return super().icdf(as_tensor(self, value))  # type: ignore[misc]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def as_tensor(dist: Any, value: Any) -> Tensor:
    """``value`` as a tensor of the dtype and device of ``dist``."""
    if isinstance(value, Tensor):
        return value
    return validation.as_value(type(dist).__name__, value, prototype(dist))


def prototype(dist: Any) -> Tensor | None:
    """A floating point tensor that ``dist`` holds, or else one that a distribution in it holds."""
    items = vars(dist).values()
    for item in items:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    for item in items:
        if isinstance(item, torch.distributions.Distribution):
            found = prototype(item)
            if found is not None:
                return found
    return None
