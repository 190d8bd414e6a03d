"""The verdict on convergence, against simulated loss curves whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.convergence import EarlyStop, Verdict, assess
from fastsvi.infer.progress import Losses

FITS = 500


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(steps, generator):
    return torch.randn(steps, FITS, generator=generator)


def heavy_tailed(steps, generator):
    """Student's t with 2 degrees of freedom: no variance."""
    chi_squared = -2 * torch.rand(steps, FITS, generator=generator).log()
    return torch.randn(steps, FITS, generator=generator) / (chi_squared / 2).sqrt()


def skewed(steps, generator):
    return torch.randn(steps, FITS, generator=generator).exp()


def correlated(steps, generator):
    """White noise on a level that wanders with a memory of 10 steps."""
    level, noise = torch.zeros(FITS), []
    for _ in range(steps):
        level = 0.9 * level + math.sqrt(1 - 0.9**2) * torch.randn(FITS, generator=generator)
        noise.append(level + torch.randn(FITS, generator=generator))
    return torch.stack(noise)


def share(losses):
    return assess(losses).fits.double().mean().item()


KINDS = [normal, heavy_tailed, skewed]


@pytest.mark.parametrize("noise", KINDS)
def test_flat_curves_have_converged(noise, generator):
    # 3 standard errors, estimated with 21 degrees of freedom, are exceeded by 7 in 1000 curves.
    assert share(noise(2000, generator)) > 0.97
    start = 1000 * torch.exp(-torch.arange(2000) / 50).unsqueeze(1)
    assert share(noise(2000, generator) + start) > 0.97


@pytest.mark.parametrize("noise", [*KINDS, correlated])
def test_curves_that_still_fall_have_not(noise, generator):
    steps = torch.arange(2000).unsqueeze(1)
    # Over the last half: from 3.3 to 0.3 above the limit, and by 2 in a straight line, where single
    # losses spread by about 1 (heavy tails and correlation: 1.4).
    assert share(noise(2000, generator) + 40 * torch.exp(-steps / 400)) < 0.03
    assert share(noise(2000, generator) - steps / 500) < 0.03


def test_a_rise_is_no_convergence(generator):
    verdict = assess(normal(2000, generator)[:, 0] + torch.arange(2000) / 500)
    assert not verdict
    assert "rose" in verdict.evidence


def test_a_level_that_wanders_slowly_is_not_called_flat_too_soon(generator):
    # 400 steps of memory 10 are some 20 effective ones in the last half.
    assert share(correlated(400, generator)) < 0.03
    assert share(correlated(8000, generator)) > 0.9


def test_the_step_from_which_on_it_is_flat():
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    falling = 200.0 - torch.arange(4000).clamp(max=1000) / 5
    verdict = assess(noise + falling)
    assert verdict
    # Batches are 83 steps long; within 15 steps of the bend the fall is lost in the noise.
    assert 900 <= verdict.step <= 1090
    assert assess(noise).step < 400


@pytest.mark.parametrize("level", [0.0, -3.7, 1e8])
def test_constant_losses(level):
    verdict = assess(torch.full((500,), level))
    assert verdict
    assert verdict.step == 0


def test_losses_without_noise():
    steps = torch.arange(1000)
    assert assess(1000 + 100 * torch.exp(-steps / 40))
    assert not assess(1000 + 100 * torch.exp(-steps / 150))


@pytest.mark.parametrize("steps", [0, 1, 199])
def test_too_few_steps(steps):
    verdict = assess(torch.zeros(steps))
    assert not verdict
    assert verdict.evidence.startswith("too few steps to tell")
    assert assess(torch.zeros(steps, 3)).fits.tolist() == [False] * 3


def test_losses_that_are_not_finite():
    losses = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    rare = losses.clone()
    rare[[50, 1500, 1700]] = torch.tensor([math.nan, math.inf, math.nan])
    assert assess(rare), "steps that were left out"
    losses[1800:] = math.nan
    verdict = assess(losses)
    assert not verdict
    assert "200 losses of the last 984 of 2000 steps are not finite" in verdict.evidence
    assert not assess(torch.full((500,), math.nan))
    assert not assess(torch.full((500,), -math.inf))


def test_fits_are_judged_each_by_itself(generator):
    losses = normal(2000, generator)[:, :3]
    losses[:, 1] -= torch.arange(2000) / 100
    verdict = assess(losses)
    assert verdict.fits.tolist() == [True, False, True]
    assert not verdict
    assert verdict.step is None
    assert "1 of 3 fits have not converged: fit 1: the loss still fell" in verdict.evidence
    for fit in range(3):
        assert bool(assess(losses[:, fit])) is (fit != 1)
    both = assess(losses[:, [0, 2]])
    assert both.step == max(assess(losses[:, fit]).step for fit in (0, 2))
    assert "all 2 fits" in both.evidence


