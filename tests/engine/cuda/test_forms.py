"""Each form of steps on a GPU gives what eager steps there give; without a GPU, a simulated one.

These are the tests to run first on a machine with a GPU: NVRTC, the driver and the kernels in
earnest. The noise is a function of seed, step, particle and element, so losses agree but for
rounding: some hundred operations of float32 a step, which the first steps of Adam carry over to
the parameters by a small part of the learning rate.
"""

from __future__ import annotations

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import settings
from fastsvi.distributions import constraints
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.arguments import Arguments
from fastsvi.infer.autoguide import AutoMultivariateNormal, AutoNormal

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.cuda] if CUDA else []
RUN = {"progress_bar": False}
CLOSE = {"rtol": 2e-3, "atol": 2e-2}
FORMS = ["block", "kernels", "graph"]
# The shim runs every thread of a GPU in turn.
STEPS, ROWS, WIDE = (100, 1000, 20_000) if CUDA else (6, 60, 300)


@pytest.fixture(autouse=True)
def device(request):
    if not CUDA:
        request.getfixturevalue("gpu")


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


x = numbers(ROWS, 3)
y = x @ torch.tensor([1.0, -2.0, 0.5], device=DEVICE) + 0.3 * numbers(ROWS)
group = torch.arange(ROWS, device=DEVICE) % 7


def schools(sigma, y):
    zero = torch.zeros((), device=y.device)
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(zero, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)


def logistic(x, y):
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=(y > 0).to(y.dtype))


def intercepts(x, y):
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(2.0), 2.0))
    with pyro.plate("groups", 7):
        level = pyro.sample("level", dist.StudentT(x.new_tensor(4.0), 0.0, scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level[group] + x[:, 0], 1.0), obs=y)


def minibatch(x, y):
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=20, device=x.device) as i:
        pyro.sample("y", dist.Normal(x[i] @ weight, 1.0), obs=y[i])


def wide(x, y):
    level = pyro.sample("level", dist.Normal(x.new_zeros(WIDE), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(level.mean() + y[0], 0.1), obs=y[1])


def counts(x, y):
    rate = pyro.sample("rate", dist.Gamma(2 + x.new_zeros(3), 1.0).to_event(1))
    share = pyro.sample("share", dist.Beta(x.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        mean = rate[0] + x[:, 0].abs() * share
        pyro.sample("size", dist.Poisson(mean), obs=(5 * x[:, 1].abs()) // 1)


def by_hand(x, y):
    loc = pyro.param("loc", x.new_zeros(3))
    scale = pyro.param("scale", x.new_full((3,), 0.1), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))


schools_data = (
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], device=DEVICE),
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], device=DEVICE),
)
# Model, guide, data, arguments of the ELBO.
PARTICLES = {"num_particles": 4, "vectorize_particles": True}
PROGRAMS = {
    "schools": (schools, AutoNormal, schools_data, {}),
    "schools, particles": (schools, AutoNormal, schools_data, PARTICLES),
    "logistic": (logistic, AutoNormal, (x, y), PARTICLES),
    "intercepts": (intercepts, AutoNormal, (x, y), {}),
    "minibatch": (minibatch, AutoNormal, (x, y), {}),
    "wide": (wide, AutoNormal, (x, y), {}),
    "counts": (counts, AutoNormal, (x, y), {}),
    "by hand": (logistic, by_hand, (x, y), {}),
    "dense": (logistic, AutoMultivariateNormal, (x, y), {}),
    "rounds": (logistic, AutoNormal, (x, y), {"num_particles": 12}),
}


# In a simulation the others are left to the slow tests.
SOON = {"schools, particles", "minibatch", "rounds", "wide"}
NAMES = [
    name if CUDA or name in SOON else pytest.param(name, marks=pytest.mark.slow)
    for name in PROGRAMS
]


def prepared(name, **options):
    model, guide, data, particles = PROGRAMS[name]
    pyro.clear_param_store()
    guide = guide if guide is by_hand else guide(model)
    adam = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.999})
    svi = SVI(model, guide, adam, Trace_ELBO(**particles), seed=7, **options)
    return svi, data


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_form_equals_eager_steps(name, form):
    svi, data = prepared(name)
    expected = svi.run(STEPS, *data, compile=False, **RUN)
    svi, data = prepared(name)
    with settings.context(cuda_steps=form):
        run = svi.run(STEPS, *data, compile=True, **RUN)
    assert (run.obstacle, run.native_steps) == (None, STEPS - 2)
    assert svi._captures._steps[0].form == form
    torch.testing.assert_close(run.losses, expected.losses, **CLOSE)
    torch.testing.assert_close(run.params, expected.params, **CLOSE)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("name", ["schools, particles", "intercepts"])
