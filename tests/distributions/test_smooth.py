"""Logistic and Laplace relatives: normalised, with the stated moments, cdfs that are integrals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist

f64 = {"dtype": torch.float64}
loc = torch.tensor(0.7, **f64)
grid = torch.linspace(-120, 120, 200_001, **f64)

FAMILIES = [
    dist.Logistic(loc, 1.5),
    dist.SkewLogistic(loc, 1.5, 2.5),
    dist.SoftLaplace(loc, 1.5),
    dist.AsymmetricLaplace(loc, 1.5, 0.6),
    dist.SoftAsymmetricLaplace(loc, 1.5, 0.6, 0.4),
]
each = pytest.mark.parametrize("d", FAMILIES, ids=lambda d: type(d).__name__)


@each
def test_the_density_integrates_to_one_and_has_the_stated_moments(d):
    density = d.log_prob(grid).exp()
    # The trapezium rule with step 0.0012: error below 1e-6, also at the kink of AsymmetricLaplace.
    assert_close(torch.trapezoid(density, grid), torch.tensor(1.0, **f64), rtol=1e-6, atol=0)
    if isinstance(d, dist.SkewLogistic):
        return
    mean = torch.trapezoid(grid * density, grid)
    variance = torch.trapezoid((grid - mean) ** 2 * density, grid)
    assert_close(d.mean, mean, rtol=1e-5, atol=1e-6)
    assert_close(d.variance, variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("d", FAMILIES[:3], ids=lambda d: type(d).__name__)
def test_the_cdf_is_the_integral_and_icdf_its_inverse(d):
    density = d.log_prob(grid).exp()
    steps = (density[1:] + density[:-1]) / 2 * (grid[1] - grid[0])
    assert_close(d.cdf(grid)[1:], steps.cumsum(0), rtol=0, atol=1e-6)
    u = torch.tensor([0.001, 0.3, 0.5, 0.999], **f64)
    assert_close(d.cdf(d.icdf(u)), u)
    assert_close(d.icdf(0.5), d.icdf(torch.tensor(0.5, **f64)))


@each
def test_draws_follow_the_density(d):
    """Kolmogorov's distance of 1e5 draws; 2.2 / sqrt(n) is exceeded with probability 1e-4."""
    x = d.sample((100_000,)).sort().values
    density = d.log_prob(grid).exp()
    steps = (density[1:] + density[:-1]) / 2 * (grid[1] - grid[0])
    cdf = steps.cumsum(0)
    at = cdf[torch.searchsorted(grid, x).clamp(1, len(cdf)) - 1]
    rank = torch.arange(1, len(x) + 1, **f64) / len(x)
    assert (at - rank).abs().max() < 2.2 / math.sqrt(len(x))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_are_linear_and_never_infinite(d, dtype):
    far = torch.tensor([-3e4, -1e4, 1e4, 3e4], dtype=dtype)
    log_prob = d.expand([4]).log_prob(far)
    assert log_prob.isfinite().all()
    slope = (log_prob[1] - log_prob[0]) / 2e4, (log_prob[3] - log_prob[2]) / 2e4
    left, right = (d.left_scale, d.right_scale) if hasattr(d, "left_scale") else (d.scale, d.scale)
    if isinstance(d, dist.SkewLogistic):
        left = d.scale / d.asymmetry
    assert_close(slope[0].double(), 1 / left, rtol=1e-4, atol=0)
    assert_close(slope[1].double(), -1 / right, rtol=1e-4, atol=0)


def test_soft_laplace_tends_to_asymmetric_laplace():
    x = torch.tensor([-2.0, 0.5, 3.0], **f64)
    soft = dist.SoftAsymmetricLaplace(loc, 1.5, 0.6, 1e-4).log_prob(x)
    assert_close(soft, dist.AsymmetricLaplace(loc, 1.5, 0.6).log_prob(x), rtol=1e-6, atol=1e-6)


def test_uniform_noise_of_zero_would_be_minus_infinity():
    draws = dist.Logistic(0.0, 1.0).sample((10,))
    assert draws.isfinite().all()


def test_entropy_of_the_logistic():
    d = FAMILIES[0]
    density = d.log_prob(grid).exp()
    integral = -torch.trapezoid(density * d.log_prob(grid), grid)
    assert_close(d.entropy(), integral, rtol=1e-6, atol=0)
