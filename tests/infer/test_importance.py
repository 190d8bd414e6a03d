"""Importance sampling against closed-form evidence and posteriors, and against Pyro."""

from __future__ import annotations

import math

import pyro as oracle
import pyro.distributions as oracle_dist
import pytest
import torch
from pyro.infer.importance import psis_diagnostic as oracle_psis
from pyro.infer.importance import vectorized_importance_weights as oracle_weights

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import FastSVIWarning, MissingSiteError, NonFiniteError, SiteError
from fastsvi.infer.importance import (
    Importance,
    ImportanceError,
    LogWeightsMixin,
    psis_diagnostic,
    vectorized_importance_weights,
)

# weight ~ N(8.5, 1), measured 9.5 with sd 0.75.
MEAN, SD = (8.5 * 0.75**2 + 9.5) / (1 + 0.75**2), math.sqrt(0.75**2 / (1 + 0.75**2))
EVIDENCE = float(torch.distributions.Normal(8.5, math.hypot(1, 0.75)).log_prob(torch.tensor(9.5)))


def scale(p=pyro, d=dist):
    weight = p.sample("weight", d.Normal(8.5, 1.0))
    return p.sample("measurement", d.Normal(weight, 0.75), obs=torch.tensor(9.5))


def normal_guide(mean, sd, p=pyro, d=dist):
    return lambda: p.sample("weight", d.Normal(mean, sd))


def schools(y, p=pyro, d=dist):
    """y[n] ~ N(a, sqrt 2) with a ~ N(0, 1), written with a local latent in a plate."""
    a = p.sample("a", d.Normal(0.0, 1.0))
    with p.plate("data", len(y)):
        z = p.sample("z", d.Normal(a, 1.0))
        p.sample("y", d.Normal(z, 1.0), obs=y)


def schools_guide(y, p=pyro, d=dist):
    a = p.sample("a", d.Normal(0.0, 1.0))
    with p.plate("data", len(y)):
        p.sample("z", d.Normal((a + y) / 2, 0.5**0.5))  # the exact conditional of z given a


def schools_evidence(y):
    covariance = torch.ones(len(y), len(y)) + 2 * torch.eye(len(y))
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance)
    return float(normal.log_prob(y))


