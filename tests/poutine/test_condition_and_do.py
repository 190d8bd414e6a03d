"""Conditioning says something about causes; an intervention cuts them off."""

from __future__ import annotations

import warnings

import pytest
import torch
from smoking import draw, smoking

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import DtypeError
from fastsvi.poutine.condition_messenger import ConditionMessenger


def test_an_observation_says_something_about_causes_and_an_intervention_does_not():
    """log p(smoking, tar=2) depends on smoking; under do(tar=2) smoking and cancer do not meet."""

    def log_joint(handler, s):
        fixed = poutine.condition(smoking, data={"smoking": torch.tensor(s)})
        return poutine.trace(handler(fixed)).get_trace()

    def normal(x, mean):
        return dist.Normal(mean, 1.0).log_prob(torch.tensor(x))

    observe = lambda fn: poutine.condition(fn, data={"tar": torch.tensor(2.0)})  # noqa: E731
    trace = log_joint(observe, 1.0)
    assert trace.nodes["tar"]["is_observed"]
    observed = trace.log_prob_sum(lambda name, site: site["is_observed"])
    torch.testing.assert_close(observed, normal(1.0, 0.0) + normal(2.0, 1.0))

    trace = log_joint(lambda fn: poutine.do(fn, data={"tar": torch.tensor(2.0)}), 1.0)
    assert not trace.nodes["tar"]["is_observed"]  # a variable of its own, that nothing reads
    assert trace.nodes["cancer"]["fn"].loc == 2.0
    observed = trace.log_prob_sum(lambda name, site: site["is_observed"])
    torch.testing.assert_close(observed, normal(1.0, 0.0))


def test_do_does_not_propagate_the_original_variable():
    torch.manual_seed(0)
    trace = poutine.trace(poutine.do(smoking, data={"tar": 2.0})).get_trace()
    assert trace.nodes["tar"]["value"] != 2.0
    assert trace.nodes["cancer"]["fn"].loc == 2.0
    assert "tar__CF" not in trace


def test_do_in_plates_scales_the_variable_once():
    """Pyro applies the plates, scales and masks inside of `do` twice to the fresh variable."""

    def model():
        with pyro.plate("data", 6, subsample_size=2), poutine.scale(scale=5.0):
            return draw("x")

    trace = poutine.trace(poutine.do(model, data={"x": torch.ones(2)})).get_trace()
    site = trace.nodes["x"]
    assert site["scale"] == 15.0
    assert site["value"].shape == (2,)
    assert trace.nodes["_RETURN"]["value"].tolist() == [1.0, 1.0]


def test_do_twice_warns():
    """(In Pyro it recurses for ever.)"""
    twice = poutine.do(poutine.do(smoking, data={"tar": 1.0}), data={"tar": 2.0})
    with pytest.warns(RuntimeWarning, match=r"'tar'.*inner"):
        trace = poutine.trace(twice).get_trace()
    assert trace.nodes["cancer"]["fn"].loc == 1.0
    assert trace.stochastic_nodes == ["smoking", "tar", "cancer"]


def test_do_with_something_else():
    with pytest.raises(DtypeError, match=r"'tar'.*tensor or a number.*'a'"):
        poutine.do(smoking, data={"tar": "a"})()


@pytest.mark.parametrize("do_inside", [True, False])
def test_counterfactuals_in_either_order(do_inside):
    """Sites keep their observations, the program goes on with the interventions."""
    seen = {"smoking": 1.0, "tar": None, "cancer": 1.0}
    acts = {"smoking": None, "tar": 0.0, "cancer": 2.0}
    model = smoking
    for handler, data in [(poutine.do, acts), (poutine.condition, seen)][:: 1 if do_inside else -1]:
        model = handler(model, data=data)
    trace = poutine.trace(model).get_trace()
    assert {name: trace.nodes[name]["is_observed"] for name in seen} == {
        name: value is not None for name, value in seen.items()
    }
    assert trace.nodes["smoking"]["value"] == 1.0
    assert trace.nodes["cancer"]["value"] == 1.0
    assert trace.nodes["cancer"]["fn"].loc == 0.0
    assert trace.nodes["_RETURN"]["value"] == 2.0


def test_conditioning_keeps_numbers():
    conditioned = poutine.condition(smoking, data={"cancer": 9.5})
    trace = poutine.trace(conditioned).get_trace()
    assert conditioned() == 9.5
    assert type(trace.nodes["cancer"]["value"]) is float
    value = trace.nodes["cancer"]["fn"].log_prob(torch.tensor(9.5))
    trace.compute_log_prob()
    assert torch.equal(trace.nodes["cancer"].log_prob, value)


def test_conditioning_on_none_makes_latent():
    trace = poutine.trace(
        poutine.condition(poutine.condition(smoking, data={"tar": 1.0}), data={"tar": None})
    ).get_trace()
    assert trace.stochastic_nodes == ["smoking", "tar", "cancer"]


def test_names_that_the_model_does_not_have_are_silent_but_known():
    messenger = ConditionMessenger({"tar": 1.0, "cansor": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        messenger(smoking)()
    assert messenger.unused == {"cansor"}
    trace = poutine.trace(smoking).get_trace()
    messenger = ConditionMessenger(trace)
    assert messenger.unused == {"smoking", "tar", "cancer"}


@pytest.mark.parametrize("handler", [poutine.condition, poutine.do, poutine.substitute])
def test_data_must_be_a_dict(handler):
    with pytest.raises(DtypeError, match="dict"):
        handler(smoking, data=3)


def test_uncondition_keeps_the_data():
    model = poutine.uncondition(poutine.condition(smoking, data={"tar": 1.0}))
    site = poutine.trace(model).get_trace().nodes["tar"]
    assert site["infer"] == {"was_observed": True, "obs": 1.0}
    assert isinstance(site["value"], torch.Tensor)
