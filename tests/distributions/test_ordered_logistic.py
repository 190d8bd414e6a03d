"""OrderedLogistic."""

from __future__ import annotations

import math

import pyro.distributions as pyro_dist
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist


def test_probabilities_are_differences_of_sigmoids():
    predictor = torch.randn(4, 1, dtype=torch.float64)
    cutpoints = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).expand(5, 3)
    ours, oracle = (lib.OrderedLogistic(predictor, cutpoints) for lib in (dist, pyro_dist))
    assert ours.batch_shape == oracle.batch_shape == (4, 5)
    assert_close(ours.probs, oracle.probs)
    assert_close(ours.predictor, oracle.predictor)
    assert_close(ours.cutpoints, oracle.cutpoints)
    wide = ours.expand((2, 4, 5))
    assert type(wide) is dist.OrderedLogistic
    assert wide.cutpoints.shape == (2, 4, 5, 3)
    assert_close(wide.enumerate_support(), oracle.expand((2, 4, 5)).enumerate_support())


def test_far_categories_keep_their_digits():
    """Between 30 and 31 both sigmoids round to 1 in float32, and their difference to 0."""
    d = dist.OrderedLogistic(torch.tensor(0.0), torch.tensor([30.0, 31.0]))
    expected = torch.tensor([-math.exp(-30), -30 + math.log1p(-math.exp(-1)), -31.0])
    assert_close(d.log_prob(torch.arange(3)), expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_both_arguments():
    predictor = torch.tensor([0.3], requires_grad=True)
    cutpoints = torch.tensor([-1.0, 1.0], requires_grad=True)
    dist.OrderedLogistic(predictor, cutpoints).log_prob(torch.tensor([1])).sum().backward()
    assert predictor.grad.isfinite().all()
    assert cutpoints.grad.abs().min() > 0