class TestImportance:
    def test_evidence_and_posterior_from_the_prior(self):
        posterior = Importance(scale, num_samples=2000).run()
        ess = float(posterior.get_ESS())
        # The relative error of the mean weight is sqrt(1/ESS - 1/N); three of them.
        error = 3 * math.sqrt(1 / ess - 1 / 2000)
        assert float(posterior.get_log_normalizer()) == pytest.approx(EVIDENCE, abs=error)
        marginal = posterior.marginal("weight").empirical["weight"]
        assert float(marginal.mean) == pytest.approx(MEAN, abs=4 * SD / ess**0.5)
        assert float(marginal.variance) == pytest.approx(SD**2, rel=4 * (2 / ess) ** 0.5)
        # In closed form ESS/N = Z(prior)^2 / E[w^2] = 0.611 here; a tenth is many standard errors.
        w2 = math.exp(2 * EVIDENCE) / _second_moment()
        assert ess / 2000 == pytest.approx(w2, abs=0.1)

    def test_perfect_guide_gives_the_evidence_in_every_draw(self):
        posterior = Importance(scale, normal_guide(MEAN, SD), num_samples=20).run()
        weights = torch.stack(posterior.log_weights)
        torch.testing.assert_close(weights, torch.full((20,), EVIDENCE), rtol=0, atol=2e-5)
        assert float(posterior.get_ESS()) == pytest.approx(20, rel=1e-4)
        assert posterior.get_normalized_weights().sum() == pytest.approx(1.0)
        torch.testing.assert_close(
            posterior.get_normalized_weights(log_scale=True).exp(),
            posterior.get_normalized_weights(),
        )

    def test_running_again_replaces_the_draws(self):
        posterior = Importance(scale, num_samples=3)
        assert posterior.run() is posterior
        first = posterior.exec_traces
        posterior.run()
        assert len(posterior.exec_traces) == len(posterior.log_weights) == 3
        assert posterior.exec_traces[0] is not first[0]

    def test_calling_draws_a_trace_by_weight_without_observations(self):
        def model():
            x = pyro.sample("x", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(0.05 + 0.9 * x), obs=torch.tensor(1.0))
            return x

        posterior = Importance(model, num_samples=400).run()
        traces = [posterior() for _ in range(300)]
        assert all("y" not in trace.nodes and "x" in trace.nodes for trace in traces)
        share = sum(float(trace.nodes["x"]["value"]) for trace in traces) / 300
        # P(x | y) = 0.95; the draws of the posterior and of the traces both spread.
        assert share == pytest.approx(0.95, abs=0.06)
        mean = float(posterior.marginal().empirical["_RETURN"].mean)
        assert mean == pytest.approx(0.95, abs=0.04)

    def test_marginals_of_sites(self):
        y = torch.tensor([1.0, -1.0, 2.0])
        posterior = Importance(schools, schools_guide, num_samples=30).run(y)
        marginals = posterior.marginal(["a", "z"])
        assert marginals.empirical["z"].event_shape == (3,)
        assert {k: tuple(v.shape) for k, v in marginals.support().items()} == {
            "a": (30,),
            "z": (30, 3),
        }
        with pytest.raises(MissingSiteError, match=r"no site 'b'.*'a'"):
            posterior.marginal("b")

    def test_before_run(self):
        posterior = Importance(scale, num_samples=3)
        for use in (posterior, posterior.marginal, posterior.get_ESS, posterior.get_log_normalizer):
            with pytest.raises(SiteError, match=r"call \.run"):
                use()

    def test_bad_arguments(self):
        with pytest.raises(ImportanceError, match="at least 1, found 0"):
            Importance(scale, num_samples=0)
        with pytest.warns(FastSVIWarning, match="draws 10"):
            assert Importance(scale).num_samples == 10

    def test_weights_that_cannot_be_normalised(self):
        class Holder(LogWeightsMixin):
            pass

        holder = Holder()
        holder.log_weights = torch.full((4,), -math.inf)
        assert float(holder.get_log_normalizer()) == -math.inf
        with pytest.raises(NonFiniteError, match="support of the model"):
            holder.get_normalized_weights()
        holder.log_weights = torch.tensor([0.0, math.nan])
        with pytest.raises(NonFiniteError, match="1 of 2 entries NaN"):
            holder.get_ESS()


def _second_moment():
    """E[w^2] under the prior: the integral of N(z; 8.5, 1) N(9.5; z, 0.75)^2 dz."""
    # N(y; z, s)^2 = N(y; z, s / sqrt 2) / (2 s sqrt pi)
    log = torch.distributions.Normal(8.5, math.sqrt(1 + 0.75**2 / 2)).log_prob(torch.tensor(9.5))
    return math.exp(float(log)) / (2 * 0.75 * math.sqrt(math.pi))


