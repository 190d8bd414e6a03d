"""A fit to be saved and taken up, and comparisons of what comes of it."""

from __future__ import annotations

import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal

DATA = torch.tensor([1.0, 2.0, 0.5, 1.5])
EAGER = {"progress_bar": False, "compile": False}


def model(data):
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(x, s), obs=data)


def guide(data):
    loc = pyro.param("loc", lambda: torch.randn(()))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("x", dist.Normal(loc, scale))
    pyro.sample("s", dist.LogNormal(pyro.param("log_s", torch.tensor(0.0)), 0.2))


def fresh(automatic=True, optim=None, particles=2, **options):
    """A fit as a new process has it: no parameters, and torch's generator anywhere."""
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True)
    own = AutoNormal(model) if automatic else guide
    return SVI(model, own, optim or pyro.optim.Adam({"lr": 0.05}), elbo, **options)


def contents(svi):
    params = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    program = svi._program
    return params, svi.optim.get_state(), program.noise.step, torch.get_rng_state()


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other
