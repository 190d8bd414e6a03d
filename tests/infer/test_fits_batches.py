"""Batches and many fits: a batch is for all of them, or has a part for each."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import CaptureError, FastSVIWarning, ShapeError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal, init_to_uniform

F, ROWS = 3, 20
generator = torch.Generator().manual_seed(0)
xs = torch.randn(F, ROWS, 2, generator=generator)
ys = xs @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(F, ROWS, generator=generator)
# 8, 8 and 4 rows; own ones of each fit, and those of the first for all.
OWN = [(xs[:, k : k + 8], ys[:, k : k + 8]) for k in (0, 8, 16)]
SHARED = [(x[0], y[0]) for x, y in OWN]


def regression(x, y, share=1.0):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=share):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


def fits(num_fits=F, model=regression, lr=0.05, **options):
    pyro.clear_param_store()
    guide = AutoNormal(model, init_loc_fn=init_to_uniform)
    optim = pyro.optim.Adam({"lr": lr})
    return SVI(model, guide, optim, Trace_ELBO(), seed=3, num_fits=num_fits, **options)


def run(svi, batches, steps=40, compile=True, fit_dims=(0, 0), **options):
    options = {"progress_bar": False, "compile": compile, "fit_dims": fit_dims, **options}
    return svi.run(steps, batches=batches, **options)


def assert_close(one, other):
    # float32; forty steps of some fifty operations, of losses of size 50.
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-3, equal_nan=True)
    torch.testing.assert_close(one.params, other.params, rtol=1e-3, atol=1e-4)


KINDS = {
    "own": (OWN, (0, 0), lambda fit: [(x[fit : fit + 1], y[fit : fit + 1]) for x, y in OWN]),
    "shared": (SHARED, None, lambda fit: SHARED),
    "of both kinds": (
        [(x, y[0]) for x, y in OWN],
        (0, None),
        lambda fit: [(x[fit : fit + 1], y[0]) for x, y in OWN],
    ),
    "by name": (
        [{"x": x, "y": y} for x, y in OWN],
        {"x": 0, "y": 0},
        lambda fit: [{"x": x[fit : fit + 1], "y": y[fit : fit + 1]} for x, y in OWN],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fits_on_the_same_batches_are_the_fits_alone(kind):
    batches, dims, alone = KINDS[kind]
    svi = fits()
    together = run(svi, batches, fit_dims=dims)
    assert together.losses.shape == (40, F)
    assert together.native_steps == 40
    assert svi._fits.num_captures == 2  # for eight rows and for four
    assert_close(run(fits(), batches, fit_dims=dims, compile=False), together)
    for fit in range(F):
        single = run(fits(1, first_fit=fit), alone(fit), fit_dims=dims)
        assert torch.equal(single.losses[:, 0], together.losses[:, fit])
        for name, value in single.params.items():
            assert torch.equal(value[0], together.params[name][fit])


def test_a_fit_takes_the_batches_that_an_ordinary_run_takes():
    start = run(fits(), SHARED, steps=0, fit_dims=None).params
    svi = fits(None)
    svi.guide(*SHARED[0])
    for name, value in start.items():
        pyro.get_param_store()[name] = value[0]
    eager = svi.run(40, batches=SHARED, progress_bar=False, compile=False)
    together = run(fits(), SHARED, fit_dims=None)
    torch.testing.assert_close(together.losses[:, 0], eager.losses, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("compile", [True, False])
def test_a_generator_is_taken_one_by_one_with_floats_that_vary(compile):
    def batches():
        for k in range(12):
            yield *SHARED[k % 2], 1 / (k + 1)

    svi = fits()
    many = run(svi, batches(), steps=12, fit_dims=None, compile=compile)
    assert svi._fits.num_captures == 1
    listed = run(fits(), list(batches()), steps=12, fit_dims=None, compile=compile)
    assert torch.equal(many.losses, listed.losses)
    assert many.losses[0].mean() > 3 * many.losses[-1].mean()  # the share of the data falls


def test_a_loader():
    loader = DataLoader(TensorDataset(xs[0], ys[0]), batch_size=8)
    loaded = run(fits(), loader, fit_dims=None)
    assert torch.equal(loaded.losses, run(fits(), SHARED, fit_dims=None).losses)


def test_what_is_not_finite_in_a_batch_of_one_fit_stays_there():
    bad = [(x, y.clone()) for x, y in OWN]
    bad[1][1][1, 2] = torch.nan
    clean, ill = run(fits(), OWN), run(fits(), bad)
    for fit in (0, 2):
        assert torch.equal(ill.losses[:, fit], clean.losses[:, fit])
    # Of forty steps, those with the second of three batches are left out; the others are taken.
    assert ill.losses[:, 1].isnan().nonzero().flatten().tolist() == list(range(1, 40, 3))
    assert ill.skipped.tolist() == [0, 13, 0]
    assert_close(run(fits(), bad, compile=False), ill)


def test_changing_shapes_are_captured_a_bounded_number_of_times():
    batches = [(xs[:, :k], ys[:, :k]) for k in range(2, 20)]
    svi = fits()
    with pytest.raises(CaptureError, match=r"captured 8 times already, because argument 1 changes"):
        run(svi, batches)
    assert svi._fits.num_captures == 8


def test_a_batch_without_an_axis_of_fits_is_named():
    with pytest.raises(ShapeError, match=r"argument 0 has shape \(8, 2\).*num_fits=3"):
        run(fits(), SHARED)


@pytest.mark.parametrize("compile", [True, False])
def test_a_run_with_batches_is_taken_up(compile, tmp_path):
    whole = run(fits(), OWN, steps=20, compile=compile)
    path = tmp_path / "fits"
    run(fits(), OWN, steps=11, compile=compile, checkpoint=path)
    resumed = run(fits(), OWN, steps=20, compile=compile, checkpoint=path)
    assert torch.equal(resumed.losses, whole.losses)
    assert all(torch.equal(resumed.params[name], whole.params[name]) for name in whole.params)


def test_python_state_that_changes_during_the_run_is_noticed(monkeypatch):
    monkeypatch.setattr("fastsvi.infer.captured.LOOKS_APART", 0)
    width = [1.0]

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), width[0]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)

    def batches(change):
        for k in range(10):
            width[0] = 0.1 if change and k >= 5 else 1.0
            yield SHARED[0]

    svi = fits(model=model)
    message = r"captured anew, because something outside .*test_fits_batches.py.* Pass what changes"
    with pytest.warns(FastSVIWarning, match=message):
        changed = run(svi, batches(True), steps=10, fit_dims=None)
    assert svi._fits.num_captures == 2
    constant = run(fits(model=model), batches(False), steps=10, fit_dims=None)
    assert torch.equal(changed.losses[:5], constant.losses[:5])
    assert (changed.losses[5:] - constant.losses[5:]).abs().min() > 0.01


def test_python_state_that_keeps_changing_ends_the_run(monkeypatch):
    monkeypatch.setattr("fastsvi.infer.captured.LOOKS_APART", 0)
    width = [1.0]

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), width[0]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)

    def batches():
        for k in range(100):
            width[0] = 1.0 + k
            yield SHARED[0]

    svi = fits(model=model)
    remedy = "outside of the tensors has changed.*Pass what changes as an argument"
    with pytest.warns(FastSVIWarning), pytest.raises(CaptureError, match=remedy):
        run(svi, batches(), steps=100, fit_dims=None)
    assert svi._fits.num_captures == 8
