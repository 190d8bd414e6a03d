"""Whole steps through the Triton kernels: on a GPU compiled, elsewhere by Triton's interpreter.

What a CUDA graph is captured from is run here launch by launch, on either device. The same fits
with the torch forms on the CPU are the reference: the noise is a function of seed, step, particle
and element, so the losses agree but for rounding.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
import torch

# Triton asks for this when it is first imported.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import settings
from fastsvi.distributions import constraints
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.graphed import GraphedLoop
from fastsvi.infer.pure_step import PureStep
from fastsvi.kernels import dispatch

CUDA = torch.cuda.is_available()
FORM, DEVICE = ("triton", "cuda") if CUDA else ("interpret", "cpu")
pytestmark = [pytest.mark.cuda] if CUDA else []

# Some steps of float32: some hundred operations each, whose rounding moves the parameters, by
# Adam's first steps, by a small part of the learning rate. The losses are near 100.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-3}

generator = torch.Generator().manual_seed(0)
x = torch.randn(20, 3, generator=generator)
y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(20, generator=generator)


def regression(x, y):
    zeros = torch.zeros(3, device=x.device)
    weight = pyro.sample("weight", dist.Normal(zeros, 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(torch.tensor(1.0, device=x.device)))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def minibatch(x, y):
    zeros = torch.zeros(3, device=x.device)
    weight = pyro.sample("weight", dist.Normal(zeros, 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=6, device=x.device) as i:
        pyro.sample("y", dist.Normal(x[i] @ weight, 1.0), obs=y[i])


def families(x, y):
    ones = torch.ones(3, device=x.device)
    rate = pyro.sample("rate", dist.Gamma(2 * ones, ones).to_event(1))
    share = pyro.sample("share", dist.Beta(2 * ones[0], ones[0]))
    with pyro.plate("rows", len(x)):
        pyro.sample("size", dist.Poisson(rate[0] + x[:, 0].exp() * share), obs=(5 * x[:, 1]) // 1)
        pyro.sample("sign", dist.Bernoulli(logits=x @ rate), obs=(y > 0).to(y.dtype))
        pyro.sample("y", dist.StudentT(3.0, x @ rate, rate.sum()), obs=y)


def counts(x, y):
    return families(x.abs(), y)


def by_hand(x, y):
    zeros = torch.zeros(3, device=x.device)
    loc = pyro.param("loc", zeros)
    scale = pyro.param("scale", zeros + 0.1, constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))
    level = pyro.param("level", zeros[0] - 0.5)
    pyro.sample("noise", dist.LogNormal(level, 0.1))


# Model, guide, and arguments of the ELBO.
PROGRAMS = {
    "one particle": (regression, AutoNormal, {}),
    "particles": (regression, AutoNormal, {"num_particles": 3, "vectorize_particles": True}),
    "chunks": (
        regression,
        AutoNormal,
        {"num_particles": 3, "vectorize_particles": True, "chunk_size": 2},
    ),
    "one by one": (regression, AutoNormal, {"num_particles": 2}),
    "minibatch": (minibatch, AutoNormal, {"num_particles": 2, "vectorize_particles": True}),
    "families": (counts, AutoNormal, {}),
    "by hand": (regression, by_hand, {}),
    "by hand, particles": (
        regression,
        by_hand,
        {"num_particles": 2, "vectorize_particles": True},
    ),
}
STEPS = 3
# How often a step calls the sampling kernel, forward and backward.
DRAWS = {name: 0 if "by hand" in name else 2 if name == "chunks" else 1 for name in PROGRAMS}


@pytest.fixture
def kernels(monkeypatch):
    """Counts the calls of launchers; a graph on a GPU launches what they have launched."""
    from fastsvi.kernels.triton import adam, normal, normal_backward, philox, subsample

    found = Counter()

    def counted(module, name):
        launcher = getattr(module, name)

        def call(*args):
            found[module.__name__.rpartition(".")[2]] += 1
            return launcher(*args)

        monkeypatch.setattr(module, name, call)

    launchers = {
        normal: "forward",
        normal_backward: "backward",
        adam: "update",
        philox: "draw",
        subsample: "indices",
    }
    with dispatch.use(FORM):
        dispatch.choose("test", torch.zeros(1, device=DEVICE))  # the interpreter, if it is one
        for module, name in launchers.items():
            counted(module, name)
        yield found


def prepared(name, device):
    """After two eager steps by the torch forms."""
    model, guide, particles = PROGRAMS[name]
    pyro.clear_param_store()
    if guide is AutoNormal:
        guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(**particles), seed=7)
    data = x.to(device), y.to(device)
    with dispatch.use("torch"):
        svi.run(2, *data, progress_bar=False, compile=False)
    return svi, data


def as_it_is(body):
    """In place of a graph."""
    return body


@pytest.mark.parametrize("name", PROGRAMS)
def test_steps_equal_those_of_the_torch_forms(name, kernels):
    svi, data = prepared(name, "cpu")
    with dispatch.use("torch"):
        expected = svi.run(STEPS, *data, progress_bar=False, compile=False)
    svi, data = prepared(name, DEVICE)
    pure = PureStep(svi, Arguments(data, {}))
    loop = GraphedLoop(pure, as_it_is)
    pure.begin(Arguments(data, {}))
    kernels.clear()
    losses = loop.run(STEPS)
    torch.testing.assert_close(losses.cpu(), expected.losses, **TOLERANCE)
    found = {name: value.detach().cpu() for name, value in pyro.get_param_store().items()}
    torch.testing.assert_close(found, expected.params, **TOLERANCE)
    assert kernels["adam"] == STEPS
    assert kernels["normal"] == kernels["normal_backward"] == STEPS * DRAWS[name]
    assert kernels["subsample"] == STEPS * (name == "minibatch")
    assert (kernels["philox"] > 0) == (not DRAWS[name])


@pytest.mark.slow
def test_many_fits_draw_by_the_kernel_for_all_at_once(kernels):
    def fitted():
        pyro.clear_param_store()
        adam = pyro.optim.Adam({"lr": 0.02})
        svi = SVI(regression, AutoNormal(regression), adam, Trace_ELBO(), seed=7, num_fits=2)
        targets = torch.stack([y, y + 1]).to(DEVICE)
        data = x.to(DEVICE), targets
        with settings.context(cuda_steps="graph"):
            return svi.run(STEPS, *data, fit_dims=(None, 0), progress_bar=False, compile=CUDA)

    with dispatch.use("torch"):
        expected = fitted()
    kernels.clear()
    found = fitted()
    torch.testing.assert_close(found.losses, expected.losses, **TOLERANCE)
    assert found.obstacle == expected.obstacle
    assert kernels["philox"] > 0
    assert kernels["normal"] <= 2  # in the eager steps of the example alone
