"""Many fits at once give what each gives alone, and what goes wrong in one stays there."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.errors import CaptureError, ConstraintError, FastSVIWarning
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal, init_to_uniform

F = 5
generator = torch.Generator().manual_seed(0)
xs = torch.randn(F, 20, 3, generator=generator)
ys = (xs @ torch.tensor([1.0, -2.0, 0.5])) + 0.3 * torch.randn(F, 20, generator=generator)


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def fitted(num_fits=F, x=xs, y=ys, steps=60, compile=True, model=regression, **options):
    pyro.clear_param_store()
    options = {"seed": 3, **options}
    guide = AutoNormal(model, init_loc_fn=init_to_uniform)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo, num_fits=num_fits, **options)
    dims = (0 if x.dim() == 3 else None, 0 if y.dim() == 2 else None)
    return svi, svi.run(steps, x, y, fit_dims=dims, compile=compile, progress_bar=False)


def test_fits_together_are_bit_identical_to_fits_alone():
    _, together = fitted()
    assert together.losses.shape == (60, F)
    assert together.native_steps == 60
    assert together.params["AutoNormal.locs.weight"].shape == (F, 3)
    for fit in range(F):
        _, alone = fitted(1, xs[fit : fit + 1], ys[fit : fit + 1], first_fit=fit)
        assert torch.equal(together.losses[:, fit], alone.losses[:, 0])
        for name, value in alone.params.items():
            assert torch.equal(together.params[name][fit], value[0])
    # Other initial values and other noise for each.
    assert len({loss.item() for loss in together.losses[0]}) == F


def test_native_and_replayed_fits_agree():
    _, native = fitted()
    _, replayed = fitted(compile=False)
    assert replayed.native_steps == 0
    assert replayed.obstacle == "compile=False"
    # float32; sixty steps of a hundred operations, of losses of size 100.
    torch.testing.assert_close(replayed.losses, native.losses, rtol=1e-4, atol=1e-3)
    for name, value in native.params.items():
        torch.testing.assert_close(replayed.params[name], value, rtol=1e-3, atol=1e-4)


def test_a_fit_equals_an_ordinary_run_from_the_same_start():
    svi, _ = fitted(steps=1)
    start = {k: v[0] for k, v in svi._fits.params().items()}
    _, together = fitted(steps=40)
    pyro.clear_param_store()
    guide = AutoNormal(regression, init_loc_fn=init_to_uniform)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    one = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), elbo, seed=3)
    one.step(xs[0], ys[0])
    for name, value in start.items():
        pyro.get_param_store()[name].unconstrained().data.copy_(svi_unconstrained(name, value))
    losses = torch.tensor([one.step(xs[0], ys[0]) for _ in range(3)])
    # The moments differ after the first step, the first loss from the same parameters does not.
    assert abs(losses[0] - together.losses[1, 0]) < 1e-3


def svi_unconstrained(name, value):
    constraint = constraints.softplus_positive if ".scales." in name else constraints.real
    return dist.transform_to(constraint).inv(value)


@pytest.mark.parametrize("compile", [True, False])
def test_a_nan_in_one_fit_leaves_all_others_bit_identical(compile):
    _, clean = fitted(compile=compile, steps=30)
    bad = ys.clone()
    bad[2, 7] = torch.nan
    _, run = fitted(y=bad, compile=compile, steps=30)
    others = [0, 1, 3, 4]
    assert torch.equal(run.losses[:, others], clean.losses[:, others])
    for name, value in clean.params.items():
        assert torch.equal(run.params[name][others], value[others])
    assert run.losses[:, 2].isnan().all()
    assert run.skipped.tolist() == [0, 0, 30, 0, 0]
    assert all(value.isfinite().all() for value in run.params.values())  # of fit 2, too


def test_a_fit_whose_first_data_are_bad_is_no_example():
    bad = ys.clone()
    bad[0] = torch.nan
    _, clean = fitted(steps=10)
    _, run = fitted(y=bad, steps=10)
    assert torch.equal(run.losses[:, 1:], clean.losses[:, 1:])


def test_runs_go_on_where_the_last_ended_and_take_new_data():
    svi, first = fitted(steps=30)
    second = svi.run(30, xs, ys, fit_dims=(0, 0), progress_bar=False, compile=True)
    _, whole = fitted(steps=60)
    assert torch.equal(torch.cat([first.losses, second.losses]), whole.losses)
    third = svi.run(2, xs.clone(), ys + 100, fit_dims=(0, 0), progress_bar=False, compile=True)
    assert (third.losses > 10 * whole.losses[-1]).all()


def test_shared_data_give_fits_that_differ_in_noise_alone():
    _, run = fitted(x=xs[0], y=ys[0], steps=1500)
    weights = run.params["AutoNormal.locs.weight"]
    # All in the same optimum, each with the noise of two particles at a rate of 0.05.
    assert len(set(weights[:, 0].tolist())) == F
    assert (weights - weights.mean(0)).abs().max() < 0.15


def test_selecting_a_fit_puts_it_into_the_store():
    svi, run = fitted(steps=400)
    svi.select_fit(3)
    median = svi.guide.median()["weight"]
    assert torch.equal(median, run.params["AutoNormal.locs.weight"][3])
    with pytest.raises(ConstraintError, match="from 0 to 4, found 5"):
        svi.select_fit(5)


def test_the_best_fit_has_the_lowest_loss_of_those_that_are_finite():
    bad = ys.clone()
    bad[2] = torch.nan
    _, run = fitted(y=bad, steps=200)
    best = run.best()
    tail = run.losses[-20:].mean(0).nan_to_num(torch.inf)
    assert best.fit == tail.argmin()
    assert abs(best.loss - tail.min()) < 1e-3 * tail.min().abs()
    assert torch.equal(
        best.params["AutoNormal.locs.weight"], run.params["AutoNormal.locs.weight"][best.fit]
    )


def test_what_cannot_be_captured_is_refused_with_the_statement():
    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = x @ weight if weight[0] > 0 else x @ weight * 2
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.warns(FastSVIWarning), pytest.raises(CaptureError, match=r"num_fits=5.*test_fits"):
        fitted(model=model)


@pytest.mark.parametrize("options", [{"num_fits": 0}, {"num_fits": 2.0}, {"first_fit": -1}])
def test_bad_numbers_of_fits_are_refused(options):
    with pytest.raises(ConstraintError, match="must be an integer >="):
        fitted(**{"num_fits": 2, **options})


def test_fits_that_have_converged_are_left_alone_and_the_run_ends():
    bad = ys.clone()
    bad[2] = torch.nan
    svi, _ = fitted(y=bad, steps=1)
    run = svi.run(
        20_000, xs, bad, fit_dims=(0, 0), stop_when_converged=True, progress_bar=False, compile=True
    )
    assert run.stopped
    assert len(run.losses) < 20_000
    last = run.losses.isfinite().sum(0)
    assert last[2] == 0  # hopeless, and no reason to go on
    assert len(set(last[[0, 1, 3, 4]].tolist())) > 1  # each ended at a look of its own
    assert (last >= 200)[[0, 1, 3, 4]].all()
    # All are run again, from where they stand, when asked.
    again = svi.run(5, xs, ys, fit_dims=(0, 0), progress_bar=False, compile=True)
    assert again.losses.isfinite().all()


def by_hand(x, y):
    loc = pyro.param("loc", lambda: dist.Normal(torch.zeros(3), 1.0).sample())
    scale = pyro.param("scale", torch.full((3,), 0.1), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))


def in_batches(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=6) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ weight, 0.5), obs=y[rows])


@pytest.mark.parametrize("compile", [True, False])
def test_a_guide_by_hand_and_batches_of_their_own(compile):
    def run(num_fits, first_fit, x, y):
        pyro.clear_param_store()
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
        optim = pyro.optim.Adam({"lr": 0.02})
        svi = SVI(in_batches, by_hand, optim, elbo, seed=3, num_fits=num_fits, first_fit=first_fit)
        return svi.run(20, x, y, fit_dims=(0, 0), compile=compile, progress_bar=False)

    # The same data for all: they differ in where they start, in noise, and in their batches.
    x, y = xs[:1].expand(F, -1, -1), ys[:1].expand(F, -1)
    together = run(F, 0, x, y)
    assert together.obstacle is None or not compile
    assert len(set(together.losses[0].tolist())) == F
    for fit in (0, 3):
        alone = run(1, fit, x[:1], y[:1])
        if compile:
            assert torch.equal(together.losses[:, fit], alone.losses[:, 0])
        else:  # batched products may add in another order
            torch.testing.assert_close(
                together.losses[:, fit], alone.losses[:, 0], rtol=1e-4, atol=1e-3
            )


def test_a_step_that_disagrees_is_refused_each_time():
    count = [0]

    def model(x, y):
        count[0] += 1
        weight = pyro.sample("weight", dist.Normal(float(count[0]), 1.0).expand([3]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    pyro.clear_param_store()
    svi = SVI(
        model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), seed=3, num_fits=F
    )
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"num_fits=5.*Python counter"):
            svi.run(5, xs, ys, fit_dims=(0, 0), compile=True, progress_bar=False)
