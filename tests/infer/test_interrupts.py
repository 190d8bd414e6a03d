"""Ctrl-C ends a run between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.errors import CheckpointError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.interrupts import Interrupts


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_noted_and_the_second_raised():
    noted = []

    def press_twice():
        with Interrupts() as interrupts:
            press()
            noted.append(interrupts.noted)
            press()

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert noted == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_are_left_alone():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with Interrupts() as interrupts:
            press()
        assert calls == [1]
        assert not interrupts.noted
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it():
    entered = []

    def inside():
        with Interrupts() as interrupts:
            entered.append(interrupts.noted)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert entered == [False]


def test_errors_of_workers_that_died_of_it():
    def fail(error, pressed=True):
        with Interrupts():
            if pressed:
                press()
            raise error("DataLoader worker exited unexpectedly")

    fail(RuntimeError)
    with pytest.raises(RuntimeError):
        fail(RuntimeError, pressed=False)
    for error in (CheckpointError, ValueError):
        with pytest.raises(error):
            fail(error)


def model(data):
    x = fastsvi.sample("x", dist.Normal(0.0, 10.0))
    with fastsvi.plate("data", len(data)):
        fastsvi.sample("obs", dist.Normal(x, 1.0), obs=data)


DATA = torch.tensor([1.0, 2.0, 0.5, 1.5])


def make(model=model):
    fastsvi.clear_param_store()
    optim = fastsvi.optim.Adam({"lr": 0.05})
    return SVI(model, AutoNormal(model), optim, Trace_ELBO(), seed=1)


def test_a_run_of_native_steps_returns_what_was_reached(tmp_path):
    path = tmp_path / "fit.ckpt"
    svi = make()
    svi.run(3, DATA, progress_bar=False, compile=True)  # so that the step is compiled
    timer = threading.Timer(0.5, press)
    timer.start()
    start = time.monotonic()
    run = svi.run(10**9, DATA, progress_bar=False, compile=True)
    timer.join()
    assert run.interrupted
    assert 1 < len(run.losses) < 10**9
    assert run.native_steps >= len(run.losses) - 2
    # A chunk of native steps takes a tenth of a second; this machine may be busy.
    assert time.monotonic() - start < 5
    assert "interrupted" in repr(run)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps = {float(state["state"][0]["step"]) for state in svi.optim.get_state().values()}
    assert steps == {3.0 + len(run.losses)}

    svi = make()
    timer = threading.Timer(0.5, press)
    timer.start()
    first = svi.run(10**9, DATA, progress_bar=False, compile=True, checkpoint=path)
    timer.join()
    assert first.interrupted
    again = make().run(
        len(first.losses) + 5, DATA, progress_bar=False, compile=True, checkpoint=path
    )
    assert torch.equal(again.losses[:-5], first.losses)
    assert not again.interrupted


def test_an_eager_run():
    calls = []

    def pressed(data):
        calls.append(1)
        if len(calls) == 6:
            press()
        model(data)

    svi = make(pressed)
    run = svi.run(100, DATA, progress_bar=False, compile=False)
    assert run.interrupted
    assert not run.stopped
    count = len(run.losses)
    assert 3 <= count <= 6
    expected = make().run(count, DATA, progress_bar=False, compile=False)
    assert torch.equal(run.losses, expected.losses)
    for name, value in expected.params.items():
        assert torch.equal(run.params[name], value), "the step was not torn apart"
    more = svi.run(2, DATA, progress_bar=False, compile=False)
    assert len(more.losses) == 2


def test_a_step_that_hangs_is_left_at_the_second_one():
    calls = []

    def hangs(data):
        model(data)
        calls.append(1)
        if len(calls) == 6:
            press()
            press()

    run = make(hangs).run(100, DATA, progress_bar=False, compile=False)
    assert run.interrupted
    assert 3 <= len(run.losses) <= 5


def test_single_steps_are_interrupted_at_once():
    def pressed(data):
        press()
        model(data)

    svi = make()
    svi.step(DATA)
    svi.model = pressed
    with pytest.raises(KeyboardInterrupt):
        svi.step(DATA)
