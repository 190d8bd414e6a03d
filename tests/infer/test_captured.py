"""A captured run gives what eager steps with the same noise give, and says why where it cannot."""

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
from fastsvi.infer.captured import CapturedStep


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * effect, sigma), obs=y)


schools_data = (
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
)


def logistic(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)


def groups(group, y):
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    share = pyro.sample("share", dist.Beta(torch.ones(3), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.Uniform(0.1, 4.0))
    shift = pyro.param("shift", torch.tensor(0.3), constraint=constraints.unit_interval)
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.StudentT(4.0, shift, scale))
    with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=0.5):
        mean = level[group] + share[group % 3]
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def network(x, y):
    with pyro.plate("unit", 6):
        hidden = pyro.sample("hidden", dist.Normal(torch.zeros(6), 1.0))
    net = pyro.module("net", NET)
    mean = (net(x) * hidden).sum(-1)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


NET = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh())

generator = torch.Generator().manual_seed(0)
rows = torch.randn(40, 3, generator=generator)
answers = (rows[:, 0] > 0).float()
MODELS = {
    "schools": (schools, schools_data),
    "logistic": (logistic, (rows, answers)),
    "groups": (groups, (torch.arange(40) % 4, rows[:, 1])),
    "network": (network, (rows, answers)),
}


def prepared(model, args, particles, optim=None, steps=2):
    pyro.clear_param_store()
    torch.manual_seed(1)
    for layer in NET:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    optim = optim or pyro.optim.Adam({"lr": 0.02})
    svi = SVI(model, AutoNormal(model), optim, elbo, seed=7)
    return svi, [svi.step(*args) for _ in range(steps)]


def values():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_captured_run_equals_eager_steps(name, particles):
    model, args = MODELS[name]
    svi, _ = prepared(model, args, particles)
    eager = torch.tensor([svi.step(*args) for _ in range(50)])
    expected = values()
    svi, _ = prepared(model, args, particles)
    captured = CapturedStep(svi, Arguments(args, {}))
    captured.check(captured.arguments, lambda: svi._advance(args, {}))
    losses = captured.run(49)
    # float32: fifty steps of some hundred operations each, and the losses have size 100.
    torch.testing.assert_close(losses, eager[1:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(values(), expected, rtol=1e-3, atol=1e-4)
    # Steps go on eagerly from where the captured run ended.
    assert svi._program.noise.step == 52


@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99, "clip_norm": 1.0}),
        lambda: pyro.optim.Adam({"lr": 0.02, "betas": (0.5, 0.9)}, {"clip_norm": 0.5}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "locs" in name else 0.01}),
    ],
)
def test_every_flat_optimizer(optim):
    svi, _ = prepared(schools, schools_data, 1, optim())
    eager = torch.tensor([svi.step(*schools_data) for _ in range(20)])
    expected = values()
    svi, _ = prepared(schools, schools_data, 1, optim())
    torch.testing.assert_close(
        CapturedStep(svi, Arguments(schools_data, {})).run(20), eager, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(values(), expected, rtol=1e-3, atol=1e-4)


def test_float64_agrees_closely():
    data = tuple(x.double() for x in schools_data)

    def model(sigma, y):
        zero = torch.zeros((), dtype=torch.float64)
        mu = pyro.sample("mu", dist.Normal(zero, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(zero + 5))
        with pyro.plate("schools", 8):
            pyro.sample("obs", dist.Normal(mu, tau + sigma), obs=y)

    svi, _ = prepared(model, data, 3)
    eager = torch.tensor([svi.step(*data) for _ in range(1000)], dtype=torch.float64)
    svi, _ = prepared(model, data, 3)
    losses = CapturedStep(svi, Arguments(data, {})).run(1000)
    torch.testing.assert_close(losses, eager, rtol=1e-10, atol=1e-10)


def test_a_non_finite_step_ends_the_run_and_changes_nothing():
    def model(limit):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mean = torch.where(x > limit, torch.inf, x)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(3.0))

    limit = torch.full((2,), 0.9)[0]
    svi, _ = prepared(model, (limit,), 1, pyro.optim.Adam({"lr": 0.05}))
    losses = CapturedStep(svi, Arguments((limit,), {})).run(2000)
    assert 0 < len(losses) < 2000
    assert losses.isfinite().all()
    before = values()
    assert all(value.isfinite().all() for value in before.values())
    with pytest.raises(pyro.errors.NonFiniteError, match="'y'"):
        svi.step(limit)
    torch.testing.assert_close(values(), before, rtol=0, atol=0)


@pytest.mark.parametrize("optim", [None, lambda name: {"lr": 0.1, "eps": 1e-8 * len(name)}])
def test_a_loss_without_gradient_counts_too(optim):
    def model(limit):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x.detach() > limit, -torch.inf, 0.0))

    limit = torch.full((2,), 1.0)[0]
    optim = optim and pyro.optim.Adam(optim)
    svi, _ = prepared(model, (limit,), 1, optim)
    losses = CapturedStep(svi, Arguments((limit,), {})).run(2000)
    assert 0 < len(losses) < 2000
    assert losses.isfinite().all()