def test_fits_that_ended_before_the_others(generator):
    losses = normal(3000, generator)[:, :4]
    losses[1500:, 0] = math.nan  # left alone
    losses[1500:, 1] = math.nan  # failed
    losses[100:, 2] = math.nan
    verdict = assess(losses, torch.tensor([1500, 3000, 100, 3000]))
    assert verdict.fits.tolist() == [True, False, False, True]
    assert "2 of 4 fits" in verdict.evidence
    assert "fit 1: 1488 losses of the last 1488" in verdict.evidence
    assert "fit 2: too few steps to tell: 100" in verdict.evidence
    flat = assess(losses[:, [0, 3]], torch.tensor([1500, 3000]))
    assert flat
    assert flat.step == max(assess(losses[:1500, 0]).step, assess(losses[:, 3]).step)


def test_a_verdict_is_true_or_false():
    assert Verdict(True, "flat", 3)
    assert not Verdict(False, "falling")


def test_precision_does_not_matter(generator):
    losses = normal(1000, generator)[:, 0]
    assert assess(losses.double()).evidence == assess(losses).evidence
    assert assess((100 * losses).round().long()).converged is assess(losses).converged


class TestEarlyStop:
    def feed(self, curve):
        losses = Losses()
        early = EarlyStop(losses)
        looks = 0
        for loss in curve:
            losses.append(loss)
            before = early.next_look
            if early.is_reached():
                return len(losses), looks
            looks += before != early.next_look
        return len(losses), looks

    def test_it_stops_soon_after_the_loss_is_flat(self, generator):
        noise = torch.randn(20_000, generator=generator)
        steps, _ = self.feed(noise + 100 * torch.exp(-torch.arange(20_000) / 300))
        # Flat, to within a tenth of the spread, from 2,000 on; the last half must be flat, and two
        # looks in a row, which come a quarter apart.
        assert 2000 < steps < 8000

    def test_looks_are_rare(self, generator):
        noise = torch.randn(20_000, generator=generator)
        steps, looks = self.feed(noise - torch.arange(20_000) / 100)
        assert steps == 20_000
        # log(20000 / 200) / log(1.25) = 21
        assert looks <= 22

    def test_every_fit_must_have_been_flat(self, generator):
        noise = torch.randn(4000, 2, generator=generator)
        noise[:, 1] -= torch.arange(4000) / 100
        assert self.feed(noise)[0] == 4000
        assert self.feed(noise[:, :1])[0] < 4000


def schools(sigma, y):
    mu = fastsvi.sample("mu", dist.Normal(0.0, 5.0))
    tau = fastsvi.sample("tau", dist.HalfCauchy(5.0))
    with fastsvi.plate("schools", 8):
        effect = fastsvi.sample("effect", dist.Normal(0.0, 1.0))
        fastsvi.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)


SCHOOLS = (
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
)


def fit_schools(**options):
    fastsvi.clear_param_store()
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    optim = fastsvi.optim.Adam({"lr": 0.02})
    return SVI(schools, AutoNormal(schools), optim, elbo, seed=1, **options)


@pytest.mark.slow
def test_eight_schools(tmp_path):
    def run(steps, **options):
        return fit_schools().run(
            steps, *SCHOOLS, progress_bar=False, compile=True, stop_when_converged=True, **options
        )

    found = run(10_000)
    assert found.stopped
    assert found.converged
    assert 500 < len(found.losses) < 10_000
    assert f"{len(found.losses)} steps (stopped, converged)" in repr(found)
    path = tmp_path / "fit.ckpt"
    assert not run(1000, checkpoint=path).stopped
    again = run(10_000, checkpoint=path)
    assert torch.equal(again.losses, found.losses), "it ends at the same step, taken up or not"
    assert "too few" in run(10).converged.evidence


@pytest.mark.slow
def test_several_fits_stop_when_the_last_has_converged():
    single = fit_schools().run(
        10_000, *SCHOOLS, progress_bar=False, compile=True, stop_when_converged=True
    )
    run = fit_schools(num_fits=2).run(
        10_000, *SCHOOLS, progress_bar=False, compile=True, stop_when_converged=True
    )
    assert run.stopped
    assert len(single.losses) <= len(run.losses) < 10_000
    assert run.ends.max() == len(run.losses)
    assert run.converged, "each is judged up to where it was left alone"
    assert run.best().loss == pytest.approx(31.6, abs=0.3)
