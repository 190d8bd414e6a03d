"""Zero-inflated counts."""

from __future__ import annotations

import math

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.errors import ShapeError

f64 = {"dtype": torch.float64}


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
def test_probabilities_add_up_and_match_the_definition(gate):
    base = dist.Poisson(torch.tensor(3.0, **f64))
    d = dist.ZeroInflatedPoisson(torch.tensor(3.0, **f64), gate=torch.tensor(gate, **f64))
    counts = torch.arange(60.0, **f64)
    probs = d.log_prob(counts).exp()
    expected = (1 - gate) * base.log_prob(counts).exp() + gate * (counts == 0)
    assert_close(probs, expected)
    assert_close(probs.sum(), torch.tensor(1.0, **f64))
    assert_close(d.mean, (counts * probs).sum())
    assert_close(d.variance, (counts**2 * probs).sum() - d.mean**2)


def test_gate_and_gate_logits_are_the_same_distribution():
    gate = torch.tensor([0.1, 0.5, 0.9], **f64)
    counts = torch.tensor([[0.0], [1.0], [30.0]], **f64)
    by_gate = dist.ZeroInflatedNegativeBinomial(4.0, probs=torch.tensor(0.3, **f64), gate=gate)
    by_logits = dist.ZeroInflatedNegativeBinomial(
        4.0, probs=torch.tensor(0.3, **f64), gate_logits=gate.logit()
    )
    assert_close(by_gate.log_prob(counts), by_logits.log_prob(counts))
    assert_close(by_gate.gate_logits, by_logits.gate_logits)
    assert_close(by_logits.expand([2, 3]).gate, gate.expand(2, 3))


def test_gradients_stay_finite_where_a_probability_underflows():
    """At 1000 events of rate 1 the zero branch computes log(0); Pyro's gradient is NaN there."""
    rate = torch.tensor(1.0, requires_grad=True)
    gate = torch.tensor(0.0, requires_grad=True)
    dist.ZeroInflatedPoisson(rate, gate=gate).log_prob(torch.tensor([0.0, 1000.0])).sum().backward()
    assert_close(rate.grad, torch.tensor(998.0))
    assert math.isfinite(gate.grad.item())


def test_draws_have_the_right_share_of_zeros():
    d = dist.ZeroInflatedDistribution(dist.Poisson(50.0), gate=torch.tensor([0.2, 0.7]))
    zeros = (d.sample((20_000,)) == 0).double().mean(0)
    # Five standard errors of a proportion of 20,000.
    assert_close(zeros, torch.tensor([0.2, 0.7], **f64), rtol=0, atol=5 * math.sqrt(0.25 / 20_000))


def test_numbers_and_names():
    d = dist.ZeroInflatedPoisson(2.0, gate=0.25)
    assert d.log_prob(0).shape == ()
    assert d.rate.item() == 2.0
    d = dist.ZeroInflatedNegativeBinomial(3, logits=0.0, gate_logits=0.0)
    oracle = pyro_dist.ZeroInflatedNegativeBinomial(
        torch.tensor(3.0), logits=torch.tensor(0.0), gate_logits=torch.tensor(0.0)
    )
    assert_close(d.log_prob(0), oracle.log_prob(torch.tensor(0.0)))
    assert (d.total_count.item(), d.probs.item(), d.logits.item()) == (3.0, 0.5, 0.0)


def test_only_single_numbers_can_be_inflated():
    with pytest.raises(ShapeError, match=r"must be over single numbers, found event shape \(3,\)"):
        dist.ZeroInflatedDistribution(dist.Poisson(torch.ones(3)).to_event(1), gate=0.5)
