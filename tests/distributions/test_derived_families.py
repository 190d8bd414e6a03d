"""Folded, affine, extended and nan-masked families."""

from __future__ import annotations

import math

import pyro.distributions as pyro_dist
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.errors import ShapeError

f64 = {"dtype": torch.float64}
nan = math.nan


def test_folded_agrees_with_pyro():
    loc = torch.tensor([0.5, -2.0], **f64)
    ours, oracle = (lib.FoldedDistribution(lib.Normal(loc, 1.0)) for lib in (dist, pyro_dist))
    value = torch.rand(5, 2, **f64) + 0.1
    assert_close(ours.log_prob(value), oracle.log_prob(value))
    assert_close(ours.expand([3, 2]).log_prob(value[:3]), oracle.expand((3, 2)).log_prob(value[:3]))
    assert ours.sample((4,)).min() >= 0
    with pytest.raises(ShapeError, match="single numbers"):
        dist.FoldedDistribution(dist.Normal(loc, 1.0).to_event(1))


def test_affine_beta_draws_stay_off_the_ends():
    d = dist.AffineBeta(torch.tensor(1e-3), 1e-3, -2.0, 4.0)
    x = d.sample((1000,))
    assert x.min() > d.low
    assert x.max() < d.high
    assert d.log_prob(x).isfinite().all()
    assert (d.low.item(), d.high.item(), d.scale.item()) == (-2.0, 2.0, 4.0)
    assert_close(d.mean, torch.tensor(0.0))
    assert_close(d.sample_size, torch.tensor(2e-3))
    value = torch.tensor(0.5, **f64)
    ours = dist.AffineBeta(torch.tensor(2.0, **f64), 3.0, -2.0, 4.0).log_prob(value)
    assert_close(ours.item(), float(scipy.stats.beta.logpdf(0.5, 2, 3, loc=-2, scale=4)))


@pytest.mark.parametrize("family", ["ExtendedBinomial", "ExtendedBetaBinomial"])
def test_extended_counts_outside_the_range(family):
    total = torch.tensor([-2.0, 0.0, 3.0], **f64)
    value = torch.arange(-2.0, 5.0, **f64).unsqueeze(-1)
    arguments = (total, torch.tensor(0.3, **f64))
    if family == "ExtendedBetaBinomial":
        arguments = (torch.tensor(0.3, **f64), torch.tensor(2.0, **f64), total)
    ours = getattr(dist, family)(*arguments).log_prob(value)
    oracle = getattr(pyro_dist, family)(*arguments).log_prob(value)
    assert_close(ours, oracle)
    assert ours[:, 0].isinf().all()


def test_missing_values_add_nothing_to_a_normal():
    data = torch.tensor([0.5, nan, math.inf, -1.0], **f64)
    loc = torch.zeros(4, **f64).requires_grad_()
    d = dist.NanMaskedNormal(loc, 2.0)
    log_prob = d.log_prob(data)
    oracle = pyro_dist.NanMaskedNormal(torch.zeros(4, **f64), torch.tensor(2.0, **f64))
    assert_close(log_prob, oracle.log_prob(data))
    log_prob.sum().backward()
    assert_close(loc.grad, torch.tensor([0.125, 0.0, 0.0, -0.25], **f64))
    assert d.expand([2, 4]).log_prob(data).shape == (2, 4)


def test_missing_values_of_a_vector_are_marginalised():
    factor = torch.randn(3, 3, **f64)
    cov = factor @ factor.T + torch.eye(3, **f64)
    loc = torch.randn(3, **f64)
    data = torch.randn(5, 3, **f64)
    data[1, 0] = data[2, 1] = data[2, 2] = data[3, :] = nan
    ours, oracle = (lib.NanMaskedMultivariateNormal(loc, cov) for lib in (dist, pyro_dist))
    assert_close(ours.log_prob(data), oracle.log_prob(data))
    marginal = dist.Normal(loc[0], cov[0, 0].sqrt()).log_prob(data[2, 0])
    assert_close(ours.log_prob(data)[2], marginal)
    leaf = cov.clone().requires_grad_()
    dist.NanMaskedMultivariateNormal(loc, leaf).log_prob(data).sum().backward()
    assert leaf.grad.isfinite().all()
    mapped = torch.vmap(lambda x: ours.log_prob(x))(data)
    assert_close(mapped, ours.log_prob(data))
