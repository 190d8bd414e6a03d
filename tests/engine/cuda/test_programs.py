"""Whole steps of fits as generated CUDA equal the native loops of a CPU, in both forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.engine.cuda import nvrtc
from fastsvi.engine.cuda.block_step import BlockStep, recorded
from fastsvi.engine.cuda.kernel_loop import KernelLoop
from fastsvi.engine.graph import Graph
from fastsvi.engine.native import NativeStep
from fastsvi.errors import CaptureError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from fastsvi.infer.pure_step import PureStep

STEPS = 4
SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def data(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 12.9898).sin().mul(43.5).remainder(2).sub(1).view(shape)


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS.to(mu)), obs=SCHOOLS.to(mu))


def logistic(x, y):
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x @ weight.unsqueeze(-1)).squeeze(-1)), obs=y)


def intercepts(x, y, group):
    """Gathers by group and by an interaction, whose gradients are scattered."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 7):
        intercept = pyro.sample("intercept", dist.Normal(0.0, scale))
    with pyro.plate("cells_0", 3, dim=-2), pyro.plate("cells_1", 4, dim=-1):
        cell = pyro.sample("cell", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        mean = intercept[..., group] + cell[..., group % 3, group % 4] + slope * x
        pyro.sample("y", dist.StudentT(4.0, mean, 1.0), obs=y)


def subsampled(size: int, count: int) -> Callable[..., None]:
    def minibatch(x, y):
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("rows", size, subsample_size=count) as rows:
            logits = (x[rows] * weight).sum(-1)
            pyro.sample("y", dist.Poisson(logits.exp()), obs=y[rows])

    return minibatch


def mixture(x):
    """Draws that are not normal, by counter: rejection turned into a fixed number of tries."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(3)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        means = rate * torch.arange(3.0).to(x)
        log_probs = dist.Normal(means, 1.0).log_prob(x.unsqueeze(-1)) + weights.log()
        pyro.factor("x", log_probs.logsumexp(-1))


def mixture_guide(x):
    alpha = pyro.param("alpha", x.new_tensor([1.5, 2.0, 0.7]), constraint=dist.constraints.positive)
    shape = pyro.param("shape", x.new_tensor(3.0), constraint=dist.constraints.positive)
    pyro.sample("weights", dist.Dirichlet(alpha))
    pyro.sample("rate", dist.Gamma(shape, 2.0))


def process(x, y):
    """Cholesky factors and triangular systems, by a block."""
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    kernel = (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + (noise + 0.1) * torch.eye(len(x)).to(
        x
    )
    root = torch.linalg.cholesky(kernel)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), scale_tril=root), obs=y)


def network(x, y):
    first = pyro.sample("first", dist.Normal(x.new_zeros(x.shape[1], 9), 1.0).to_event(2))
    second = pyro.sample("second", dist.Normal(x.new_zeros(9, 5), 1.0).to_event(2))
    logits = torch.tanh(x @ first) @ second
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@dataclass
class Case:
    model: Callable[..., Any]
    args: tuple[torch.Tensor, ...] = ()
    guide: Any = AutoNormal
    particles: int = 1
    sequential: bool = False
    dtype: torch.dtype = torch.float64
    optimizer: str = "Adam"


x, y = data(40, 3), data(40, 1).squeeze(-1)
CASES = {
    "schools": Case(schools, dtype=torch.float32),
    "schools, 70 particles": Case(schools, particles=70),
    "schools, one by one": Case(schools, particles=11, sequential=True),
    "logistic": Case(logistic, (x, (y > 0).float()), particles=3, dtype=torch.float32),
    "intercepts": Case(intercepts, (data(60), data(60), torch.arange(60) ** 2 % 7), particles=2),
    "minibatch of a few": Case(subsampled(40, 9), (x, y.abs().round())),
    "minibatch of many": Case(
        subsampled(3000, 17), (data(3000, 3), data(3000).abs().round()), optimizer="ClippedAdam"
    ),
    "mixture": Case(mixture, (data(20),), mixture_guide, particles=2),
    "process": Case(process, (data(13), data(13)), AutoMultivariateNormal),
    "network": Case(network, (x, torch.arange(40) % 5), AutoLowRankMultivariateNormal),
}


def called(body):
    """In place of a CUDA graph. The first call stands for the warm-up."""
    body()
    return body


@dataclass
class Prepared:
    """A case whose step has been recorded."""

    step: PureStep
    graph: Graph
    dtype: torch.dtype

    def made(self, kind: type) -> BlockStep | KernelLoop:
        """The step in a form; calls take the place of a CUDA graph."""
        step = self.step
        options = {"capture": called} if kind is KernelLoop else {}
        tensors = (step.state, step.inputs, step.aliases)
        return kind(step, *tensors, graph=self.graph, **options)

    def state(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.step.state]


@pytest.fixture(params=CASES)
def prepared(request):
    case = CASES[request.param]
    default = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    args = tuple(a.to(case.dtype) if a.is_floating_point() else a for a in case.args)
    guide = case.guide(case.model) if isinstance(case.guide, type) else case.guide
    elbo = Trace_ELBO(num_particles=case.particles, vectorize_particles=not case.sequential)
    optimizer = getattr(pyro.optim, case.optimizer)({"lr": 0.01})
    svi = SVI(case.model, guide, optimizer, elbo, seed=3)
    svi.run(2, *args, compile=False, progress_bar=False)
    step = PureStep(svi, Arguments(args, {}))
    graph = recorded(step, [*step.state, *step.inputs], step.aliases)
    yield Prepared(step, graph, case.dtype)
    torch.set_default_dtype(default)


def test_steps_equal_those_of_native_loops(prepared, simulated):
    step, expected = prepared.step, prepared.state()
    native = NativeStep(step, step.state, step.inputs, step.aliases)
    losses = native.run(STEPS, state=expected)
    assert losses.isfinite().all()
    # Roundings differ, and Adam carries those of small gradients over to the parameters.
    slack = 1e-8 if prepared.dtype == torch.float64 else 1e-3
    for kind in (BlockStep, KernelLoop):
        made, state = prepared.made(kind), prepared.state()
        got = made.run(STEPS, state=state)
        torch.testing.assert_close(got, losses, rtol=slack, atol=slack)
        torch.testing.assert_close(state, expected, rtol=slack, atol=slack)
        # Another order of the threads changes nothing: no barrier is missing.
        again, simulated.seed = prepared.state(), simulated.seed + 1
        assert torch.equal(made.run(STEPS, state=again), got)
        assert all(torch.equal(a, b) for a, b in zip(again, state, strict=True))


@pytest.fixture(scope="module")
def compiler():
    """NVRTC, which needs no GPU: a wheel of its own, or in torch's builds for CUDA."""
    try:
        return nvrtc.library()
    except CaptureError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_nvrtc_takes_the_source(compiler, prepared, simulated):
    for kind in (BlockStep, KernelLoop):
        source = prepared.made(kind).source
        for capability in ((8, 0), (9, 0), (10, 0)):
            assert nvrtc.compile_source(source, capability)
