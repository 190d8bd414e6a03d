"""MaskedMixture."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.distributions.mixture import MaskedConstraint
from fastsvi.errors import ConstraintError, ShapeError

mask = torch.tensor([True, False, True])


def build(lib, event=False):
    if event:
        zero = lib.MultivariateNormal(torch.zeros(2), torch.eye(2))
        one = lib.MultivariateNormal(torch.ones(3, 2), 2 * torch.eye(2))
    else:
        zero, one = lib.Normal(0.0, 1.0), lib.Normal(torch.ones(2, 1), 2 * torch.ones(2, 1))
    return lib.MaskedMixture(mask, zero, one)


@pytest.mark.parametrize("event", [False, True])
def test_agrees_with_pyro(event):
    ours, oracle = build(dist, event), build(pyro_dist, event)
    assert ours.batch_shape == torch.Size(oracle.batch_shape)
    assert ours.event_shape == oracle.event_shape
    value = torch.randn(4, *ours.shape())
    assert_close(ours.log_prob(value), oracle.log_prob(value))
    assert_close(ours.mean, oracle.mean)
    assert_close(ours.variance, oracle.variance)
    for draw in ("sample", "rsample"):
        torch.manual_seed(1)
        actual = getattr(ours, draw)((5,))
        torch.manual_seed(1)
        assert_close(actual, getattr(oracle, draw)(torch.Size((5,))))
    wide = ours.expand((6, *ours.batch_shape))
    assert wide.log_prob(value[0]).shape == (6, *ours.batch_shape)
    assert wide.sample().shape == wide.shape()


def test_each_component_is_checked_where_the_mask_chooses_it():
    zero, one = dist.HalfNormal(1.0), dist.Normal(0.0, 1.0)
    d = dist.MaskedMixture(mask, zero, one)
    assert d.log_prob(torch.tensor([-1.0, 1.0, -1.0])).isfinite().all()
    with pytest.raises(ConstraintError, match=r"found -1 at index \(1\)"):
        d.log_prob(torch.tensor([1.0, -1.0, 1.0]))
    assert zero._validate_args  # Pyro switches off the checks of the user's component
    assert isinstance(d.support, MaskedConstraint)
    assert not d.support.is_discrete
    assert dist.MaskedMixture(mask, one, one).support is one.support


def test_the_mask_of_the_method_still_works():
    d = build(dist).mask(torch.tensor(False))
    assert d.log_prob(torch.zeros(3)).abs().sum() == 0


def test_bad_mixtures():
    one = dist.Normal(0.0, 1.0)
    for bad in (torch.ones(3), True, [True]):
        with pytest.raises(ValueError, match="must be a boolean tensor"):
            dist.MaskedMixture(bad, one, one)
    with pytest.raises(ShapeError, match=r"same event shape, found \(\) and \(2,\)"):
        dist.MaskedMixture(mask, one, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert not dist.MaskedMixture(mask, one, dist.Bernoulli(0.5)).has_rsample
