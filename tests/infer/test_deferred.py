"""Looking at the losses of a run now and then, as on an accelerator."""

import math

import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.deferred import DeferredChecks
from fastsvi.infer.progress import Losses
from fastsvi.optim import Adam


def model(factor):
    fastsvi.sample("x", dist.Normal(factor, 1.0))


def contents(svi):
    params = {n: p.detach().clone() for n, p in fastsvi.get_param_store().named_parameters()}
    return params, svi.optim.get_state()


def make():
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.1}), Trace_ELBO())
    losses = Losses()
    losses.append(svi.step(1.0))
    return svi, losses, DeferredChecks(losses, svi.optim)


def test_good_losses_become_the_new_last_look():
    svi, losses, deferred = make()
    for _ in range(3):
        losses.append(svi.step(1.0))
    assert deferred.look() is None
    losses.append(torch.tensor(math.nan))
    before, state = contents(svi)
    svi.step(1.0)
    assert deferred.look() == 4
    after, state_after = contents(svi)
    for name, value in before.items():
        assert torch.equal(after[name], value)
        moments, again = (s[name]["state"][0] for s in (state, state_after))
        assert all(torch.equal(moments[key], again[key]) for key in moments)


def test_a_bad_step_is_found_and_undone():
    svi, losses, deferred = make()
    before, _ = contents(svi)
    with fastsvi.settings.context(validate="never"):
        losses.append(svi.step(1.0))
        losses.append(svi.step(math.nan))
        losses.append(svi.step(1.0))
    assert deferred.look() == 2
    after, _ = contents(svi)
    for name, value in before.items():
        assert torch.equal(after[name], value)
    assert math.isfinite(svi.step(1.0))


def test_parameters_that_diverged_in_the_last_step():
    svi, losses, deferred = make()
    losses.append(svi.step(1.0))
    fastsvi.get_param_store().leaf("AutoNormal.locs.x").data.fill_(math.inf)
    assert deferred.look() == 2
    assert torch.isfinite(fastsvi.param("AutoNormal.locs.x"))


def test_it_is_due_after_a_while(monkeypatch):
    _, _, deferred = make()
    assert not deferred.is_due()
    monkeypatch.setattr(deferred, "_noted_at", deferred._noted_at - 2.0)
    assert deferred.is_due()
