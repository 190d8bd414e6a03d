"""What users do between two runs of an SVI: a captured run gives what an eager one gives."""

from __future__ import annotations

import threading

import pytest
import torch
from edits import EDITS, STEPS, Runs, X, Y, fit, model

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import FastSVIWarning


@pytest.mark.filterwarnings("ignore::fastsvi.errors.FastSVIWarning")  # of what is not captured
@pytest.mark.parametrize("edits", EDITS)
def test_edits_between_runs(edits):
    found, memory = [], {}
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        runs = Runs(compile, memory)
        edits(runs)
        found.append(runs.results)
    # float32; some twelve steps of a hundred operations a run, of losses of size 100.
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=5e-3)


# ------------------------------------------------------------------- values that Python computes


READS = {
    "numpy": lambda tensor: torch.from_numpy(tensor.detach().numpy().copy()),
    "list": lambda tensor: torch.tensor(tensor.tolist()),
    "memory": lambda tensor: torch.as_tensor(tensor.detach().numpy()),
    "data": lambda tensor: tensor.data,
    "Parameter": lambda tensor: torch.nn.Parameter(tensor.detach()),
}


@pytest.mark.parametrize("what", ["site", "parameter"])
@pytest.mark.parametrize("read", READS)
def test_what_is_read_by_no_operation_is_no_constant(read, what):
    def reading(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        shift = READS[read](weight if what == "site" else pyro.param("loc"))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight + shift.sum(), 0.5), obs=y)

    runs = []
    for compile in (False, "auto"):
        pyro.clear_param_store()
        svi = fit(reading)
        runs.append(svi.run(200, X, Y, progress_bar=False, compile=compile))
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-3, atol=5e-3)
    if read in ("numpy", "list", "memory"):
        assert "reads a tensor back to Python" in runs[1].obstacle
    else:
        assert runs[1].native_steps == 198


# -------------------------------------------------------------------------------------- exceptions


class OwnError(Exception):
    """Raised by a program."""


@pytest.mark.parametrize("call", range(1, 7))
def test_a_program_that_fails_leaves_all_as_it_was(call):
    """At the rehearsal, the first step, the recording, the check, a look, and in a later run."""
    calls = []

    def failing(x, y):
        calls.append(len(calls))
        if len(calls) == call:
            raise OwnError
        model(x, y)

    def state(svi):
        store = {name: leaf.clone() for name, leaf in pyro.get_param_store().named_parameters()}
        grads = [leaf.grad for _, leaf in pyro.get_param_store().named_parameters()]
        assert all(grad is None or not grad.any() for grad in grads)
        return store, svi.optim.get_state()

    svi = fit(failing)
    for _ in range(3):
        before, length = state(svi), len(calls)
        try:
            result = svi.run(4, X, Y, progress_bar=False, compile=True)
        except OwnError:
            after = state(svi)
            # Steps before the failure count: the run had taken as many.
            steps = max(0, call - length - 2) if length else max(0, call - 2)
            if steps == 0 or length:
                torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        else:
            assert len(result.losses) == 4
            assert result.losses.isfinite().all()
    assert len(calls) >= call


def test_a_failure_at_the_start_of_a_later_run_is_raised_and_forgotten():
    bad = []

    def failing(x, y):
        if bad:
            raise OwnError
        model(x, y)

    def losses(compile):
        pyro.clear_param_store()
        svi = fit(failing)
        first = svi.run(STEPS, X, Y, progress_bar=False, compile=compile).losses
        bad.append(True)
        with pytest.raises(OwnError):
            svi.run(STEPS, X, Y, progress_bar=False, compile=compile)
        bad.clear()
        return torch.cat([first, svi.run(STEPS, X, Y, progress_bar=False, compile=compile).losses])

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-3, atol=5e-3)


# ---------------------------------------------------------------------------------- the same again


def repeated(compile, steps=400, seed=None):
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    svi = fit(seed=seed)
    return svi.run(steps, X, Y, progress_bar=False, compile=compile)


@pytest.mark.parametrize("compile", ["auto", True, False])
def test_the_same_seed_gives_the_same_bits(compile):
    one, two = repeated(compile), repeated(compile)
    assert torch.equal(one.losses, two.losses)
    assert all(torch.equal(one.params[name], two.params[name]) for name in one.params)


def test_auto_takes_over_at_a_step_that_no_clock_decides(monkeypatch):
    build = pyro.engine.loops.build
    one = repeated("auto")
    slow = build.compile_source

    def slowly(*args, **kwargs):
        threading.Event().wait(0.3)
        return slow(*args, **kwargs)

    monkeypatch.setattr(build, "compile_source", slowly)
    two = repeated("auto")
    assert one.native_steps == two.native_steps == 398
    assert torch.equal(one.losses, two.losses)
    assert repeated("auto", steps=20).native_steps == 0


def test_a_seed_set_between_runs_gives_the_same_run():
    found = []
    svi = fit(seed=None)
    for _ in range(2):
        pyro.set_rng_seed(1)
        pyro.clear_param_store()
        svi.optim = pyro.optim.Adam({"lr": 0.05})
        found.append(svi.run(40, X, Y, progress_bar=False, compile=True))
    assert torch.equal(found[0].losses, found[1].losses)


def test_threads_in_turn():
    """One after the other, as the store belongs to all."""
    pyro.clear_param_store()
    svi = fit()
    expected = [svi.run(STEPS, X, Y, progress_bar=False, compile=True).losses for _ in range(2)]
    pyro.clear_param_store()
    svi, found = fit(), []
    for _ in range(2):
        thread = threading.Thread(
            target=lambda: found.append(
                svi.run(STEPS, X, Y, progress_bar=False, compile=True).losses
            )
        )
        thread.start()
        thread.join()
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_too_many_edits_are_counted_and_named():
    width = [1.0]

    def edited(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), width[0]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)

    svi = fit(edited)
    for k in range(8):
        width[0] = 1.0 + k
        svi.run(4, X, Y, progress_bar=False, compile=True)
    width[0] = 9.0
    message = r"captured 8 times already, because something outside of the tensors.*has become"
    with pytest.warns(FastSVIWarning, match=message):
        svi.run(4, X, Y, progress_bar=False, compile=True)
    width[0] = 3.0  # known from before
    assert svi.run(4, X, Y, progress_bar=False, compile=True).native_steps == 4