def test_python_state_that_changes_is_noticed():
    count = [0]

    def model():
        count[0] += 1
        pyro.sample("x", dist.Normal(float(count[0]), 1.0))

    svi, _ = prepared(model, (), 1)
    captured = CapturedStep(svi, Arguments((), {}))
    with pytest.raises(CaptureError, match="captured step gave another loss"):
        captured.check(captured.arguments, lambda: svi._advance((), {}))


def branching(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x if x > 0 else -x, 1.0), obs=y)


def drawing(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + torch.randn(()), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (branching, r"test_captured.py:\d+: `pyro.sample\(\"y\", dist.Normal\(x if x > 0"),
        (
            drawing,
            r"`pyro.sample\(\"y\", dist.Normal\(x \+ torch.randn\(\(\)\), 1.0\), obs=y\)` draws",
        ),
    ],
)
def test_what_cannot_be_captured_is_named(model, message):
    y = torch.tensor(1.0)
    svi, _ = prepared(model, (y,), 1)
    before = values()
    with pytest.raises(CaptureError, match=message):
        CapturedStep(svi, Arguments((y,), {}))
    torch.testing.assert_close(values(), before, rtol=0, atol=0)


def test_what_is_not_captured_yet_says_so():
    svi, _ = prepared(schools, schools_data, 1, pyro.optim.SGD({"lr": 1e-4}))
    with pytest.raises(CaptureError, match="cannot be captured"):
        CapturedStep(svi, Arguments(schools_data, {}))


@pytest.mark.parametrize("compile", ["auto", True])
def test_run_gives_the_same_compiled_or_not(compile):
    svi, _ = prepared(schools, schools_data, 8)
    eager = svi.run(3000, *schools_data, progress_bar=False, compile=False)
    assert (eager.native_steps, eager.obstacle) == (0, "compile=False")
    svi, _ = prepared(schools, schools_data, 8)
    run = svi.run(3000, *schools_data, progress_bar=False, compile=compile)
    assert run.obstacle is None
    assert run.native_steps > (2900 if compile is True else 0)
    assert len(run.losses) == 3000
    # Rounding grows with the steps; the first thousand stay close, the end agrees as a fit.
    torch.testing.assert_close(run.losses[:1000], eager.losses[:1000], rtol=1e-3, atol=1e-2)
    for name, value in run.params.items():
        torch.testing.assert_close(value, eager.params[name], rtol=0.01, atol=0.02)


def test_a_second_run_uses_the_same_captured_step():
    svi, _ = prepared(schools, schools_data, 2)
    quietly = {"progress_bar": False, "compile": True}
    # One that shows what parameters there are, and one to check against.
    assert svi.run(50, *schools_data, **quietly).native_steps == 48
    assert svi.run(50, *schools_data, **quietly).native_steps == 50
    assert svi._captures.count == 1


