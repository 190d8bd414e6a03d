"""MultivariateStudentT and ProjectedNormal."""

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
tril = torch.tensor([[1.0, 0.0], [0.5, 2.0]], **f64)


def test_student_against_scipy():
    loc = torch.tensor([1.0, -1.0], **f64)
    d = dist.MultivariateStudentT(3.5, loc, tril)
    oracle = scipy.stats.multivariate_t(loc.numpy(), (tril @ tril.T).numpy(), 3.5)
    x = d.sample((20,))
    assert_close(d.log_prob(x), torch.as_tensor(oracle.logpdf(x.numpy())))
    assert_close(d.covariance_matrix, tril @ tril.T)
    assert_close(d.precision_matrix, torch.linalg.inv(tril @ tril.T))


def test_student_agrees_with_pyro_on_moments_and_shapes():
    df = torch.tensor([0.5, 1.5, 4.0], **f64)
    loc = torch.randn(2, **f64)
    ours, oracle = (lib.MultivariateStudentT(df, loc, tril) for lib in (dist, pyro_dist))
    assert_close(ours.mean, oracle.mean, equal_nan=True)
    assert_close(ours.variance, oracle.variance, equal_nan=True)
    wide = ours.expand([4, 3])
    assert wide.precision_matrix.shape == (4, 3, 2, 2)
    assert wide.log_prob(loc).shape == (4, 3)
    with pytest.raises(ShapeError, match=r"\(3,\) and \(2, 2\)"):
        dist.MultivariateStudentT(1.0, torch.zeros(3), tril)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_projected_normal_integrates_to_one_on_the_circle(scale):
    angle = torch.arange(2000, **f64) * (2 * math.pi / 2000)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    d = dist.ProjectedNormal(scale * torch.tensor([0.6, 0.8], **f64))
    # A smooth periodic function: the mean over equal steps is its integral to rounding.
    integral = d.log_prob(circle).exp().mean() * 2 * math.pi
    assert_close(integral, torch.tensor(1.0, **f64))


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7])
def test_projected_normal_in_any_dimension(dim):
    """Importance sampling: the density over that of the uniform distribution has mean 1."""
    c = torch.randn(dim, **f64)
    d = dist.ProjectedNormal(c)
    x = dist.ProjectedNormal(torch.zeros(dim, **f64)).sample((20_000,))
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    weight = (d.log_prob(x) + log_area).exp()
    assert (weight.mean() - 1).abs() < 5 * weight.std() / len(x) ** 0.5 + 1e-12
    assert_close(d.mean, c / c.norm())
    assert_close(d.mode, d.mean)
    if dim in {2, 3, 4}:
        assert_close(d.log_prob(x), pyro_dist.ProjectedNormal(c).log_prob(x))


def test_projected_normal_needs_a_vector():
    with pytest.raises(ShapeError, match="must be a vector"):
        dist.ProjectedNormal(torch.tensor(1.0))