def test_two_runs_are_bit_identical(name, form):
    def losses():
        svi, data = prepared(name)
        with settings.context(cuda_steps=form):
            return svi.run(STEPS, *data, compile=True, **RUN).losses

    assert torch.equal(losses(), losses())


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_of_itself_a_small_step_is_a_block_and_a_large_one_is_not():
    def form(name):
        svi, data = prepared(name)
        svi.run(4, *data, compile=True, **RUN)
        return svi._captures._steps[0].form

    assert form("schools") == "block"
    pyro.clear_param_store()
    large = torch.randn(300_000, 3, device="cuda")
    svi = SVI(logistic, AutoNormal(logistic), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    run = svi.run(20, large, large[:, 0], compile=True, **RUN)
    assert (svi._captures._steps[0].form, run.obstacle) == ("kernels", None)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_waits_for_no_step(form):
    svi, data = prepared("schools")
    with settings.context(cuda_steps=form):
        svi.run(4, *data, compile=True, **RUN)
    (step,) = svi._captures._steps
    step.pure.begin(Arguments(data, {}))
    step.loop.run(3)
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step.loop.run(20)
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_not_finite_is_left_out(form):
    def scaled(x, y, beta):
        with pyro.poutine.scale(scale=beta):
            logistic(x, y)

    pyro.clear_param_store()
    svi = SVI(scaled, AutoNormal(scaled), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), seed=7)
    betas = [torch.nan if k in (6, 7) else 1.0 for k in range(9)]
    with settings.context(cuda_steps=form):
        run = svi.run(9, batches=[(x, y, beta) for beta in betas], compile=True, **RUN)
    assert (run.native_steps, run.obstacle) == (7, None)
    assert run.losses.isnan().nonzero().flatten().tolist() == [6, 7]
    assert svi._captures._steps[0].pure.skipped.item() == 2
    assert all(value.isfinite().all() for value in run.params.values())


@pytest.mark.parametrize("form", FORMS[::2])
def test_fits_equal_runs_of_one(form):
    def many(F, first):
        targets = torch.stack([y + k for k in range(first, first + F)])
        svi, _ = prepared("intercepts", num_fits=F, first_fit=first)
        options = {"fit_dims": (None, 0), "compile": True, **RUN}
        with settings.context(cuda_steps=form):
            run = svi.run(STEPS, x, targets, **options)
        assert run.native_steps == (STEPS if form == "block" else 0)
        return run

    together, alone = many(3, 0), many(1, 1)
    torch.testing.assert_close(together.losses[:, 1:2], alone.losses, **CLOSE)
    if form == "block":
        assert torch.equal(together.losses[:, 1:2], alone.losses)
    svi, _ = prepared("intercepts")
    expected = svi.run(STEPS, x, y, compile=False, **RUN)
    torch.testing.assert_close(together.losses[:, 0], expected.losses, **CLOSE)


def test_a_fit_that_fails_leaves_the_others_alone():
    def run(bad):
        targets = torch.stack([y + k for k in range(4)])
        targets[2, 5] = torch.nan if bad else targets[2, 5]
        svi, _ = prepared("logistic", num_fits=4)
        return svi.run(STEPS, x, targets, fit_dims=(None, 0), compile=True, **RUN)

    good, bad = run(False), run(True)
    others = [0, 1, 3]
    assert torch.equal(good.losses[:, others], bad.losses[:, others])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    with torch.cuda.device(0):
        svi, data = prepared("logistic")
        data = [tensor.to("cuda:1") for tensor in data]
        run = svi.run(STEPS, *data, compile=True, **RUN)
    assert run.obstacle is None
    assert run.losses.device == torch.device("cuda:1")


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_many_fits_at_once():
    targets = torch.stack([y + 0.01 * k for k in range(2000)])
    svi, _ = prepared("logistic", num_fits=2000)
    run = svi.run(50, x, targets, fit_dims=(None, 0), compile=True, **RUN)
    assert run.native_steps == 50
    assert run.losses.shape == (50, 2000)
    assert run.losses.isfinite().all()