def regression(x, y, slope=1.0):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight * slope, 1.0), obs=y)


def test_another_model_or_optimizer_is_captured_anew():
    svi, _ = prepared(schools, schools_data, 2)
    quietly = {"progress_bar": False, "compile": True}
    svi.run(20, *schools_data, **quietly)
    svi.model = pyro.poutine.scale(schools, 10.0)
    scaled = svi.run(20, *schools_data, **quietly)
    assert svi._captures.count == 2
    assert scaled.losses[-1] > 200  # ten times as large as before
    svi.optim = pyro.optim.Adam({"lr": 0.0})
    before = values()
    svi.run(20, *schools_data, **quietly)
    assert svi._captures.count == 3
    torch.testing.assert_close(values(), before)


def test_arguments_that_vary_become_inputs_and_cost_one_capture():
    def losses(compile):
        svi, _ = prepared(regression, (rows, answers), 2, steps=1)
        runs = []
        for k in range(5):
            x, slope = rows + k, 1.0 - k / 10
            runs.append(svi.run(20, x, answers, slope=slope, progress_bar=False, compile=compile))
        return torch.stack([run.losses for run in runs]), svi, runs

    captured, svi, runs = losses(True)
    eager, _, _ = losses(False)
    torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-3)
    assert svi._captures.count == 2  # as constants, then with the two that vary as inputs
    assert [run.native_steps for run in runs] == [18, 18, 20, 20, 20]


def test_data_written_in_place_become_an_input():
    x = rows.clone()
    svi, _ = prepared(regression, (x, answers), 2, steps=1)
    for count in (1, 2, 2, 2):
        run = svi.run(20, x, answers, progress_bar=False, compile=True)
        assert run.obstacle is None
        assert svi._captures.count == count
        x.mul_(1.5)  # what was computed from it, such as its logarithm, is out of date
    x.div_(1.5)
    last = svi.run(1, x, answers, progress_bar=False, compile=True).losses[0]
    svi._program.noise.step -= 1
    assert abs(last - svi.evaluate_loss(x, answers)) < 1e3  # of the data now, not of those before


def test_what_varies_otherwise_is_captured_a_bounded_number_of_times():
    svi, _ = prepared(regression, (rows, answers), 1, steps=1)
    message = "captured 8 times already, because argument [01] changes"
    quietly = {"progress_bar": False, "compile": True}
    for k in range(8):
        svi.run(3, rows[: 20 + k], answers[: 20 + k], **quietly)
    with pytest.warns(pyro.errors.FastSVIWarning, match=message):
        run = svi.run(3, rows[:30], answers[:30], **quietly)
    assert svi._captures.count == 8
    assert "argument" in run.obstacle


def test_learning_rates_may_change_without_a_capture():
    def losses(compile):
        options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.7}
        scheduler = pyro.optim.ExponentialLR(options)
        svi, _ = prepared(schools, schools_data, 2, scheduler, steps=1)
        runs = []
        for _ in range(10):
            run = svi.run(20, *schools_data, progress_bar=False, compile=compile)
            runs.append(run.losses)
            assert run.obstacle is None or not compile
            scheduler.step()
        return torch.cat(runs), svi._captures.count

    captured, count = losses(True)
    assert count == 1
    torch.testing.assert_close(captured, losses(False)[0], rtol=1e-4, atol=1e-3)


def test_another_optimizer_is_captured_anew():
    losses = []
    for compile in (True, False):
        pyro.clear_param_store()
        first, second = pyro.optim.Adam({"lr": 0.05}), pyro.optim.ClippedAdam({"lrd": 0.5})
        svi = SVI(schools, AutoNormal(schools), first, Trace_ELBO(), seed=0)
        svi.run(20, *schools_data, progress_bar=False, compile=compile)
        svi.optim = second
        losses.append(svi.run(20, *schools_data, progress_bar=False, compile=compile).losses)
    # Both round some hundred operations in a row; steps of the first would be 50 times as long.
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-3)


