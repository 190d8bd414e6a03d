"""A run that is taken up again from its file goes on, bit for bit, as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.errors import CheckpointError, ConstraintError, FastSVIWarning
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.params import checkpoint

DATA = torch.tensor([1.0, 2.0, 0.5, 1.5])
EAGER = {"progress_bar": False, "compile": False}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTSVI_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.ckpt"


def model(data):
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(x, s), obs=data)


def guide(data):
    loc = pyro.param("loc", lambda: torch.randn(()))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("x", dist.Normal(loc, scale))
    pyro.sample("s", dist.LogNormal(pyro.param("log_s", torch.tensor(0.0)), 0.2))


def fresh(automatic=True, optim=None, particles=2, **options):
    """A fit as a new process has it: no parameters, and torch's generator anywhere."""
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True)
    own = AutoNormal(model) if automatic else guide
    return SVI(model, own, optim or pyro.optim.Adam({"lr": 0.05}), elbo, **options)


def contents(svi):
    params = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    program = svi._program
    return params, svi.optim.get_state(), program.noise.step, torch.get_rng_state()


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


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


def test_batches_are_passed_over(path):
    batches = [DATA[:2], DATA[2:], DATA[1:3]]

    def go(steps, **options):
        svi = fresh(seed=1)
        return svi.run(steps, batches=batches, progress_bar=False, compile=False, **options)

    whole = go(20)
    go(7, checkpoint=path)
    assert torch.equal(go(20, checkpoint=path).losses, whole.losses)


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
    import test_saving as t
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
def test_a_process_that_was_killed(path):
    script = textwrap.dedent(SCRIPT.format(folder=os.path.dirname(__file__), path=str(path)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
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


class TestSeveralFits:
    ROWS = torch.stack([DATA, DATA + 1, DATA - 1])

    def make(self, **options):
        return fresh(**{"num_fits": 3, "seed": 1, **options})

    def go(self, svi, steps, **options):
        rows = self.ROWS[: svi._fits.num_fits]
        return svi.run(steps, rows, fit_dims=(0,), progress_bar=False, **options)

    @pytest.mark.parametrize("compile", [False, True])
    def test_they_go_on(self, path, compile):
        whole = self.go(self.make(), 40, compile=compile)
        first = self.go(self.make(), 13, compile=compile, checkpoint=path)
        torch.manual_seed(5)
        run = self.go(self.make(seed=None), 40, compile=compile, checkpoint=path)
        assert first.losses.shape == (13, 3)
        assert torch.equal(run.losses, whole.losses)
        assert_same(run.params, whole.params)
        assert run.skipped.tolist() == [0, 0, 0]
        again = self.go(self.make(), 40, compile=compile, checkpoint=path)
        assert torch.equal(again.losses, whole.losses)
        assert_same(again.params, whole.params)

    def test_a_fit_that_failed_is_none_of_the_others_business(self, path):
        bad = self.ROWS.clone()
        bad[1] = torch.nan

        def go(steps, **options):
            svi = self.make()
            return svi.run(steps, bad, fit_dims=(0,), progress_bar=False, **options)

        whole = go(150)
        go(60, checkpoint=path)
        run = go(150, checkpoint=path)
        assert torch.equal(run.losses.nan_to_num(-1.0), whole.losses.nan_to_num(-1.0))
        assert torch.equal(run.skipped, whole.skipped)

    def test_another_number_of_fits(self, path):
        self.go(self.make(), 5, checkpoint=path)
        for other in (self.make(num_fits=2), self.make(first_fit=3)):
            with pytest.raises(CheckpointError, match=r"(num_fits|first_fit) is [30] in the file"):
                self.go(other, 9, checkpoint=path)
            assert self.go(other, 3).losses.isfinite().all()
        with pytest.raises(CheckpointError, match="num_fits is 3 in the file and None"):
            fresh().run(9, DATA, progress_bar=False, checkpoint=path)
        assert not pyro.get_param_store().keys()

    def test_a_damaged_state(self, path):
        self.go(self.make(), 5, checkpoint=path)
        tensors, header = checkpoint.read(path)
        del tensors["run/fits/active"]
        checkpoint.write(path, tensors, header)
        with pytest.raises(CheckpointError, match="3 fits"):
            self.go(self.make(), 9, checkpoint=path)


class TestOtherPrograms:
    """Each difference is named, and nothing changes."""

    @pytest.fixture
    def saved(self, path):
        fresh(False).run(5, DATA, progress_bar=False, checkpoint=path)
        return path

    def refused(self, svi, saved, message, *args, steps=9, **options):
        before, file = contents(svi), saved.read_bytes()
        with pytest.raises(CheckpointError, match=message) as caught:
            svi.run(steps, *(args or (DATA,)), progress_bar=False, checkpoint=saved, **options)
        assert saved.name in str(caught.value)
        assert_same(contents(svi), before)
        assert saved.read_bytes() == file
        assert svi.run(2, *(args or (DATA,)), progress_bar=False).losses.isfinite().all()

    def test_names(self, saved):
        message = (
            r"(?s)'loc' is in the file and not in the program.*"
            r"'AutoNormal.locs.x' is in the program and not in the file"
        )
        self.refused(fresh(), saved, message)

    def test_shapes_and_constraints(self, saved):
        def other(data):
            pyro.param("loc", torch.zeros(3))
            pyro.sample("x", dist.Normal(pyro.param("scale", torch.tensor(0.5)), 1.0))
            pyro.sample("s", dist.LogNormal(pyro.param("log_s", torch.tensor(0.0)), 0.2))

        svi = fresh(False)
        svi.guide = other
        svi._follow_changes()
        message = (
            r"(?s)'loc' is shape \(\), float32.* in the file and shape \(3,\).*"
            r"'scale' is .*greater_than.* in the file and .*real"
        )
        self.refused(svi, saved, message)

    def test_optimizer(self, saved):
        other = fresh(False, pyro.optim.ClippedAdam({"lr": 0.05}))
        self.refused(other, saved, "the optimizer is 'Adam' in the file and 'ClippedAdam'")
        other = fresh(False, pyro.optim.Adam({"lr": 0.01}))
        self.refused(other, saved, r"options of the optimizer is {'lr': 0.05} in the file")

    def test_particles(self, saved):
        self.refused(fresh(False, particles=3), saved, "num_particles is 2 in the file and 3")

    def test_a_store_that_holds_something_else_by_that_name(self, path):
        def needs_two(data, size):
            model(data)
            if size:
                pyro.param("other", torch.zeros(size))

        def make():
            optim = pyro.optim.Adam({"lr": 0.05})
            return SVI(needs_two, lambda data, size: guide(data), optim, Trace_ELBO())

        make().run(3, DATA, 2, progress_bar=False, checkpoint=path)
        pyro.clear_param_store()
        self.refused(make(), path, r"'other' is shape \(2,\)", DATA, 3)


class TestBadFiles:
    @pytest.mark.parametrize("cut", [0, 5, 100, -1, -400])
    def test_truncated(self, path, cut):
        fresh().run(5, DATA, progress_bar=False, checkpoint=path)
        path.write_bytes(path.read_bytes()[:cut])
        damaged = path.read_bytes()
        svi = fresh()
        with pytest.raises(CheckpointError, match=r"fit.ckpt.*(truncated|damaged)"):
            svi.run(9, DATA, progress_bar=False, checkpoint=path)
        assert path.read_bytes() == damaged
        assert not pyro.get_param_store().keys()

    def test_no_run(self, path):
        svi = fresh()
        svi.step(DATA)
        pyro.get_param_store().save(path)
        before = contents(svi)
        with pytest.raises(CheckpointError, match="it holds no run"):
            svi.run(9, DATA, progress_bar=False, checkpoint=path)
        assert_same(contents(svi), before)

    @pytest.mark.parametrize(
        "change",
        [
            {"steps": 7},
            {"steps": "5"},
            {"noise": [1]},
            {"noise": [-1, 0]},
            {"seed": {"value": "x"}},
            {"program": []},
            {"native": None},
        ],
    )
    def test_malformed(self, path, change):
        fresh().run(5, DATA, progress_bar=False, checkpoint=path)
        tensors, header = checkpoint.read(path)
        header["run"] |= change
        checkpoint.write(path, tensors, header)
        with pytest.raises(CheckpointError, match="malformed"):
            fresh().run(9, DATA, progress_bar=False, checkpoint=path)

    def test_paths(self, tmp_path):
        svi = fresh()
        for bad in (tmp_path, tmp_path / "none" / "fit.ckpt"):
            with pytest.raises(CheckpointError, match="cannot be written"):
                svi.run(5, DATA, progress_bar=False, checkpoint=bad)
        assert not pyro.get_param_store().keys()

    @pytest.mark.parametrize("every", [-1, "often", None, float("nan"), True])
    def test_seconds(self, path, every):
        with pytest.raises(ConstraintError, match="checkpoint_every"):
            fresh().run(5, DATA, progress_bar=False, checkpoint=path, checkpoint_every=every)

    def test_a_full_disk_ends_no_run(self, path, monkeypatch):
        svi = fresh()
        svi.run(5, DATA, progress_bar=False, checkpoint=path)
        before = path.read_bytes()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "write", full)
        with pytest.warns(FastSVIWarning, match=r"No space left.*still that of step 5"):
            run = svi.run(9, DATA, progress_bar=False, checkpoint=path)
        assert len(run.losses) == 9
        assert path.read_bytes() == before

    def test_parameters_outside_of_the_store(self, path):
        class Guide(pyro.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.loc = pyro.nn.PyroParam(torch.tensor(0.0))

            def forward(self, data):
                pyro.sample("x", dist.Normal(self.loc, 1.0))
                pyro.sample("s", dist.LogNormal(self.loc, 0.1))

        with pyro.settings.context(module_local_params=True):
            svi = SVI(model, Guide(), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            with pytest.raises(CheckpointError, match="not in the param store"):
                svi.run(9, DATA, checkpoint=path, **EAGER)
        assert not path.exists()

    def test_losses_with_gradients_of_their_own(self, path):
        def own_gradients(model, guide, data):
            loss = (pyro.param("w", torch.tensor(1.0)) ** 2).sum()
            loss.backward()
            return loss.detach()

        optim = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(model, guide, optim, own_gradients, loss_and_grads=own_gradients)
        whole = svi.run(9, DATA, progress_bar=False).losses
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), own_gradients, own_gradients)
        svi.run(4, DATA, progress_bar=False, checkpoint=path)
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), own_gradients, own_gradients)
        assert torch.equal(svi.run(9, DATA, progress_bar=False, checkpoint=path).losses, whole)
