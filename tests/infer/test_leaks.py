"""Long runs keep nothing: no memory, no tensors, no files."""

from __future__ import annotations

import gc
import os
import sys
import threading
from typing import NamedTuple

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads memory and open files from /proc"
)

DATA = torch.tensor([1.0, 2.0, 0.5, 1.5])


def model(data):
    x = fastsvi.sample("x", dist.Normal(0.0, 10.0))
    s = fastsvi.sample("s", dist.HalfNormal(2.0))
    with fastsvi.plate("data", len(data)):
        fastsvi.sample("obs", dist.Normal(x, s), obs=data)


def guide(data):
    loc = fastsvi.param("loc", torch.tensor(0.0))
    fastsvi.sample("x", dist.Normal(loc, 0.5))
    fastsvi.sample("s", dist.LogNormal(fastsvi.param("log_s", torch.tensor(0.0)), 0.2))


def held():
    """Bytes of memory in use, tensors alive, open files, and threads; blocks of Python's memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    return Held(memory, (tensors, files, threads), sys.getallocatedblocks())


class Held(NamedTuple):
    memory: int
    exact: tuple[int, int, int]
    blocks: int


def assert_nothing_kept(run, warm, measured, bytes_per_step):
    run(warm)
    grown = []
    for _ in range(2):
        before = held()
        run(measured)
        after = held()
        assert after.exact == before.exact
        grown.append((after.memory - before.memory, after.blocks - before.blocks))
    memory, blocks = map(min, zip(*grown, strict=True))  # what grows once is not a leak
    # A tensor kept for each step would be 500 bytes and more; allocators hold on to some pages.
    assert memory < bytes_per_step * measured
    assert blocks < measured / 2  # an object kept for each step is a block at least


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [True, False])
def test_native_steps(automatic):
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    own = AutoNormal(model) if automatic else guide
    svi = SVI(model, own, fastsvi.optim.Adam({"lr": 1e-3}), elbo, seed=1)

    def run(steps):
        assert svi.run(steps, DATA, progress_bar=False, compile=True).native_steps > steps - 3

    assert_nothing_kept(run, 1000, 50_000, bytes_per_step=40)


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("automatic", [True, False])
def test_eager_steps(automatic, particles):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    own = AutoNormal(model) if automatic else guide
    svi = SVI(model, own, fastsvi.optim.Adam({"lr": 1e-3}), elbo, seed=1)

    def run(steps):
        assert len(svi.run(steps, DATA, progress_bar=False, compile=False).losses) == steps

    assert_nothing_kept(run, 300, 750 // particles, bytes_per_step=400)


def test_many_short_runs(tmp_path):
    """Each with a bar, a checkpoint, and looks at the losses."""
    svi = SVI(model, AutoNormal(model), fastsvi.optim.Adam({"lr": 1e-3}), Trace_ELBO(), seed=1)

    def runs(count):
        for number in range(count):
            path = tmp_path / f"{count}-{number}.ckpt"
            svi.run(3, DATA, compile=False, checkpoint=path, stop_when_converged=True)
            path.unlink()

    runs(5)
    before = held()
    runs(30)
    after = held()
    assert after.exact == before.exact


def test_a_fit_that_is_done_is_forgotten():
    def fit(number):
        fastsvi.clear_param_store()
        svi = SVI(model, AutoNormal(model), fastsvi.optim.Adam({"lr": 1e-3}), Trace_ELBO(), seed=1)
        svi.run(5, DATA, progress_bar=False, compile=number % 2 == 0)
        fastsvi.clear_param_store()

    for number in range(4):
        fit(number)
    before = held()
    for number in range(10):
        fit(number)
    after = held()
    tensors, _, threads = after.exact
    assert (tensors, threads) == (before.exact[0], before.exact[2])
