"""Predictive: Pyro's shapes and sites, and the right distributions, in a loop and by vmap."""

from __future__ import annotations

import pyro as oracle
import pyro.distributions as oracle_dist
import pytest
import torch
from pyro.infer import Predictive as OraclePredictive
from pyro.infer.autoguide import AutoNormal as OracleAutoNormal

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import DtypeError, FastSVIWarning, ShapeError
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.predictive import Predictive, PredictiveError

# Programs that run under either library: p is the library, d its distributions.


def no_plate(p, d):
    a = p.sample("a", d.Normal(0.0, 1.0))
    b = p.deterministic("b", 2 * a)
    w = p.sample("w", d.Normal(0.0, 1.0).expand([3]).to_event(1))
    return p.sample("obs", d.Normal(b + w.sum(), 1.0))


def one_plate(p, d):
    a = p.sample("a", d.Normal(0.0, 1.0))
    w = p.sample("w", d.Normal(0.0, 1.0).expand([3]).to_event(1))
    with p.plate("data", 5):
        loc = p.deterministic("loc", a + w.sum() + torch.zeros(5))
        return p.sample("obs", d.Normal(loc, 1.0))


def two_plates(p, d):
    with p.plate("outer", 4, dim=-2):
        rate = p.sample("rate", d.Gamma(2.0, 1.0))
        with p.plate("inner", 5, dim=-1):
            return p.sample("obs", d.Poisson(rate))


def observed(p, d):
    a = p.sample("a", d.Normal(0.0, 1.0))
    with p.plate("data", 2):
        p.sample("obs", d.Normal(a, 1.0), obs=torch.tensor([1.0, 2.0]))
    return 2 * a


# Draws as a guide returns them: with a 1 for each plate that the site is not in.
SAMPLES = {
    no_plate: {"a": (), "w": (3,)},
    one_plate: {"a": (1,), "w": (1, 3)},
    two_plates: {"rate": (4, 1)},
    observed: {"a": (1,)},
}
SITES = [(), None, ["obs"], ["_RETURN"], {"a", "rate", "obs"}, ("_RETURN", "a", "rate", "obs")]


def shapes(draws):
    return {name: tuple(draw.shape) for name, draw in draws.items()}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("source", ["prior", "samples", "guide"])
@pytest.mark.parametrize("program", SAMPLES)
@pytest.mark.filterwarnings("ignore:return_sites names")
def test_sites_and_shapes_are_those_of_pyro(program, source, parallel):
    def ours():
        return program(pyro, dist)

    def theirs():
        return program(oracle, oracle_dist)

    def arguments(library, model, guide):
        if source == "prior":
            return {"num_samples": 7}
        if source == "guide":
            latent = library.poutine.block(model, hide=["obs"])
            return {"num_samples": 7, "guide": guide(latent)}
        return {"posterior_samples": {k: torch.rand(7, *s) for k, s in SAMPLES[program].items()}}

    for sites in SITES:
        for library in (pyro, oracle):
            library.clear_param_store()
        draws = Predictive(
            ours, **arguments(pyro, ours, AutoNormal), return_sites=sites, parallel=parallel
        )()
        expected = OraclePredictive(
            theirs, **arguments(oracle, theirs, OracleAutoNormal), return_sites=sites
        )()
        assert shapes(draws) == shapes(expected), sites
        assert not any(draw.requires_grad for draw in draws.values())


