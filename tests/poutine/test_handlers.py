"""Handlers one by one: what the comparison with Pyro's traces does not show."""

from __future__ import annotations

import queue
import random

import numpy as np
import pytest
import torch
from smoking import draw, smoking
from torch.distributions import constraints

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import DtypeError, ShapeError, SiteError
from fastsvi.poutine.errors import HandlerError
from fastsvi.poutine.runtime import STACK, NonlocalExit

# ---- replay ----


def test_replay_leaves_observations_and_other_sites_alone():
    trace = poutine.trace(smoking).get_trace()
    trace.remove_node("cancer")
    model = poutine.condition(smoking, data={"tar": torch.tensor(7.0)})
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    assert again.nodes["smoking"]["value"] is trace.nodes["smoking"]["value"]
    assert again.nodes["tar"]["value"] == 7.0


def test_replaying_an_observed_site(lib):
    def model():
        return lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))

    guide = lib.poutine.condition(model, data={"x": torch.tensor(1.0)})
    trace = lib.poutine.trace(guide).get_trace()
    with pytest.raises(RuntimeError, match=r"x must be sampled|'x' must be sampled"):
        lib.poutine.replay(model, trace=trace)()


def test_replaying_a_param_as_a_sample():
    trace = poutine.trace(lambda: pyro.param("x", torch.tensor(1.0))).get_trace()
    with pytest.raises(SiteError, match=r"'x'.*a param site"):
        poutine.replay(lambda: draw("x"), trace=trace)()


def test_replaying_params():
    def model():
        return pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)

    value = model()
    replayed = poutine.replay(model, params={"a": value})
    assert replayed() is value
    with pytest.raises(DtypeError, match=r"'a'.*unconstrained"):
        poutine.replay(model, params={"a": torch.tensor(3.0)})()
    with pytest.raises(HandlerError, match="trace or params"):
        poutine.replay(model)


# ---- block ----


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, []),
        ({"hide_all": False}, ["a", "b", "p"]),
        ({"hide_all": False, "expose_all": True}, ["a", "b", "p"]),
        ({"hide": ["a"]}, ["b", "p"]),
        ({"expose": ["a"]}, ["a"]),
        ({"hide_types": ["sample"]}, ["b", "p"]),
        ({"hide_types": ["observe"]}, ["a", "p"]),
        ({"expose_types": ["param"]}, ["p"]),
        ({"expose": ["a"], "hide_types": ["param"]}, ["a", "b"]),
        ({"hide": ["a"], "expose_types": ["sample", "param"]}, ["p"]),
        ({"hide_fn": lambda site: site["name"] == "a"}, ["b", "p"]),
        ({"expose_fn": lambda site: site["name"] == "a"}, ["a"]),
        ({"hide_fn": lambda site: None}, ["a", "b", "p"]),
    ],
)
def test_block(options, seen, lib):
    def model():
        lib.pyro.param("p", torch.tensor(1.0))
        lib.pyro.sample("a", lib.dist.Normal(0.0, 1.0))
        lib.pyro.sample("b", lib.dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    trace = lib.poutine.trace(lib.poutine.block(model, **options)).get_trace()
    assert sorted(name for name in trace.nodes if not name.startswith("_")) == seen


@pytest.mark.parametrize(
    "options",
    [
        {"hide_all": True, "expose_all": True},
        {"hide": ["a"], "expose": ["a"]},
        {"hide_types": ["sample"], "expose_types": ["sample"]},
        {"hide_fn": bool, "expose_fn": bool},
    ],
)
def test_contradictory_block(options):
    with pytest.raises(HandlerError):
        poutine.block(**options)


# ---- scale and mask ----


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), None, "2"])
def test_bad_scale(scale):
    with pytest.raises(HandlerError, match="positive"):
        poutine.scale(scale=scale)


def test_bad_scale_tensor_only_under_full_validation():
    bad = torch.tensor([1.0, 0.0])
    poutine.scale(scale=bad)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="positive"):
        poutine.scale(scale=bad)


@pytest.mark.parametrize("mask", [torch.ones(2), 2, None, "a"])
def test_bad_mask(mask):
    with pytest.raises(ValueError, match="bool"):
        poutine.mask(mask=mask)


def test_masked_entries_may_be_anything():
    """A NaN or infinite log-density under a false mask counts nothing, also in the gradient."""
    loc = torch.zeros(2, requires_grad=True)
    data = torch.tensor([1.0, float("nan")])

    def model():
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=data)

    total = poutine.trace(model).get_trace().log_prob_sum()
    assert torch.isfinite(total)


def test_scale_one_and_mask_true_cost_nothing():
    with poutine.trace() as tracer, poutine.scale(scale=1.0), poutine.mask(mask=True):
        draw("x")
    tracer.trace.compute_log_prob()
    site = tracer.trace.nodes["x"]
    assert site.log_prob is site.unscaled_log_prob


