"""A run whose losses are looked at now and then, as on an accelerator."""

from __future__ import annotations

import math

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.errors import NonFiniteError
from fastsvi.infer import SVI, Trace_ELBO, course, deferred
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.params import checkpoint


@pytest.fixture(autouse=True)
def reading_waits(monkeypatch):
    """Losses on the CPU are treated as if they were on a GPU."""
    monkeypatch.setattr(course, "_waits_for_device", lambda loss: True)


def make(good_steps=10**9):
    calls = []

    def model(y):
        calls.append(1)
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        shift = math.nan if len(calls) > good_steps else 0.0
        fastsvi.sample("y", dist.Normal(x + shift, 1.0, validate_args=False), obs=y)

    fastsvi.clear_param_store()
    optim = fastsvi.optim.Adam({"lr": 0.05})
    return SVI(model, AutoNormal(model), optim, Trace_ELBO(), seed=1), torch.tensor(1.0)


def run(svi, steps, y, **options):
    return svi.run(steps, y, progress_bar=False, compile=False, **options)


def test_good_losses():
    svi, y = make()
    found = run(svi, 30, y)
    svi, y = make()
    expected = [svi.step(y) for _ in range(30)]
    assert found.losses.tolist() == expected


def test_a_bad_loss_is_found_at_the_end():
    svi, y = make(good_steps=20)
    with pytest.raises(NonFiniteError, match=r"the loss of step \d+ is not finite"):
        run(svi, 30, y)
    assert all(value.isfinite().all() for _, value in fastsvi.get_param_store().items())


def test_a_file_never_holds_a_bad_state(tmp_path, monkeypatch):
    path = tmp_path / "fit.ckpt"
    svi, y = make(good_steps=20)
    with pytest.raises(NonFiniteError):
        run(svi, 60, y, checkpoint=path, checkpoint_every=0)
    tensors, header = checkpoint.read(path)
    assert 10 < header["run"]["steps"] <= 20
    assert tensors["run/losses"].isfinite().all()
    svi, y = make()
    whole = run(svi, 60, y)
    svi, y = make()
    assert torch.equal(run(svi, 60, y, checkpoint=path).losses, whole.losses)

    path.unlink()
    monkeypatch.setattr(deferred, "_SECONDS_BETWEEN", 0.0)
    svi, y = make(good_steps=20)
    with pytest.raises(NonFiniteError):
        run(svi, 60, y, checkpoint=path)
    assert not path.exists(), "there was no time to save at a good look"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_does_not_hide_a_bad_loss(failure):
    calls = []

    def model(y):
        calls.append(1)
        if len(calls) > 20:
            raise failure
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        shift = math.nan if len(calls) > 15 else 0.0
        fastsvi.sample("y", dist.Normal(x + shift, 1.0, validate_args=False), obs=y)

    svi = SVI(model, AutoNormal(model), fastsvi.optim.Adam({"lr": 0.05}), Trace_ELBO(), seed=1)
    with pytest.raises(NonFiniteError):
        run(svi, 60, torch.tensor(1.0))
    assert all(value.isfinite().all() for _, value in fastsvi.get_param_store().items())
