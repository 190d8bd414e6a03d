"""Fixing the random numbers of a run: ``poutine.seed``."""

from __future__ import annotations

import operator
from typing import Any

from fastsvi.errors import DtypeError, describe
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.rng import get_rng_state, set_rng_seed, set_rng_state


class SeedMessenger(Messenger):
    """Seeds all generators on entry, and on exit puts them back to where they were.

    >>> import torch
    >>> draw = SeedMessenger(rng_seed=3)(lambda: torch.rand(()))
    >>> bool(draw() == draw())
    True
    """

    def __init__(self, rng_seed: int) -> None:
        try:
            self.rng_seed = operator.index(rng_seed)
        except TypeError as error:
            raise DtypeError(f"rng_seed must be an integer, found {describe(rng_seed)}") from error
        super().__init__()
        self._states: list[dict[str, Any]] = []

    # It concerns no message, so it stays off the stack; that also lets it nest in itself.
    def __enter__(self) -> SeedMessenger:
        self._states.append(get_rng_state())
        set_rng_seed(self.rng_seed)
        return self

    def __exit__(self, *exception: Any) -> None:
        set_rng_state(self._states.pop())
