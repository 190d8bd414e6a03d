"""The workloads that the benchmarks time, written once for every library with Pyro's interface.

Each workload is a function of the library (``fastsvi`` or ``pyro``) that returns the model, its
arguments and a gate: the range in which the smoothed loss must end, without which no time counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Workload:
    """A model with data, and the loss that a fit must reach before its time counts."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    max_final_loss: float


def eight_schools(pyro: ModuleType) -> Workload:
    """Rubin (1981), non-centred: three latent sites, ten latent numbers, eight observations."""
    dist = pyro.distributions
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(sigma: torch.Tensor, y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", 8):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)

    return Workload("eight schools", model, (sigma, y), max_final_loss=34.0)


WORKLOADS = {"eight_schools": eight_schools}
