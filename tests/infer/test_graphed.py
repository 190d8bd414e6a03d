"""Steps taken in place, as a CUDA graph replays them; on a CPU with calls in place of the graph."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.engine.cuda_graph import Capturer
from fastsvi.errors import CaptureError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.graphed import GraphedLoop
from fastsvi.infer.pure_step import PureStep

generator = torch.Generator().manual_seed(0)
x = torch.randn(30, 3, generator=generator)
y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(30, generator=generator)


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, device=x.device), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfCauchy(torch.ones((), device=x.device)))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


def by_hand(x, y):
    zeros = torch.zeros(3, device=x.device)
    loc = pyro.param("loc", zeros)
    scale = pyro.param("scale", zeros + 0.1, constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))
    rate = pyro.param("rate", zeros[0] + 0.5, constraint=constraints.positive)
    pyro.sample("noise", dist.LogNormal(rate.log(), 0.1))


GUIDES = {"AutoNormal": lambda: AutoNormal(regression), "by hand": lambda: by_hand}


def prepared(guide="AutoNormal", device="cpu"):
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(regression, GUIDES[guide](), pyro.optim.Adam({"lr": 0.02}), elbo, seed=7)
    data = x.to(device), y.to(device)
    svi.run(2, *data, progress_bar=False, compile=False)
    return svi, data


def eager(svi, data, steps):
    return svi.run(steps, *data, progress_bar=False, compile=False).losses


def called(body):
    """In place of a graph. The first call stands for the warm-up."""
    body()
    return body


def values():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("guide", GUIDES)
def test_steps_in_place_equal_eager_ones(guide):
    svi, data = prepared(guide)
    expected, after = eager(svi, data, 40), values()
    svi, data = prepared(guide)
    pure = PureStep(svi, Arguments(data, {}))
    loop = GraphedLoop(pure, called)
    before = values()
    loop.build()
    torch.testing.assert_close(values(), before, rtol=0, atol=0)
    pure.begin(Arguments(data, {}))
    losses = torch.cat([loop.run(35), loop.run(5)])  # two whole graphs and single steps
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(values(), after, rtol=1e-3, atol=1e-4)


def test_another_state_is_used_and_the_live_one_kept():
    svi, data = prepared()
    pure = PureStep(svi, Arguments(data, {}))
    loop = GraphedLoop(pure, called)
    before = values()
    copies = [tensor.clone() for tensor in pure.state]
    loss = loop.run(3, state=copies)
    torch.testing.assert_close(values(), before, rtol=0, atol=0)
    assert not torch.equal(copies[0], pure.state[0])
    assert torch.equal(loss, loop.run(3))  # the same steps, now on the live state
    assert torch.equal(copies[0], pure.state[0])


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    svi, data = prepared()
    bad = data[1].clone()
    arguments = Arguments((data[0], bad), {})
    pure = PureStep(svi, arguments, lifted=[1])
    loop = GraphedLoop(pure, called)
    loop.run(2)
    before = values()
    nan = torch.full_like(bad, torch.nan)
    rows = torch.stack([nan, bad, nan])
    position = len(pure.inputs) - 1
    losses = loop.run(3, inputs=[*pure.inputs[:-1], rows], stepped=[position])
    assert losses.isfinite().tolist() == [False, True, False]
    assert pure.skipped.item() == 2
    assert all(value.isfinite().all() for value in values().values())
    assert any(not torch.equal(value, before[name]) for name, value in values().items())


def test_eager_steps_go_on_as_if_there_had_been_no_others():
    svi, data = prepared()
    expected = eager(svi, data, 8)
    svi, data = prepared()
    pure = PureStep(svi, Arguments(data, {}))
    loop = GraphedLoop(pure, called)
    pure.begin(Arguments(data, {}))
    losses = loop.run(4)
    pure.advance(4)
    losses = torch.cat([losses, eager(svi, data, 4)])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-3)


def test_arguments_that_vary_are_read_where_the_steps_run():
    def annealed(x, y, beta):
        with pyro.poutine.scale(scale=beta):
            regression(x, y)

    pyro.clear_param_store()
    svi = SVI(annealed, AutoNormal(annealed), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), seed=7)
    run = {"progress_bar": False, "compile": False}
    svi.run(2, x, y, 1.0, **run)
    start = values()
    expected = torch.cat([svi.run(2, x, y, beta, **run).losses for beta in (0.5, 0.25)])
    pyro.clear_param_store()
    svi = SVI(annealed, AutoNormal(annealed), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), seed=7)
    svi.run(2, x, y, 1.0, **run)
    torch.testing.assert_close(values(), start, rtol=0, atol=0)
    first = Arguments((x, y, 0.5), {})
    pure = PureStep(svi, first, lifted=[2])
    loop = GraphedLoop(pure, called)
    losses = []
    for arguments in (first, Arguments((x, y, 0.25), {})):
        pure.begin(arguments)
        losses.append(loop.run(2))
        pure.advance(2)
    torch.testing.assert_close(torch.cat(losses), expected, rtol=1e-4, atol=1e-3)


def test_what_changes_outside_of_the_tensors_shows_in_another_recording():
    shift = [0.0]

    def shifted(x, y):
        regression(x, y + shift[0])

    pyro.clear_param_store()
    svi = SVI(shifted, AutoNormal(shifted), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), seed=7)
    svi.run(2, x, y, progress_bar=False, compile=False)
    loop = GraphedLoop(PureStep(svi, Arguments((x, y), {})), called)
    assert loop.graph.difference(loop.record()) is None
    shift[0] = 1.0
    assert "has changed" in loop.graph.difference(loop.record())


def test_a_program_that_reads_a_tensor_is_named():
    def reads(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if weight.sum() > 100:
            weight = weight * 2
        pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    pyro.clear_param_store()
    svi = SVI(reads, AutoNormal(reads), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), seed=7)
    svi.run(2, x, y, progress_bar=False, compile=False)
    with pytest.raises(CaptureError, match=r"if weight.sum\(\) > 100"):
        GraphedLoop(PureStep(svi, Arguments((x, y), {})), called)


def test_what_a_graph_cannot_hold_is_reported():
    svi, data = prepared()

    def fails(body):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    before = values()
    with pytest.raises(CaptureError, match="a CUDA graph cannot hold the step: operation not"):
        GraphedLoop(PureStep(svi, Arguments(data, {})), fails).build()
    torch.testing.assert_close(values(), before, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guide", GUIDES)
def test_runs_on_a_gpu_equal_eager_ones(guide):
    svi, data = prepared(guide, "cuda")
    expected = eager(svi, data, 200)
    svi, data = prepared(guide, "cuda")
    run = svi.run(200, *data, progress_bar=False, compile=True)
    assert run.obstacle is None
    assert run.native_steps == 198  # the first is eager, and the one to check against
    torch.testing.assert_close(run.losses, expected, rtol=1e-3, atol=1e-2)
    svi, data = prepared(guide)
    cpu = svi.run(200, *data, progress_bar=False, compile=True)
    torch.testing.assert_close(run.losses.cpu(), cpu.losses, rtol=1e-3, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCapturer:
    def test_graphs_of_one_capturer_may_be_launched_in_any_order(self):
        total = torch.zeros(1000, device="cuda")

        def add(number):
            def body():
                total.add_(torch.ones(1000, device="cuda") * number)

            return body

        capture = Capturer()
        one, ten = capture(add(1.0)), capture(add(10.0))
        total.zero_()
        for launch in (ten, one, ten, one, one):
            launch()
        assert (total == 23).all()

    def test_waiting_is_found_before_the_capture_and_nothing_is_broken(self):
        x = torch.ones(3, device="cuda")

        def body():
            x.mul_(2.0 if x.sum().item() > 0 else 1.0)

        capture = Capturer()
        with pytest.raises(RuntimeError, match="synchronizing"):
            capture(body)
        assert torch.cuda.get_sync_debug_mode() == 0
        launch = capture(lambda: x.fill_(3.0))
        x.zero_()
        launch()
        assert x.tolist() == [3.0, 3.0, 3.0]

    def test_a_fit_reads_new_arguments_and_follows_learning_rates(self):
        def annealed(x, y, beta):
            with pyro.poutine.scale(scale=beta):
                regression(x, y)

        def losses(compile):
            pyro.clear_param_store()
            optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})
            svi = SVI(annealed, AutoNormal(annealed), optim, Trace_ELBO(), seed=7)
            betas = (1.0, 0.5, 0.25, 0.2, 0.1)
            data = x.cuda(), y.cuda()
            runs = [svi.run(20, *data, beta, progress_bar=False, compile=compile) for beta in betas]
            assert compile is False or runs[-1].native_steps == 20
            return torch.cat([run.losses for run in runs])

        torch.testing.assert_close(losses(True), losses(False), rtol=1e-3, atol=1e-2)

    def test_a_run_waits_for_the_device_only_between_chunks(self):
        svi, data = prepared(device="cuda")
        svi.run(40, *data, progress_bar=False, compile=True)
        pure = PureStep(svi, Arguments(data, {}))
        loop = GraphedLoop(pure)
        loop.run(20)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.run(200)
        finally:
            torch.cuda.set_sync_debug_mode("default")
