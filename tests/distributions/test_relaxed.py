"""Straight-through estimators: hard values, soft gradients and densities."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist

CASES = {
    "RelaxedBernoulliStraightThrough": lambda logits: {"logits": logits},
    "RelaxedOneHotCategoricalStraightThrough": lambda logits: {"logits": logits},
}


@pytest.mark.parametrize("family", CASES)
def test_values_gradients_and_densities_agree_with_pyro(family):
    results = []
    for lib in (dist, pyro_dist):
        logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        d = getattr(lib, family)(torch.tensor(0.7), **CASES[family](logits))
        torch.manual_seed(0)
        x = d.rsample((6,))
        weight = torch.arange(18.0).reshape(6, 3)
        (gradient,) = torch.autograd.grad((x * weight).sum(), logits, retain_graph=True)
        results.append((x, gradient, d.log_prob(x)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
    assert set(results[0][0].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("family", CASES)
def test_sample_is_hard_and_has_no_gradient(family):
    logits = torch.zeros(3, requires_grad=True)
    d = getattr(dist, family)(torch.tensor(0.5), **CASES[family](logits))
    x = d.sample((5,))
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    assert not x.requires_grad
    assert d.log_prob(x).isfinite().all()
    assert type(d.expand_by([2])) is type(d)
