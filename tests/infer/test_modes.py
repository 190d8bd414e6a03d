"""One seed, one fit: however its steps are taken, their losses are the same for 1,000 steps."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal

STEPS = 1000
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[0]), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.full_like(y[0], 5.0)))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(torch.zeros_like(y[0]), 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)


def run(compile, dtype, chunk_size=None, num_fits=None, steps=STEPS):
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, chunk_size=chunk_size)
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(schools, AutoNormal(schools), optim, elbo, seed=5, num_fits=num_fits)
    data = sigma.to(dtype), y.to(dtype)
    result = svi.run(steps, *data, progress_bar=False, compile=compile)
    losses = result.losses if num_fits is None else result.losses[:, 0]
    return losses, result


MODES = {
    "captured": {"compile": True},
    "swapped in": {"compile": "auto"},
    "chunked": {"compile": False, "chunk_size": 4, "steps": 400},
    "chunked and captured": {"compile": True, "chunk_size": 4},
    "among fits": {"compile": True, "num_fits": 3},
    # Slow, operation by operation, so for fewer steps.
    "among fits, replayed": {"compile": False, "num_fits": 3, "steps": 150},
}


@pytest.fixture(scope="module")
def eager():
    return {dtype: run(False, dtype)[0] for dtype in (torch.float32, torch.float64)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_float64_losses_agree_to_rounding(mode, eager):
    losses, _ = run(dtype=torch.float64, **MODES[mode])
    assert losses.dtype == torch.float64
    # 1,000 steps of about 200 operations: rounding of 1e-16 grows to some 1e-11 of losses of 32.
    expected = eager[torch.float64][: len(losses)]
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["captured", "swapped in", "among fits"])
def test_float32_losses_agree_to_rounding_growth(mode, eager):
    losses, _ = run(dtype=torch.float32, **MODES[mode])
    # As above with 6e-8; a single loss may see a draw where its derivative is large.
    torch.testing.assert_close(losses, eager[torch.float32], rtol=1e-3, atol=5e-3)


def test_two_runs_are_bit_identical():
    for mode in ("captured", "among fits"):
        first, one = run(dtype=torch.float32, **MODES[mode])
        again, two = run(dtype=torch.float32, **MODES[mode])
        assert torch.equal(first, again)
        assert all(torch.equal(one.params[name], two.params[name]) for name in one.params)
