"""Comparing the traces of a model and its guide."""

import warnings

import pyro
import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import FastSVIWarning, ShapeError, SiteError
from fastsvi.infer.checks import (
    check_fully_reparametrized,
    check_if_enumerated,
    check_model_guide_match,
    check_site_shape,
)


def trace(program):
    result = poutine.trace(program).get_trace()
    result.compute_score_parts()
    return result


def normal(shape, event_dim=0):
    return lambda: fastsvi.sample("x", dist.Normal(torch.zeros(shape), 1.0).to_event(event_dim))


def in_pyro_as(site):
    """A trace of Pyro with a site of the same shape."""
    fn = pyro.distributions.Normal(0.0, 1.0).expand(site["value"].shape)
    fn = fn.to_event(site["fn"].event_dim)
    return pyro.poutine.trace(lambda: pyro.sample("x", fn)).get_trace()


@pytest.mark.parametrize(
    ("model", "guide", "fits"),
    [
        (normal(3, 1), normal(3, 1), True),
        (normal(3, 1), normal(4, 1), False),
        (normal((2, 3), 1), normal((2, 3), 2), False),
        (normal((1, 3), 1), normal((3,), 1), True),
        (normal((2, 3), 1), normal((3,), 1), False),
    ],
)
def test_shapes_as_pyro_sees_them(model, guide, fits):
    traces = trace(model), trace(guide)
    in_pyro = [in_pyro_as(t.nodes["x"]) for t in traces]
    if fits:
        check_model_guide_match(*traces)
        pyro.util.check_model_guide_match(*in_pyro)
    else:
        with pytest.raises(ShapeError, match="'x'"):
            check_model_guide_match(*traces)
        with pytest.raises(ValueError, match="disagree"):
            pyro.util.check_model_guide_match(*in_pyro)


def test_dimensions_left_of_max_plate_nesting_may_differ():
    check_model_guide_match(trace(normal((5, 3), 1)), trace(normal((3,), 1)), max_plate_nesting=0)


def test_auxiliary_sites_are_silent():
    def guide():
        fastsvi.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model_guide_match(trace(lambda: None), trace(guide))
    with pytest.warns(FastSVIWarning, match="also stand in the model: 'aux'"):
        check_model_guide_match(trace(guide), trace(guide))


def test_plates_of_the_guide_alone():
    def guide():
        fastsvi.plate("rows", 5, subsample_size=2)

    with pytest.warns(FastSVIWarning, match="plates in the guide but not in the model: 'rows'"):
        check_model_guide_match(trace(lambda: None), trace(guide))


def test_factors_in_the_guide():
    def guide():
        fastsvi.factor("good", torch.tensor(1.0), has_rsample=True)

    check_model_guide_match(trace(lambda: None), trace(guide))


class TestSiteShape:
    def check(self, program, **options):
        for site in trace(program).nodes.values():
            if site["type"] == "sample" and "x" in site["name"]:
                check_site_shape(site, **options)

    def test_good(self):
        def program():
            with fastsvi.plate("a", 3, dim=-2), fastsvi.plate("b", 2, dim=-1):
                fastsvi.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))

        self.check(program)

    def test_batch_without_plate(self):
        with pytest.raises(ShapeError, match=r"'x'.*\(3,\)"):
            self.check(normal(3))

    def test_unused_dim_between_plates(self):
        def program():
            with fastsvi.plate("a", 3, dim=-3), fastsvi.plate("b", 2, dim=-1):
                fastsvi.sample("x", dist.Normal(torch.zeros(3, 4, 2), 1.0))

        # As in Pyro: a dimension that no plate declares is broadcast from size 1 at most.
        with pytest.raises(ShapeError):
            self.check(program, max_plate_nesting=2)

    def test_too_deep(self):
        def program():
            with fastsvi.plate("a", 3), fastsvi.plate("b", 2):
                fastsvi.sample("x", dist.Normal(0.0, 1.0))

        with pytest.raises(ShapeError, match="2 nested plates"):
            self.check(program, max_plate_nesting=1)


def test_enumeration_marks():
    def guide():
        fastsvi.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.warns(FastSVIWarning, match="'k'"):
        check_if_enumerated(trace(guide))


def test_reparameterised_sites_only():
    good, bad = trace(normal(())), trace(lambda: fastsvi.sample("k", dist.Bernoulli(0.5)))
    check_fully_reparametrized(good.nodes["x"])
    with pytest.raises(SiteError, match="'k'"):
        check_fully_reparametrized(bad.nodes["k"])
