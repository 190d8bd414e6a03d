"""ImproperUniform: a factor without samples."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.distributions import constraints


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize(
    ("support", "event"),
    [(constraints.real, ()), (constraints.positive, (4,)), (constraints.simplex, (4,))],
    ids=str,
)
def test_agrees_with_pyro(support, batch, event):
    ours, oracle = (lib.ImproperUniform(support, batch, event) for lib in (dist, pyro_dist))
    assert ours.shape() == torch.Size(batch + event)
    assert ours.support is support
    value = torch.rand(5, *batch, *event)
    assert_close(ours.log_prob(value), oracle.log_prob(value))
    wide = ours.expand((7, *batch))
    assert_close(wide.log_prob(value[0]), torch.zeros(7, *batch))
    assert ours.mask(torch.tensor(True)).log_prob(value).shape == (5, *batch)


def test_it_cannot_be_drawn_from_and_says_what_to_do():
    d = dist.ImproperUniform(constraints.real, (), (3,))
    for draw in (d, d.sample, d.expand([2]).sample):
        with pytest.raises(NotImplementedError, match=r"cannot be sampled.*mask\(False\)"):
            draw()
    assert d.log_prob(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


def test_the_support_must_be_a_constraint():
    with pytest.raises(TypeError, match="must be a constraint such as"):
        dist.ImproperUniform("real", (), ())
