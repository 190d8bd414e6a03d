"""The traceless log-density equals the trace's, under vmap and in a captured graph too."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import constraints

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import SiteError
from fastsvi.poutine.log_density import log_density


def model(data, scale=1.0):
    """Every way to change a density: plates, subsampling, scale, mask, factor, deterministic."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    sd = pyro.param("sd", torch.tensor(2.0), constraint=constraints.positive)
    pyro.deterministic("twice", 2 * loc)
    pyro.factor("penalty", -(loc**2))
    with pyro.plate("data", len(data), subsample=torch.tensor([2, 0])) as i:
        local = pyro.sample("local", dist.Normal(loc, sd))
        with poutine.mask(mask=torch.tensor([True, False])), poutine.scale(scale=scale):
            pyro.sample("obs", dist.Normal(local, 1.0), obs=data[i])
        with poutine.mask(mask=False):
            pyro.sample("ignored", dist.Normal(0.0, 1.0), obs=data[i])
    with poutine.mask(mask=True):
        pyro.sample("number", dist.Normal(loc, 1.0), obs=1.5)


DATA = torch.tensor([0.5, -1.0, 2.0])


def by_trace(values, **kwargs):
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    replayed = poutine.replay(model, trace=trace)
    return poutine.trace(replayed).get_trace(DATA, **kwargs).log_prob_sum()


def values_for(loc):
    return {"loc": loc, "local": torch.stack([loc + 1.0, loc - 0.5])}


def test_equals_the_trace():
    values = values_for(torch.tensor(0.3))
    log_joint, sites = log_density(model, (DATA,), {"scale": 3.0}, values)
    assert torch.equal(log_joint, by_trace(values, scale=3.0))
    assert sites["loc"].value is values["loc"]
    assert sites["number"]["value"] == 1.5
    assert list(sites) == [
        *("loc", "twice", "penalty", "data", "local", "obs", "ignored", "number"),
    ]


def test_under_vmap():
    locs = torch.tensor([0.3, -1.0, 2.0])

    def density(loc):
        return log_density(model, (DATA,), values=values_for(loc))[0]

    pyro.param("sd", torch.tensor(2.0), constraint=constraints.positive)
    actual = torch.func.vmap(density)(locs)
    expected = torch.stack([by_trace(values_for(loc)) for loc in locs])
    torch.testing.assert_close(actual, expected)


def test_in_a_captured_graph_with_gradients():
    pyro.param("sd", torch.tensor(2.0), constraint=constraints.positive)

    def loss(loc):
        value = log_density(model, (DATA,), values=values_for(loc))[0]
        (gradient,) = torch.autograd.grad(value, loc)
        return value.detach(), gradient

    graph = torch.fx.experimental.proxy_tensor.make_fx(loss)(torch.tensor(0.0, requires_grad=True))
    at = torch.tensor(0.7, requires_grad=True)
    value, gradient = graph(at)
    torch.testing.assert_close(value, by_trace(values_for(torch.tensor(0.7))).detach())
    torch.testing.assert_close(gradient, loss(at)[1])


def test_params_are_substituted():
    values = values_for(torch.tensor(0.3))
    other = log_density(model, (DATA,), values=values, params={"sd": torch.tensor(5.0)})[0]
    assert "sd" not in pyro.get_param_store()
    pyro.param("sd", torch.tensor(5.0), constraint=constraints.positive)
    torch.testing.assert_close(other, by_trace(values).detach())


def test_missing_latents_are_sampled():
    def guide():
        loc = pyro.sample("loc", dist.Normal(1.0, 0.1))
        pyro.sample("x", dist.Normal(loc, 1.0))

    log_q, sites = log_density(guide)
    trace = poutine.trace(
        poutine.condition(guide, data={name: site.value for name, site in sites.items()})
    ).get_trace()
    torch.testing.assert_close(log_q, trace.log_prob_sum())


def test_values_at_observed_sites_are_ignored():
    def observed():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    a, b = log_density(observed)[0], log_density(observed, values={"x": torch.tensor(9.0)})[0]
    assert torch.equal(a, b)


def test_outer_handlers_count():
    with poutine.scale(scale=3.0):
        scaled = log_density(lambda: draw_zero())[0]
    torch.testing.assert_close(scaled, 3.0 * log_density(draw_zero)[0])


def draw_zero():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def test_no_sites():
    assert log_density(lambda: None)[0] == 0.0


def test_duplicate_names():
    with pytest.raises(SiteError, match="Multiple sample sites named 'x'"):
        log_density(lambda: (draw_zero(), draw_zero()))


def test_the_state_is_restored_after_an_error():
    def failing():
        raise KeyError("mine")

    before = torch.distributions.Distribution._validate_args
    with pytest.raises(KeyError):
        log_density(failing)
    assert torch.distributions.Distribution._validate_args == before
