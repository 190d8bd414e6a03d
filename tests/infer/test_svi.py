"""SVI: steps, runs, and what is left behind when something goes wrong."""

import contextlib
import io
import math
import warnings

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import ConstraintError, NonFiniteError
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.infer.svi import OptimizerError
from fastsvi.optim import SGD, Adam, ClippedAdam

DATA = torch.tensor([1.0, 2.0, 0.5, 1.5])


def model(data):
    x = fastsvi.sample("x", dist.Normal(0.0, 10.0))
    with fastsvi.plate("data", len(data)):
        fastsvi.sample("obs", dist.Normal(x, 1.0), obs=data)


def guide(data):
    loc = fastsvi.param("loc", torch.tensor(0.0))
    scale = fastsvi.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    fastsvi.sample("x", dist.Normal(loc, scale))


def make(model=model, guide=guide, optim=None, **options):
    return SVI(model, guide, optim or Adam({"lr": 0.05}), Trace_ELBO(**options))


def store_contents():
    return {n: p.detach().clone() for n, p in fastsvi.get_param_store().named_parameters()}


def optimizer_contents(svi):
    return {name: state["state"] for name, state in svi.optim.get_state().items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, dict):
            assert_same(value, after[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key])
        else:
            assert value == after[key]


class TestStep:
    def test_returns_a_float_and_learns(self):
        svi = make(num_particles=10, vectorize_particles=True)
        losses = [svi.step(DATA) for _ in range(300)]
        assert all(type(loss) is float for loss in losses)
        # Exact posterior: N(1.247, 0.499). Adam at 0.05 wanders within about 0.1.
        assert abs(fastsvi.param("loc").item() - DATA.sum().item() / 4.01) < 0.15
        assert sum(losses[-50:]) < sum(losses[:50])

    def test_gradients_are_zero_afterwards(self):
        svi = make()
        svi.step(DATA)
        for _, leaf in fastsvi.get_param_store().named_parameters():
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))

    def test_only_params_of_the_step_are_updated(self):
        def two_sided(left):
            name = "left" if left else "right"
            loc = fastsvi.param(name, torch.tensor(1.0))
            fastsvi.sample("x", dist.Normal(loc, 1.0))

        def prior(left):
            fastsvi.sample("x", dist.Normal(0.0, 1.0))

        svi = make(prior, two_sided)
        svi.step(True)
        svi.step(False)
        right = fastsvi.param("right").item()
        svi.step(True)
        assert fastsvi.param("right").item() == right
        steps = {name: state["state"][0]["step"] for name, state in svi.optim.get_state().items()}
        assert steps["left"] == 2
        assert steps["right"] == 1

    def test_evaluate_loss_changes_nothing(self):
        auto = AutoNormal(model)
        trajectories = []
        for evaluate in (False, True):
            fastsvi.clear_param_store()
            fastsvi.set_rng_seed(3)
            auto = AutoNormal(model)
            svi = make(guide=auto)
            losses = []
            for _ in range(5):
                if evaluate:
                    assert type(svi.evaluate_loss(DATA)) is float
                losses.append(svi.step(DATA))
            trajectories.append(losses)
        assert trajectories[0] == trajectories[1]

    def test_seeded_runs_repeat(self):
        def losses(**options):
            fastsvi.clear_param_store()
            svi = SVI(model, AutoNormal(model), Adam({"lr": 0.1}), Trace_ELBO(), **options)
            return [svi.step(DATA) for _ in range(4)]

        fastsvi.set_rng_seed(1)
        first = losses()
        fastsvi.set_rng_seed(1)
        assert losses() == first
        assert losses() != first
        assert losses(seed=5) == losses(seed=5)

    def test_seeding_between_steps_repeats_them(self):
        svi = make(guide=AutoNormal(model))
        svi.step(DATA)
        losses = []
        for _ in range(2):
            fastsvi.set_rng_seed(4)
            losses.append([svi.evaluate_loss(DATA) for _ in range(3)])
        assert losses[0] == losses[1]
        noise = []
        for _ in range(2):
            fastsvi.set_rng_seed(5)
            svi.step(DATA)
            svi.step(DATA)
            noise.append(svi._program.noise.step)
        assert noise == [2, 2]

    def test_module_params_are_trained(self):
        net = torch.nn.Linear(1, 1)

        def with_net(data):
            fastsvi.module("net", net)
            fastsvi.sample("obs", dist.Normal(net(torch.ones(1)), 1.0).to_event(1), obs=data[:1])

        before = net.bias.detach().clone()
        make(with_net, lambda data: None).step(DATA)
        assert not torch.equal(net.bias, before)

    def test_custom_loss_function(self):
        def simple_elbo(model, guide, *args):
            guide_trace = poutine.trace(guide).get_trace(*args)
            model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
            return -(model_trace.log_prob_sum() - guide_trace.log_prob_sum())

        svi = SVI(model, guide, Adam({"lr": 0.05}), simple_elbo)
        for _ in range(200):
            loss = svi.step(DATA)
        assert type(loss) is float
        assert abs(fastsvi.param("loc").item() - 1.25) < 0.3
        assert type(svi.evaluate_loss(DATA)) is float

    def test_losses_that_are_tuples(self):
        def pair(model, guide, *args):
            loss = fastsvi.param("w", torch.tensor(1.0)) ** 2
            loss.backward()
            return loss, 2 * loss

        svi = SVI(model, guide, Adam({"lr": 0.05}), pair, loss_and_grads=pair)
        assert svi.step(DATA) == (1.0, 2.0)
        assert svi.run(3, DATA, progress_bar=False).losses.shape == (3, 2)

    def test_loss_of_a_subclass_is_called(self):
        class Shifted(Trace_ELBO):
            def loss_and_grads(self, *args, **kwargs):
                return super().loss_and_grads(*args, **kwargs) + 1000.0

        assert SVI(model, guide, Adam({"lr": 0.05}), Shifted()).step(DATA) > 1000

    def test_handlers_around_the_step_see_params(self):
        svi = make()
        with poutine.trace(param_only=True) as seen:
            svi.step(DATA)
        assert set(seen.trace.nodes) == {"loc", "scale"}

    def test_arguments_are_checked(self):
        with pytest.raises(OptimizerError, match="PyroOptim"):
            SVI(model, guide, torch.optim.Adam([torch.zeros(1)]), Trace_ELBO())
        with pytest.raises(TypeError, match="loss"):
            SVI(model, guide, Adam({"lr": 0.1}), 3)
        with pytest.warns(FutureWarning, match="num_steps"):
            SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(), num_steps=10)


