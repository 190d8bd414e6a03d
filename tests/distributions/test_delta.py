"""Delta and Unit."""

from __future__ import annotations

import math

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.errors import ShapeError


@pytest.mark.parametrize("event_dim", [0, 1, 2])
@pytest.mark.parametrize("with_density", [False, True])
def test_delta_agrees_with_pyro(event_dim, with_density):
    v = torch.randn(4, 2, 3)
    density = torch.randn(v.shape[: 3 - event_dim]) if with_density else 0.5
    ours, oracle = (lib.Delta(v, density, event_dim) for lib in (dist, pyro_dist))
    assert_close(ours.log_density, oracle.log_density)
    elsewhere = v.clone()
    elsewhere[1, 0, 2] += 1
    for value in (v, elsewhere, v.expand(5, 4, 2, 3)):
        assert_close(ours.log_prob(value), oracle.log_prob(value))
    wide, oracle_wide = (d.expand((6, *ours.batch_shape)) for d in (ours, oracle))
    assert_close(wide.log_prob(v), oracle_wide.log_prob(v))
    assert_close(wide.log_density, oracle_wide.log_density)
    assert_close(wide.sample((2,)), oracle_wide.sample((2,)))
    assert_close(ours.mean, oracle.mean)
    assert_close(ours.variance, oracle.variance)


def test_gradients_flow_through_the_point_and_the_density():
    v = torch.randn(3, requires_grad=True)
    density = torch.tensor(0.25, requires_grad=True)
    d = dist.Delta(v, density, event_dim=1)
    (d().sum() + 2 * d.log_prob(d())).backward()
    assert_close(v.grad, torch.ones(3))
    assert_close(density.grad, torch.tensor(2.0))


def test_deltas_of_numbers_and_integers():
    assert dist.Delta(2.0)().item() == 2.0
    ints = dist.Delta(torch.tensor([1, 2]))
    assert ints.log_prob(torch.tensor([1, 3])).tolist() == [0.0, -math.inf]
    assert ints.log_prob(torch.tensor([1, 3])).dtype == torch.float32
    assert ints().dtype == torch.int64
    assert dist.Delta(torch.tensor(math.nan)).log_prob(math.nan) == -math.inf  # NaN equals nothing


def test_a_scalar_density_is_spread_over_the_batch():
    d = dist.Delta(torch.zeros(3, 2), torch.tensor(1.5), 1)
    assert_close(d.log_prob(torch.zeros(3, 2)), torch.full((3,), 1.5))
    assert d.log_density.shape == (3,)


def test_bad_deltas():
    with pytest.raises(ShapeError, match=r"event_dim=2, but v has shape \(3,\)"):
        dist.Delta(torch.zeros(3), event_dim=2)
    with pytest.raises(ShapeError, match=r"log_density of shape \(2,\) .* batch shape \(3,\)"):
        dist.Delta(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="must be a number or a tensor"):
        dist.Delta("here")


def test_unit_agrees_with_pyro():
    factor = torch.randn(2, 3)
    ours, oracle = (lib.Unit(factor) for lib in (dist, pyro_dist))
    assert ours.shape() == oracle.shape() == (2, 3, 0)
    assert_close(ours.log_prob(ours()), oracle.log_prob(oracle()))
    assert ours.expand((4, 2, 3)).log_prob(torch.empty(0)).shape == (4, 2, 3)
    assert ours.sample((5,)).shape == (5, 2, 3, 0)
    assert dist.Unit(1.5).log_prob(torch.empty(0)).item() == 1.5


@pytest.mark.parametrize("choice", [None, True, False])
def test_unit_remembers_whether_it_was_reparameterized(choice):
    d = dist.Unit(torch.zeros(2), has_rsample=choice)
    assert d.has_rsample is bool(choice)
    assert ("has_rsample" in vars(d)) == (choice is not None)  # read by the ELBO's checks
    assert d.expand((3, 2)).has_rsample is bool(choice)
    assert ("has_rsample" in vars(d.expand((3, 2)))) == (choice is not None)
    assert d.score_parts(d()).score_function is not None
