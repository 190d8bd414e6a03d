"""Seed 000: "different access methods to Pyro Paramstore give different results".

The question: after a fit, ``pyro.param(name)`` and ``named_parameters()`` agree on the locations
and not on the scales. The answer: one is constrained, the other unconstrained. Here both are named.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.optim import Adam

NAMES = [
    "AutoNormal.locs.bias",
    "AutoNormal.scales.bias",
    "AutoNormal.locs.weight",
    "AutoNormal.scales.weight",
    "AutoNormal.locs.noise_scale",
    "AutoNormal.scales.noise_scale",
]


def model(data, covariates):
    """The question's forecasting model without the forecaster: the same latent sites."""
    bias = pyro.sample("bias", dist.Normal(0, 10).expand([1]).to_event(1))
    weight = pyro.sample("weight", dist.Normal(0, 0.1).expand([1]).to_event(1))
    prediction = bias + (weight * covariates).sum(-1, keepdim=True)
    noise_scale = pyro.sample("noise_scale", dist.LogNormal(-5, 5).expand([1]).to_event(1))
    with pyro.plate("time", len(data), dim=-1):
        pyro.sample("data", dist.Normal(prediction, noise_scale).to_event(1), obs=data)


@pytest.fixture
def fitted():
    pyro.set_rng_seed(1)
    covariates = (torch.arange(100.0) / 365).unsqueeze(-1)
    data = 14.6 + 0.1 * covariates + 0.1 * torch.randn(100, 1)
    guide = AutoNormal(model)
    # Pyro 1.3, which the question used, held the scales by exp; today the default is softplus.
    guide.scale_constraint = constraints.positive
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(100):
        svi.step(data, covariates)


@pytest.mark.filterwarnings("ignore:.*get_all_param_names.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*get_all_param_names.*:FutureWarning")
def test_program_of_the_question(fitted, run_program, capsys):
    names = run_program("000_store", pyro=pyro)
    printed = capsys.readouterr().out.strip().split("\n")
    assert [line.split()[0] for line in printed[:6]] == NAMES
    assert [name for name, _ in names["items"]] == NAMES
    # The question's own check prints np.log of the constrained value, the unconstrained, equal?
    assert [line.split()[2] for line in printed[6:]] == ["True"] * 3
    assert list(pyro.get_param_store().get_all_param_names()) == NAMES


def test_constrained_and_unconstrained_are_told_apart(fitted):
    store = pyro.get_param_store()
    unconstrained = dict(store.named_parameters())
    for name in NAMES:
        value, leaf = store[name], unconstrained[name]
        assert value.unconstrained() is leaf
        assert leaf.is_leaf
        if "locs" in name:
            assert value is leaf
        else:
            assert float(leaf.detach()) == pytest.approx(math.log(value.item()), rel=1e-6)
            assert float(leaf.detach()) < 0 < value.item() < 1
