"""Guides over the packed vector of all latent sites."""

import copy

import pyro
import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import ConstraintError, NonFiniteError, SiteError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from fastsvi.optim import Adam

GUIDES = [
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoLaplaceApproximation",
]


def mixed(library):
    d = library.distributions

    def model():
        library.sample("real", d.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = library.sample("rate", d.Gamma(2.0, 1.0))
        library.sample("weights", d.Dirichlet(torch.ones(3)))
        with library.plate("outer", 2):
            library.sample("row", d.Normal(0.0, rate))
        library.sample("obs", d.Normal(rate, 1.0), obs=torch.tensor(1.0))

    return model


@pytest.mark.parametrize("name", GUIDES)
def test_equals_pyro_under_one_seed(name):
    """Parameters, one draw and its density, medians, and the loss of a step."""
    found = []
    for library in (fastsvi, pyro):
        model = mixed(library)
        guides = library.infer.autoguide
        torch.manual_seed(0)
        guide = getattr(guides, name)(model, init_loc_fn=guides.init_to_feasible)
        guide()
        torch.manual_seed(1)
        trace = library.poutine.trace(guide).get_trace()
        trace.compute_log_prob()
        torch.manual_seed(2)
        loss = library.infer.Trace_ELBO().loss(model, guide)
        params = {n: v.detach() for n, v in library.get_param_store().items()}
        values = {
            n: (s["value"].detach(), s["log_prob"].detach())
            for n, s in trace.nodes.items()
            if s["type"] == "sample" and not n.startswith("outer")
        }
        # Pyro's Laplace guide has no median.
        median = guide.median() if name != "AutoLaplaceApproximation" else {}
        found.append((params, values, median, loss))
    (params, values, median, loss), (params2, values2, median2, loss2) = found
    torch.testing.assert_close(params, params2)
    torch.testing.assert_close(values, values2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(median, median2)
    assert loss == pytest.approx(loss2, rel=1e-5)


@pytest.mark.parametrize("name", GUIDES[:3])
def test_quantiles_equal_pyro(name):
    found = []
    for library in (fastsvi, pyro):
        guides = library.infer.autoguide
        torch.manual_seed(0)
        guide = getattr(guides, name)(mixed(library), init_loc_fn=guides.init_to_feasible)
        guide()
        found.append(guide.quantiles([0.1, 0.5, 0.8]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GUIDES)
def test_posterior_samples(name):
    guide = getattr(fastsvi.infer.autoguide, name)(mixed(fastsvi))
    guide()
    draws = guide.sample_posterior((5, 2))
    assert {k: v.shape for k, v in draws.items()} == {
        "real": (5, 2, 2),
        "rate": (5, 2),
        "weights": (5, 2, 3),
        "row": (5, 2, 2),
    }
    assert (draws["rate"] > 0).all()


@pytest.mark.parametrize("name", GUIDES)
def test_vectorized_particles(name):
    model = mixed(fastsvi)
    guide = getattr(fastsvi.infer.autoguide, name)(model)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
    svi.step()
    assert not elbo.program(model, guide).is_sequential


@pytest.mark.parametrize("name", GUIDES)
def test_copies_run(name):
    guide = getattr(fastsvi.infer.autoguide, name)(mixed(fastsvi))
    guide()
    assert set(copy.deepcopy(guide)()) == {"real", "rate", "weights", "row"}


def gaussian():
    """A posterior that is exactly normal, with correlation: precision [[3, 1], [1, 2]] + prior."""
    x = fastsvi.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    fastsvi.sample("sum", dist.Normal(x.sum(), 0.5), obs=torch.tensor(1.0))


PRECISION = torch.eye(2) + 4.0 * torch.ones(2, 2)
MEAN = torch.linalg.solve(PRECISION, 4.0 * torch.ones(2))


def test_laplace_is_exact_for_a_gaussian():
    guide = AutoLaplaceApproximation(gaussian)
    SVI(gaussian, guide, Adam({"lr": 0.1}), Trace_ELBO()).run(300, progress_bar=False)
    normal = guide.laplace_approximation()
    posterior = normal.get_posterior()
    torch.testing.assert_close(posterior.mean, MEAN, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        posterior.covariance_matrix, torch.linalg.inv(PRECISION), rtol=1e-4, atol=1e-5
    )
    assert not list(normal.parameters())
    assert normal().keys() == {"x"}


def test_laplace_needs_a_maximum():
    def saddle():
        x = fastsvi.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        fastsvi.factor("saddle", 3.0 * x[0] ** 2)

    guide = AutoLaplaceApproximation(saddle)
    guide()
    with pytest.raises(NonFiniteError, match="not positive definite"):
        guide.laplace_approximation()


@pytest.mark.slow
@pytest.mark.parametrize("cls", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_full_rank_guides_learn_correlations(cls):
    torch.manual_seed(0)
    guide = cls(gaussian)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(gaussian, guide, Adam({"lr": 0.03}), elbo)
    svi.run(500, progress_bar=False)
    svi.optim = Adam({"lr": 0.003})
    svi.run(200, progress_bar=False)
    with torch.no_grad():
        posterior = guide.get_posterior()
        torch.testing.assert_close(posterior.mean, MEAN, rtol=0, atol=0.05)
        torch.testing.assert_close(
            posterior.covariance_matrix, torch.linalg.inv(PRECISION), rtol=0, atol=0.08
        )


def test_models_without_latent_sites_are_refused():
    with pytest.raises(SiteError, match="no latent sites"):
        AutoDiagonalNormal(lambda: None)()


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_rank_is_positive(rank):
    with pytest.raises(ConstraintError, match="rank"):
        AutoLowRankMultivariateNormal(gaussian, rank=rank)


def test_transform_makes_the_posterior():
    guide = AutoMultivariateNormal(gaussian)
    guide()
    value = torch.tensor([0.3, -0.2])
    composed = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    torch.testing.assert_close(composed.log_prob(value), guide.get_posterior().log_prob(value))


def test_replays_into_the_model():
    model = mixed(fastsvi)
    guide = AutoDiagonalNormal(model)
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace()
    assert replayed.nodes["row"]["value"] is trace.nodes["row"]["value"]
