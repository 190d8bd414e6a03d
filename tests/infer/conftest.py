"""Models that are written once and run by fastsvi and by Pyro, its oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Test modules are imported without their folder being on the path.
sys.path.append(str(Path(__file__).parent))


class Programs:
    """Pairs of model and guide as functions of the library, by name.

    Guides draw all their sites with torch's generator and in the same order in both libraries, so
    under one seed the losses must agree to rounding.
    """

    @staticmethod
    def normal_normal(pyro):
        dist = pyro.distributions

        def model(data):
            x = pyro.sample("x", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(data)):
                pyro.sample("obs", dist.Normal(x, 1.0), obs=data)

        def guide(data):
            loc = pyro.param("loc", torch.tensor(0.3))
            scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
            pyro.sample("x", dist.Normal(loc, scale))

        return model, guide, (torch.tensor([0.5, -1.0, 2.0]),)

    @staticmethod
    def nested_plates(pyro):
        dist = pyro.distributions

        def model(data):
            with pyro.plate("rows", 3, dim=-2):
                row = pyro.sample("row", dist.Normal(torch.zeros(3, 1), 1.0))
                with pyro.plate("columns", 4, dim=-1):
                    cell = pyro.sample("cell", dist.Gamma(2.0, row.exp()))
                    pyro.sample("obs", dist.Poisson(cell), obs=data)

        def guide(data):
            loc = pyro.param("loc", torch.zeros(3, 1))
            shape = pyro.param(
                "shape", 2.0 + torch.zeros(3, 4), constraint=dist.constraints.positive
            )
            with pyro.plate("rows", 3, dim=-2):
                pyro.sample("row", dist.Normal(loc, 0.5))
                with pyro.plate("columns", 4, dim=-1):
                    pyro.sample("cell", dist.Gamma(shape, 1.5))

        return model, guide, (torch.arange(12.0).reshape(3, 4) % 5,)

    @staticmethod
    def subsampled(pyro):
        dist = pyro.distributions

        def model(data):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(data), subsample_size=4) as index:
                z = pyro.sample("z", dist.Normal(x, 1.0))
                pyro.sample("obs", dist.Normal(z, 0.5), obs=data[index])

        def guide(data):
            loc = pyro.param("loc", torch.tensor(0.1))
            pyro.param("local", lambda: torch.linspace(-1, 1, len(data)), event_dim=0)
            pyro.sample("x", dist.Normal(loc, 0.4))
            with pyro.plate("data", len(data), subsample_size=4):
                pyro.sample("z", dist.Normal(pyro.param("local", event_dim=0), 0.3))

        return model, guide, (torch.linspace(-2, 2, 10),)

    @staticmethod
    def scaled_and_masked(pyro):
        dist, poutine = pyro.distributions, pyro.poutine

        def model(data):
            x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with poutine.scale(scale=2.5), pyro.plate("data", 4):
                mask = torch.tensor([True, False, True, True])
                with poutine.mask(mask=mask):
                    pyro.sample("obs", dist.Normal(x.sum(), 1.0), obs=data)
            pyro.factor("prior", -x.abs().sum())

        def guide(data):
            loc = pyro.param("loc", torch.tensor([0.1, 0.2, 0.3]))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(loc, 0.2).to_event(1))

        return model, guide, (torch.tensor([1.0, 1e6, 0.0, -1.0]),)

    @staticmethod
    def discrete(pyro):
        dist = pyro.distributions

        def model(data):
            probs = torch.tensor([0.2, 0.3, 0.5])
            k = pyro.sample("k", dist.Categorical(probs))
            with pyro.plate("data", 3):
                b = pyro.sample("b", dist.Bernoulli(0.3))
                pyro.sample("obs", dist.Normal(b + k.float(), 1.0), obs=data)

        def guide(data):
            logits = pyro.param("logits", torch.tensor([0.1, 0.0, -0.2]))
            probs = pyro.param(
                "probs", torch.tensor([0.2, 0.6, 0.5]), constraint=dist.constraints.unit_interval
            )
            pyro.sample("k", dist.Categorical(logits=logits))
            with pyro.plate("data", 3):
                pyro.sample("b", dist.Bernoulli(probs))

        return model, guide, (torch.tensor([0.5, 2.0, 1.5]),)

    @staticmethod
    def params_in_the_model(pyro):
        dist = pyro.distributions

        def model(data):
            noise = pyro.param("noise", torch.tensor(0.9), constraint=dist.constraints.positive)
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("data", len(data)):
                pyro.sample("obs", dist.Normal(weights[0], noise), obs=data)

        def guide(data):
            concentration = pyro.param(
                "concentration", torch.tensor([1.0, 2.0, 3.0]), constraint=dist.constraints.positive
            )
            pyro.sample("weights", dist.Dirichlet(concentration))

        return model, guide, (torch.tensor([0.5, 0.1]),)

    @staticmethod
    def sequential_plate(pyro):
        dist = pyro.distributions

        def model(data):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            for i in pyro.plate("data", len(data)):
                z = pyro.sample(f"z_{i}", dist.Bernoulli(0.4))
                pyro.sample(f"obs_{i}", dist.Normal(x + z, 1.0), obs=data[i])

        def guide(data):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))
            logits = pyro.param("logits", torch.zeros(len(data)))
            for i in pyro.plate("data", len(data)):
                pyro.sample(f"z_{i}", dist.Bernoulli(logits=logits[i]))

        return model, guide, (torch.tensor([0.3, 1.2]),)

    names = (
        "normal_normal",
        "nested_plates",
        "subsampled",
        "scaled_and_masked",
        "discrete",
        "params_in_the_model",
        "sequential_plate",
    )


@pytest.fixture(params=Programs.names)
def program(request):
    """A function of the library that returns model, guide and arguments."""
    return getattr(Programs, request.param)
