"""Posteriors, number by number: fastsvi's are NumPyro's, and both are the best there are.

Every workload with a mean-field guide is fitted 16 times by each library, with independent noise
and a learning rate that falls until noise is small. Held against each other are the means of the
guides' ``loc`` (in units of the guide's scale) and log scale, for every number of every site, by
their Monte Carlo error, which is that of the mean of 16 fits. A bound is exceeded by noise alone
in one comparison of a workload in a thousand: Student's t, Bonferroni over all numbers.

The optimum is that of :mod:`bench.workloads.exact`, which takes no draws and no library of this
kind; without NumPyro the comparison with it is what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import fastsvi as pyro
from bench import agreement
from bench.libraries import LIBRARIES
from bench.libraries.store_names import named
from bench.workloads import WORKLOADS, Case, case, exact
from bench.workloads import log_joints as by_draws
from bench.workloads.pyro_models import programs
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal, init_to_feasible

MEAN_FIELD = [name for name in WORKLOADS if exact.has_optimum(name)]
FITS, PARTICLES, STEPS = 16, 4, 6000
FIRST, LAST = 0.05, 1e-4  # learning rates
DECAY = (LAST / FIRST) ** (1 / STEPS)
ONE_IN = 1000


def posteriors(one, optim, steps, fits, compile=True, seed=0):
    """Guides of independent fits by fastsvi, each as the evaluator reads it."""
    num_fits, many = fits * one.fits, one.workload.fits
    model, _ = programs("regression" if many else one.name, pyro, one.shape)
    data = [torch.from_numpy(array) for array in one.data()]
    if many:
        data = [torch.cat([part] * fits) for part in data]
    pyro.clear_param_store()
    svi = SVI(
        model,
        AutoNormal(model, init_loc_fn=init_to_feasible),
        optim,
        Trace_ELBO(one.particles, vectorize_particles=one.particles > 1),
        seed=seed,
        num_fits=num_fits if num_fits > 1 else None,
    )
    dims = {"fit_dims": (0,) * len(data)} if many else {}
    run = svi.run(steps, *data, progress_bar=False, compile=compile, **dims)
    assert run.native_steps >= steps - 2 if compile else run.native_steps == 0
    found = {name: value.reshape(fits, -1) for name, value in named(run.params).items()}
    return [{name: value[k] for name, value in found.items()} for k in range(fits)]


def tiny(name):
    return case(name, "tiny", 1 if WORKLOADS[name].minibatch else PARTICLES)


def adam(lr=0.01):
    return pyro.optim.Adam({"lr": lr})


@functools.cache
def optimum(name):
    return exact.optimum(tiny(name))


@functools.cache
def places_of_fastsvi(name):
    one = tiny(name)
    # Adam, but for the learning rate: no gradient is that large.
    optim = pyro.optim.ClippedAdam({"lr": FIRST, "lrd": DECAY, "clip_norm": 1e9})
    return places(name, posteriors(one, optim, STEPS, FITS))


def places_of_numpyro(name):
    """The like by NumPyro."""
    pytest.importorskip("numpyro")
    import jax
    from numpyro.optim import Adam

    one = tiny(name)
    fit = LIBRARIES["numpyro"].load().prepare(one, "cpu")
    svi = fit.svi
    svi.optim = Adam(lambda step: FIRST * DECAY**step)

    def alone(key, *data):
        def step(state, _):
            return svi.update(state, *fit._batch(state.rng_key, data))[0], None

        state = svi.init(key, *fit._batch(key, data))
        return svi.get_params(jax.lax.scan(step, state, length=STEPS)[0])

    keys, rest = jax.random.split(jax.random.PRNGKey(0), FITS), [None] * len(fit.data)
    if one.workload.fits:
        keys = jax.vmap(lambda key: jax.random.split(key, one.fits))(keys)
        alone = jax.vmap(alone)
    found = {}
    for name_, value in jax.jit(jax.vmap(alone, (0, *rest)))(keys, *fit.data).items():
        site, _, kind = name_.rpartition("_auto_")
        found[f"{kind}.{site}"] = np.asarray(value).reshape(FITS, -1)
    return places(name, [{key: value[k] for key, value in found.items()} for k in range(FITS)])


def places(name, guides):
    """Guides from the optimum, ``loc`` in units of its scale and log scale: ``[fits, numbers]``."""
    guide, best = exact.MeanField(tiny(name)), optimum(name)
    scale = best.log_scale.exp()
    rows = [
        torch.cat(
            [
                (guide.join(found, "loc") - best.loc) / scale,
                guide.join(found, "scale").log() - best.log_scale,
            ],
            -1,
        ).flatten()
        for found in guides
    ]
    return torch.stack(rows)


def standard_error(rows):
    return rows.std(0) / len(rows) ** 0.5


def bound(count, freedom):
    """What the largest of ``count`` t-distributed numbers exceeds once in a thousand times."""
    return stats.t.ppf(1 - 1 / ONE_IN / count / 2, freedom)


# ---- mean-field guides


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_fits_reach_the_exact_optimum(name):
    rows = places_of_fastsvi(name)
    error = standard_error(rows)
    # Or else the comparison would say little. A minibatch is a tenth of the rows.
    assert error.max() < (0.03 if WORKLOADS[name].minibatch else 0.01)
    assert (rows.mean(0) / error).abs().max() < bound(rows.shape[1], FITS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEAN_FIELD)
def test_fits_are_numpyros(name):
    theirs = places_of_numpyro(name)
    ours = places_of_fastsvi(name)
    error = (standard_error(ours).square() + standard_error(theirs).square()).sqrt()
    limit = bound(ours.shape[1], 2 * FITS - 2)
    assert ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < limit
    # Nor is one more certain than the other: F of 15 and 15 degrees, over all numbers.
    ratio = ours.var(0) / theirs.var(0)
    most = stats.f.ppf(1 - 1 / ONE_IN / ours.shape[1] / 2, FITS - 1, FITS - 1)
    assert 1 / most < ratio.min() <= ratio.max() < most


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_eager_and_captured_fits_are_one(name):
    one = case(name, "tiny", 1)
    captured, eager = (
        places(name, posteriors(one, adam(), 150, 1, compile)) for compile in (True, False)
    )
    # The same noise, so only rounding is left: float32 has 6e-8 of each number, of which a step
    # rounds some tens; and Adam, which divides by the gradient's size, keeps relative errors.
    assert (captured - eager).abs().max() < 2e-5
    other = places(name, posteriors(one, adam(), 150, 1, seed=1))
    assert (captured - other).abs().max() > 1e-2


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_noise_is_that_of_the_law(name):
    """What :mod:`bench.agreement` derives of the noise of single fits, which the gates rely on."""
    one, fits = case(name, "tiny", 1), 32
    law = agreement.law(one)
    found = posteriors(one, adam(), 3000, fits)
    spread = torch.stack([law.place(guide) for guide in found]) / law.error
    # Numbers depend on each other, so 32 fits know the mean square to about 10%, and its root to
    # 5%; the law leaves out what is of higher order in the learning rate, here about 5% too.
    assert 0.85 < spread.square().mean().sqrt() < 1.2
    gaps = np.array([law.best.elbo - agreement.evaluate(one, guide)[0] for guide in found])
    error = gaps.std(ddof=1) / fits**0.5
    assert gaps.min() > 0
    assert abs(gaps.mean() - law.gap) < 3.5 * error + 0.1 * law.gap


# ---- the auto-encoder: its weights have no one optimum, but what they are worth has a law


def auto_encoder():
    one = case("vae", "tiny", 1)
    workload = dataclasses.replace(one.workload, learning_rate=0.01, samples=100)
    return Case(workload, one.size, 1, "vae")


@functools.cache
def worth(library):
    """ELBOs of fits of 200 steps."""
    one, found, fit = auto_encoder(), [], None
    for seed in range(12):
        if library == "numpyro":
            import jax

            fit = fit or LIBRARIES[library].load().prepare(one, "cpu")
            fit.state, fit.keys = None, jax.random.PRNGKey(seed)
        else:
            fit = LIBRARIES[library].load().prepare(one, "cpu")
            torch.manual_seed(seed)
        if library == "fastsvi":
            fit.compile = True
        fit.run(200)
        found.append(by_draws.elbo(one, fit.posterior())[0])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "numpyro"])
def test_auto_encoders_are_worth_the_same(library):
    if library == "numpyro":
        pytest.importorskip("numpyro")
    ours, theirs = worth("fastsvi"), worth(library)
    apart = stats.ttest_ind(ours, theirs, equal_var=False)
    assert apart.pvalue > 1 / ONE_IN
    error = math.hypot(ours.std(ddof=1), theirs.std(ddof=1)) / len(ours) ** 0.5
    assert error < 0.01 * abs(ours.mean())


def test_eager_and_captured_auto_encoders_are_one():
    one, found = auto_encoder(), []
    for compile in (True, False):
        fit = LIBRARIES["fastsvi"].load().prepare(one, "cpu")
        fit.compile = compile
        fit.run(100)
        found.append(fit.posterior())
    for name, weight in found[0].items():
        np.testing.assert_allclose(weight, found[1][name], rtol=0, atol=1e-4, err_msg=name)
