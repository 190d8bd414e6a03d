"""Pyro's ``util`` module, as far as programs use it."""

from fastsvi.poutine.rng import get_rng_state, set_rng_state
from fastsvi.primitives import set_rng_seed

__all__ = ["get_rng_state", "set_rng_seed", "set_rng_state"]
