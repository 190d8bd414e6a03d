"""Where automatic guides start."""

import math

import pyro
import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import NonFiniteError, ShapeError
from fastsvi.infer.autoguide import (
    AutoNormal,
    InitMessenger,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from fastsvi.infer.autoguide.initialization import InitializationError, UnsupportedSiteError

SITES = {
    "real": lambda d: d.Normal(3.0, 1.0),
    "positive": lambda d: d.Gamma(2.0, 1.0),
    "unit": lambda d: d.Beta(2.0, 3.0),
    "interval": lambda d: d.Uniform(2.0, 5.0),
    "vector": lambda d: d.Normal(torch.zeros(3), 1.0).to_event(1),
    "simplex": lambda d: d.Dirichlet(torch.ones(4)),
    "cholesky": lambda d: d.LKJCholesky(3, 1.0),
    "batched": lambda d: d.LogNormal(torch.zeros(2, 1), 1.0).expand([2, 3]),
}


def site_of(name, library=dist):
    return {"name": name, "fn": SITES[name](library)}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize(
    "strategy",
    [init_to_feasible, init_to_sample, init_to_median, init_to_mean, init_to_uniform],
    ids=lambda s: s.__name__,
)
def test_values_lie_in_the_support(strategy, name):
    site = site_of(name)
    for configured in (strategy, strategy()):
        value = configured(site)
        assert value.shape == site["fn"].shape()
        assert site["fn"].support.check(value).all()
        assert not value.requires_grad


@pytest.mark.parametrize("name", SITES)
def test_feasible_points_are_those_of_pyro(name):
    theirs = pyro.infer.autoguide.init_to_feasible(site_of(name, pyro.distributions))
    torch.testing.assert_close(init_to_feasible(site_of(name)), theirs)


def test_median_is_near_the_median():
    site = {"name": "x", "fn": dist.Normal(3.0, 1.0)}
    # The median of 4000 draws has a standard error of 1.25 / sqrt(4000) = 0.02.
    assert abs(init_to_median(site, num_samples=4000) - 3.0) < 0.1


def test_mean_falls_back_where_there_is_none():
    site = {"name": "x", "fn": dist.Cauchy(7.0, 1.0)}
    assert torch.isfinite(init_to_mean(site))
    with pytest.raises(InitializationError, match="'x'"):
        init_to_mean(site, fallback=None)


def test_uniform_stays_within_its_radius():
    site = {"name": "x", "fn": dist.Normal(torch.zeros(1000), 1.0)}
    value = init_to_uniform(site, radius=0.5)
    assert value.abs().max() <= 0.5
    assert value.abs().max() > 0.45


def test_value_and_its_fallback():
    site = {"name": "x", "fn": dist.Normal(0.0, 1.0)}
    given = init_to_value(values={"x": torch.tensor(4.0)}, fallback=None)
    assert given(site) == 4.0
    with pytest.raises(InitializationError, match=r"\['x'\] only"):
        given({"name": "y", "fn": dist.Normal(0.0, 1.0)})
    fallen = init_to_value(values={}, fallback=init_to_feasible)
    assert fallen(site) == 0.0


def test_generated_is_asked_once_per_run():
    made = []

    def generate():
        made.append(1)
        return init_to_value(values={"x": torch.tensor(float(len(made)))})

    @InitMessenger(init_to_generated(generate=generate))
    def model():
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        fastsvi.sample("y", dist.Normal(0.0, 1.0))
        return x

    assert model() == 1.0
    assert model() == 2.0
    assert len(made) == 2


class TestInitMessenger:
    def test_gives_latent_sites_their_values_only(self):
        def model():
            fastsvi.sample("x", dist.Normal(0.0, 1.0))
            fastsvi.sample("obs", dist.Normal(0.0, 1.0), obs=torch.tensor(9.0))
            with fastsvi.plate("plate", 10, subsample_size=3):
                fastsvi.sample("z", dist.Normal(0.0, 1.0))

        init = init_to_value(values={"x": 5.0, "z": torch.tensor(2.0), "obs": 1.0})
        nodes = poutine.trace(InitMessenger(init)(model)).get_trace().nodes
        assert nodes["x"]["value"] == 5.0
        assert nodes["obs"]["value"] == 9.0
        assert nodes["plate"]["value"].shape == (3,)
        # A value for one element serves all, but each gets its own.
        assert nodes["z"]["value"].tolist() == [2.0, 2.0, 2.0]

    def test_wrong_shape_names_the_site(self):
        init = init_to_value(values={"x": torch.zeros(4)})
        with pytest.raises(ShapeError, match="'x'"), InitMessenger(init):
            fastsvi.sample("x", dist.Normal(torch.zeros(3), 1.0))

    def test_inner_handlers_win(self):
        def model():
            with InitMessenger(init_to_value(values={"x": torch.tensor(1.0)})):
                return fastsvi.sample("x", dist.Normal(0.0, 1.0))

        with InitMessenger(init_to_value(values={"x": torch.tensor(2.0)})):
            assert model() == 1.0


class TestSupports:
    def test_discrete_sites_are_refused_with_a_way_out(self):
        def model():
            fastsvi.sample("k", dist.Bernoulli(0.5))

        with pytest.raises(UnsupportedSiteError, match=r"'k' is discrete.*block"):
            AutoNormal(model)()


class TestInfeasibleStart:
    def test_a_start_without_density_is_moved(self):
        """At the feasible point 0 the square has no finite log: some other start has."""

        def model():
            x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
            fastsvi.factor("log", (x**2).log())

        guide = AutoNormal(model)
        guide()
        start = fastsvi.param("AutoNormal.locs.x").item()
        assert start != 0.0
        assert math.isfinite(start)

    def test_random_strategies_are_tried_again(self):
        tries = []

        def init(site):
            tries.append(1)
            return torch.tensor(float(len(tries) - 2))

        def model():
            x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
            fastsvi.factor("log", x.log())

        AutoNormal(model, init_loc_fn=init)()
        assert fastsvi.param("AutoNormal.locs.x") == 1.0
        assert len(tries) == 3

    def test_hopeless_starts_are_an_error_that_names_the_site(self):
        def model():
            x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
            fastsvi.sample("obs", dist.Normal(x, 1.0), obs=torch.tensor(math.nan))

        guide = AutoNormal(model)
        for _ in range(2):  # and the guide is not left half made
            with pytest.raises(NonFiniteError, match="'obs'"):
                guide()
        assert guide.prototype_trace is None