class TestVectorizedWeights:
    def test_evidence(self):
        y = torch.tensor([1.0, -1.0, 2.0])
        weights, model_trace, guide_trace = vectorized_importance_weights(
            schools, schools_guide, y, num_samples=5000, max_plate_nesting=1
        )
        assert weights.shape == (5000,)
        assert model_trace.nodes["z"]["value"] is guide_trace.nodes["z"]["value"]
        assert model_trace.nodes["z"]["value"].shape == (5000, 3)
        holder = LogWeightsMixin()
        holder.log_weights = weights
        error = 3 * math.sqrt(1 / float(holder.get_ESS()) - 1 / 5000)
        assert float(holder.get_log_normalizer()) == pytest.approx(schools_evidence(y), abs=error)

    def test_equal_to_pyro_on_the_same_values(self):
        y = torch.tensor([1.0, -1.0, 2.0])
        ours, trace, _ = vectorized_importance_weights(
            schools, schools_guide, y, num_samples=6, max_plate_nesting=1
        )
        values = {name: trace.nodes[name]["value"] for name in ("a", "z")}
        guide = _replayed(values)
        theirs, _, _ = oracle_weights(
            lambda y: schools(y, oracle, oracle_dist), guide, y, num_samples=6, max_plate_nesting=1
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_normalized(self):
        # In Pyro 1.9.2 this argument raises: its logsumexp has no dimension.
        weights, _, _ = vectorized_importance_weights(
            scale, normal_guide(9.0, 1.0), num_samples=50, max_plate_nesting=0, normalized=True
        )
        assert float(weights.exp().sum()) == pytest.approx(1.0)

    def test_one_draw(self):
        weights, _, _ = vectorized_importance_weights(
            scale, normal_guide(MEAN, SD), max_plate_nesting=0
        )
        torch.testing.assert_close(weights, torch.tensor([EVIDENCE]), rtol=0, atol=2e-5)

    def test_nesting_must_be_told(self):
        with pytest.raises(ImportanceError, match="needs max_plate_nesting"):
            vectorized_importance_weights(scale, normal_guide(9.0, 1.0))


def _replayed(values):
    """A Pyro guide that draws exactly ``values`` and scores them as schools_guide does."""

    class Fixed(oracle.poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] in values:
                msg["value"] = values[msg["name"]]

    return Fixed()(lambda y: schools_guide(y, oracle, oracle_dist))


class TestPsis:
    def test_perfect_guide(self):
        assert psis_diagnostic(scale, normal_guide(MEAN, SD)) == 0.0

    def test_wide_guide_is_fine_and_narrow_guide_is_not(self):
        assert psis_diagnostic(scale, normal_guide(MEAN, 1.5 * SD), num_particles=2000) < 0.5
        with pytest.warns(FastSVIWarning, match=r"k-hat is \d\.\d\d, above 0\.70"):
            k = psis_diagnostic(scale, normal_guide(MEAN, 0.5 * SD), num_particles=3000)
        # For normals of sds s and S the weights' tail index is 1 - (s / S)^2 = 0.75 in the limit.
        assert k == pytest.approx(0.75, abs=0.3)

    @pytest.mark.filterwarnings("ignore:k-hat is")
    def test_draws_at_a_time_and_plates_do_not_matter_much(self):
        guide = normal_guide(MEAN, 0.6 * SD)
        ks = [
            psis_diagnostic(scale, guide, num_particles=4000),
            psis_diagnostic(scale, guide, num_particles=4000, max_simultaneous_particles=500),
            psis_diagnostic(scale, guide, num_particles=4000, max_plate_nesting=0),
            oracle_psis(
                lambda: scale(oracle, oracle_dist),
                normal_guide(MEAN, 0.6 * SD, oracle, oracle_dist),
                num_particles=4000,
                max_plate_nesting=0,
            ),
        ]
        # The standard error of k from 190 tail values is about (1 + k) / sqrt(190) = 0.12.
        assert max(ks) - min(ks) < 0.5

    def test_a_plate_with_local_latents(self):
        y = torch.tensor([1.0, -1.0, 2.0])
        k = psis_diagnostic(schools, schools_guide, y, num_particles=2000)
        assert k < 0.5  # the prior of a is wider than its posterior, so the weights are bounded

    def test_guide_parameters_are_made_before_vmap(self):
        def guide():
            loc = pyro.param("loc", lambda: torch.tensor(MEAN))
            pyro.sample("weight", dist.Normal(loc, SD))

        assert psis_diagnostic(scale, guide) == 0.0
        assert pyro.param("loc").shape == ()

    def test_guide_that_misses_the_support(self):
        def model():
            x = pyro.sample("x", dist.Uniform(0.0, 1.0, validate_args=False))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

        def guide():
            pyro.sample("x", dist.Normal(50.0, 0.1))

        with pytest.raises(NonFiniteError, match="support of the model"):
            psis_diagnostic(model, guide)

    def test_bad_chunks(self):
        with pytest.raises(ImportanceError, match="300 does not divide num_particles=1000"):
            psis_diagnostic(scale, normal_guide(9.0, 1.0), max_simultaneous_particles=300)
