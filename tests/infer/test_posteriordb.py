"""Means of real posteriors: six models of posteriordb with reference draws (see data/README.md).

Mean-field guides are measured on all six, and held to 0.2 reference standard deviations of every
posterior mean on those whose posterior is nearly normal. Eight schools is reported only: its tau is
skewed and piles up at 0, so no normal guide is right there. Full-rank guides are held to means
and standard deviations.

Correlation does not shift the optimum of a mean-field guide for a normal posterior, but it makes
the way there long: kidiq's slope and intercept correlate at -0.99, so the predictor is centred
there, as the README says, and the intercept is moved back afterwards. Nothing else is changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_value,
)
from fastsvi.optim import Adam, ClippedAdam

HERE = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("FASTSVI_DATA", HERE.parent / "shared" / "data")) / "posteriordb"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference posteriors in {FOLDER}"),
]

FLAT = 1000.0  # Normal(0, FLAT) on a parameter of order one does as well as a flat prior


def load(name):
    content = json.loads((FOLDER / f"{name}.json").read_text())
    data = {
        key: torch.tensor(value, dtype=torch.float32) if isinstance(value, list) else value
        for key, value in content["data"].items()
    }
    return data, content["reference"]


def vector(name, values):
    return {f"{name}[{i + 1}]": values[:, i] for i in range(values.shape[1])}


def flat(size):
    return dist.Normal(torch.zeros(size), FLAT).to_event(1)


def eight_schools(data):
    def model(y, sigma):
        mu = fastsvi.sample("mu", dist.Normal(0.0, 5.0))
        tau = fastsvi.sample("tau", dist.HalfCauchy(5.0))
        with fastsvi.plate("schools", len(y)):
            effect = fastsvi.sample("effect", dist.Normal(0.0, 1.0))
            fastsvi.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)

    def parameters(draws):
        theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["effect"]
        return {"mu": draws["mu"], "tau": draws["tau"], **vector("theta", theta)}

    return model, (data["y"], data["sigma"]), parameters


def kidiq(data):
    center = data["mom_iq"].mean()

    def model(x, y):
        beta = fastsvi.sample("beta", flat(2))
        sigma = fastsvi.sample("sigma", dist.HalfCauchy(2.5))
        with fastsvi.plate("data", len(y)):
            fastsvi.sample("obs", dist.Normal(beta[0] + beta[1] * x, sigma), obs=y)

    def parameters(draws):
        intercept = draws["beta"][:, 0] - draws["beta"][:, 1] * center
        return {"beta[1]": intercept, "beta[2]": draws["beta"][:, 1], "sigma": draws["sigma"]}

    return model, (data["mom_iq"] - center, data["kid_score"]), parameters


def blr(data):
    def model(x, y):
        beta = fastsvi.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
        sigma = fastsvi.sample("sigma", dist.HalfNormal(10.0))
        with fastsvi.plate("data", len(y)):
            fastsvi.sample("obs", dist.Normal(x @ beta, sigma), obs=y)

    return model, (data["X"], data["y"]), regression_parameters


def ar(data):
    lags, y = data["K"], data["y"]
    x = torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], dim=1)

    def model(x, y):
        alpha = fastsvi.sample("alpha", dist.Normal(0.0, 10.0))
        beta = fastsvi.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
        sigma = fastsvi.sample("sigma", dist.HalfCauchy(2.5))
        with fastsvi.plate("data", len(y)):
            fastsvi.sample("obs", dist.Normal(alpha + x @ beta, sigma), obs=y)

    def parameters(draws):
        return {"alpha": draws["alpha"], **regression_parameters(draws)}

    return model, (x, y[lags:]), parameters


def mixture(data):
    def model(y):
        low = fastsvi.sample("low", dist.Normal(0.0, 2.0))
        # mu[2] = mu[1] + gap with the prior of both restricted to mu[1] < mu[2].
        gap = fastsvi.sample("gap", dist.ImproperUniform(dist.constraints.positive, (), ()))
        high = low + gap
        fastsvi.factor("high", dist.Normal(0.0, 2.0).log_prob(high))
        sigma = fastsvi.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
        theta = fastsvi.sample("theta", dist.Beta(5.0, 5.0))
        with fastsvi.plate("data", len(y)):
            first = dist.Normal(low, sigma[0]).log_prob(y) + theta.log()
            second = dist.Normal(high, sigma[1]).log_prob(y) + (1 - theta).log()
            fastsvi.factor("obs", torch.logaddexp(first, second))

    def parameters(draws):
        return {
            "mu[1]": draws["low"],
            "mu[2]": draws["low"] + draws["gap"],
            **vector("sigma", draws["sigma"]),
            "theta": draws["theta"],
        }

    return model, (data["y"],), parameters


def mesquite(data):
    d1, d2, height = data["diam1"], data["diam2"], data["canopy_height"]
    columns = [
        torch.ones(len(d1)),
        (d1 * d2 * height).log(),
        (d1 * d2).log(),
        (d1 / d2).log(),
        data["total_height"].log(),
        data["group"],
    ]
    x = torch.stack(columns, dim=1)

    def model(x, y):
        beta = fastsvi.sample("beta", flat(x.shape[1]))
        sigma = fastsvi.sample("sigma", dist.LogNormal(0.0, FLAT))
        fastsvi.factor("flat", sigma.log())  # flat in sigma itself
        with fastsvi.plate("data", len(y)):
            fastsvi.sample("obs", dist.Normal(x @ beta, sigma), obs=y)

    return model, (x, data["weight"].log()), regression_parameters


def regression_parameters(draws):
    return {**vector("beta", draws["beta"]), "sigma": draws["sigma"]}


POSTERIORS = {
    "eight_schools": ("eight_schools-eight_schools_noncentered", eight_schools, {}),
    "kidiq": (
        "kidiq-kidscore_momiq",
        kidiq,
        {"lr": 0.4, "steps": 600, "decay": 1000, "start": {"sigma": 20.0}},
    ),
    "blr": ("sblri-blr", blr, {"lr": 0.05, "last_lr": 1e-4, "decay": 1600}),
    "ar": ("arK-arK", ar, {}),
    "mixture": ("low_dim_gauss_mix-low_dim_gauss_mix", mixture, {}),
    "mesquite": ("mesquite-logmesquite_logvash", mesquite, {"decay": 1500}),
}


def fit(name, guide_type, **changes):
    """Errors of means (in reference sd) and ratios of standard deviations, by parameter."""
    file, make, options = POSTERIORS[name]
    options = {"lr": 0.1, "last_lr": 0.002, "steps": 700, "decay": 800, **options, **changes}
    data, reference = load(file)
    model, args, parameters = make(data)
    torch.manual_seed(0)
    # kidiq: with sigma at 1 and the intercept 90 away the first gradients are 10,000 times the
    # later ones, and Adam would remember them for thousands of steps; start from the data's spread.
    start = init_to_value(values=options.get("start", {}), fallback=init_to_feasible)
    guide = guide_type(model, init_loc_fn=start)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": options["lr"]}), elbo, seed=0)
    svi.run(options["steps"], *args, progress_bar=False)
    lrd = (options["last_lr"] / options["lr"]) ** (1 / options["decay"])
    svi.optim = ClippedAdam({"lr": options["lr"], "lrd": lrd, "clip_norm": 1e9})
    svi.run(options["decay"], *args, progress_bar=False)
    found = parameters(guide.sample_posterior(20_000))
    assert found.keys() == reference.keys()
    return {
        key: (
            (found[key].mean().item() - exact["mean"]) / exact["sd"],
            found[key].std().item() / exact["sd"],
        )
        for key, exact in reference.items()
    }


def report(name, kind, errors):
    print(f"\n{name} by {kind}")
    for key, (error, ratio) in errors.items():
        print(f"  {key:<10} mean off by {error:+.3f} sd, sd ratio {ratio:.2f}")


@pytest.mark.parametrize("name", POSTERIORS)
def test_mean_field(name):
    errors = fit(name, AutoNormal)
    report(name, "AutoNormal", errors)
    if name != "eight_schools":
        assert max(abs(error) for error, _ in errors.values()) <= 0.2


@pytest.mark.parametrize("name", ["ar", "mesquite"])
def test_full_rank(name):
    """On the two with the strongest correlations; all five were measured to pass."""
    errors = fit(name, AutoMultivariateNormal)
    report(name, "AutoMultivariateNormal", errors)
    for error, ratio in errors.values():
        assert abs(error) <= 0.2
        assert 0.85 <= ratio <= 1.15
