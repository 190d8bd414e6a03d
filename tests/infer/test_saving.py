"""A run that is taken up again from its file goes on, bit for bit, as if nothing had happened."""

from __future__ import annotations

import os
import signal
import textwrap

import pytest
import torch
from saved_fits import DATA, EAGER, assert_same, contents, fresh, guide, model

import fastsvi as pyro
from fastsvi.errors import CheckpointError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.runner import Runner
from fastsvi.params import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.ckpt"


OPTIMIZERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99, "clip_norm": 1.0}),
    "sgd": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.01 if "scale" in name else 0.1}),
}


@pytest.mark.parametrize(
    ("optimizer", "automatic", "compile"),
    [
        *((name, automatic, False) for name in OPTIMIZERS for automatic in (True, False)),
        ("adam", True, True),
        ("adam", False, True),
        ("clipped", True, True),
    ],
)
def test_a_run_that_was_cut_short_is_taken_up(path, automatic, optimizer, compile):
    def make():
        return fresh(automatic, OPTIMIZERS[optimizer]())

    def go(svi, steps, **options):
        return svi.run(steps, DATA, progress_bar=False, compile=compile, **options)

    torch.manual_seed(3)
    svi = make()
    whole, state = go(svi, 60), contents(svi)
    for cut in (1, 2, 23):
        torch.manual_seed(3)
        first = go(make(), cut, checkpoint=path)
        torch.manual_seed(99)
        svi = make()
        run = go(svi, 60, checkpoint=path)
        assert torch.equal(first.losses, whole.losses[:cut])
        assert torch.equal(run.losses, whole.losses)
        assert_same(run.params, whole.params)
        assert_same(contents(svi)[:3], state[:3])
        assert whole.native_steps == (58 if compile else 0)
        if cut == 23 and compile:
            assert run.native_steps == 60 - 23
        path.unlink()


def test_the_same_call_goes_on_bit_for_bit(path, monkeypatch):
    """Whether steps are compiled follows from the call: so "auto" goes on as it would have."""
    whole = fresh(seed=1).run(400, DATA, progress_bar=False)
    assert whole.native_steps > 300
    native, calls = Runner._advance_native, []

    def interrupted(self, step):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return native(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_advance_native", interrupted)
        first = fresh(seed=1).run(400, DATA, progress_bar=False, checkpoint=path)
    assert 20 < len(first.losses) < 400
    run = fresh(seed=1).run(400, DATA, progress_bar=False, checkpoint=path)
    assert torch.equal(run.losses, whole.losses)
    assert_same(run.params, whole.params)


def test_seeds(path):
    svi = fresh(seed=5)
    whole = svi.run(30, DATA, progress_bar=False)
    fresh(seed=5).run(10, DATA, progress_bar=False, checkpoint=path)
    run = fresh().run(30, DATA, progress_bar=False, checkpoint=path)
    assert torch.equal(run.losses, whole.losses), "the seed is taken from the file"
    svi = fresh(seed=6)
    with pytest.raises(CheckpointError, match="seed 5, and this one has 6"):
        svi.run(30, DATA, progress_bar=False, checkpoint=path)
    assert not pyro.get_param_store().keys()


def test_a_seed_that_was_drawn_can_still_be_forgotten(path):
    fresh().run(10, DATA, progress_bar=False, checkpoint=path)
    svi = fresh()
    svi.run(10, DATA, progress_bar=False, checkpoint=path)
    losses = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        losses.append(svi.evaluate_loss(DATA))
    assert losses[0] == losses[1]


def test_a_finished_run_takes_no_more_steps(path):
    calls = []

    def counted(data):
        calls.append(1)
        model(data)

    def make():
        pyro.clear_param_store()
        return SVI(counted, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())

    first = make().run(20, DATA, progress_bar=False, checkpoint=path)
    before = path.read_bytes()
    calls.clear()
    again = make().run(20, DATA, checkpoint=path)
    assert torch.equal(again.losses, first.losses)
    assert_same(again.params, first.params)
    assert len(calls) <= 2, "only to make the parameters"
    assert path.read_bytes() == before
    longer = make().run(25, DATA, progress_bar=False, checkpoint=path)
    assert torch.equal(longer.losses[:20], first.losses)
    with pytest.raises(CheckpointError, match="holds 25 steps, more than the 20"):
        make().run(20, DATA, progress_bar=False, checkpoint=path)


def test_the_same_process_may_take_it_up(path):
    whole = fresh(seed=1).run(30, DATA, progress_bar=False)
    svi = fresh(seed=1)
    svi.run(10, DATA, progress_bar=False, checkpoint=path)
    svi.step(DATA)  # goes back to where the file is
    run = svi.run(30, DATA, progress_bar=False, checkpoint=path)
    assert torch.equal(run.losses, whole.losses)


@pytest.mark.parametrize("compile", [False, True])
def test_batches_are_passed_over(path, compile):
    batches = [DATA[:2], DATA[2:], DATA[1:3]]

    def go(steps, **options):
        svi = fresh(seed=1)
        return svi.run(steps, batches=batches, progress_bar=False, compile=compile, **options)

    whole = go(20)
    go(7, checkpoint=path)
    run = go(20, checkpoint=path)
    assert torch.equal(run.losses, whole.losses)
    assert run.native_steps == (13 if compile else 0)


def test_parameters_that_appear_late(path):
    def late(data, stage):
        if stage["step"] >= 5:
            pyro.param("late", torch.tensor(1.0))
        stage["step"] += 1
        model(data)

    def make():
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 0.05})
        return SVI(late, lambda data, stage: guide(data), optim, Trace_ELBO(), seed=1)

    make().run(10, DATA, {"step": 0}, checkpoint=path, **EAGER)
    for stage in (0, 10):
        run = make().run(20, DATA, {"step": stage}, checkpoint=path, **EAGER)
        assert len(run.losses) == 20
        assert set(run.params) == {"loc", "scale", "log_s", "late"}
        path.unlink()
        make().run(10, DATA, {"step": 0}, checkpoint=path, **EAGER)


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {folder!r})
    import torch, fastsvi
    import saved_fits as t
    torch.manual_seed(5)
    steps = []
    def dying(data):
        steps.append(1)
        if len(steps) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        t.model(data)
    elbo = t.Trace_ELBO(num_particles=1)
    svi = t.SVI(dying, t.guide, fastsvi.optim.Adam({{"lr": 0.05}}), elbo, seed=1)
    svi.run(60, t.DATA, progress_bar=False, checkpoint={path!r}, checkpoint_every=0, compile=False)
