"""Particles in pieces: the same steps, in the memory and the code of one piece."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal

DATA = torch.linspace(-1.0, 2.0, 600)
# Sums of some hundred float32 terms in another order, over a few steps.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def wide(data):
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)


def subsampled(data):
    """A random subset, which all particles share, and a draw by the program itself."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(data), subsample_size=7) as rows:
        pyro.sample("y", dist.Normal(0.0, scale), obs=data[rows])


def guide(data):
    loc = pyro.param("loc", torch.tensor(0.1))
    spread = pyro.param("spread", torch.tensor(0.3), constraint=dist.constraints.positive)
    pyro.sample("scale", dist.LogNormal(loc, spread))


PROGRAMS = {
    "wide": (wide, None),
    "subset": (subsampled, None),
    "own guide": (subsampled, guide),
}


def fit(
    name="wide",
    particles=12,
    chunk=None,
    vectorize=True,
    fits=None,
    compile=True,
    data=DATA,
):
    pyro.clear_param_store()
    model, own = PROGRAMS[name]
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=vectorize, chunk_size=chunk)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, own or AutoNormal(model), optim, elbo, seed=2, num_fits=fits)
    run = svi.run(6, data, progress_bar=False, compile=compile)
    assert run.obstacle is None or not compile
    return svi, run


def native(svi):
    (step,) = svi._captures._steps
    return step.loop


def assert_same(run, other):
    torch.testing.assert_close(run.losses, other.losses, **CLOSE)
    for name, value in run.params.items():
        torch.testing.assert_close(value, other.params[name], **CLOSE)


@pytest.fixture(scope="module", params=PROGRAMS)
def whole(request):
    return request.param, fit(request.param)[1]


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_the_same_as_at_once(whole, chunk):
    """Five does not divide twelve: two particles are left over."""
    name, run = whole
    chunked = fit(name, chunk=chunk)[1]
    assert chunked.native_steps >= 4
    assert_same(chunked, run)


def test_the_same_as_one_after_the_other(whole):
    name, run = whole
    assert_same(fit(name, vectorize=False)[1], run)


def test_the_same_as_eagerly(whole):
    name, run = whole
    assert_same(fit(name, chunk=5, compile=False)[1], run)


def test_fits_in_chunks():
    assert_same(fit(chunk=4, fits=2)[1], fit(fits=2)[1])


def test_code_and_memory_do_not_grow_with_the_particles():
    data = DATA.repeat(50)
    few, more = (native(fit(particles=n, chunk=4, data=data)[0]) for n in (8, 80))
    assert few.arena_bytes == more.arena_bytes
    assert abs(len(few.source) - len(more.source)) < 200  # other numbers in the same code
    # Of a chunk the noise; the gradient twice, of a chunk and of all; and the scales.
    arrays = 4 + 2 * 2 + 1
    assert more.arena_bytes < (arrays + 0.1) * data.nbytes
    assert native(fit(particles=16, data=data)[0]).arena_bytes > 16 * data.nbytes


def test_many_particles_one_after_the_other():
    """Once 65 and more were too many to be recorded."""
    run = fit(particles=100, vectorize=False)[1]
    assert run.native_steps >= 4
    assert_same(run, fit(particles=100)[1])
