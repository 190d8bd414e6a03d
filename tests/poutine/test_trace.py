"""Traces: recording, graphs, log-densities, and errors that name the site."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch.distributions import constraints

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine, settings
from fastsvi.errors import ConstraintError, MissingSiteError, ShapeError, SiteError
from fastsvi.poutine.message import Message
from fastsvi.poutine.trace_struct import Trace


def model(data=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        return pyro.sample("obs", dist.Normal(loc, 2.0), obs=data)


def test_log_density_is_analytic():
    """Against the density written out, in float64."""
    data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    loc = torch.tensor(0.25, dtype=torch.float64)
    conditioned = poutine.condition(model, data={"loc": loc})
    trace = poutine.trace(conditioned).get_trace(data)

    def normal(x, mean, sd):
        return -0.5 * ((x - mean) / sd) ** 2 - torch.log(torch.tensor(sd * (2 * torch.pi) ** 0.5))

    expected = normal(loc, 0.0, 1.0) + normal(data, loc, 2.0).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected.double())
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["obs"]["log_prob"], normal(data, loc, 2.0).double())


def test_input_and_return_are_recorded():
    data = torch.zeros(3)
    trace = poutine.trace(model).get_trace(data=data)
    assert trace.nodes["_INPUT"]["kwargs"] == {"data": data}
    assert trace.nodes["_INPUT"]["type"] == "args"
    assert trace.nodes["_RETURN"]["value"] is data


def test_site_filter():
    trace = poutine.trace(model).get_trace(torch.zeros(3))
    trace.compute_log_prob(lambda name, site: name == "obs")
    assert trace.nodes["loc"].log_prob is None
    only = trace.log_prob_sum(lambda name, site: site["is_observed"])
    assert torch.equal(only, trace.nodes["obs"].log_prob.sum())
    assert trace.log_prob_sum(lambda name, site: False) == 0.0


def test_results_are_computed_once():
    calls = []

    class Counting(dist.Normal):
        def log_prob(self, value):
            calls.append(value)
            return super().log_prob(value)

    trace = poutine.trace(lambda: pyro.sample("x", Counting(0.0, 1.0))).get_trace()
    trace.log_prob_sum()
    trace.log_prob_sum()
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [9.5, 9, True])
def test_observed_numbers(number, dtype):
    fn = dist.Normal(torch.tensor(8.0, dtype=dtype), 1.0).expand([2]).to_event(1)
    with poutine.trace() as tracer:
        assert pyro.sample("x", fn, obs=number) is number
    log_prob = tracer.trace.log_prob_sum()
    assert tracer.trace.nodes["x"]["value"] is number
    assert log_prob.dtype == dtype
    assert torch.equal(log_prob, fn.log_prob(torch.full((2,), float(number), dtype=dtype)))


def test_observed_numpy_array():
    np = pytest.importorskip("numpy")
    data = np.array([1.0, 2.0, 3.0])  # float64
    with poutine.trace() as tracer:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0), obs=data)
    assert tracer.trace.log_prob_sum().dtype == torch.float32


def test_nested_traces_do_not_share_results():
    with poutine.trace() as outer, poutine.trace() as inner:
        pyro.sample("x", dist.Normal(0.0, 1.0))
    inner.trace.compute_log_prob()
    assert outer.trace.nodes["x"].log_prob is None
    inner.trace.nodes["x"]["value"] = None
    assert outer.trace.nodes["x"]["value"] is not None


def test_get_trace_returns_a_copy():
    handler = poutine.trace(model)
    trace = handler.get_trace()
    trace.remove_node("loc")
    assert "loc" in handler.trace
    assert "loc" not in trace


def test_a_trace_messenger_starts_afresh():
    handler = poutine.trace(model)
    first = handler.get_trace()
    second = handler.get_trace()
    assert first.nodes["loc"]["value"] is not second.nodes["loc"]["value"]


def test_detach():
    scale = torch.tensor(1.0, requires_grad=True)
    trace = poutine.trace(lambda: pyro.sample("x", dist.Normal(0.0, scale))).get_trace()
    assert trace.nodes["x"]["value"].requires_grad
    trace.detach_()
    assert not trace.nodes["x"]["value"].requires_grad


def test_deepcopy_and_pickle():
    trace = poutine.trace(model).get_trace(torch.zeros(3))
    for other in (copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        assert list(other.nodes) == list(trace.nodes)
        assert torch.equal(other.log_prob_sum(), trace.log_prob_sum())


def test_pickling_a_param_site_leaves_the_store_behind():
    pyro.param("big", torch.zeros(100_000))

    def small():
        pyro.param("a", torch.ones(2), constraint=constraints.positive)

    trace = poutine.trace(small).get_trace()
    trace.nodes["a"]["value"] = trace.nodes["a"]["value"].detach().clone()
    assert len(pickle.dumps(trace)) < 10_000


# ---- graphs ----


def test_edges():
    trace = Trace("dense")
    for name in "abc":
        trace.add_node(name, name=name, type="sample")
    trace.add_edge("a", "b")
    trace.add_edge("b", "c")
    assert list(trace.edges) == [("a", "b"), ("b", "c")]
    assert trace.successors("a") == {"b"}
    assert trace.predecessors("c") == {"b"}
    assert trace.successors("c") == set()
    assert trace.topological_sort() == ["a", "b", "c"]
    assert trace.topological_sort(reverse=True) == ["c", "b", "a"]
    other = trace.copy()
    trace.remove_node("b")
    assert list(trace.edges) == []
    assert list(other.edges) == [("a", "b"), ("b", "c")]
    for missing in (trace.successors, trace.predecessors, trace.remove_node):
        with pytest.raises(MissingSiteError, match="'b'"):
            missing("b")
    with pytest.raises(KeyError):
        trace.add_edge("a", "b")


def test_topological_order_of_a_diamond():
    trace = Trace("dense")
    for name in "dcba":
        trace.add_node(name, name=name, type="sample")
    for edge in ("ab", "ac", "bd", "cd"):
        trace.add_edge(*edge)
    order = trace.topological_sort()
    assert all(order.index(before) < order.index(after) for before, after in trace.edges)


def test_bad_graph_type():
    with pytest.raises(ValueError, match="'flat' or 'dense'"):
        poutine.trace(graph_type="round")


# ---- errors ----


def test_duplicate_site_name(lib):
    def twice():
        lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))
        lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match=r"Multiple sample sites named 'x'"):
        lib.poutine.trace(twice).get_trace()


def test_one_name_for_a_param_and_a_sample(lib):
    def both():
        lib.pyro.param("x", torch.tensor(1.0))
        lib.pyro.sample("x", lib.dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match="already in the trace as a param"):
        lib.poutine.trace(both).get_trace()


def test_errors_in_a_model_show_the_shapes_so_far(lib):
    def failing():
        lib.pyro.sample("x", lib.dist.Normal(torch.zeros(3), 1.0).to_event(1))
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"(?s)mine\nTrace Shapes:.*x dist.*3"):
        lib.poutine.trace(failing).get_trace()


def test_the_error_object_survives():
    """Pyro makes a new exception, which fails for types with other arguments."""

    class MyError(ValueError):
        def __init__(self, number, why):
            super().__init__(number, why)

    mine = MyError(3, "reasons")

    def failing():
        raise mine

    with pytest.raises(MyError) as caught:
        poutine.trace(poutine.trace(failing)).get_trace()
    assert caught.value is mine


def test_shapes_are_appended_once():
    def failing():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        poutine.trace(poutine.trace(failing)).get_trace()
    assert str(caught.value).count("Trace Shapes:") == 1


@pytest.mark.parametrize("method", ["log_prob_sum", "compute_log_prob", "compute_score_parts"])
def test_value_outside_of_the_support(method):
    with poutine.trace() as tracer:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("rate", dist.Exponential(1.0), obs=torch.tensor(-3.0))
    with pytest.raises(ConstraintError) as caught:
        getattr(tracer.trace, method)()
    message = str(caught.value)
    assert "'rate'" in message
    assert "-3" in message
    assert "support" in message
    assert "Trace Shapes:" in message
    assert tracer.trace.nodes["rate"].log_prob is None


@pytest.mark.parametrize("validate", [True, False])
def test_observation_of_the_wrong_shape(validate):
    def bad():
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=torch.zeros(5))

    with pyro.validation_enabled(validate):
        trace = poutine.trace(bad).get_trace()
        with pytest.raises(
            ShapeError, match=r"(?s)'obs'.*obs has shape \(5,\).*batch shape \(3,\)"
        ):
            trace.log_prob_sum()


def test_other_runtime_errors_pass_unchanged():
    class Broken(dist.Normal):
        def log_prob(self, value):
            raise RuntimeError("out of luck")

    trace = poutine.trace(lambda: pyro.sample("x", Broken(0.0, 1.0))).get_trace()
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        trace.log_prob_sum()


def test_a_function_has_no_density():
    trace = poutine.trace(lambda: pyro.sample("x", lambda: torch.tensor(1.0))).get_trace()
    with pytest.raises(SiteError, match=r"'x'.*no log_prob"):
        trace.log_prob_sum()


def test_do_not_trace():
    with poutine.trace() as tracer:
        pyro.sample("x", dist.Normal(0.0, 1.0), infer={"_do_not_trace": True, "is_auxiliary": True})
    assert "x" not in tracer.trace
    with pytest.raises(ValueError, match="auxiliary"), poutine.trace():
        pyro.sample("x", dist.Normal(0.0, 1.0), infer={"_do_not_trace": True})


# ---- validation ----


def test_non_finite_densities_warn_only_under_full_validation(lib):
    def nan():
        fn = lib.dist.Normal(torch.tensor(float("nan")), 1.0, validate_args=False)
        lib.pyro.sample("x", fn, obs=torch.tensor(0.0))

    trace = lib.poutine.trace(nan).get_trace()
    with lib.pyro.validation_enabled(True), pytest.warns(UserWarning, match=r"NaN.*site 'x'"):
        trace.log_prob_sum()
    with lib.pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        lib.poutine.trace(nan).get_trace().log_prob_sum()


def test_default_validation_does_not_synchronise():
    """On the meta device there are no values: whatever reads one raises."""
    assert settings.get("validate") == "first"

    def on_meta():
        loc = torch.zeros(3, device="meta")
        with pyro.plate("data", 3, device="meta"):
            fn = dist.Normal(loc, 1.0, validate_args=False)
            pyro.sample("x", fn, obs=torch.zeros(3, device="meta"))

    trace = poutine.trace(poutine.scale(on_meta, scale=2.0)).get_trace()
    trace.compute_log_prob()
    trace.compute_score_parts()
    assert trace.log_prob_sum().device.type == "meta"


def test_backward_of_a_non_finite_density_warns():
    x = torch.tensor(0.0, requires_grad=True)
    fn = dist.Delta(torch.zeros(()), log_density=x.sqrt())
    with poutine.trace() as tracer:
        pyro.sample("x", fn)
    with pyro.validation_enabled(True):
        total = tracer.trace.log_prob_sum()
        with pytest.warns(UserWarning, match="backward log_prob_sum at site 'x'"):
            total.backward(torch.tensor(float("nan")))


def test_add_site_takes_the_message_itself():
    trace = Trace()
    site = Message("sample", "x")
    trace.add_site(site)
    assert trace.nodes["x"] is site