# ---- lift and substitute ----


def test_lift_with_a_function():
    def prior(*args, **kwargs):
        return draw("hidden") + 10.0

    def model():
        return pyro.param("s", torch.tensor(0.5))

    with poutine.trace() as tracer:
        assert poutine.lift(model, prior=prior)() > 5.0
    assert list(tracer.trace.nodes) == ["hidden"]


@pytest.mark.parametrize("handler", ["lift", "substitute"])
def test_unused_names_warn(handler, lib):
    def model():
        lib.pyro.param("s", torch.tensor(0.5))

    if handler == "lift":
        handled = lib.poutine.lift(model, prior={"sss": lib.dist.Normal(0.0, 1.0)})
    else:
        handled = lib.poutine.substitute(model, data={"sss": torch.tensor(1.0)})
    with pytest.warns(UserWarning, match=r"(?s)sss.*'s'"):
        handled()
    with lib.pyro.validation_enabled(False):
        handled()


def test_lift_needs_a_prior():
    with pytest.raises(DtypeError, match="prior must be"):
        poutine.lift(smoking)


def test_substituted_params_do_not_reach_the_store():
    poutine.substitute(lambda: pyro.param("a", torch.tensor(1.0)), data={"a": torch.tensor(2.0)})()
    assert "a" not in pyro.get_param_store()


# ---- seed ----


def test_seed_restores_all_generators():
    def numbers():
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

    pyro.set_rng_seed(1)
    expected = numbers()
    pyro.set_rng_seed(1)
    inside = poutine.seed(numbers, rng_seed=2)()
    assert numbers() == expected
    assert poutine.seed(numbers, rng_seed=2)() == inside
    with pytest.raises(DtypeError, match="integer"):
        poutine.seed(numbers, rng_seed=1.5)


def test_seed_nests_and_survives_exceptions():
    handler = poutine.seed(rng_seed=1)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), handler, handler:
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
    assert STACK == []


# ---- markov ----


def test_markov_arguments():
    with pytest.raises(ValueError, match="history"):
        poutine.markov(history=-1)
    with pytest.raises(NotImplementedError):
        poutine.markov(dim=-1)
    with pytest.raises(TypeError, match="history"):
        poutine.markov(history="a")


def test_markov_leaves_the_stack_after_a_break():
    for t in poutine.markov(range(5)):
        draw(f"x_{t}")
        if t == 2:
            break
    assert STACK == []


# ---- escape and queue ----


def test_escape():
    model = poutine.trace(poutine.escape(smoking, escape_fn=lambda msg: msg["name"] == "tar"))
    with pytest.raises(NonlocalExit) as caught:
        model()
    assert caught.value.site["name"] == "tar"
    assert list(model.trace.nodes) == ["_INPUT", "smoking"]
    assert STACK == []


def test_queue_enumerates_all_runs(lib):
    def model():
        p = torch.tensor(0.5)
        a = lib.pyro.sample("a", lib.dist.Bernoulli(p))
        return a, lib.pyro.sample("b", lib.dist.Bernoulli(p))

    traces = queue.Queue()
    traces.put(lib.poutine.Trace())
    run = lib.poutine.queue(model, queue=traces, max_tries=100)
    seen = []
    while not traces.empty():
        seen.append(tuple(int(x) for x in run()))
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_queue_under_a_trace(lib):
    """The outer trace is reset whenever a run is left, and keeps the arguments."""

    def model(p):
        x = lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
        lib.pyro.sample("y", lib.dist.Bernoulli(p))
        return x

    traces = queue.Queue()
    traces.put(lib.poutine.Trace())
    run = lib.poutine.trace(lib.poutine.queue(queue=traces)(model))
    first, second = run.get_trace(torch.tensor(0.5)), run.get_trace(torch.tensor(0.5))
    assert list(first.nodes) == ["_INPUT", "x", "y", "_RETURN"]
    assert first.nodes["_INPUT"]["args"] == (0.5,)
    assert {first.nodes["y"]["value"].item(), second.nodes["y"]["value"].item()} == {0.0, 1.0}
    assert first.nodes["x"]["value"] == second.nodes["x"]["value"]


def test_reset_stops_at_the_block_that_hides_the_site(lib):
    def model():
        lib.pyro.sample("before", lib.dist.Normal(0.0, 1.0))
        lib.pyro.sample("here", lib.dist.Normal(0.0, 1.0))

    with lib.poutine.trace() as outer, lib.poutine.block(hide=["here"]):
        with lib.poutine.trace() as inner:
            try:
                lib.poutine.escape(model, escape_fn=lambda msg: msg["name"] == "here")()
            except lib.poutine.NonlocalExit as exit_:
                exit_.reset_stack()
        assert "before" not in inner.trace
    assert "before" in outer.trace