@pytest.mark.parametrize("parallel", [False, True])
def test_samples_reach_the_model_one_by_one_and_in_order(parallel):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        assert a.shape == ()  # not (1,), which is how a guide with a plate returns it
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Delta(10 * a + torch.arange(3.0)))
        return a

    given = torch.tensor([[1.0], [2.0]])
    draws = Predictive(model, {"a": given}, return_sites=("obs", "_RETURN"), parallel=parallel)()
    assert draws["obs"].tolist() == [[10.0, 11.0, 12.0], [20.0, 21.0, 22.0]]
    assert draws["_RETURN"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("parallel", [False, True])
def test_posterior_predictive_moments(parallel):
    """y = a + noise with a ~ N(3, 0.5) and noise ~ N(0, 1): mean 3, variance 1.25."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10):
            return pyro.sample("y", dist.Normal(a, 1.0))

    def guide():
        pyro.sample("a", dist.Normal(3.0, 0.5))

    n = 2000 if parallel else 500
    draws = Predictive(model, guide=guide, num_samples=n, parallel=parallel)()
    a, y = draws["a"].squeeze(-1), draws["y"]
    # Four standard errors of a mean and of a variance of n draws.
    assert float(a.mean()) == pytest.approx(3.0, abs=4 * 0.5 / n**0.5)
    assert float(y.mean()) == pytest.approx(3.0, abs=4 * 0.6 / n**0.5)
    assert float(y.var(0).mean()) == pytest.approx(1.25, abs=4 * 1.25 * (2 / n) ** 0.5)
    # Draws of y share the a of their sample and nothing else: covariance 0.25 within, 0 across.
    within = ((y[:, 0] - 3) * (y[:, 1] - 3)).mean()
    across = ((y[:-1, 0] - 3) * (y[1:, 1] - 3)).mean()
    assert float(within) == pytest.approx(0.25, abs=4 * 1.3 / n**0.5)
    assert float(across) == pytest.approx(0.0, abs=4 * 1.3 / n**0.5)


def test_parallel_needs_no_plates_and_runs_the_model_twice():
    runs = []

    def model(x):
        runs.append(1)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1))  # no plate around the rows

    draws = Predictive(model, num_samples=50, parallel=True)(torch.randn(4, 3))
    assert shapes(draws) == {"w": (50, 3), "y": (50, 4)}
    assert len(runs) == 2  # once to see the sites, once for all samples


def test_parallel_falls_back_to_the_loop_and_says_why():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        side = 1.0 if a > 0 else -1.0  # a branch on a value
        return pyro.sample("y", dist.Delta(torch.tensor(side)))

    predictive = Predictive(model, num_samples=20, parallel=True)
    with pytest.warns(FastSVIWarning, match=r"one after another.*data-dependent control flow"):
        draws = predictive()
    assert torch.equal(draws["y"], draws["a"].sign())


def test_an_error_of_the_model_itself_reaches_the_user():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return torch.zeros(2) @ torch.zeros(3) + a

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        Predictive(model, num_samples=2, parallel=True)()


def test_parameters_born_on_the_first_call_have_no_extra_axis():
    def model():
        loc = pyro.param("loc", lambda: torch.randn(3))
        return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    Predictive(model, num_samples=5, parallel=True)()
    assert pyro.param("loc").shape == (3,)


@pytest.mark.parametrize("parallel", [False, True])
def test_nested_and_missing_return_values(parallel):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return a, {"twice": 2 * a, "number": 3.0}

    def silent():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    sites = ("a", "_RETURN")
    draws = Predictive(model, num_samples=4, return_sites=sites, parallel=parallel)()
    first, rest = draws["_RETURN"]
    assert torch.equal(first, draws["a"])
    assert torch.equal(rest["twice"], 2 * draws["a"])
    assert rest["number"].tolist() == [3.0] * 4
    draws = Predictive(silent, num_samples=4, return_sites=sites, parallel=parallel)()
    assert draws["_RETURN"] is None


@pytest.mark.parametrize("parallel", [False, True])
def test_observations_may_be_numbers(parallel):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return pyro.sample("m", dist.Normal(a, 1.0), obs=9.5)

    draws = Predictive(model, num_samples=3, parallel=parallel)()
    assert draws["m"].tolist() == [9.5] * 3


def test_a_prior_that_cannot_be_drawn_from_is_no_hindrance():
    def model():
        scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
        return pyro.sample("x", dist.Normal(0.0, scale))

    assert shapes(Predictive(model, {"scale": torch.ones(6)})()) == {"x": (6,)}


def test_subsampled_plates_draw_anew_for_every_sample():
    data = torch.arange(100.0)

    def model():
        with pyro.plate("data", 100, subsample_size=5) as index:
            return pyro.sample("x", dist.Delta(data[index]))

    for parallel in (False, True):
        draws = Predictive(model, num_samples=8, parallel=parallel)()
        assert shapes(draws) == {"x": (8, 5)}
        assert len({tuple(sorted(row)) for row in draws["x"].tolist()}) > 1


def test_vectorized_trace_has_the_samples_leftmost():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("obs", dist.Normal(a + w.sum(-1), 1.0))

    # As MCMC returns them, without the plate's dimension, and as a guide does, with it.
    for samples in ({"a": torch.rand(7), "w": torch.rand(7, 3)}, {"a": torch.rand(7, 1)}):
        trace = Predictive(model, samples).get_vectorized_trace()
        sites = {n: tuple(trace.nodes[n]["value"].shape) for n in ("a", "w", "obs")}
        assert sites == {"a": (7, 1), "w": (7, 1, 3), "obs": (7, 5)}
        assert torch.equal(trace.nodes["a"]["value"].reshape(7), samples["a"].reshape(7))
    trace = Predictive(model, guide=AutoNormal(poutine.block(model, hide=["obs"])), num_samples=7)
    assert trace.get_vectorized_trace().nodes["obs"]["value"].shape == (7, 5)


def test_call_returns_a_tuple_in_order_of_the_names():
    def model():
        pyro.sample("z", dist.Delta(torch.tensor(1.0)))
        pyro.sample("a", dist.Delta(torch.tensor(2.0)))

    a, z = Predictive(model, num_samples=2).call()
    assert (a.tolist(), z.tolist()) == ([2.0, 2.0], [1.0, 1.0])


def test_model_and_guide_are_submodules():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = pyro.nn.PyroParam(torch.zeros(()))

        def forward(self):
            return pyro.sample("x", dist.Normal(self.loc, 1.0))

    predictive = Predictive(Model(), num_samples=2)
    assert [name for name, _ in predictive.named_parameters()] == ["model.loc_unconstrained"]
    assert shapes(predictive()) == {"x": (2,)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, PredictiveError, "give posterior_samples"),
        ({"posterior_samples": {}}, PredictiveError, "give posterior_samples"),
        ({"num_samples": 0}, PredictiveError, "at least one sample, found 0"),
        (
            {"posterior_samples": {"a": torch.rand(3)}, "guide": lambda: None},
            PredictiveError,
            r"found both \(samples of \['a'\]\)",
        ),
        (
            {"posterior_samples": {"a": torch.rand(3), "b": torch.rand(4)}},
            ShapeError,
            "'a' has 3, 'b' has 4",
        ),
        ({"num_samples": 2, "return_sites": "obs"}, DtypeError, "found str 'obs'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Predictive(lambda: None, **arguments)


def test_warnings():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.warns(FastSVIWarning, match="num_samples=5 is ignored: .* are 3"):
        assert Predictive(model, {"a": torch.rand(3)}, num_samples=5).num_samples == 3
    with pytest.warns(FastSVIWarning, match=r"return_sites names \['b'\].*it has \['a'\]"):
        assert Predictive(model, num_samples=2, return_sites=["b"])() == {}


def test_a_site_whose_shape_varies_is_named():
    def model():
        size = int(pyro.sample("size", dist.Poisson(3.0)))
        pyro.sample("ragged", dist.Normal(torch.zeros(size + 1), 1.0).to_event(1))

    with pytest.raises(ShapeError, match=r"'ragged' has another shape.*\(1,\), \(3,\)"):
        Predictive(model, {"size": torch.tensor([0.0, 2.0, 0.0])})()


def test_a_sample_may_lack_the_dimension_of_a_plate():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(2 * z))

    draws = Predictive(model, {"z": torch.tensor([1.0, 2.0])})()
    assert draws["x"].tolist() == [[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]
