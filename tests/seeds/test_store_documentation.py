"""Seed 002, the documentation of Pyro's parameter store: each of its statements and examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.optim import Adam


def test_init_tensor_is_used_only_the_first_time():
    first = pyro.param("x", torch.tensor(1.0))
    assert pyro.param("x", torch.tensor(2.0)) is first
    pyro.clear_param_store()
    assert pyro.param("x", torch.tensor(2.0)).item() == 2.0


def test_parameters_of_modules_are_prefixed():
    store = pyro.get_param_store()
    pyro.param("weight", torch.zeros(()))
    pyro.module("one", nn.Linear(2, 1))
    pyro.module("two", nn.Linear(2, 1))
    assert set(store) == {
        "weight",
        *(f"{module}$$${param}" for module in ("one", "two") for param in ("weight", "bias")),
    }


def test_a_positive_parameter_lives_in_log_space():
    value = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    unconstrained = dict(pyro.get_param_store().named_parameters())["scale"]
    assert value.item() == pytest.approx(0.5)
    assert unconstrained.item() == pytest.approx(math.log(0.5))


def test_items_and_values_are_constrained():
    store = pyro.get_param_store()
    pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    assert [(name, value.item()) for name, value in store.items()] == [("scale", 0.5)]
    assert [value.item() for value in store.values()] == [0.5]
    assert list(store.keys()) == ["scale"]


def test_setdefault_calls_a_lazy_init_only_when_it_is_needed():
    # The documentation's example says ``get``; the method that it documents is ``setdefault``.
    param_store = pyro.get_param_store()
    calls = []

    def init():
        calls.append(1)
        return (0.001 * torch.randn(10, 10)).exp()

    first = param_store.setdefault("foo", init, constraint=constraints.positive)
    second = param_store.setdefault("foo", init, constraint=constraints.positive)
    assert len(calls) == 1
    assert bool((first > 0).all())
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_match_and_param_name():
    store = pyro.get_param_store()
    for name in ("loc.a", "loc.b", "scale.a"):
        pyro.param(name, torch.zeros(()))
    assert set(store.match("loc")) == {"loc.a", "loc.b"}
    assert store.param_name(pyro.param("loc.b")) == "loc.b"
    assert store.param_name(torch.zeros(())) is None


def test_save_load_and_update_module_params(tmp_path):
    path = str(tmp_path / "saved_params.save")
    trained = nn.Linear(3, 2)
    pyro.module("module", trained)
    pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    pyro.get_param_store().save(path)

    pyro.clear_param_store()
    fresh = nn.Linear(3, 2)
    pyro.get_param_store().load(path)
    pyro.module("module", fresh, update_module_params=True)
    torch.testing.assert_close(fresh.weight, trained.weight, rtol=0, atol=0)
    assert pyro.param("scale").item() == pytest.approx(2.0)


def test_get_state_clear_set_state():
    store = pyro.get_param_store()
    pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    state = store.get_state()
    assert set(state) == {"params", "constraints"}
    store.clear()
    assert len(store) == 0
    store.set_state(state)
    assert pyro.param("scale").item() == pytest.approx(2.0)


def test_two_models_in_two_scopes():
    param_store = pyro.get_param_store()

    def fit(observed):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(observed))

        def guide():
            loc = pyro.param("loc", torch.tensor(0.0))
            pyro.sample("x", dist.Normal(loc, 0.5**0.5))

        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(100):
            svi.step()
        return pyro.param("loc").item()

    # Train multiple models, while avoiding param name conflicts.
    with param_store.scope() as scope1:
        first = fit(-4.0)
    with param_store.scope() as scope2:
        second = fit(4.0)
    assert len(param_store) == 0

    # Now evaluate each, still avoiding name conflicts.
    with param_store.scope(scope1):  # loads the first model's scope
        assert pyro.param("loc").item() == first
    with param_store.scope(scope2):  # loads the second model's scope
        assert pyro.param("loc").item() == second
    # The posteriors are Normal(-2, ..) and Normal(2, ..); Adam at 0.1 gets well past half way.
    assert first < -1 < 1 < second
