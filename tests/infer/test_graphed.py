"""Steps taken in place, as a CUDA graph replays them; on a CPU with calls in place of the graph."""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.distributions import constraints
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


def test_what_a_graph_cannot_hold_is_reported():
    svi, data = prepared()

    def fails(body):
        raise RuntimeError("operation not permitted when stream is capturing")

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
    assert run.native_steps == 199
    torch.testing.assert_close(run.losses, expected, rtol=1e-3, atol=1e-2)
    svi, data = prepared(guide)
    cpu = svi.run(200, *data, progress_bar=False, compile=True)
    torch.testing.assert_close(run.losses.cpu(), cpu.losses, rtol=1e-3, atol=1e-2)
