"""Empirical."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.errors import ShapeError


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("event", [(), (4,)], ids=str)
def test_agrees_with_pyro(batch, event):
    samples = torch.randint(3, (*batch, 10, *event)).double()
    log_weights = torch.randn(*batch, 10, dtype=torch.float64)
    ours, oracle = (lib.Empirical(samples, log_weights) for lib in (dist, pyro_dist))
    assert ours.batch_shape == oracle.batch_shape
    assert ours.event_shape == oracle.event_shape
    assert ours.sample_size == oracle.sample_size
    assert_close(ours.mean, oracle.mean)
    assert_close(ours.variance, oracle.variance)
    assert ours.log_weights is log_weights
    for shape in ((), (5,), (5, 2)):
        torch.manual_seed(0)
        actual = ours.sample(shape)
        torch.manual_seed(0)
        assert_close(actual, oracle.sample(torch.Size(shape)))
    value = ours.sample()
    expected = torch.where(
        samples.eq(value.unsqueeze(len(batch))).reshape(*batch, 10, -1).all(-1),
        log_weights.softmax(-1),
        0.0,
    )
    assert_close(ours.log_prob(value), expected.sum(-1).log())
    assert ours.enumerate_support() is samples


def test_bad_shapes_and_values():
    with pytest.raises(ShapeError, match=r"log_weights \(3,\) and samples \(2,\)"):
        dist.Empirical(torch.zeros(2), torch.zeros(3))
    d = dist.Empirical(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ShapeError, match=r"must have shape \(3,\)"):
        d.log_prob(torch.zeros(5, 3))
    ints = dist.Empirical(torch.tensor([1, 2]), torch.zeros(2))
    for name in ("mean", "variance"):
        with pytest.raises(ValueError, match=rf"the {name} of torch.int64 samples"):
            getattr(ints, name)
