"""The workloads that the benchmarks time: data, and a model per family of libraries.

``fastsvi`` and ``pyro`` share the text of a model, and are given as the argument ``pyro``;
NumPyro's text differs in little. Priors, data, guide (AutoNormal, initial scale 0.1), optimizer
(Adam, 0.01), precision (float32) and threads are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Model = Callable[..., Any]


@dataclass(frozen=True)
class Workload:
    """A model with data, and how many steps a timing takes.

    Attributes:
        model: makes the model, from ``fastsvi`` or ``pyro``.
        numpyro_model: makes NumPyro's.
        data: arguments of the model.
        particles: numbers of particles to time.
        steps: steps of one timing with one particle.
    """

    model: Callable[[ModuleType], Model]
    numpyro_model: Callable[[], Model]
    data: Callable[[], tuple[Tensor, ...]]
    particles: tuple[int, ...]
    steps: int


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- eight schools: Rubin (1981), non-centred; ten latent numbers, eight observations


def schools_data() -> tuple[Tensor, ...]:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return sigma, y


def schools(pyro: ModuleType) -> Model:
    dist = pyro.distributions

    def model(sigma: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", 8):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)

    return model


def numpyro_schools() -> Model:
    import numpyro
    import numpyro.distributions as dist

    def model(sigma: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
            numpyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)

    return model


# ---- logistic regression, 10,000 rows of 50 columns


def logistic_data() -> tuple[Tensor, ...]:
    generator = _generator()
    x = torch.randn(10_000, 50, generator=generator)
    weight = torch.randn(50, generator=generator)
    y = (torch.rand(10_000, generator=generator) < torch.sigmoid(x @ weight)).float()
    return x, y


def logistic(pyro: ModuleType) -> Model:
    dist = pyro.distributions

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        # Pyro's particles are batch dimensions, which the model must leave room for.
        logits = (x @ weight.unsqueeze(-1)).squeeze(-1) + bias
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model


def numpyro_logistic() -> Model:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x: Any, y: Any) -> None:
        weight = numpyro.sample("weight", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model


# ---- varying intercepts: 919 observations in 85 groups, as in the radon study


def intercepts_data() -> tuple[Tensor, ...]:
    generator = _generator()
    group = torch.randint(0, 85, (919,), generator=generator)
    floor = torch.randint(0, 2, (919,), generator=generator).float()
    level = 1.3 + 0.3 * torch.randn(85, generator=generator)
    y = level[group] - 0.7 * floor + 0.75 * torch.randn(919, generator=generator)
    return group, floor, y


def intercepts(pyro: ModuleType) -> Model:
    dist = pyro.distributions

    def model(group: Tensor, floor: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        spread = pyro.sample("spread", dist.HalfCauchy(torch.tensor(5.0)))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        noise = pyro.sample("noise", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("groups", 85):
            level = pyro.sample("level", dist.Normal(mean, spread))
        with pyro.plate("rows", len(y)):
            fitted = level[..., group] + slope * floor
            pyro.sample("y", dist.Normal(fitted, noise), obs=y)

    return model


def numpyro_intercepts() -> Model:
    import numpyro
    import numpyro.distributions as dist

    def model(group: Any, floor: Any, y: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 10.0))
        noise = numpyro.sample("noise", dist.HalfCauchy(5.0))
        with numpyro.plate("groups", 85):
            level = numpyro.sample("level", dist.Normal(mean, spread))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(level[group] + slope * floor, noise), obs=y)

    return model


# ---- wide: 100,000 independent normal means


def wide_data() -> tuple[Tensor, ...]:
    return (torch.randn(100_000, generator=_generator()),)


def wide(pyro: ModuleType) -> Model:
    dist = pyro.distributions

    def model(y: Tensor) -> None:
        with pyro.plate("elements", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return model


def numpyro_wide() -> Model:
    import numpyro
    import numpyro.distributions as dist

    def model(y: Any) -> None:
        with numpyro.plate("elements", len(y)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return model


WORKLOADS = {
    "eight_schools": Workload(schools, numpyro_schools, schools_data, (1, 64, 1024), 5000),
    "logistic": Workload(logistic, numpyro_logistic, logistic_data, (1, 16), 1000),
    "intercepts": Workload(intercepts, numpyro_intercepts, intercepts_data, (1,), 5000),
    "wide": Workload(wide, numpyro_wide, wide_data, (1, 8), 500),
}
