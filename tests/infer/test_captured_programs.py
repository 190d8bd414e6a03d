"""Programs of every kind are captured, and give what they give eagerly with the same noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.distributions import constraints
from fastsvi.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from fastsvi.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from fastsvi.nn import PyroModule, PyroParam, PyroSample

generator = torch.Generator().manual_seed(0)
x = torch.randn(30, 3, generator=generator)
y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(30, generator=generator)
images = (torch.rand(12, 16, generator=generator) < 0.4).float()


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def by_hand(x, y):
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.full((3,), 0.1), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))
    rate = pyro.param("rate", torch.tensor(0.5), constraint=constraints.interval(0.1, 3.0))
    pyro.sample("noise", dist.LogNormal(rate.log(), 0.1))


def in_vain(x, y):  # minibatches of the rows, in the model alone
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x), subsample_size=7) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ weight, noise), obs=y[rows])


def local(x, y):
    with pyro.plate("rows", len(x), subsample_size=10) as rows:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(level, 0.5), obs=y[rows])


def mixture(x, y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
    centre = pyro.sample("centre", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        components = dist.Normal(centre, 0.5)
        family = dist.MixtureSameFamily(dist.Categorical(weight), components)
        pyro.sample("y", family, obs=y)


def choice(x, y):
    positive = pyro.sample("positive", dist.Bernoulli(0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(2.0 * positive - 1.0, 2.0), obs=y)


def choose(x, y):
    pyro.sample(
        "positive",
        dist.Bernoulli(pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)),
    )


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 16))

    def forward(self, z):
        return self.layers(z)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.act = nn.Linear(16, 5), nn.ReLU()
        self.loc, self.scale = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x):
        h = self.act(self.hidden(x))
        return self.loc(h), self.scale(h).exp()


def autoencoder():
    torch.manual_seed(5)
    encoder, decoder = Encoder(), Decoder()

    def model(images):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(images), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=images)

    def guide(images):
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images)):
            loc, scale = encoder(images)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide, (images,)


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.scale = PyroParam(torch.tensor(0.7), constraints.positive)

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


def bayesian():
    torch.manual_seed(5)
    model = Bayesian()
    return model, AutoNormal(model), (x, y)


def listed():
    guide = AutoGuideList(regression)
    guide.append(AutoDiagonalNormal(poutine.block(regression, expose=["weight"])))
    guide.append(AutoDelta(poutine.block(regression, expose=["noise"])))
    return regression, guide, (x, y)


def with_handlers():
    model = poutine.scale(poutine.condition(regression, data={"noise": torch.tensor(0.4)}), 0.1)
    return model, AutoNormal(model), (x, y)


PROGRAMS = {
    "by hand": lambda: (regression, by_hand, (x, y)),
    "AutoDelta": lambda: (regression, AutoDelta(regression), (x, y)),
    "AutoDiagonalNormal": lambda: (regression, AutoDiagonalNormal(regression), (x, y)),
    "AutoMultivariateNormal": lambda: (regression, AutoMultivariateNormal(regression), (x, y)),
    "AutoGuideList": listed,
    "minibatches": lambda: (in_vain, AutoNormal(in_vain), (x, y)),
    "minibatches by hand": lambda: (in_vain, by_hand, (x, y)),
    "local latent sites": lambda: (local, AutoNormal(local), (x, y)),
    "simplex": lambda: (mixture, AutoNormal(mixture), (x, y)),
    "score function": lambda: (choice, choose, (x, y)),
    "autoencoder": autoencoder,
    "PyroModule": bayesian,
    "handlers": with_handlers,
}


def run(name, compile, particles=1, loss=Trace_ELBO, steps=40):
    pyro.clear_param_store()
    model, guide, args = PROGRAMS[name]()
    elbo = loss(num_particles=particles, vectorize_particles=particles > 1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo, seed=7)
    torch.manual_seed(11)
    return svi.run(steps, *args, progress_bar=False, compile=compile)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_captured_and_eager_runs_agree(name, particles):
    captured = run(name, True, particles)
    assert captured.obstacle is None
    assert captured.native_steps == 38  # all but the first, and the one to check against
    eager = run(name, False, particles)
    assert len(set(eager.losses.tolist())) == 40 or name == "AutoDelta"
    # float32; forty steps of some hundred operations.
    torch.testing.assert_close(captured.losses, eager.losses, rtol=2e-4, atol=2e-3)
    for key, value in eager.params.items():
        torch.testing.assert_close(captured.params[key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["by hand", "AutoDiagonalNormal"])
def test_a_loss_with_exact_divergences_is_captured(name):
    captured = run(name, True, loss=TraceMeanField_ELBO)
    assert captured.obstacle is None
    eager = run(name, False, loss=TraceMeanField_ELBO)
    torch.testing.assert_close(captured.losses, eager.losses, rtol=2e-4, atol=2e-3)


def test_what_draws_by_rejection_stays_eager_and_is_named():
    def model(y):
        count = pyro.sample("count", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(count, 1.0), obs=y)

    def guide(y):
        rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("count", dist.Poisson(rate))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), seed=7)
    message = r"dist.Poisson\(rate\).*draws from torch's generator"
    with pytest.warns(pyro.errors.FastSVIWarning, match=message):
        result = svi.run(10, torch.tensor(4.0), progress_bar=False, compile=True)
    assert result.native_steps == 0
    assert len(result.losses) == 10
