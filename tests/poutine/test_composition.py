"""Laws of handler composition, on random stacks of handlers and random plates."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.poutine.log_density import log_density
from fastsvi.poutine.runtime import STACK

# Few examples, for the suite runs on one slow core; each example runs a handful of small models.
few = settings(max_examples=25, deadline=None, derandomize=True)

SITES = ("a", "b", "c")


def model():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))
    return a


scales = st.floats(0.25, 4.0).map(lambda s: ("scale", s))
masks = st.sampled_from([True, False]).map(lambda m: ("mask", m))
conditions = st.sampled_from(SITES).map(lambda name: ("condition", name))
interventions = st.sampled_from(SITES).map(lambda name: ("do", name))
blocks = st.sampled_from(SITES).map(lambda name: ("block", name))


def apply(handlers, fn):
    for kind, argument in handlers:
        if kind == "scale":
            fn = poutine.scale(fn, scale=argument)
        elif kind == "mask":
            fn = poutine.mask(fn, mask=argument)
        elif kind == "condition":
            fn = poutine.condition(fn, data={argument: torch.tensor(0.5)})
        elif kind == "do":
            fn = poutine.do(fn, data={argument: torch.tensor(-0.5)})
        else:
            fn = poutine.block(fn, hide=[argument])
    return fn


def traced(fn, seed=0):
    return poutine.trace(poutine.seed(fn, rng_seed=seed)).get_trace()


def summary(trace):
    return {
        name: (site["scale"], site["mask"], site["is_observed"], site["value"].tolist())
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
    }


@few
@given(st.lists(scales, max_size=4), st.randoms())
def test_scales_multiply_in_any_order(handlers, random):
    shuffled = list(handlers)
    random.shuffle(shuffled)
    product = math.prod(scale for _, scale in handlers)
    plain = traced(model).log_prob_sum()
    scaled = traced(apply(shuffled, model)).log_prob_sum()
    torch.testing.assert_close(scaled, product * plain)


@few
@given(st.lists(st.one_of(scales, masks, conditions), max_size=4), st.randoms())
def test_scale_mask_and_condition_commute(handlers, random):
    shuffled = list(handlers)
    random.shuffle(shuffled)
    first, second = traced(apply(handlers, model)), traced(apply(shuffled, model))
    for name, (scale, *rest) in summary(first).items():
        other_scale, *other_rest = summary(second)[name]
        assert math.isclose(scale, other_scale, rel_tol=1e-12)
        assert rest == other_rest


@few
@given(st.sets(st.sampled_from(SITES), max_size=2), st.sampled_from(SITES))
def test_interventions_and_observations_on_different_sites_commute(observed, intervened):
    observed = [("condition", name) for name in observed - {intervened}]
    act = [("do", intervened)]
    first, second = traced(apply(observed + act, model)), traced(apply(act + observed, model))
    assert summary(first) == summary(second)


@few
@given(st.lists(st.one_of(scales, masks, conditions, interventions, blocks), max_size=5))
def test_replay_reproduces_the_density(handlers):
    handlers = list(dict.fromkeys(handlers))  # two interventions on one site warn, by design
    program = apply(handlers, model)
    first = traced(program, seed=1)
    again = traced(poutine.replay(program, trace=first), seed=2)
    hidden = {argument for kind, argument in handlers if kind == "block"}
    if not hidden:
        assert summary(first) == summary(again)
        torch.testing.assert_close(
            torch.as_tensor(first.log_prob_sum()), torch.as_tensor(again.log_prob_sum())
        )
    assert STACK == []


@few
@given(st.lists(st.one_of(scales, masks, conditions), max_size=5))
def test_log_density_equals_the_trace(handlers):
    program = apply(handlers, model)
    trace = traced(program)
    values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    log_joint, _ = log_density(poutine.seed(program, rng_seed=0), values=values)
    torch.testing.assert_close(log_joint, torch.as_tensor(trace.log_prob_sum()))


@few
@given(st.lists(st.one_of(scales, masks, conditions), max_size=4))
def test_a_block_shields_the_outside(handlers):
    with poutine.trace() as outer:
        poutine.block(apply(handlers, model))()
    assert len(outer.trace) == 0


@few
@given(
    st.dictionaries(
        st.integers(-4, -1), st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=4
    ),
    st.integers(0, 2),
)
def test_plates_give_shape_scale_and_density(sizes, event_dim):
    """``sizes``: dim -> (full size, part of it); the density is that of independent copies."""
    plates = [
        pyro.plate(f"plate_{-dim}", max(full, part), subsample_size=part, dim=dim)
        for dim, (full, part) in sizes.items()
    ]
    fn = dist.Normal(torch.zeros((2,) * event_dim), 1.0).to_event(event_dim)

    def run(remaining):
        if remaining:
            with remaining[0]:
                return run(remaining[1:])
        return pyro.sample("x", fn)

    with poutine.trace() as tracer:
        value = run(plates)
    parts = [sizes[dim][1] if dim in sizes else 1 for dim in range(min(sizes, default=0), 0)]
    assert value.shape == (*parts, *(2,) * event_dim)
    factor = math.prod(max(full, part) / part for full, part in sizes.values())
    tracer.trace.compute_log_prob()
    expected = dist.Normal(0.0, 1.0).log_prob(value).sum() * factor
    torch.testing.assert_close(tracer.trace.nodes["x"].log_prob_sum, expected)
    assert {frame.dim for frame in tracer.trace.nodes["x"].cond_indep_stack} == set(sizes)