def test_batches_of_two_sizes_are_captured_twice():
    data = torch.utils.data.TensorDataset(rows, answers)
    loader = torch.utils.data.DataLoader(data, batch_size=16)  # 16, 16 and 8

    def losses(compile):
        svi, _ = prepared(regression, (rows, answers), 1, steps=1)
        run = svi.run(60, batches=loader, slope=0.9, progress_bar=False, compile=compile)
        return run, svi

    run, svi = losses(True)
    assert svi._captures.count == 2
    assert run.native_steps == 60 - 3  # the first, and one of each to check against
    torch.testing.assert_close(run.losses, losses(False)[0].losses, rtol=1e-4, atol=1e-3)


def test_a_bad_batch_is_named_and_those_before_it_count():
    bad = answers.clone()
    bad[3] = torch.nan
    batches = [(rows, answers)] * 40 + [(rows, bad)]
    svi, _ = prepared(regression, (rows, answers), 1, steps=1)
    with pytest.raises(pyro.errors.NonFiniteError, match="'y'"):
        svi.run(60, batches=batches, progress_bar=False, compile=True)
    # The bad one's draws are used up, so that whoever tries again draws others.
    assert svi._program.noise.step == 1 + 40 + 1
    after = values()
    svi, _ = prepared(regression, (rows, answers), 1, steps=1)
    svi.run(40, batches=batches[:40], progress_bar=False, compile=True)
    torch.testing.assert_close(after, values(), rtol=1e-4, atol=1e-5)


def test_run_names_what_keeps_it_eager():
    y = torch.tensor(1.0)
    svi, _ = prepared(branching, (y,), 1)
    with pytest.warns(pyro.errors.FastSVIWarning, match="taken eagerly, because .*test_captured"):
        run = svi.run(10, y, progress_bar=False, compile=True)
    assert "test_captured.py" in run.obstacle
    assert len(run.losses) == 10
    quiet = svi.run(300, y, progress_bar=False)
    assert quiet.native_steps == 0


def test_run_notices_python_state_and_goes_on_eagerly():
    count = [0]

    def model():
        count[0] += 1
        pyro.sample("x", dist.Normal(float(count[0] % 7), 1.0))

    svi, _ = prepared(model, (), 1)
    with pytest.warns(pyro.errors.FastSVIWarning, match="Python counter"):
        run = svi.run(50, progress_bar=False, compile=True)
    assert len(run.losses) == 50
    assert run.native_steps == 0


def test_python_state_that_changes_later_is_noticed_at_a_look(monkeypatch):
    width = [1.0]
    monkeypatch.setattr("fastsvi.infer.captured.LOOKS_APART", 0)

    def model():
        pyro.sample("x", dist.Normal(0.0, width[0]))

    def batches():
        for k in range(50):
            width[0] = 1.0 if k < 25 else 1.0001  # too little to show in a comparison of losses
            yield ()

    svi, _ = prepared(model, (), 1)
    message = r"0.5 has become 0.49990.*test_captured.py"
    with pytest.warns(pyro.errors.FastSVIWarning, match=message):
        run = svi.run(50, batches=batches(), progress_bar=False, compile=True)
    assert "Pass what changes as an argument" in run.obstacle
    assert run.native_steps == 23


def test_run_stops_at_a_non_finite_step_with_the_site():
    def model(limit):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mean = torch.where(x > limit, torch.inf, x)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(3.0))

    limit = torch.full((2,), 0.9)[0]
    svi, _ = prepared(model, (limit,), 1, pyro.optim.Adam({"lr": 0.05}))
    with pytest.raises(pyro.errors.NonFiniteError, match="'y'"):
        svi.run(2000, limit, progress_bar=False, compile=True)
    assert all(value.isfinite().all() for value in values().values())


def test_a_bad_choice_of_compile_is_refused():
    svi, _ = prepared(schools, schools_data, 1)
    with pytest.raises(ValueError, match="compile is one of"):
        svi.run(1, *schools_data, compile="fast")
