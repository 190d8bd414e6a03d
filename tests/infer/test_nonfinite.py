"""From a non-finite log-density back to its site."""

import math

import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.infer.nonfinite import explain_non_finite, first_non_finite_site


def explain(model, guide=lambda: None, values=None):
    return explain_non_finite(model, guide, (), {}, [values or {}])


def test_finite_programs_have_nothing_to_explain():
    def model():
        fastsvi.sample("x", dist.Normal(0.0, 1.0))

    assert explain(model) is None
    assert first_non_finite_site(poutine.trace(model).get_trace()) is None


def test_the_first_site_is_named_with_value_and_parameters():
    def model():
        scale = torch.tensor([1.0, math.nan, 2.0])
        fastsvi.sample("fine", dist.Normal(0.0, 1.0))
        fastsvi.sample("broken", dist.Normal(torch.zeros(3), scale).to_event(1))
        fastsvi.sample("later", dist.Normal(math.nan, 1.0))

    text = explain(model)
    assert text.startswith("model site 'broken' (Normal)")
    assert "scale: tensor of shape (3,)" in text
    assert "1 of 3 entries NaN (first at index 1)" in text
    assert "scale of its distribution not finite" in text
    assert "'later'" not in text


def test_data_outside_of_the_support():
    def model():
        with fastsvi.plate("data", 2):
            fastsvi.sample("obs", dist.Gamma(2.0, 1.0), obs=torch.tensor([1.0, 0.0]))

    text = explain(model)
    assert "observed Gamma" in text
    assert "outside of the support" in text or "no density" in text


def test_numbers_as_data():
    def model():
        fastsvi.sample("obs", dist.Normal(0.0, 1.0), obs=math.inf)

    assert "value: float inf" in explain(model)


def test_given_values_are_used():
    def model():
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        fastsvi.factor("log", x.log())

    def guide():
        fastsvi.sample("x", dist.Normal(5.0, 0.1))

    assert explain(model, guide) is None
    text = explain(model, guide, {"x": torch.tensor(-1.0)})
    assert "model site 'log'" in text


def test_a_diverged_guide_is_the_root():
    def model():
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        fastsvi.sample("obs", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    def guide():
        fastsvi.sample("x", dist.Normal(math.nan, 1.0))

    assert explain(model, guide).startswith("guide site 'x'")


def test_the_particle_is_named():
    def model():
        fastsvi.factor("log", fastsvi.sample("x", dist.Normal(0.0, 1.0)).log())

    particles = [{"x": torch.tensor(1.0)}, {"x": torch.tensor(-1.0)}]
    text = explain_non_finite(model, model, (), {}, particles)
    assert text.endswith("(particle 1)")


def test_masked_sites_are_innocent():
    def model():
        with poutine.mask(mask=False):
            fastsvi.sample("x", dist.Normal(math.nan, 1.0), obs=torch.tensor(0.0))

    assert explain(model) is None