class TestFailedSteps:
    """Store, gradients and optimizer are as before the call."""

    @pytest.mark.parametrize("automatic", [False, True])
    def test_error_in_the_model(self, automatic):
        def fails(data, when):
            model(data)
            if when == "now":
                fastsvi.param("late", torch.tensor(1.0))
                raise ZeroDivisionError("mine")

        def plain(data, when):
            guide(data)

        svi = make(fails, AutoNormal(fails) if automatic else plain)
        with pytest.raises(ZeroDivisionError):
            svi.step(DATA, "now")
        assert not fastsvi.get_param_store().keys()
        svi.step(DATA, "later")
        svi.step(DATA, "later")
        before, state = store_contents(), optimizer_contents(svi)
        with pytest.raises(ZeroDivisionError):
            svi.step(DATA, "now")
        assert_same(before, store_contents())
        assert_same(state, optimizer_contents(svi))
        for _, leaf in fastsvi.get_param_store().named_parameters():
            assert leaf.grad is None or not leaf.grad.any()
        svi.step(DATA, "later")

    @pytest.mark.parametrize("automatic", [False, True])
    @pytest.mark.parametrize("particles", [(1, False), (3, False), (3, True)])
    def test_loss_that_is_nan(self, automatic, particles):
        num_particles, vectorize = particles
        auto = AutoNormal(model) if automatic else guide
        svi = make(guide=auto, num_particles=num_particles, vectorize_particles=vectorize)
        svi.step(DATA)
        svi.step(DATA)
        before, state = store_contents(), optimizer_contents(svi)
        bad = DATA.clone()
        bad[2] = math.nan
        with pytest.raises(NonFiniteError) as caught:
            svi.step(bad)
        message = str(caught.value)
        assert "site 'obs'" in message
        assert "first at index 2" in message
        assert "the data not finite" in message
        assert_same(before, store_contents())
        assert_same(state, optimizer_contents(svi))
        assert math.isfinite(svi.step(DATA))

    def test_first_step_that_is_nan_leaves_the_store_empty(self):
        svi = make()
        with pytest.raises(ValueError, match="obs"):
            svi.step(torch.tensor([math.nan]))
        assert not fastsvi.get_param_store().keys()

    def test_diverged_parameter_is_named(self):
        svi = make()
        svi.step(DATA)
        fastsvi.get_param_store().leaf("scale").data.fill_(math.inf)
        with pytest.raises(NonFiniteError) as caught:
            svi.step(DATA)
        assert "parameter 'scale'" in str(caught.value)
        assert "guide site 'x'" in str(caught.value)

    def test_gradient_that_is_nan(self):
        def kink(data):
            x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
            zero = 0.0 * x
            fastsvi.factor("norm", -zero.sqrt())

        svi = make(kink)
        with pytest.raises(NonFiniteError, match=r"gradient of 'loc'") as caught:
            svi.step(DATA)
        assert "sqrt" in str(caught.value)
        assert not fastsvi.get_param_store().keys()

    def test_never_validate_goes_on_like_pyro(self):
        svi = make()
        svi.step(DATA)
        with fastsvi.settings.context(validate="never"):
            assert math.isnan(svi.step(torch.tensor([math.nan])))

    def test_large_gradients_are_not_mistaken_for_infinite(self):
        def steep(data):
            with fastsvi.plate("wide", 4):
                x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
                # Each gradient is 2e38; their sum overflows float32, none of them does.
                fastsvi.factor("steep", 2e38 * (x - x.detach()))

        def wide(data):
            with fastsvi.plate("wide", 4):
                fastsvi.sample("x", dist.Normal(fastsvi.param("w", torch.zeros(4)), 1.0))

        assert math.isfinite(make(steep, wide).step(DATA))

    def test_error_in_the_optimizer(self):
        calls = []

        def options(name):
            calls.append(name)
            if len(calls) == 2:
                raise KeyError("no options for " + name)
            return {"lr": 0.1}

        svi = make(optim=Adam(options))
        with pytest.raises(KeyError):
            svi.step(DATA)
        assert not fastsvi.get_param_store().keys()


