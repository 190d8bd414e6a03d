"""Seeding every generator a model may draw from: torch's, numpy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import torch

from fastsvi.engine.noise import forget_seeds


def set_rng_seed(rng_seed: int) -> None:
    """Seed torch (all devices), numpy and ``random``; fits under way draw their noise anew.

    >>> set_rng_seed(0); a = torch.rand(())
    >>> set_rng_seed(0); bool(torch.rand(()) == a)
    True
    """
    import numpy as np

    torch.manual_seed(rng_seed)
    random.seed(rng_seed)
    np.random.seed(rng_seed % 2**32)  # noqa: NPY002 - numpy's global generator takes 32 bits
    forget_seeds()


def get_rng_state() -> dict[str, Any]:
    """The state of all generators, for :func:`set_rng_state`."""
    import numpy as np

    state = {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }
    if torch.cuda.is_initialized():  # asking an unused GPU for its state would wake it
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put all generators back into ``state``."""
    import numpy as np

    torch.set_rng_state(state["torch"])
    random.setstate(state["random"])
    if "numpy" in state:
        np.random.set_state(state["numpy"])  # noqa: NPY002
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
