"""What a run says about itself."""

from __future__ import annotations

import time

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.infer import SVI, SVIRunResult, Timings, Trace_ELBO
from fastsvi.infer import run_result as module
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.run_result import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def go(seconds):
        now[0] += seconds

    return go


class TestStopwatch:
    def test_the_pace_is_that_of_the_second_half(self, clock):
        watch = Stopwatch()
        clock(3.0)
        watch.lap(1)
        for steps in range(2, 11):
            clock(1.0 if steps <= 5 else 0.1)
            watch.lap(steps)
        timings = watch.stop(10, 0.5, 0.25)
        assert timings.total == pytest.approx(3 + 4 + 0.5)
        assert timings.first_step == 3.0
        assert timings.steps_per_second == pytest.approx(10.0)
        assert (timings.capture, timings.compile) == (0.5, 0.25)

    def test_many_laps_take_little_memory(self, clock):
        watch = Stopwatch()
        for steps in range(1, 20_001):
            clock(0.01 if steps <= 5000 else 0.001)
            watch.lap(steps)
        assert len(watch._marks) <= module._MAX_MARKS + 1
        assert watch.stop(20_000, 0.0, 0.0).steps_per_second == pytest.approx(1000.0, rel=0.01)

    def test_steps_of_an_earlier_process_do_not_count(self, clock):
        watch = Stopwatch()
        watch.skip(100)
        for steps in (101, 102):
            clock(0.5)
            watch.lap(steps)
        assert watch.stop(102, 0.0, 0.0).steps_per_second == pytest.approx(2.0)

    def test_no_steps(self, clock):
        assert Stopwatch().stop(0, 0.0, 0.0) == Timings()
        clock(1.0)
        assert Stopwatch().stop(0, 0.0, 0.0).steps_per_second == 0.0

    def test_one_chunk(self, clock):
        watch = Stopwatch()
        clock(2.0)
        watch.lap(1000)
        assert watch.stop(1000, 0.0, 0.0).steps_per_second == pytest.approx(500.0)


def test_repr_says_what_matters():
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    timings = Timings(2.0, 0.1, 0.2, 0.4, 1500.0)
    run = SVIRunResult(noise + 7, {"a": torch.zeros(1)}, False, 1990, None, timings=timings)
    text = repr(run)
    for part in ("2000 steps", "1 params", "mean of the last 200", "1990 steps compiled"):
        assert part in text
    assert "finally 1,500 steps/s" in text
    assert "converged since step" in text
    assert "interrupted" in repr(SVIRunResult(noise, {}, True))
    assert "stopped" in repr(SVIRunResult(noise, {}, stopped=True))
    falling = SVIRunResult(noise - torch.arange(2000) / 100, {}, obstacle="compile=False")
    assert "still fell" in repr(falling)
    assert repr(SVIRunResult(torch.empty(0), {})) == "SVIRunResult: 0 steps, 0 params"
    fits = SVIRunResult(torch.tensor([[1.0, torch.nan, 3.0]]), {})
    assert "1 steps of 3 fits" in repr(fits)
    assert "loss 2, mean" in repr(fits)


def test_the_best_fit_may_have_been_left_alone():
    losses = torch.full((100, 3), 5.0)
    losses[:, 1] = torch.linspace(9.0, 1.0, 100)
    losses[50:, 2] = torch.nan
    losses[45:50, 2] = 2.0
    ends = torch.tensor([100, 100, 50])
    run = SVIRunResult(losses, {"a": torch.arange(3.0)}, ends=ends)
    assert run.best().fit == 1
    losses[:, 1] = 9.0
    best = SVIRunResult(losses, {"a": torch.arange(3.0)}, ends=ends).best()
    assert (best.fit, best.loss, best.params["a"].item()) == (2, 2.0, 2.0)


def test_the_verdict_is_computed_once_and_when_asked():
    run = SVIRunResult(torch.zeros(500), {})
    assert "converged" not in vars(run)
    assert run.converged is run.converged
    assert run.converged


def test_results_do_not_change():
    run = SVIRunResult(torch.zeros(500), {})
    with pytest.raises(AttributeError):
        run.losses = torch.zeros(3)


def model():
    fastsvi.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("compile", [False, True])
def test_timings_of_a_run(compile):
    svi = SVI(model, AutoNormal(model), fastsvi.optim.Adam({"lr": 0.1}), Trace_ELBO())
    start = time.perf_counter()
    run = svi.run(200, progress_bar=False, compile=compile)
    seconds = time.perf_counter() - start
    timings = run.timings
    assert 0 < timings.first_step < timings.total <= seconds
    assert timings.capture + timings.first_step < seconds
    assert (timings.capture > 0) is compile
    assert (timings.compile > 0) is compile
    # The second half of the steps takes less than all of the time.
    assert timings.steps_per_second > 100 / seconds
    assert ("compiled" in repr(run)) is compile
