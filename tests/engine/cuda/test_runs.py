"""Whole runs as on a simulated GPU: generated kernels run on the shim, graphs as calls."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import settings
from fastsvi.engine.cuda import block_step
from fastsvi.errors import CaptureError, FastSVIWarning
from fastsvi.infer import SVI, Trace_ELBO, captured, fits_step
from fastsvi.infer.autoguide import AutoNormal

generator = torch.Generator().manual_seed(0)
x = torch.randn(12, 3, generator=generator)
y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(12, generator=generator)
RUN = {"progress_bar": False}
# Some dozens of steps of float32 whose rounding Adam's first steps carry over to the parameters.
CLOSE = {"rtol": 2e-3, "atol": 2e-2}


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def tempered(x, y, beta):
    with pyro.poutine.scale(scale=beta):
        regression(x, y)


def prepared(model=regression, particles=2, **options):
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True)
    adam = pyro.optim.Adam({"lr": 0.02})
    return SVI(model, AutoNormal(model), adam, elbo, seed=7, **options)


def step_of(svi):
    (step,) = svi._captures._steps
    return step


@pytest.fixture(scope="module")
def eager():
    return prepared().run(24, x, y, compile=False, **RUN).losses


def test_a_run_takes_the_block_form_and_equals_eager_steps(gpu, eager):
    svi = prepared()
    run = svi.run(24, x, y, compile=True, **RUN)
    assert step_of(svi).form == "block"
    assert (run.native_steps, run.obstacle) == (22, None)
    assert gpu.launches == [1] * len(gpu.launches)
    torch.testing.assert_close(run.losses, eager, **CLOSE)
    again = svi.run(8, x, y, compile=True, **RUN)
    assert again.native_steps == 8
    assert svi._captures.count == 1


@pytest.mark.parametrize("form", ["block", "kernels", "graph"])
def test_the_form_can_be_asked_for(gpu, eager, form):
    with settings.context(cuda_steps=form):
        svi = prepared()
        run = svi.run(24, x, y, compile=True, **RUN)
    assert step_of(svi).form == form
    assert run.native_steps == 22
    torch.testing.assert_close(run.losses, eager, **CLOSE)


def test_a_form_that_there_is_not_is_refused_at_once():
    with pytest.raises(settings.SettingError, match="cuda_steps"):
        settings.set(cuda_steps="triangle")
    program = "import os; os.environ['FASTSVI_CUDA_STEPS'] = '{}'; from fastsvi import settings"
    program += "; print(settings.get('cuda_steps'))"

    def told(form):
        command = [sys.executable, "-c", program.format(form)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert told("graph") == "graph\n"
    assert "takes one of ('auto', 'block', 'kernels', 'graph'), found 'triangle'" in told(
        "triangle"
    )


def refuse(*args, **options):
    raise CaptureError("nothing of this is known here")


def test_what_cannot_be_generated_becomes_a_graph_without_a_word(gpu, eager, monkeypatch):
    monkeypatch.setattr("fastsvi.engine.cuda.block_step.emit_block", refuse)
    monkeypatch.setattr("fastsvi.engine.cuda.kernel_loop.emit_kernels", refuse)
    svi = prepared()
    run = svi.run(24, x, y, compile=True, **RUN)
    step = step_of(svi)
    assert step.form == "graph"
    assert step.passed_over == (
        "block: nothing of this is known here; kernels: nothing of this is known here"
    )
    assert (run.native_steps, run.obstacle) == (22, None)
    torch.testing.assert_close(run.losses, eager, **CLOSE)


def test_what_cannot_be_compiled_becomes_a_graph_too(gpu, monkeypatch):
    monkeypatch.setattr("fastsvi.engine.cuda.driver.load", refuse)
    svi = prepared()
    run = svi.run(8, x, y, compile=True, **RUN)
    assert (step_of(svi).form, run.native_steps) == ("graph", 6)
    assert step_of(svi).passed_over == "nothing of this is known here"


def test_what_cannot_be_launched_becomes_a_graph_too(gpu, monkeypatch):
    monkeypatch.setattr(block_step.BlockStep, "launch", refuse)
    svi = prepared()
    run = svi.run(8, x, y, compile=True, **RUN)
    assert (step_of(svi).form, run.native_steps) == ("graph", 6)


def test_a_form_that_was_asked_for_has_no_substitute(gpu, monkeypatch):
    monkeypatch.setattr("fastsvi.engine.cuda.driver.load", refuse)
    with settings.context(cuda_steps="block"), pytest.warns(FastSVIWarning, match="eagerly"):
        run = prepared().run(4, x, y, compile=True, **RUN)
    assert run.obstacle == "nothing of this is known here"


@pytest.fixture
def wrong(monkeypatch):
    """Generated kernels that reach what they should not."""
    launch = block_step.BlockStep.launch

    def launch_wrong(self, table, strides, num_steps):
        losses, halts = launch(self, table, strides, num_steps)
        return losses + 100.0, halts

    monkeypatch.setattr(block_step.BlockStep, "launch", launch_wrong)


def test_kernels_that_disagree_are_replaced_and_checked_again(gpu, eager, wrong, monkeypatch):
    compared = []
    compare = captured.compare
    monkeypatch.setattr(captured, "compare", lambda *args: compared.append(1) or compare(*args))
    svi = prepared()
    with pytest.warns(FastSVIWarning, match="generated kernels .form 'block'. are not used"):
        run = svi.run(24, x, y, compile=True, **RUN)
    assert step_of(svi).form == "graph"
    assert len(compared) == 2
    assert (run.native_steps, run.obstacle) == (21, None)  # two steps were eager ones besides
    torch.testing.assert_close(run.losses, eager, **CLOSE)


@pytest.mark.parametrize("form", ["block", "kernels"])
def test_a_step_that_is_not_finite_is_left_out_and_the_noise_goes_on(gpu, form):
    def batches():
        bad = y.clone()
        bad[3] = torch.nan
        return [(x, bad if k in (5, 6, 11) else y + k) for k in range(14)]

    def losses(form):
        svi = prepared()
        with settings.context(cuda_steps=form):
            run = svi.run(14, batches=batches(), compile=True, **RUN)
        return run.losses, step_of(svi).pure.skipped.item(), run.native_steps

    found, skipped, native = losses(form)
    assert found.isfinite().logical_not().nonzero().flatten().tolist() == [5, 6, 11]
    assert (skipped, native) == (3, 12)
    expected, *_ = losses("graph")
    torch.testing.assert_close(found, expected, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("form", ["block", "kernels"])
def test_floats_that_vary_cost_one_capture(gpu, form):
    def losses(compile):
        svi = prepared(tempered)
        betas = (1.0, 0.5, 0.25, 0.1)
        with settings.context(cuda_steps=form):
            runs = [svi.run(6, x, y, beta, compile=compile, **RUN) for beta in betas]
        assert compile is False or runs[-1].native_steps == 6
        return torch.cat([run.losses for run in runs])

    torch.testing.assert_close(losses(True), losses(False), **CLOSE)


def test_python_state_that_changes_is_noticed(gpu, monkeypatch):
    monkeypatch.setattr(captured, "LOOKS_APART", 0)
    shift = [0.0]

    def shifted(x, y):
        regression(x, y + shift[0])

    svi = prepared(shifted)
    svi.run(8, x, y, compile=True, **RUN)
    step = step_of(svi)
    assert step.form == "block"
    assert step.difference() is None
    shift[0] = 1.0
    assert "has changed" in step.difference() or "has become" in step.difference()


@pytest.mark.parametrize("form", ["block", "kernels"])
def test_a_loop_over_particles(gpu, form):
    def losses(compile):
        pyro.clear_param_store()
        elbo = Trace_ELBO(num_particles=70)  # one after the other
        svi = SVI(regression, AutoNormal(regression), pyro.optim.Adam({"lr": 0.02}), elbo, seed=7)
        with settings.context(cuda_steps=form):
            run = svi.run(4, x, y, compile=compile, **RUN)
        assert compile is False or (step_of(svi).form, run.native_steps) == (form, 2)
        return run.losses

    torch.testing.assert_close(losses(True), losses(False), **CLOSE)


class TestFits:
    F = 5

    @staticmethod
    def run(steps=16, data=None, svi=None, **options):
        targets = torch.stack([y + k for k in range(TestFits.F)]) if data is None else data
        first = options.pop("first_fit", 0)
        svi = svi or prepared(particles=1, num_fits=len(targets), first_fit=first)
        compile = options.pop("compile", True)
        found = svi.run(steps, x, targets, fit_dims=(None, 0), compile=compile, **RUN, **options)
        return svi, found

    def test_all_fits_are_one_launch_and_equal_native_ones(self, gpu, monkeypatch):
        svi, run = self.run()
        assert svi._fits._current.form == "block"
        assert run.native_steps == 16
        assert set(gpu.launches) == {1, self.F}  # one fit is compared with an eager one
        monkeypatch.undo()
        _, expected = self.run()
        assert expected.native_steps == 16
        torch.testing.assert_close(run.losses, expected.losses, **CLOSE)
        torch.testing.assert_close(run.params, expected.params, **CLOSE)

    def test_a_fit_is_the_same_alone_and_among_others(self, gpu):
        _, together = self.run()
        targets = torch.stack([y + k for k in range(2, 4)])
        _, alone = self.run(data=targets, first_fit=2)
        assert torch.equal(together.losses[:, 2:4], alone.losses)

    def test_what_is_not_finite_stays_in_its_fit(self, gpu):
        targets = torch.stack([y + k for k in range(self.F)])
        bad = targets.clone()
        bad[1, 2] = torch.nan
        _, good = self.run(data=targets)
        _, run = self.run(data=bad)
        assert run.losses[:, 1].isnan().all()
        assert run.skipped.tolist() == [0, 16, 0, 0, 0]
        others = [0, 2, 3, 4]
        assert torch.equal(run.losses[:, others], good.losses[:, others])

    def test_a_hopeless_fit_is_run_no_more(self, gpu):
        bad = torch.stack([y, y * torch.nan, y])
        svi, run = self.run(130, data=bad)
        _, run = self.run(8, data=bad, svi=svi)
        assert run.losses[:, 1].isnan().all()
        assert not run.losses[:, [0, 2]].isnan().any()
        assert svi._fits.skipped.tolist() == [0, 108, 0]  # 100 in a row, then those of this run

    def test_fits_that_are_done_are_left_alone(self, gpu):
        svi, _ = self.run(8)
        fits = svi._fits
        before = fits._state[0].clone()
        fits.active[1] = fits.active[3] = False
        losses = fits.run(4)
        assert losses.isnan().any(0).tolist() == [False, True, False, True, False]
        still = (fits._state[0] == before).all(1)
        assert still.tolist() == [False, True, False, True, False]

    def test_batches_of_their_own(self, gpu, monkeypatch):
        def run():
            targets = torch.stack([y + k for k in range(3)])
            batches = [(x, targets + 0.1 * k) for k in range(9)]
            svi = prepared(particles=1, num_fits=3)
            return svi.run(9, batches=batches, fit_dims=(None, 0), compile=True, **RUN)

        found = run()
        assert found.native_steps == 9
        monkeypatch.undo()
        torch.testing.assert_close(found.losses, run().losses, **CLOSE)

    @pytest.mark.parametrize("reason", ["emit_block", "wrong"])
    def test_what_is_of_no_use_is_replayed(self, gpu, monkeypatch, request, reason):
        if reason == "wrong":
            request.getfixturevalue("wrong")
            with pytest.warns(FastSVIWarning, match="generated kernels are not used"):
                svi, run = self.run(6)
        else:
            monkeypatch.setattr("fastsvi.engine.cuda.block_step.emit_block", refuse)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                svi, run = self.run(6)
        step = svi._fits._current
        assert (step.form, run.native_steps, run.obstacle) == ("replay", 0, None)
        assert step.passed_over
        assert not run.losses.isnan().any()

    def test_python_state_is_looked_at(self, gpu):
        svi, _ = self.run(4)
        step = svi._fits._current
        assert isinstance(step, fits_step.FitsStep)
        assert step.difference() is None