def test_queue_errors():
    with pytest.raises(ValueError, match="empty"):
        poutine.queue(smoking, queue=queue.Queue())()
    traces = queue.Queue()
    traces.put(poutine.Trace())
    with pytest.raises(ValueError, match="no complete run in 0 tries"):
        poutine.queue(smoking, queue=traces, max_tries=0)()


# ---- enum ----


def test_enumerated_values_lie_left_of_the_plates():
    @poutine.enum(first_available_dim=-3)
    def model():
        with pyro.plate("a", 2):
            fn = dist.Categorical(torch.ones(4) / 4)
            x = pyro.sample("x", fn, infer={"enumerate": "parallel"})
            y = pyro.sample("y", fn, infer={"enumerate": "parallel", "expand": True})
            return x, y

    x, y = model()
    assert x.shape == (4, 1, 1)
    assert y.shape == (4, 1, 1, 2)


def test_replaying_an_enumerated_site(lib):
    fn = lib.dist.Categorical(torch.tensor([0.5, 0.25, 0.25]))
    coin = lib.dist.Bernoulli(torch.tensor(0.5))

    @lib.poutine.enum(first_available_dim=-3)
    def guide():
        lib.pyro.sample("y", fn, infer={"enumerate": "parallel"})

    @lib.poutine.enum(first_available_dim=-2)
    def model():
        lib.pyro.sample("a", coin, infer={"enumerate": "parallel"})
        lib.pyro.sample("y", fn, infer={"enumerate": "parallel"})
        lib.pyro.sample("b", coin, infer={"enumerate": "parallel"})

    guide_trace = lib.poutine.trace(guide).get_trace()
    trace = lib.poutine.trace(lib.poutine.replay(model, trace=guide_trace)).get_trace()
    assert trace.nodes["y"]["value"] is guide_trace.nodes["y"]["value"]
    assert [trace.nodes[n]["value"].shape for n in "ayb"] == [(2, 1), (3, 1, 1), (2, 1, 1, 1)]


def test_enum_needs_a_finite_nesting():
    with pytest.raises(HandlerError, match="negative"):
        poutine.enum(smoking, first_available_dim=1)()

    def model():
        pyro.sample("x", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})

    with pytest.raises(HandlerError, match="finite"):
        poutine.enum(model, first_available_dim=-float("inf"))()


def test_tensor_monte_carlo_is_not_there():
    infer = {"enumerate": "parallel", "num_samples": 3}

    def model():
        return pyro.sample("x", dist.Bernoulli(torch.tensor(0.5)), infer=infer)

    with pytest.raises(NotImplementedError, match="'x'"):
        poutine.enum(model, first_available_dim=-1)()
    infer["expand"] = True
    assert poutine.enum(model, first_available_dim=-1)().shape == (3,)


# ---- reparam ----


class Decentered:
    """loc + scale * standard normal."""

    args_kwargs = None
    seen = None

    def apply(self, msg):
        self.seen = self.args_kwargs
        fn = msg["fn"]
        noise = pyro.sample(f"{msg['name']}_decentered", dist.Normal(torch.zeros(()), 1.0))
        value = fn.loc + fn.scale * noise
        delta = dist.Delta(value, event_dim=0).mask(False)
        return {"fn": delta, "value": value, "is_observed": True}


def test_reparam():
    reparam = Decentered()

    def model(loc):
        return pyro.sample("x", dist.Normal(loc, 2.0))

    trace = poutine.trace(poutine.reparam(model, config={"x": reparam})).get_trace(3.0)
    assert trace.stochastic_nodes == ["x_decentered"]
    noise = trace.nodes["x_decentered"]["value"]
    assert torch.equal(trace.nodes["x"]["value"], 3.0 + 2.0 * noise)
    torch.testing.assert_close(trace.log_prob_sum(), dist.Normal(0.0, 1.0).log_prob(noise))
    assert reparam.seen == ((3.0,), {})
    assert reparam.args_kwargs is None


def test_reparam_by_a_function_leaves_other_sites():
    config = lambda site: Decentered() if site["name"] == "tar" else None  # noqa: E731
    trace = poutine.trace(poutine.reparam(smoking, config=config)).get_trace()
    assert trace.stochastic_nodes == ["smoking", "tar_decentered", "cancer"]
    with pytest.raises(ValueError, match="config"):
        poutine.reparam(smoking)


def test_reparam_checks_an_initial_value():
    def initialized(value):
        return poutine.reparam(
            poutine.condition(lambda: draw("x"), data={"x": value}), config={"x": Decentered()}
        )

    with pytest.raises(ShapeError, match=r"'x'.*Decentered"):
        initialized(torch.zeros(2))()
    with pytest.warns(RuntimeWarning, match=r"'x'.*Decentered"):
        initialized(torch.tensor(0.0))()


def test_equalize_starts_afresh_each_run():
    model = poutine.equalize(lambda: (draw("a"), draw("b")), ["a", "b"])
    (a, b), (c, d) = model(), model()
    assert a is b
    assert c is d
    assert a is not c
