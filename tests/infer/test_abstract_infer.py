"""Bags of weighted traces: chains, marginals, and the errors of either."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import DtypeError, SiteError
from fastsvi.infer.abstract_infer import EmpiricalMarginal, Marginals, TracePosterior


def model(x):
    x = pyro.sample("x", dist.Delta(torch.as_tensor(x)))
    y = pyro.sample("y", dist.Delta(-x))
    return torch.stack([x, y])


class Listed(TracePosterior):
    """A posterior of given values with given weights, in one chain or several."""

    def __init__(self, values, weights, num_chains=1):
        super().__init__(num_chains)
        self.values, self.weights = values, weights

    def _traces(self):
        for i, (value, weight) in enumerate(zip(self.values, self.weights, strict=True)):
            log_weight = torch.tensor(weight).log()
            trace = poutine.trace(model).get_trace(value)
            if self.num_chains == 1:
                yield trace, log_weight
            else:
                yield trace, log_weight, i % self.num_chains


def test_weighted_marginal():
    posterior = Listed([1.0, 2.0, 4.0], [0.5, 0.25, 0.25]).run()
    marginal = EmpiricalMarginal(posterior, "x")
    assert float(marginal.mean) == pytest.approx(2.0)
    assert float(marginal.variance) == pytest.approx(0.5 * 1 + 0.25 * 0 + 0.25 * 4)
    assert float(marginal.log_prob(torch.tensor(4.0))) == pytest.approx(torch.tensor(0.25).log())
    drawn = marginal.sample((2000,))
    assert drawn.shape == (2000,)
    assert float((drawn == 1.0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_return_value_and_several_sites_stacked():
    posterior = Listed([1.0, 2.0], [1.0, 1.0]).run()
    assert EmpiricalMarginal(posterior).enumerate_support().tolist() == [[1.0, -1.0], [2.0, -2.0]]
    assert EmpiricalMarginal(posterior, ["y", "x"]).mean.tolist() == [-1.5, 1.5]


def test_chains_are_a_batch_dimension():
    posterior = Listed([1.0, 10.0, 3.0, 30.0], [1.0] * 4, num_chains=2).run()
    marginals = posterior.marginal("x")
    assert isinstance(marginals, Marginals)
    assert marginals.empirical["x"].mean.tolist() == [2.0, 20.0]
    assert marginals.support()["x"].tolist() == [[1.0, 3.0], [10.0, 30.0]]
    assert marginals.support(flatten=True)["x"].tolist() == [1.0, 3.0, 10.0, 30.0]


def test_draws_of_traces_follow_the_weights():
    posterior = Listed([1.0, 2.0], [0.0, 1.0]).run()
    for _ in range(5):
        assert float(posterior().nodes["x"]["value"]) == 2.0


def test_weights_are_detached():
    class WithGradient(Listed):
        def _traces(self):
            leaf = torch.tensor(0.5, requires_grad=True)
            with torch.enable_grad():
                yield poutine.trace(model).get_trace(1.0), leaf * 2

    assert not WithGradient([], []).run().log_weights[0].requires_grad


def test_errors():
    with pytest.raises(SiteError, match=r"Listed holds no traces yet: call \.run"):
        EmpiricalMarginal(Listed([1.0], [1.0]))
    with pytest.raises(DtypeError, match="made from a TracePosterior, found dict"):
        EmpiricalMarginal({})

    class Text(Listed):
        def _traces(self):
            yield poutine.trace(lambda: "text").get_trace(), torch.zeros(())

    with pytest.raises(DtypeError, match="needs tensors, found str"):
        Text([], []).run().marginal()
