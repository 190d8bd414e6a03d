"""Every kind of program, guide, optimizer and loss: a fit among others is the fit alone."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.errors import CaptureError
from fastsvi.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, autoguide
from fastsvi.infer.autoguide import init_to_uniform

F, STEPS = 3, 12
generator = torch.Generator().manual_seed(0)
xs = torch.randn(F, 12, 2, generator=generator)
ys = xs @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(F, 12, generator=generator)


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def by_hand(x, y):
    loc = pyro.param("loc", lambda: dist.Normal(torch.zeros(2), 1.0).sample())
    scale = pyro.param("scale", torch.full((2,), 0.1), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))
    pyro.sample("noise", dist.LogNormal(pyro.param("log_noise", torch.tensor(0.0)), 0.1))


def subsets(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=4) as rows:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x[rows] @ weight + shift, 0.5), obs=y[rows])


def shares(x, y):
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ share, noise), obs=y)


def guide_of_shares(x, y):
    shape = pyro.param("shape", torch.tensor(5.0), constraint=constraints.positive)
    pyro.sample("noise", dist.Gamma(shape, 5.0))
    weights = pyro.param("weights", torch.full((2,), 3.0), constraint=constraints.positive)
    pyro.sample("share", dist.Dirichlet(weights))


def correlated(x, y):
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
    weight = pyro.sample("weight", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)


def mixture(x, y):
    with pyro.plate("rows", len(x)):
        shift = pyro.sample("shift", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(shift, 1.0), obs=y)


def guide_of_mixture(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("shift", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(len(x)))))


def one_by_one(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    for i in pyro.plate("rows", 3):
        pyro.sample(f"y_{i}", dist.Normal(x[i] @ weight, 1.0), obs=y[i])


def latents(x, y):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def amortised():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

    def guide(x, y):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(net(x).squeeze(-1), 0.3))

    return guide


def auto(name, model=regression, **options):
    return model, getattr(autoguide, name)(model, init_loc_fn=init_to_uniform, **options)


PROGRAMS = {
    "normal": lambda: auto("AutoNormal"),
    "by hand": lambda: (regression, by_hand),
    "subsets, one latent for each row": lambda: auto("AutoNormal", subsets),
    "amortised": lambda: (latents, amortised()),
    "multivariate": lambda: auto("AutoMultivariateNormal"),
    "low rank": lambda: auto("AutoLowRankMultivariateNormal", rank=2),
    "diagonal": lambda: auto("AutoDiagonalNormal"),
    "points": lambda: auto("AutoDelta"),
    "Gamma and Dirichlet": lambda: (shares, guide_of_shares),
    "Gamma and Dirichlet under a normal": lambda: auto("AutoNormal", shares),
    "correlations": lambda: auto("AutoNormal", correlated),
    "discrete": lambda: (mixture, guide_of_mixture),
    "a sequential plate": lambda: auto("AutoNormal", one_by_one),
    "scaled and masked": lambda: (
        pyro.poutine.scale(pyro.poutine.mask(regression, mask=True), 2.0),
        auto("AutoNormal")[1],
    ),
}
ELBOS = {
    "several particles": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),
    "one after the other": lambda: Trace_ELBO(num_particles=2),
    "in chunks": lambda: Trace_ELBO(num_particles=5, vectorize_particles=True, chunk_size=2),
    "mean field": lambda: TraceMeanField_ELBO(num_particles=2, vectorize_particles=True),
}
OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 1.0}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "loc" in name else 0.01}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
}


def fit(program, elbo="several particles", optimizer="Adam", num_fits=F, first_fit=0):
    pyro.clear_param_store()
    model, guide = PROGRAMS[program]()
    optim, loss = OPTIMIZERS[optimizer](), ELBOS[elbo]()
    return SVI(model, guide, optim, loss, seed=3, num_fits=num_fits, first_fit=first_fit)


def run(svi, fits=slice(None), steps=STEPS, compile=True):
    return svi.run(steps, xs[fits], ys[fits], fit_dims=(0, 0), progress_bar=False, compile=compile)


def assert_close(one, other):
    # float32; twelve steps of some hundred operations, of losses of size 100.
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-3)


def check(program, elbo="several particles", optimizer="Adam"):
    what = program, elbo, optimizer
    svi = fit(*what)
    run(svi, steps=0)
    svi.select_fit(0)
    plain = SVI(svi.model, svi.guide, OPTIMIZERS[optimizer](), ELBOS[elbo](), seed=3)
    eager = plain.run(STEPS, xs[0], ys[0], progress_bar=False, compile=False)
    together = run(svi)
    assert together.obstacle is None
    assert_close(together.losses[:, 0], eager.losses)
    for name, value in eager.params.items():
        assert_close(together.params[name][0], value)
    alone = run(fit(*what, num_fits=1, first_fit=2), slice(2, 3))
    assert torch.equal(alone.losses[:, 0], together.losses[:, 2])
    for name, value in alone.params.items():
        assert torch.equal(value[0], together.params[name][2])
    return what, together


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program):
    check(program)


@pytest.mark.parametrize("program", ["low rank", "correlations", "amortised"])
def test_programs_replayed(program):
    """Operations that vmap has rules of its own for, some of which are wrong."""
    native = run(fit(program))
    assert_close(run(fit(program), compile=False).losses, native.losses)


@pytest.mark.parametrize("elbo", [name for name in ELBOS if name != "several particles"])
def test_losses(elbo):
    check("normal", elbo=elbo)


def test_mean_field_with_its_own_divergences():
    check("Gamma and Dirichlet", elbo="mean field")


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "Adam"])
def test_optimizers(optimizer):
    check("normal", optimizer=optimizer)


def test_a_schedule_of_learning_rates():
    def scheduled(num_fits, first_fit, fits):
        pyro.clear_param_store()
        options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1}
        scheduler = pyro.optim.ExponentialLR(options)
        model, guide = PROGRAMS["normal"]()
        loss = ELBOS["several particles"]()
        svi = SVI(model, guide, scheduler, loss, seed=3, num_fits=num_fits, first_fit=first_fit)
        losses = []
        for _ in range(3):
            losses.append(run(svi, fits, steps=6).losses)
            scheduler.step()
        assert svi._fits.num_captures == 1
        return torch.cat(losses)

    together = scheduled(F, 0, slice(None))
    assert torch.equal(scheduled(1, 2, slice(2, 3))[:, 0], together[:, 2])
    fast = torch.cat([run(svi, steps=18).losses for svi in [fit("normal")]])
    assert (together[6:] - fast[6:]).abs().max() > 0.1


def test_another_optimizer_begins_anew_and_cleared_parameters_too():
    svi = fit("by hand")
    start = run(svi, steps=0).params
    first = run(svi)
    svi.optim = pyro.optim.Adam({"lr": 0.0})
    second = run(svi)
    torch.testing.assert_close(second.params, first.params)
    pyro.clear_param_store()
    # Where the fits begin is as at first, the noise goes on.
    torch.testing.assert_close(run(svi, steps=0).params, start)
    assert not torch.equal(run(svi).losses, first.losses)


def test_a_seed_set_between_runs_gives_the_same_run():
    svi, found = None, []
    for _ in range(2):
        pyro.set_rng_seed(1)
        if svi is None:
            svi = SVI(*PROGRAMS["by hand"](), OPTIMIZERS["Adam"](), Trace_ELBO(), num_fits=F)
        pyro.clear_param_store()
        svi.optim = OPTIMIZERS["Adam"]()
        found.append(run(svi))
    assert torch.equal(found[0].losses, found[1].losses)


def test_an_edited_model_and_python_values_are_followed_from_run_to_run():
    share = [1.0]

    def model(x, y):
        with pyro.poutine.scale(scale=share[0]):
            regression(x, y)

    pyro.clear_param_store()
    guide = autoguide.AutoNormal(regression, init_loc_fn=init_to_uniform)
    optim = pyro.optim.Adam({"lr": 1e-6})  # losses change by their noise and by edits alone
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(model, guide, optim, elbo, seed=3, num_fits=F)
    before = run(svi).losses.mean(0)
    share[0] = 3.0
    by_value = run(svi).losses.mean(0)
    share[0] = 1.0
    svi.model = pyro.poutine.scale(model, 3.0)
    by_model = run(svi).losses.mean(0)
    assert (by_value > 2 * before).all()
    torch.testing.assert_close(by_model, by_value, rtol=0.2, atol=0)


def test_what_is_out_of_reach_says_why():
    pyro.clear_param_store()
    model, guide = PROGRAMS["normal"]()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO(), num_fits=F)
    with pytest.raises(CaptureError, match=r"num_fits=3.*SGD.*Use Adam, AdamW or ClippedAdam"):
        run(svi)
    assert len(svi._fits._state) == 0


def test_a_step_that_disagrees_says_what_to_do_and_not_that_it_goes_on():
    count = [0]

    def model(x, y):
        count[0] += 1
        weight = pyro.sample("weight", dist.Normal(float(count[0]), 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    pyro.clear_param_store()
    guide = autoguide.AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), seed=3, num_fits=F)
    with pytest.raises(CaptureError, match="Pass what changes as an argument") as caught:
        run(svi)
    assert "goes on" not in str(caught.value)