class TestRun:
    def test_result(self):
        svi = make()
        run = svi.run(50, DATA, progress_bar=False)
        assert run.losses.shape == (50,)
        assert not run.losses.requires_grad
        assert set(run.params) == {"loc", "scale"}
        assert run.params["scale"] > 0
        assert not run.interrupted
        kept = run.params["loc"].clone()
        svi.run(5, DATA, progress_bar=False)
        assert torch.equal(run.params["loc"], kept), "a result does not change afterwards"
        assert "50 steps" in repr(run)

    def test_equals_steps(self):
        runs = []
        for use_run in (False, True):
            fastsvi.clear_param_store()
            svi = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO(), seed=1)
            if use_run:
                runs.append(svi.run(20, DATA, progress_bar=False).losses)
            else:
                runs.append(torch.tensor([svi.step(DATA) for _ in range(20)]))
        assert torch.equal(*runs)

    def test_no_steps(self):
        svi = make()
        run = svi.run(0, DATA)
        assert run.losses.shape == (0,)
        assert run.params == {}

    @pytest.mark.parametrize("bad", [-1, 2.5, DATA, True])
    def test_number_of_steps_is_checked(self, bad):
        with pytest.raises(ConstraintError, match="number of steps first"):
            make().run(bad, DATA)

    def test_more_steps_than_a_chunk(self):
        def constant(data):
            fastsvi.param("w", torch.tensor(1.0))

        run = make(lambda data: None, constant).run(2100, DATA, progress_bar=False)
        assert run.losses.shape == (2100,)

    def test_progress_bar_shows_the_elbo(self):
        svi = make()
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            svi.run(30, DATA)
        assert "30/30" in shown.getvalue()
        assert "ELBO -" in shown.getvalue()

    def test_ctrl_c_returns_what_was_reached(self):
        count = []

        def stops(data):
            count.append(1)
            if len(count) == 6:
                raise KeyboardInterrupt
            model(data)

        svi = make(stops)
        run = svi.run(100, DATA, progress_bar=False)
        assert run.interrupted
        assert len(run.losses) in (4, 5), "the program may have been rehearsed once"
        steps = {state["state"][0]["step"].item() for state in svi.optim.get_state().values()}
        assert steps == {len(run.losses)}

    def test_a_bad_step_ends_the_run_with_the_last_good_state(self):
        count = []

        def breaks(data):
            count.append(1)
            model(data if len(count) < 8 else data * math.nan)

        svi = make(breaks)
        with pytest.raises(NonFiniteError, match="obs"):
            svi.run(100, DATA, progress_bar=False)
        assert all(torch.isfinite(p).all() for p in store_contents().values())

    def test_other_optimizers(self):
        for optim in (SGD({"lr": 0.01}), ClippedAdam({"lr": 0.05, "lrd": 0.99})):
            fastsvi.clear_param_store()
            run = make(optim=optim, num_particles=5).run(100, DATA, progress_bar=False)
            assert run.losses[-20:].mean() < run.losses[:20].mean()


