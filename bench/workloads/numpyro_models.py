"""The models of the benchmarks as NumPyro reads them.

Each function makes ``(model, guide)`` for a size; a guide of None stands for ``AutoNormal``.

Where a workload takes minibatches, model and guide are given a batch, and scale its density.
NumPyro's ``plate(..., subsample_size=...)`` would do the same, but shuffles an array of all rows in
each step: of 100,000 rows that takes most of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import scale

from bench.workloads import vae_weights

Program = Callable[..., Any]
Shape = Mapping[str, int]


def programs(name: str, shape: Shape) -> tuple[Program, Program | None]:
    """Model and guide of the workload ``name``; of ``regressions``, those of one fit."""
    return _PROGRAMS[name](shape)


def eight_schools(shape: Shape) -> tuple[Program, None]:
    def model(sigma: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(y)):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
            numpyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)

    return model, None


def logistic(shape: Shape) -> tuple[Program, None]:
    def model(x: Any, y: Any) -> None:
        with numpyro.plate("columns", x.shape[1]):
            weight = numpyro.sample("weight", dist.Normal(0.0, 1.0))
        bias = numpyro.sample("bias", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model, None


def minibatch(shape: Shape) -> tuple[Program, None]:
    def model(x: Any, y: Any) -> None:
        with numpyro.plate("columns", x.shape[1]):
            weight = numpyro.sample("weight", dist.Normal(0.0, 1.0))
        bias = numpyro.sample("bias", dist.Normal(0.0, 10.0))
        with scale(scale=shape["rows"] / len(x)), numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model, None


def intercepts(shape: Shape) -> tuple[Program, None]:
    def model(group: Any, floor: Any, y: Any) -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 10.0))
        noise = numpyro.sample("noise", dist.HalfCauchy(5.0))
        with numpyro.plate("groups", shape["groups"]):
            level = numpyro.sample("level", dist.Normal(mean, spread))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(level[group] + slope * floor, noise), obs=y)

    return model, None


def wide(shape: Shape) -> tuple[Program, None]:
    def model(y: Any) -> None:
        with numpyro.plate("elements", len(y)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return model, None


def regression(shape: Shape) -> tuple[Program, None]:
    def model(x: Any, y: Any) -> None:
        weight = numpyro.sample("weight", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.HalfCauchy(1.0))
        with numpyro.plate("rows", y.shape[-1]):
            numpyro.sample("y", dist.Normal(x @ weight + bias, noise), obs=y)

    return model, None


def vae(shape: Shape) -> tuple[Program, Program]:
    weights = vae_weights(**shape)

    def linear(name: str, x: Any) -> Any:
        weight = numpyro.param(f"{name}.weight", weights[f"{name}.weight"])
        return x @ weight.T + numpyro.param(f"{name}.bias", weights[f"{name}.bias"])

    def model(images: Any) -> None:
        with scale(scale=shape["images"] / len(images)), numpyro.plate("images", len(images)):
            prior = dist.Normal(jnp.zeros((len(images), shape["latent"])), 1.0).to_event(1)
            z = numpyro.sample("z", prior)
            logits = linear("decoder.logits", jax.nn.softplus(linear("decoder.hidden", z)))
            pixels = dist.Bernoulli(logits=logits).to_event(1)
            numpyro.sample("pixels", pixels, obs=images)

    def guide(images: Any) -> None:
        with scale(scale=shape["images"] / len(images)), numpyro.plate("images", len(images)):
            hidden = jax.nn.softplus(linear("encoder.hidden", images))
            sd = jnp.exp(linear("encoder.log_scale", hidden))
            numpyro.sample("z", dist.Normal(linear("encoder.loc", hidden), sd).to_event(1))

    return model, guide


_PROGRAMS: dict[str, Callable[[Shape], tuple[Program, Program | None]]] = {
    "eight_schools": eight_schools,
    "logistic": logistic,
    "intercepts": intercepts,
    "wide": wide,
    "minibatch": minibatch,
    "vae": vae,
    "regressions": regression,
}
