"""KL divergences: torch's registry finds our classes, and what torch lacks is right."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.distributions import kl_divergence as torch_kl
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.distributions import kl_divergence
from fastsvi.engine.record import record

f64 = {"dtype": torch.float64}


def positive(*shape):
    return torch.rand(shape, **f64) + 0.5


PAIRS = {
    "Normal": lambda: (torch.randn(3, **f64), positive(3)),
    "LogNormal": lambda: (torch.randn(3, **f64), positive(3)),
    "HalfNormal": lambda: (positive(3),),
    "Cauchy": lambda: (torch.randn(3, **f64), positive(3)),
    "Laplace": lambda: (torch.randn(3, **f64), positive(3)),
    "Gamma": lambda: (positive(3), positive(3)),
    "Beta": lambda: (positive(3), positive(3)),
    "Dirichlet": lambda: (positive(2, 3),),
    "Exponential": lambda: (positive(3),),
    "Poisson": lambda: (positive(3),),
    "Bernoulli": lambda: (positive(3) / 2,),
    "Geometric": lambda: (positive(3) / 2,),
    "Categorical": lambda: (positive(2, 3),),
    "OneHotCategorical": lambda: (positive(2, 3),),
    "Binomial": lambda: (3, positive(3) / 2),
    "Gumbel": lambda: (torch.randn(3, **f64), positive(3)),
    "Pareto": lambda: (torch.ones(3, **f64), positive(3)),
    "MultivariateNormal": lambda: (torch.randn(3, **f64), torch.diag(positive(3))),
    "LowRankMultivariateNormal": lambda: (torch.randn(3, **f64), positive(3, 1), positive(3)),
    "ContinuousBernoulli": lambda: (positive(3) / 2,),
}


@pytest.mark.parametrize("family", PAIRS)
def test_two_of_a_family(family):
    torch.manual_seed(4)
    first, second = PAIRS[family](), PAIRS[family]()
    ours = kl_divergence(*(getattr(dist, family)(*a) for a in (first, second)))
    oracle = torch_kl(*(getattr(torch.distributions, family)(*a) for a in (first, second)))
    assert_close(ours, oracle)
    expanded = [getattr(dist, family)(*a).expand_by([2]).to_event(1) for a in (first, second)]
    assert_close(kl_divergence(*expanded), oracle.expand(2, *oracle.shape).sum(-1))


def test_numbers_and_mixed_families():
    assert kl_divergence(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).item() == 0.5
    pairs = [
        (("Uniform", (0.0, 1.0)), ("Normal", (0.0, 2.0))),
        (("Exponential", (2.0,)), ("Gamma", (2.0, 1.0))),
        (("Beta", (2.0, 3.0)), ("Uniform", (-1.0, 2.0))),
        (("Laplace", (0.0, 1.0)), ("Normal", (0.0, 2.0))),
    ]
    for (p, p_args), (q, q_args) in pairs:
        ours, oracle = (
            torch_kl(getattr(lib, p)(*p_args), getattr(lib, q)(*q_args))
            for lib in (dist, torch.distributions)
        )
        assert_close(ours, oracle)


def build(lib, which):
    torch.manual_seed(5)
    loc, scale = torch.randn(2, 3), torch.rand(2, 3) + 0.5
    scale_tril = torch.diag_embed(torch.rand(2, 3) + 0.5) + 0.1 * torch.randn(2, 3, 3).tril(-1)
    normal = lib.Normal(loc, scale)
    mask = torch.tensor([True, False])
    return {
        "delta": lib.Delta(loc),
        "delta event": lib.Delta(loc, event_dim=1),
        "normal": normal,
        "normal 1": normal.to_event(1),
        "normal 2": normal.to_event(2),
        "delta 1": lib.Delta(loc).to_event(1),
        "delta 2": lib.Delta(loc).to_event(2),
        "mvn": lib.MultivariateNormal(loc, scale_tril=scale_tril),
        "mvn 1": lib.MultivariateNormal(loc, scale_tril=scale_tril).to_event(1),
        "masked": normal.to_event(1).mask(mask),
        "masked true": normal.to_event(1).mask(True),
        "masked other": normal.to_event(1).mask(~mask),
        "masked false": normal.to_event(1).mask(False),
    }[which]


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ("delta", "normal"),
        ("delta event", "mvn"),
        ("delta event", "normal 1"),
        ("delta 1", "normal 1"),
        ("delta 2", "normal 2"),
        ("delta 1", "mvn"),
        ("normal 1", "normal 1"),
        ("normal 2", "normal 2"),
        ("normal 1", "mvn"),
        ("normal 2", "mvn 1"),
        ("masked", "masked"),
        ("masked", "masked true"),
        ("masked true", "masked"),
        ("masked", "masked other"),
        ("masked false", "masked"),
    ],
)
def test_agrees_with_pyro(p, q):
    ours = kl_divergence(build(dist, p), build(dist, q))
    oracle = pyro_dist.kl.kl_divergence(build(pyro_dist, p), build(pyro_dist, q))
    assert_close(torch.as_tensor(ours), torch.as_tensor(oracle))


def test_expanded_and_unknown_pairs():
    p, q = (dist.ExpandedDistribution(dist.Normal(loc, 1.0), (3,)) for loc in (0.0, 1.0))
    assert_close(kl_divergence(p, q), torch.full((3,), 0.5))
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.Cauchy(0.0, 1.0), dist.Normal(0.0, 1.0))
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.Laplace(torch.zeros(3), 1.0).to_event(1), build(dist, "mvn"))


def test_monte_carlo_of_a_normal_against_a_multivariate_one():
    p, q = build(dist, "normal 1"), build(dist, "mvn")
    x = p.sample((100_000,))
    difference = p.log_prob(x) - q.log_prob(x)
    error = difference.std(0) / len(x) ** 0.5
    assert bool(((difference.mean(0) - kl_divergence(p, q)).abs() < 5 * error).all())


def test_inverse_gamma_is_captured():
    def divergence(a, b):
        return [kl_divergence(dist.InverseGamma(a, b), dist.InverseGamma(b, a))]

    a, b = positive(3), positive(3)
    with dist.validation_enabled(False):
        assert record(divergence, [a, b]).nodes
        oracle = torch_kl(
            torch.distributions.InverseGamma(a, b), torch.distributions.InverseGamma(b, a)
        )
        assert_close(divergence(a, b)[0], oracle)