"""


@pytest.mark.slow
def test_a_process_that_was_killed(path, fresh_python):
    script = textwrap.dedent(SCRIPT.format(folder=os.path.dirname(__file__), path=str(path)))
    done = fresh_python(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    _, header = checkpoint.read(path)
    assert 30 <= header["run"]["steps"] < 40
    torch.manual_seed(17)
    run = fresh(False, particles=1, seed=1).run(60, DATA, checkpoint=path, **EAGER)
    torch.manual_seed(5)
    whole = fresh(False, particles=1, seed=1).run(60, DATA, **EAGER)
    assert torch.equal(run.losses, whole.losses)
    assert_same(run.params, whole.params)


def test_ctrl_c_saves(path):
    calls = []

    def pressed(data):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        model(data)

    whole = fresh(seed=1).run(20, DATA, progress_bar=False, compile=False)
    pyro.clear_param_store()
    svi = SVI(pressed, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(2), seed=1)
    svi.elbo.vectorize_particles = True
    first = svi.run(20, DATA, progress_bar=False, compile=False, checkpoint=path)
    assert first.interrupted
    assert 0 < len(first.losses) < 20
    run = fresh(seed=1).run(20, DATA, progress_bar=False, compile=False, checkpoint=path)
    assert torch.equal(run.losses, whole.losses)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_in_the_middle_of_a_step_saves_the_last_whole_one(path, failure):
    """Also the noise that the broken step has drawn is drawn again."""
    armed = []

    def fails(data):
        model(data)
        if armed:
            armed.append(1)
            if len(armed) == 6:
                raise failure

    def make():
        pyro.clear_param_store()
        return SVI(fails, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), seed=1)

    def go(**options):
        torch.manual_seed(2)
        return make().run(20, DATA, progress_bar=False, compile=False, **options)

    whole = go()
    armed.append(1)
    if failure is KeyboardInterrupt:
        assert go(checkpoint=path).interrupted
    else:
        with pytest.raises(failure):
            go(checkpoint=path)
    armed.clear()
    _, header = checkpoint.read(path)
    assert header["run"]["steps"] in (3, 4, 5)
    assert torch.equal(go(checkpoint=path).losses, whole.losses)


def test_it_saves_as_it_goes(path, monkeypatch):
    written = []
    write = checkpoint.write

    def counting(*args):
        written.append(len(args[1]["run/losses"]))
        write(*args)

    monkeypatch.setattr(checkpoint, "write", counting)
    svi = fresh()
    svi.run(5, DATA, progress_bar=False, compile=False, checkpoint=path, checkpoint_every=0)
    assert written == [1, 2, 3, 4, 5]
    written.clear()
    svi.run(9, DATA, progress_bar=False, compile=False, checkpoint=path)
    assert written == [9]


def test_store_and_optimizer_read_it_too(path):
    svi = fresh()
    run = svi.run(5, DATA, progress_bar=False, checkpoint=path)
    moments = svi.optim.get_state()
    fresh(optim=(optim := pyro.optim.Adam({"lr": 0.05})))
    pyro.get_param_store().load(path)
    assert_same(dict(pyro.get_param_store().items()), run.params)
    optim.load(path)
    assert_same(optim.get_state(), moments)
