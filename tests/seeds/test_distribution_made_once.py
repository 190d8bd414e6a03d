"""Seed 003: "define parameters through some transformation, or keep part of the graph".

The question: the standard deviation of a distribution is ``exp(log_std)``. Made once, the
distribution works for one backward pass; made anew in the loop, the loop must know its family.
The answer given there, ``retain_graph=True``, runs and is wrong. Here: a distribution over
parameters of the store.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastsvi.distributions as dd
from fastsvi.params import ParamStore


def test_graph_made_once_is_used_up_by_the_first_backward(run_program, capsys):
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        run_program("003_graph_made_once")
    assert capsys.readouterr().out.startswith("0\n")  # the first pass went through


def test_retain_graph_runs_but_the_scale_never_moves(run_program):
    names = run_program("003_retain_graph")
    moved = float(names["log_std"].detach())
    assert abs(moved - 1) > 0.1
    assert float(names["dist"].scale.detach()) == pytest.approx(math.e)  # exp of the first log_std


def fit(dist, target, optim, steps):
    """The loop that the question wants: it knows neither the family nor its parameters."""
    for _ in range(steps):
        optim.zero_grad()
        samples = dist.rsample((1000,))
        cost = -(target.log_prob(samples) - dist.log_prob(samples)).sum()
        cost.backward()
        optim.step()


def test_the_store_gives_what_making_it_anew_gives(run_program):
    torch.manual_seed(0)
    anew = run_program("003_made_anew")

    torch.manual_seed(0)
    store = ParamStore()
    dist = store.distribution(dd.Normal, "q", loc=torch.tensor([1.0]), scale=torch.tensor([math.e]))
    fit(dist, dd.Normal(5, 5), torch.optim.SGD(dist.parameters(), lr=0.001), steps=50)
    # The same draws and the same arithmetic; only the first scale, exp(1), is rounded once more.
    for ours, theirs in (
        (store.leaf("q.loc"), anew["mean"]),
        (store.leaf("q.scale"), anew["log_std"]),
    ):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-4)
    assert abs(float(store.leaf("q.scale").detach()) - 1) > 0.1


def test_another_family_changes_one_line():
    """The question's second example: Gamma to Gamma(5, 5), of mean 1 and sd 0.447."""
    store = ParamStore()
    dist = store.distribution(dd.Gamma, "q", concentration=1.0, rate=1.0)
    fit(dist, dd.Gamma(5.0, 5.0), torch.optim.Adam(dist.parameters(), lr=0.05), steps=300)
    assert float(dist.mean.detach()) == pytest.approx(1.0, abs=0.05)
    assert float(dist.stddev.detach()) == pytest.approx(5**0.5 / 5, abs=0.05)
    assert bool((store["q.rate"] > 0).all())
