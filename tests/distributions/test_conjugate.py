"""Compound families against scipy, and as the mixtures they are."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist

f64 = {"dtype": torch.float64}
counts = torch.arange(11)


def test_beta_binomial_against_scipy():
    d = dist.BetaBinomial(torch.tensor(2.0, **f64), 3.5, 10)
    oracle = scipy.stats.betabinom(10, 2, 3.5)
    assert_close(d.log_prob(counts), torch.as_tensor(oracle.logpmf(counts)), rtol=1e-12, atol=1e-12)
    assert_close(d.mean.item(), oracle.mean())
    assert_close(d.variance.item(), oracle.var())
    assert_close(d.enumerate_support(), counts.double())
    with pytest.raises(NotImplementedError, match="equal"):
        dist.BetaBinomial(1.0, 1.0, torch.tensor([1.0, 2.0])).enumerate_support()


def test_gamma_poisson_against_scipy():
    d = dist.GammaPoisson(torch.tensor(2.0, **f64), 0.7)
    oracle = scipy.stats.nbinom(2.0, 0.7 / 1.7)
    assert_close(d.log_prob(counts), torch.as_tensor(oracle.logpmf(counts)), rtol=1e-12, atol=1e-12)
    assert_close(d.mean.item(), oracle.mean())
    assert_close(d.variance.item(), oracle.var())


def test_dirichlet_multinomial_against_scipy():
    alpha = torch.tensor([0.5, 2.0, 3.0], **f64)
    d = dist.DirichletMultinomial(alpha, 6)
    oracle = scipy.stats.dirichlet_multinomial(alpha.numpy(), 6)
    value = d.sample((50,))
    assert bool((value.sum(-1) == 6).all())
    expected = torch.as_tensor(oracle.logpmf(value.numpy()))
    assert_close(d.log_prob(value), expected, rtol=1e-12, atol=1e-12)
    sparse = dist.DirichletMultinomial(alpha, 6, is_sparse=True)
    assert_close(sparse.log_prob(value), expected, rtol=1e-12, atol=1e-12)
    assert_close(d.mean, torch.as_tensor(oracle.mean()))
    assert_close(d.variance, torch.as_tensor(oracle.var()))


def test_dirichlet_multinomial_totals():
    alpha = torch.ones(2, 3)
    tensor_total = dist.DirichletMultinomial(alpha, torch.tensor(4))
    assert tensor_total.expand([5, 2]).sample().sum(-1).unique().tolist() == [4.0]
    assert dist.DirichletMultinomial(alpha, torch.tensor([4, 4])).batch_shape == (2,)
    with pytest.raises(NotImplementedError, match="equal"):
        dist.DirichletMultinomial(alpha, torch.tensor([4, 5])).sample()
    mixed = dist.DirichletMultinomial(alpha, torch.tensor([4, 5]))
    assert mixed.log_prob(torch.tensor([[4.0, 0, 0], [5.0, 0, 0]])).shape == (2,)


@pytest.mark.parametrize(
    "d",
    [
        dist.BetaBinomial(torch.tensor(2.0, **f64), 3.0, 10),
        dist.GammaPoisson(torch.tensor(4.0, **f64), 2.0),
        dist.DirichletMultinomial(torch.tensor([1.0, 2.0], **f64), 8),
    ],
    ids=repr,
)
def test_draws_have_the_stated_moments(d):
    n = 20_000
    x = d.sample((n,))
    # Five standard errors; that of a variance from the fourth moment of the draws.
    error = (d.variance / n).sqrt()
    assert bool(((x.mean(0) - d.mean).abs() < 5 * error).all())
    square = (x - d.mean) ** 2
    assert bool(((square.mean(0) - d.variance).abs() < 5 * square.std(0) / n**0.5).all())
