"""Seed 004, "An introduction to inference in Pyro": a scale that errs, by SVI and by hand.

The posterior is known: Normal(9.14, 0.6).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastsvi as pyro
from fastsvi import poutine

# The parameters wander around the optimum, so the last steps are averaged. The bars: one tenth
# for the mean, one twentieth for the standard deviation.
LAST = 500


def check_fit(names, *, steps):
    assert len(names["a"]) == len(names["b"]) == len(names["losses"]) == steps
    a, b = np.mean(names["a"][-LAST:]), np.mean(np.abs(names["b"][-LAST:]))
    assert a == pytest.approx(9.14, abs=0.1)
    assert b == pytest.approx(0.6, abs=0.05)
    # The loss of the last steps lies near minus the log evidence, and no single one can say more
    # than the average: of a guide this close it has a spread of a few tenths.
    evidence = torch.distributions.Normal(8.5, math.hypot(1.0, 0.75)).log_prob(torch.tensor(9.5))
    assert float(np.mean(names["losses"][-LAST:])) == pytest.approx(-float(evidence), abs=0.05)


@pytest.mark.slow
def test_first_program_2500_steps_of_sgd(run_program, capsys):
    names = run_program("004_sgd")
    check_fit(names, steps=2500)
    assert all(isinstance(loss, float) for loss in names["losses"])
    printed = capsys.readouterr().out.split("\n")
    assert printed[0] == f"a =  {pyro.param('a').item()}"
    assert printed[1] == f"b =  {pyro.param('b').item()}"


@pytest.mark.slow
def test_second_program_1000_steps_of_gradient_descent_by_hand(run_program, capsys):
    names = run_program("004_gradient_descent")
    check_fit(names, steps=1000)
    printed = capsys.readouterr().out
    assert "Before updated: tensor(8.5000, requires_grad=True) tensor(1., requires_grad=True)" in (
        printed
    )
    # The parameters are the very tensors that the program updated by ``x.data = ...``.
    assert names["params"][0] is pyro.param("a").unconstrained()
    assert f"a =  {names['a'][-1]}" != f"a =  {pyro.param('a').item()}"  # one update later


def test_fragments(run_program, capsys):
    names = run_program("004_introduction")
    mu = names["mu"]
    assert names["conditioned_scale"](mu) == 9.5
    assert names["deferred_conditioned_scale"](9.0, mu) == 9.0
    with pytest.warns(RuntimeWarning, match="outside of inference"):  # as Pyro does
        assert names["scale_obs"](mu) == 9.5

    # The trace holds the sites in order, and the observation is the number that was given.
    sites = {n: s for n, s in names["trace"].nodes.items() if s["type"] == "sample"}
    assert list(sites) == ["weight", "measurement"]
    assert not sites["weight"]["is_observed"]
    assert sites["measurement"]["is_observed"]
    assert sites["measurement"]["value"] == 9.5
    weight = sites["weight"]["value"]
    expected = torch.distributions.Normal(8.5, 1.0).log_prob(weight) + torch.distributions.Normal(
        weight, 0.75
    ).log_prob(torch.tensor(9.5))
    torch.testing.assert_close(names["logp"], expected)
    printed = capsys.readouterr().out
    assert f"weight Normal(loc: 8.5, scale: 1.0) {weight!s} False\n" in printed
    assert ", scale: 0.75) 9.5 True\n" in printed

    loc, sd = names["perfect_guide"], []
    for _ in range(2):
        site = poutine.trace(loc).get_trace(mu).nodes["weight"]["fn"]
        sd.append(float(site.stddev))
        assert float(site.mean) == pytest.approx(9.14, abs=1e-6)
    assert sd[0] == sd[1] == pytest.approx(0.6, abs=1e-6)

    drawn = names["scale_parametrized_guide"](mu)
    assert drawn.requires_grad
    assert set(pyro.get_param_store()) == {"a", "b"}
    pyro.clear_param_store()
    names["scale_parametrized_guide_constrained"](mu)
    assert pyro.param("b").item() == 1.0
    assert float(pyro.param("b").unconstrained().detach()) == 0.0

    with pytest.raises(NameError, match="some_nonlinear_function"):  # the text leaves it out
        names["intractable_scale"](mu)
    names["some_nonlinear_function"] = torch.tanh
    assert names["intractable_scale"](mu).shape == ()


def test_the_trace_prints_as_in_the_text(run_program, capsys):
    names = run_program("004_introduction")
    weight = names["trace"].nodes["weight"]["value"].item()
    expected = f"measurement Normal(loc: {weight}, scale: 0.75) 9.5 True"
    assert expected in capsys.readouterr().out


def test_condition_and_do_mix(run_program):
    """The text says that they mix: do cuts the weight off its prior, condition does not."""
    scale = run_program("004_introduction")["scale"]
    weighed = pyro.condition(scale, data={"measurement": torch.tensor(9.5)})
    forced = pyro.do(weighed, data={"weight": torch.tensor(2.0)})
    trace = poutine.trace(forced).get_trace(8.5)
    assert trace.stochastic_nodes == ["weight"]  # drawn, and ignored
    assert trace.observation_nodes == ["measurement"]
    assert float(trace.nodes["measurement"]["fn"].mean) == 2.0
    seen = poutine.trace(pyro.condition(weighed, data={"weight": torch.tensor(2.0)}))
    assert seen.get_trace(8.5).observation_nodes == ["weight", "measurement"]
