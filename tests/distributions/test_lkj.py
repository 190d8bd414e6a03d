"""LKJ distributions over correlation matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist

f64 = {"dtype": torch.float64}


@pytest.mark.parametrize("concentration", [0.5, 1.0, 3.0])
def test_the_density_of_a_correlation_is_that_of_a_beta(concentration):
    """In two dimensions (1 + r) / 2 is Beta(c, c), so the density of r is half of Beta's."""
    r = torch.tensor([-0.9, -0.2, 0.0, 0.6], **f64)
    matrix = torch.eye(2, **f64).repeat(4, 1, 1)
    matrix[:, 0, 1] = matrix[:, 1, 0] = r
    d = dist.LKJ(2, torch.tensor(concentration, **f64))
    beta = dist.Beta(torch.tensor(concentration, **f64), concentration)
    assert_close(d.log_prob(matrix), beta.log_prob((1 + r) / 2) - math.log(2))


def test_draws_are_correlation_matrices_with_the_right_spread():
    d = dist.LKJ(3, torch.tensor([1.0, 20.0], **f64))
    x = d.sample((2000,))
    assert d.support.check(x).all()
    # For a single correlation (1 + r) / 2 ~ Beta(a, a) with a = c + 1/2: variance 1 / (2 a + 1).
    variance = x[..., 1, 0].var(0)
    expected = 1 / (2 * (torch.tensor([1.0, 20.0], **f64) + 0.5) + 1)
    assert_close(variance, expected, rtol=0.2, atol=0)  # six standard errors, sqrt(2 / 2000) each
    assert_close(d.mean, torch.eye(3, **f64).expand(2, 3, 3))


def test_expand_keeps_the_class_and_the_dimension():
    d = dist.LKJ(3, torch.ones(2)).expand([5, 2])
    assert type(d) is dist.LKJ
    assert d.dim == 3
    assert d.concentration.shape == (5, 2)
    assert d().shape == (5, 2, 3, 3)
    cholesky = dist.LKJCholesky(3, 1.0).expand([4])
    assert type(cholesky) is dist.LKJCholesky
    assert cholesky.sample((2,)).shape == (2, 4, 3, 3)


def test_the_deprecated_name():
    with pytest.warns(FutureWarning, match="LKJCholesky"):
        d = dist.LKJCorrCholesky(3, 1.0)
    x = d()
    assert_close(d.log_prob(x), dist.LKJCholesky(3, 1.0).log_prob(x))
