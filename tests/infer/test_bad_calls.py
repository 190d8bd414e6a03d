"""Bad calls of step and run: the error names what is at fault, and nothing has changed."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.engine.native import NativeStep
from fastsvi.errors import ConstraintError, DeviceError, FastSVIWarning, OutOfMemoryError
from fastsvi.infer import SVI, Trace_ELBO, bad_calls
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.bad_calls import CallError

DATA = torch.tensor([1.0, 2.0, 0.5, 1.5])


def model(data, shift=0.0):
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(x + shift, 1.0), obs=data)


def guide(data, shift=0.0):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("x", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0))))


def make(model=model, guide=guide, particles=1):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo, seed=1)


def contents(svi):
    leaves = dict(pyro.get_param_store().named_parameters())
    values = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    grads = {
        name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()
    }
    state = {name: state["state"] for name, state in svi.optim.get_state().items()}
    return values, grads, state


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@contextlib.contextmanager
def nothing_changes(svi):
    before = contents(svi)
    yield
    assert_same(contents(svi), before)


BOTH = pytest.mark.parametrize("automatic", [False, True])
AFTER = pytest.mark.parametrize("after", [0, 3])


def started(automatic, after, model=model, particles=1):
    svi = make(model, AutoNormal(model) if automatic else guide, particles)
    for _ in range(after):
        svi.step(DATA)
    return svi


@BOTH
@AFTER
@pytest.mark.parametrize("compile", [False, "auto", True])
def test_arguments_on_another_device(automatic, after, compile):
    # Tensors without memory, on the device "meta", are as far away as those on a GPU.
    svi = started(automatic, after)
    elsewhere = DATA.to("meta")
    message = r"argument 0 is on meta, and the .* cpu.*data.to\(\"cpu\"\)"
    with nothing_changes(svi), pytest.raises(DeviceError, match=message):
        svi.run(10, elsewhere, progress_bar=False, compile=compile)
    with nothing_changes(svi), pytest.raises(DeviceError, match="argument 'shift' is on meta"):
        svi.run(10, DATA, shift=torch.zeros((4,), device="meta"), progress_bar=False)
    with nothing_changes(svi), pytest.raises(DeviceError, match=r"parameters are|default device"):
        svi.step(elsewhere)
    assert svi.run(3, DATA, progress_bar=False).losses.isfinite().all()


@BOTH
@AFTER
def test_keywords_that_the_model_does_not_take(automatic, after):
    svi = started(automatic, after)
    with nothing_changes(svi), pytest.raises(CallError, match=r"'progres_bar' .*progress_bar\?"):
        svi.run(10, DATA, progres_bar=False)
    with nothing_changes(svi), pytest.raises(TypeError, match="'colour' is handed on") as caught:
        svi.run(10, DATA, colour="red", progress_bar=False)
    assert "Did you mean" not in str(caught.value)
    with nothing_changes(svi), pytest.raises(CallError, match="'colour'"):
        svi.step(DATA, colour="red")


def test_other_type_errors_are_left_alone():
    def fails(data):
        model(data)
        int(data, colour="red")

    with pytest.raises(TypeError) as caught:
        make(fails).step(DATA)
    assert not isinstance(caught.value, CallError)
    with pytest.raises(TypeError, match="missing"):
        make().step()


@BOTH
@AFTER
@pytest.mark.parametrize("steps", [-1, 1.5, "many", None, True])
def test_numbers_of_steps(automatic, after, steps):
    svi = started(automatic, after)
    with nothing_changes(svi), pytest.raises(ConstraintError, match="number of steps first"):
        svi.run(steps, DATA)


@BOTH
@AFTER
def test_no_steps(automatic, after):
    svi = started(automatic, after)
    with nothing_changes(svi):
        run = svi.run(0, DATA)
    assert run.losses.shape == (0,)
    assert run.timings.steps_per_second == 0
    assert not run.converged
    assert "0 steps" in repr(run)


def test_compile(capsys):
    svi = make()
    with nothing_changes(svi), pytest.raises(ConstraintError, match="compile is one of"):
        svi.run(5, DATA, compile="fast")
    assert capsys.readouterr().err == "", "no bar was begun"


class Fails(Exception):
    pass


@BOTH
@pytest.mark.parametrize("compile", [False, "auto", True])
@pytest.mark.parametrize("when", [1, 2, 3, 9])
@pytest.mark.filterwarnings("ignore:SVI.run. the steps are taken eagerly")
def test_a_model_that_raises_in_the_middle(automatic, compile, when):
    """Wherever it is called: checked, in an eager step, or while a step is recorded."""
    calls = []

    def fails(data):
        calls.append(1)
        if len(calls) == when:
            raise Fails
        model(data)

    svi = make(fails, AutoNormal(model) if automatic else guide)
    losses = []
    try:
        run = svi.run(40, DATA, progress_bar=False, compile=compile)
        losses = run.losses
    except Fails:
        pass
    assert len(losses) in (0, 40)
    values, grads, state = contents(svi)
    assert all(value.isfinite().all() for value in values.values())
    assert all(grad is None or not grad.any() for grad in grads.values())
    steps = {float(one[0]["step"]) for one in state.values() if one}
    assert len(steps) <= 1, "all parameters were updated equally often"
    # The fit goes on as one that never failed would from here.
    fresh = svi.run(30, DATA, progress_bar=False, compile=compile)
    assert fresh.losses.isfinite().all()


def test_a_run_while_an_exception_is_handled():
    expected = make().run(20, DATA, progress_bar=False, compile=False).losses
    pyro.clear_param_store()
    svi = make()
    try:
        raise Fails
    except Fails:
        run = svi.run(20, DATA, progress_bar=False, compile=False)
    assert torch.equal(run.losses, expected)
    pyro.clear_param_store()
    svi, runs = make(), []

    def runs_at_the_end():
        try:
            raise Fails
        finally:
            runs.append(svi.run(20, DATA, progress_bar=False, compile=False))

    with pytest.raises(Fails):
        runs_at_the_end()
    assert torch.equal(runs[0].losses, expected)


class TestOutOfMemory:
    @staticmethod
    def greedy(data, size=10**14):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        y = x.sum().expand(size).contiguous()  # 400 TB
        pyro.sample("obs", dist.Normal(y.mean(), 1.0), obs=data.sum())

    @staticmethod
    def guide(data, size=10**14):
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    @pytest.mark.parametrize("compile", [False, True])
    def test_message_and_state(self, compile, monkeypatch):
        # One particle takes 4 MB; a million at once take 4 TB, and 4 such tensors are expected.
        monkeypatch.setattr(bad_calls, "available_bytes", lambda error: 2**30)
        svi = make(self.greedy, self.guide, particles=10**6)
        with nothing_changes(svi), pytest.raises(OutOfMemoryError) as caught:
            svi.run(5, DATA, size=10**6, progress_bar=False, compile=compile)
        message = str(caught.value)
        assert "1000000 particles (P)" in message
        assert "3.64 TiB could not be had, about 1 GiB are free" in message
        # 2**30 / 16e6 = 67 particles.
        assert "(num_particles=1000000, vectorize_particles=True, chunk_size=64)" in message
        assert isinstance(caught.value, MemoryError)
        assert not svi._program.is_sequential
        elbo = Trace_ELBO(num_particles=128, vectorize_particles=True, chunk_size=64)
        smaller = SVI(self.greedy, self.guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        assert len(smaller.run(1, DATA, size=10**4, progress_bar=False).losses) == 1

    def test_one_particle(self):
        svi = make(self.greedy, self.guide)
        with (
            nothing_changes(svi),
            pytest.raises(OutOfMemoryError, match=r"1 particle \(P\).*minibatch"),
        ):
            svi.step(DATA)
        svi = make(self.greedy, AutoNormal(self.greedy))
        with nothing_changes(svi), pytest.raises(OutOfMemoryError, match="particle"):
            svi.step(DATA)

    def test_latent_elements_are_counted(self):
        svi = make(self.greedy, AutoNormal(self.greedy), particles=4)
        svi.step(DATA, 10)
        with (
            nothing_changes(svi),
            pytest.raises(OutOfMemoryError, match=r"3 latent elements \(D\)"),
        ):
            svi.step(DATA, 10**14)
        svi.step(DATA, 10)

    def test_working_memory_of_compiled_steps(self, monkeypatch):
        """The noise of all particles is asked for at once."""

        def wide(data):
            x = pyro.sample("x", dist.Normal(torch.zeros(1000), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(x.mean(), 1.0), obs=data.sum())

        def greedy(self, *args, **kwargs):
            raise RuntimeError(
                f"DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                f"{self.arena_bytes} bytes."
            )

        monkeypatch.setattr(NativeStep, "run", greedy)
        monkeypatch.setattr(bad_calls, "available_bytes", lambda error: 200_000)
        svi = make(wide, AutoNormal(wide), particles=64)
        with pytest.raises(OutOfMemoryError) as caught:
            svi.run(5, DATA, progress_bar=False, compile=True)
        message = str(caught.value)
        assert "64 particles (P) and 1,000 latent elements (D)" in message
        # 64 particles of 260 kB in all, four times: a sixth of them fit.
        assert "chunk_size=8" in message
        # 4 bytes, of 6 times 2,000 parameters and 8 times 1,000 draws.
        assert "in 78.1 KiB or more in all" in message

    @pytest.mark.parametrize(
        ("chunk", "requested", "free", "fitting"),
        [
            (64, 64_000, 10**9, 32),
            (64, 64_000, 32_000, 8),
            (64, 64_000, 31_999, 4),
            (64, 64_000, 3_999, None),
            (64, None, None, 32),
            (1, 64_000, 10**9, None),
            (3, 1, 10**9, 1),
        ],
    )
    def test_estimates(self, chunk, requested, free, fitting):
        assert bad_calls._fitting(chunk, requested, free) == fitting

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda(self):
        def wide(data):
            x = pyro.sample("x", dist.Normal(torch.zeros(3, device="cuda"), 10.0).to_event(1))
            y = x.expand(10**11, 3).contiguous()
            pyro.sample("obs", dist.Normal(y.mean(), 1.0), obs=data.sum())

        svi = make(wide, AutoNormal(wide), particles=2)
        with pytest.raises(OutOfMemoryError, match=r"chunk_size|Even one"):
            svi.step(DATA.cuda())


def test_a_warning_is_no_error_of_the_call():
    def warns(data):
        model(data)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.warns(FastSVIWarning, match="extra"):
        make(warns).step(DATA)
