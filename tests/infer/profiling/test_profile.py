"""Profiles: what they find, the advice that each kind of program provokes, and what they leave."""

from __future__ import annotations

import copy
import json
import time

import numpy as np
import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import settings
from fastsvi.errors import ConstraintError
from fastsvi.infer import SVI, Trace_ELBO, profile
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.profiling import EagerStep, NativeForm, Profile
from fastsvi.infer.profiling.advice import advise
from fastsvi.optim import SGD, Adam

SECONDS = 0.02  # of each measurement: enough to see that it is made
Y = torch.linspace(-1.0, 1.0, 20)


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def looking_model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = 1.0 if loc > 0 else 2.0  # reads the value
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def make(model=model, optim=None, loss=None, **options):
    return SVI(
        model, AutoNormal(model), optim or Adam({"lr": 0.05}), loss or Trace_ELBO(**options), seed=3
    )


def about(found):
    return [advice.about for advice in found.advice]


def text_on(found, kind):
    (text,) = [advice.text for advice in found.advice if advice.about == kind]
    return text


def test_an_ordinary_program():
    found = profile(make(), Y, seconds=SECONDS)
    assert found.obstacle is None
    assert about(found) == ["use-run"]
    eager = found.eager
    assert set(eager.phases) >= {"guide", "model", "ELBO", "gradient", "update"}
    assert all(time > 0 for time in eager.phases.values())
    assert sum(eager.phases.values()) == pytest.approx(eager.step_us)
    assert 0 < eager.torch_us <= eager.step_us
    assert 0 <= eager.python_share < 1
    assert eager.operations > 20
    native = found.native
    assert 0 < native.step_us < eager.step_us
    assert native.nests > 3
    assert native.noise == 1  # one latent number, one particle
    assert native.bytes >= Y.nbytes
    assert found.data_bytes == Y.nbytes
    assert found.params_bytes == 8  # loc and scale, float32
    assert native.moments_bytes >= 16
    assert found.peak_bytes > 1 << 20
    assert "svi.run" in text_on(found, "use-run")


def test_text_and_json_hold_the_findings():
    found = profile(make(), Y, seconds=SECONDS)
    shown = str(found)
    for word in ("eager step", "guide", "captured step", "loop nests", "parameters", "advice"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 100
    data = json.loads(json.dumps(found.to_dict()))
    assert data["eager"]["step_us"] == found.eager.step_us
    assert data["advice"][0]["about"] == "use-run"


@pytest.mark.parametrize("begun", [0, 3], ids=["not begun", "begun"])
@pytest.mark.parametrize("kind", [Adam, SGD])
def test_the_fit_goes_on_as_if_nothing_had_been(kind, begun):
    def losses(measured):
        pyro.clear_param_store()
        torch.manual_seed(1)
        svi = make(optim=kind({"lr": 0.01}))
        found = [svi.step(Y) for _ in range(begun)]
        if measured:
            names, grads = list(pyro.get_param_store()), svi._targets.leaves
            profile(svi, Y, seconds=SECONDS)
            assert list(pyro.get_param_store()) == names
            assert svi._targets.leaves is grads
        found += [svi.step(Y) for _ in range(3)]
        return found, torch.rand(()).item(), svi.evaluate_loss(Y)

    assert losses(True) == losses(False)


def test_a_run_goes_on_compiled():
    svi = make()
    svi.run(50, Y, compile=True, progress_bar=False)
    before = {k: v.clone() for k, v in pyro.get_param_store().items()}
    profile(svi, Y, seconds=SECONDS)
    assert all(torch.equal(v, before[k]) for k, v in pyro.get_param_store().items())
    assert svi.run(50, Y, compile=True, progress_bar=False).native_steps > 40


def test_modules_keep_weights_and_running_means():
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))

    def regression(x, y):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=y)

    def guide(x, y):
        pass

    svi = SVI(regression, guide, Adam({"lr": 0.1}), Trace_ELBO())
    x, y = torch.randn(8, 1), torch.randn(8)
    svi.step(x, y)
    weights = {name: v.clone() for name, v in net.named_parameters()}
    profile(svi, x, y, seconds=SECONDS)
    assert all(torch.equal(v, weights[name]) for name, v in net.named_parameters())


def test_a_read_of_a_value_is_named_with_its_line():
    found = profile(make(looking_model), Y, seconds=SECONDS)
    assert found.native is None
    text = text_on(found, "eager-only")
    assert "test_profile.py" in text
    assert "1.0 if loc > 0" in text
    assert "torch.where" in text
    assert "use-run" not in about(found)


