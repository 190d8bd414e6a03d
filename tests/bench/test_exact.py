"""The reference of the benchmarks: ELBOs without noise, the optimum, and the noise of Adam."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bench import agreement
from bench.workloads import WORKLOADS, case, exact
from bench.workloads import log_joints as by_draws

MEAN_FIELD = [name for name in WORKLOADS if exact.has_optimum(name)]


def some_guide(one, seed=1):
    generator = np.random.default_rng(seed)
    guide = {}
    for site, latent in one.latents().items():
        guide[f"loc.{site}"] = 0.3 * generator.standard_normal(latent.shape)
        guide[f"scale.{site}"] = generator.uniform(0.1, 0.6, latent.shape)
    return guide


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_elbo_is_the_mean_of_draws(name):
    one = case(name, "tiny", 1)
    many = dataclasses.replace(one, workload=dataclasses.replace(one.workload, samples=20_000))
    guide = some_guide(one)
    found, error = by_draws.elbo(many, guide)
    # Six comparisons: noise alone exceeds 4 errors once in 2,600 times.
    assert abs(found - exact.elbo(one, guide)) < 4 * error
    assert error < 0.01 * abs(found)


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_quadrature_has_converged(name, monkeypatch):
    one = case(name, "tiny", 1)
    with_few = exact.optimum(one).elbo
    monkeypatch.setattr(exact, "NODES", 2 * exact.NODES)
    assert exact.optimum(one).elbo == pytest.approx(with_few, abs=1e-7)


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_nothing_near_the_optimum_is_better(name):
    best = exact.optimum(case(name, "tiny", 1))
    guide = exact.MeanField(case(name, "tiny", 1))
    assert best.error < 1e-9
    assert torch.linalg.eigvalsh(best.curvature).min() > 0
    unit = best.log_scale.exp()
    for _ in range(20):
        away = 0.01 * torch.randn(2, *unit.shape, dtype=torch.float64)
        there = guide.elbo(best.loc + unit * away[0], best.log_scale + away[1]).sum()
        step = torch.cat(list(away), -1)
        lost = 0.5 * torch.einsum("bi,bij,bj->", step, best.curvature, step)
        # Cubic terms are a hundredth of the quadratic ones, of the order of the step.
        assert best.elbo - there == pytest.approx(lost.item(), rel=0.1)


def test_the_optimum_of_wide_is_the_posterior():
    one = case("wide", "tiny", 1)
    (y,) = (torch.from_numpy(array).double() for array in one.data())
    best = exact.optimum(one)
    torch.testing.assert_close(best.loc[:, 0], 0.8 * y, rtol=0, atol=1e-6)
    torch.testing.assert_close(best.log_scale.exp().square(), torch.full((50, 1), 0.2).double())
    evidence = torch.distributions.Normal(0.0, 1.25**0.5).log_prob(y).sum()
    assert best.elbo == pytest.approx(evidence.item(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MEAN_FIELD if name != "minibatch"])
def test_the_table_holds_the_optimum(name):
    """That of ``minibatch``, which takes half a minute, is ``logistic`` on other rows."""
    size = WORKLOADS[name].sizes["cpu"]
    best = exact.optimum(case(name, "cpu", 1))
    assert size.elbo == pytest.approx(best.elbo, rel=1e-6)


def test_an_auto_encoder_has_no_optimum():
    with pytest.raises(ValueError, match="vae is not known without noise"):
        exact.MeanField(case("vae", "tiny", 1))
    assert not agreement.can_compare(case("vae", "tiny", 1))


# ---- the noise of Adam


def test_the_law_of_one_normal_number():
    """By hand: gradients of loc and log scale of ``wide`` have deviations 1 and sqrt(2)."""
    one = dataclasses.replace(case("wide", "tiny", 1), particles=4)
    found = agreement.law(one)
    scale = 0.2**0.5
    slope = -np.expm1(-scale) / scale  # of log scale in Adam's coordinate
    # Var = lr * sd of the noise / (2 * curvature); loc is moved in units of its scale.
    loc = 0.01 * (1 / scale / 2) / (2 * scale**-2) / scale**2
    log_scale = 0.01 * (slope * 2**0.5 / 2) / (2 * 2 * slope**2) * slope**2
    # A thousand draws know a deviation to some 3%, and there are 50 of each.
    assert found.error[:, 0].square().mean() == pytest.approx(loc, rel=0.03)
    assert found.error[:, 1].square().mean() == pytest.approx(log_scale, rel=0.03)
    gap = 0.01 / 4 * 50 * (1 / scale + slope * 2**0.5) / 2
    assert found.gap == pytest.approx(gap, rel=0.02)


def test_more_particles_less_noise():
    one = case("eight_schools", "tiny", 1)
    law, quarter = agreement.law(one), agreement.law(dataclasses.replace(one, particles=16))
    torch.testing.assert_close(quarter.error, law.error / 2)
    assert quarter.gap == pytest.approx(law.gap / 4)


def test_two_guides_apart():
    one = case("eight_schools", "tiny", 1)
    law = agreement.law(one)
    scale = law.best.log_scale.exp()
    guide = {}
    for kind, matrix in (("loc", law.best.loc), ("scale", scale)):
        for site, part in law.guide.split(matrix).items():
            guide[f"{kind}.{site}"] = part.reshape(one.latents()[site].shape).numpy()
    other = dict(guide)
    other["loc.tau"] = guide["loc.tau"] + 0.3 * guide["scale.tau"]
    other["scale.mu"] = guide["scale.mu"] * np.exp(-0.05)
    found = agreement.apart(law, guide, other)
    assert (found["loc"], found["log_scale"], found["site"]) == (0.3, 0.05, "tau")
    assert found["errors"] == pytest.approx(0.3 / law.error[0, 1].item() / 2**0.5, abs=0.01)
    # Of 20 normal numbers, once in a thousand times.
    assert found["bound"] == 4.06