class TestWeighingScale:
    """The weighing scale of Pyro's introduction: posterior N(9.14, 0.6) exactly."""

    @staticmethod
    def scale(mu):
        weight = fastsvi.sample("weight", dist.Normal(mu, 1.0))
        return fastsvi.sample("measurement", dist.Normal(weight, 0.75))

    @staticmethod
    def guide(mu):
        a = fastsvi.param("a", torch.tensor(mu))
        b = fastsvi.param("b", torch.tensor(1.0))
        return fastsvi.sample("weight", dist.Normal(a, torch.abs(b)))

    @pytest.mark.slow
    def test_sgd_with_momentum(self):
        fastsvi.set_rng_seed(101)
        conditioned = fastsvi.condition(self.scale, data={"measurement": 9.5})
        svi = SVI(conditioned, self.guide, SGD({"lr": 0.001, "momentum": 0.1}), loss=Trace_ELBO())
        a, b = [], []
        for _ in range(2500):
            svi.step(8.5)
            a.append(fastsvi.param("a").item())
            b.append(fastsvi.param("b").item())
        assert abs(sum(a[-500:]) / 500 - 9.14) < 0.1
        assert abs(sum(b[-500:]) / 500 - 0.6) < 0.05

    def test_gradient_descent_by_hand(self):
        """The loop of the tutorial, which rebinds the leaves' memory."""
        fastsvi.set_rng_seed(101)
        conditioned = fastsvi.condition(self.scale, data={"measurement": torch.tensor(9.5)})
        loss_fn = Trace_ELBO().differentiable_loss
        for _ in range(1000):
            with poutine.trace(param_only=True) as capture:
                loss_fn(conditioned, self.guide, 8.5).backward()
            params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
            assert len(params) == 2
            for x in params:
                x.data = x.data - 0.002 * x.grad
                x.grad.zero_()
        # Gradient noise at this rate leaves a spread of about 0.03.
        assert abs(fastsvi.param("a").item() - 9.14) < 0.15
        assert abs(fastsvi.param("b").item() - 0.6) < 0.1


def test_evidence_bounds_the_elbo():
    """Conjugate: means and scales within 0.05, and never above the evidence."""
    svi = make(optim=Adam({"lr": 0.02}), num_particles=10, vectorize_particles=True)
    svi.run(400, DATA, progress_bar=False)
    svi.optim = Adam({"lr": 0.002})
    svi.run(300, DATA, progress_bar=False)
    precision = 4 + 0.01
    assert abs(fastsvi.param("loc").item() - DATA.sum().item() / precision) < 0.05
    assert abs(fastsvi.param("scale").item() - precision**-0.5) < 0.05
    covariance = torch.eye(4) + 100.0
    evidence = torch.distributions.MultivariateNormal(torch.zeros(4), covariance).log_prob(DATA)
    elbos = -torch.tensor([svi.evaluate_loss(DATA) for _ in range(200)])
    error = elbos.std() / 200**0.5
    assert elbos.mean() <= evidence + 3 * error
    # The family contains the posterior, so the bound is nearly tight too.
    assert elbos.mean() >= evidence - 0.05


def test_warnings_of_a_checked_first_step_come_once():
    def extra(data):
        guide(data)
        fastsvi.sample("unknown", dist.Normal(0.0, 1.0))

    svi = make(guide=extra)
    with pytest.warns(UserWarning, match="unknown"):
        svi.step(DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(DATA)