def test_a_loss_that_is_a_function():
    def loss(model, guide, *args):
        return Trace_ELBO().differentiable_loss(model, guide, *args)

    found = profile(make(loss=loss), Y, seconds=SECONDS)
    assert "not an ELBO" in text_on(found, "eager-only")
    assert found.eager.phases["loss and gradient"] > 0


def test_particles_one_by_one():
    found = profile(make(num_particles=16), Y, seconds=SECONDS)
    assert found.is_sequential
    # Sixteen runs of the program against one: far more than the noise of a busy machine.
    assert found.vectorized_us < found.eager.step_us
    assert "vectorize_particles=True" in text_on(found, "particles")


def test_particles_that_vmap_cannot_run():
    svi = make(looking_model, num_particles=4, vectorize_particles=True)
    found = profile(svi, Y, seconds=SECONDS)
    assert "1.0 if loc > 0" in text_on(found, "particles")


def test_checks_of_every_step():
    with settings.context(validate="always"):
        found = profile(make(), Y, seconds=SECONDS)
        assert settings.get("validate") == "always"
    assert found.unchecked_us > 0
    assert 'validate="first"' in text_on(found, "validation")
    assert "every step is to be checked" in text_on(found, "eager-only")


def test_data_converted_at_each_step():
    numbers = [0.5] * 10_000

    def converting(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        data = torch.tensor(numbers)
        pyro.sample("y", dist.Normal(loc, 1.0).expand((len(data),)).to_event(1), obs=data)

    found = profile(make(converting), Y, seconds=SECONDS)
    text = text_on(found, "conversion")
    assert "torch.tensor(numbers)" in text
    assert "40 kB" in text


def test_an_array_as_argument():
    def of_array(y):
        model(torch.as_tensor(y))

    found = profile(make(of_array), Y.numpy(), seconds=SECONDS)
    assert "argument 0 is a ndarray of shape (20,)" in text_on(found, "conversion")
    assert "argument 0 is a list of 2 numbers" in str(
        profile(make(of_array), [0.5, 1.0], seconds=SECONDS)
    )


def test_slow_batches():
    class Loader:
        def __iter__(self):
            for _ in range(30):
                time.sleep(0.005)
                yield (Y,)

    found = profile(make(), batches=Loader(), seconds=SECONDS)
    assert found.batch_us >= 5000
    assert "num_workers" in text_on(found, "batches")
    fast = profile(make(), batches=[(Y,)] * 30, seconds=SECONDS)
    assert fast.batch_us < 5000


def test_float64_is_questioned_where_bytes_matter():
    large = torch.zeros(600_000, dtype=torch.float64)

    def double(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand((len(y),)).to_event(1), obs=y)

    assert "4.8 MB" in text_on(profile(make(double), large, seconds=SECONDS), "float64")
    assert "float64" not in about(profile(make(double), large[:100].clone(), seconds=SECONDS))


def test_what_memory_bounds():
    native = NativeForm(100.0, 90.0, 0.1, 0.5, True, bytes=10**7, copy_us=80.0)
    found = Profile(EagerStep(150.0, 140.0), native, called="run", params_bytes=10**7)
    assert [advice.about for advice in advise(found)] == ["memory-bound"]
    quick = copy.copy(native)
    quick.copy_us = 10.0
    assert advise(Profile(found.eager, quick, called="run", params_bytes=10**7)) == []


def test_one_of_many_fits():
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO(), num_fits=3, seed=0)
    ys = Y + torch.zeros(3, 1)
    found = profile(svi, ys, fit_dims=(0,), seconds=SECONDS)
    assert found.num_fits == 3
    assert found.native is not None
    assert "one fit of 3" in str(found)
    assert svi.run(20, ys, fit_dims=(0,), progress_bar=False).losses.shape == (20, 3)


@pytest.mark.parametrize("seconds", [0, -1.0, True, "1", float("nan")])
def test_bad_seconds(seconds):
    with pytest.raises(ConstraintError, match="seconds"):
        profile(make(), Y, seconds=seconds)


def test_an_error_of_the_program_comes_through_and_changes_nothing():
    def failing(y):
        raise KeyError("no such column")

    svi = make(failing)
    with pytest.raises(KeyError, match="no such column"):
        profile(svi, Y, seconds=SECONDS)
    assert len(pyro.get_param_store()) == 0


def test_numbers_that_numpy_holds_are_no_array():
    assert "conversion" not in about(profile(make(), Y, seconds=SECONDS))
    assert np.float64(1.0).shape == ()
