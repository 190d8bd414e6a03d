"""The fast path equals the ordinary one: loss and gradients under the same noise."""

import copy
import pickle
import warnings

import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.engine.noise import NoiseStream, Seed
from fastsvi.errors import FastSVIWarning, NonFiniteError
from fastsvi.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from fastsvi.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from fastsvi.infer.elbo import fused
from fastsvi.infer.elbo.particles import chunks
from fastsvi.optim import Adam
from fastsvi.poutine import Messenger


def eight_schools():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    mu = fastsvi.sample("mu", dist.Normal(0.0, 5.0))
    tau = fastsvi.sample("tau", dist.HalfCauchy(5.0))
    with fastsvi.plate("schools", 8):
        effect = fastsvi.sample("effect", dist.Normal(0.0, 1.0))
        fastsvi.sample("obs", dist.Normal(mu + tau * effect, 10.0), obs=y)


def supports():
    """Every kind of support, elementwise and structured, some of them shared by two sites."""
    rate = fastsvi.sample("rate", dist.Gamma(2.0, 1.0))
    shape = fastsvi.sample("shape", dist.Gamma(torch.ones(2), 1.0).to_event(1))
    share = fastsvi.sample("share", dist.Beta(2.0, 3.0))
    bounded = fastsvi.sample("bounded", dist.Uniform(-1.0, torch.tensor([2.0, 3.0])).to_event(1))
    weights = fastsvi.sample("weights", dist.Dirichlet(torch.ones(3)))
    cholesky = fastsvi.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with fastsvi.plate("outer", 2, dim=-2), fastsvi.plate("inner", 3, dim=-1):
        mixed = fastsvi.sample("mixed", dist.Dirichlet(torch.ones(4)))
        fastsvi.sample("real", dist.Normal(mixed[..., 0], rate))
    total = share + bounded.sum() + weights[0] + cholesky.sum() + shape.prod()
    fastsvi.sample("obs", dist.Normal(total, 1.0), obs=torch.tensor(1.0))


def handlers():
    x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
    mask = torch.tensor([True, True, False, True])
    with poutine.scale(scale=3.0), fastsvi.plate("data", 4), poutine.mask(mask=mask):
        z = fastsvi.sample("z", dist.Normal(x, 1.0))
        fastsvi.sample("obs", dist.Normal(z, 1.0), obs=torch.ones(4))
    fastsvi.factor("soft", -(x**2))
    fastsvi.deterministic("twice", 2 * x)


def model_params():
    noise = fastsvi.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
    x = fastsvi.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with fastsvi.plate("data", 3):
        fastsvi.sample("obs", dist.Normal(x, noise), obs=torch.ones(3))


def observed_subsample():
    data = torch.linspace(-1, 1, 12)
    x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
    with fastsvi.plate("data", 12, subsample=torch.tensor([1, 5, 7])) as index:
        fastsvi.sample("obs", dist.Normal(x, 1.0), obs=data[index])


def float64():
    x = fastsvi.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    fastsvi.sample("obs", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0, dtype=torch.float64))


MODELS = [eight_schools, supports, handlers, model_params, observed_subsample, float64]


class Substitute(Messenger):
    """Feeds the auxiliary sites of an AutoNormal from given noise, in the order of its elements."""

    def __init__(self, slots, noise):
        super().__init__()
        parts = noise.split([slot.numel for slot in slots])
        self.noise = {
            slot.name: part.reshape(slot.shape) for slot, part in zip(slots, parts, strict=True)
        }

    def _pyro_sample(self, msg):
        name = msg.name.removesuffix("_unconstrained")
        if name != msg.name:
            base = msg.fn.base_dist if hasattr(msg.fn, "base_dist") else msg.fn
            msg.value = base.loc + base.scale * self.noise[name]
            msg.done = True


def ordinary(model, guide, noise, elbo):
    """Loss and gradients with the guide run as a program, particle by particle."""
    for leaf in dict(fastsvi.get_param_store().named_parameters()).values():
        leaf.grad = None
    slots = guide.fused().slots
    losses = []
    for particle in noise:
        one = type(elbo)()
        with Substitute(slots, particle):
            loss = one.differentiable_loss(model, guide)
        (loss / len(noise)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), gradients()


def gradients():
    leaves = dict(fastsvi.get_param_store().named_parameters())
    return {name: leaf.grad.clone() for name, leaf in leaves.items()}


def fast(model, guide, elbo, seed):
    """Loss and gradients by the fast path, and the noise that it used."""
    for leaf in dict(fastsvi.get_param_store().named_parameters()).values():
        leaf.grad = None
    program = elbo.program(model, guide)
    program.set_seed(seed)
    program.rehearsed = True
    (chunk,) = chunks(elbo)
    estimate = fused.estimate(elbo, program, (), {}, program.noise, chunk, None, {})
    estimate.surrogate.backward()
    some = guide.fused()
    draw = NoiseStream(Seed(seed)).draw(
        elbo.num_particles, some.num_elements, some._loc.dtype, torch.device("cpu")
    )
    return estimate, gradients(), draw.noise[0]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("elbo_type", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize(("particles", "vectorize"), [(1, False), (5, False), (5, True)])
def test_fast_path_equals_the_program(model, elbo_type, particles, vectorize):
    guide = AutoNormal(model)
    guide()
    if model is model_params:
        model()
    elbo = elbo_type(num_particles=particles, vectorize_particles=vectorize)
    estimate, fast_grads, noise = fast(model, guide, elbo, seed=3)
    loss, grads = ordinary(model, guide, noise, elbo)
    exact = model is float64
    # float32: some fifty terms of order one to a hundred, summed in another order.
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(estimate.loss, loss, **tolerance)
    torch.testing.assert_close(fast_grads, grads, **tolerance)
    assert set(map(id, estimate.leaves)) == {
        id(leaf) for _, leaf in fastsvi.get_param_store().named_parameters()
    }


def takes_fast_path(svi, *args):
    """Whether steps of ``svi`` are made without running the guide."""
    svi.step(*args)  # the first step rehearses
    guide = svi.guide
    return hasattr(guide, "fused") and guide.fused() is not None and fused.applies_to(svi._program)


def make_svi(model, guide, **options):
    return SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO(**options))


class TestWhenItApplies:
    def test_plain_guide(self):
        assert takes_fast_path(make_svi(eight_schools, AutoNormal(eight_schools)))

    def test_no_program_run_of_the_guide(self, monkeypatch):
        guide = AutoNormal(eight_schools)
        svi = make_svi(eight_schools, guide)
        svi.step()
        calls = []
        monkeypatch.setattr(guide, "_create_plates", lambda *a, **k: calls.append(1))
        svi.step()
        assert not calls

    def test_handlers_around_the_step(self):
        seen = []

        class Watch(Messenger):
            def _pyro_sample(self, msg):
                seen.append(msg.name)

        svi = make_svi(eight_schools, AutoNormal(eight_schools))
        svi.step()
        with Watch():
            svi.step()
        assert "effect_unconstrained" in seen

    @pytest.mark.parametrize("how", ["wrapped", "subclass", "hook", "list", "plates", "frozen"])
    def test_whoever_changes_the_guide_gets_the_ordinary_path(self, how):
        class Quiet(AutoNormal):
            def forward(self, *args, **kwargs):
                with poutine.scale(scale=0.5):
                    return super().forward(*args, **kwargs)

        if how == "wrapped":
            guide = poutine.scale(AutoNormal(eight_schools), scale=0.5)
        elif how == "subclass":
            guide = Quiet(eight_schools)
        elif how == "list":
            guide = AutoGuideList(eight_schools)
            guide.append(AutoNormal(poutine.block(eight_schools, hide=["tau"])))
            guide.append(AutoDelta(poutine.block(eight_schools, expose=["tau"])))
        elif how == "plates":
            guide = AutoNormal(
                eight_schools, create_plates=lambda: fastsvi.plate("schools", 8, dim=-1)
            )
        else:
            guide = AutoNormal(eight_schools)
        if how == "hook":
            guide.register_forward_hook(lambda *_: None)
        svi = make_svi(eight_schools, guide)
        if how == "frozen":
            guide()
            fastsvi.get_param_store().leaf("AutoNormal.locs.mu").requires_grad_(False)
        assert not takes_fast_path(svi)

    def test_latent_sites_in_subsampled_plates(self):
        def model():
            with fastsvi.plate("data", 10, subsample_size=4):
                z = fastsvi.sample("z", dist.Normal(0.0, 1.0))
                fastsvi.sample("obs", dist.Normal(z, 1.0), obs=torch.ones(4))

        svi = make_svi(model, AutoNormal(model))
        assert not takes_fast_path(svi)
        before = fastsvi.param("AutoNormal.locs.z").detach().clone()
        svi.step()
        moved = (fastsvi.param("AutoNormal.locs.z") != before).sum()
        assert moved >= 4

    def test_data_of_another_size_is_left_to_the_ordinary_path(self):
        def model(data):
            with fastsvi.plate("data", len(data)):
                fastsvi.sample("z", dist.Normal(0.0, 1.0))
                fastsvi.sample("obs", dist.Normal(0.0, 1.0), obs=data)

        svi = make_svi(model, AutoNormal(model))
        svi.step(torch.zeros(4))
        # z has four parameters and now meets one datum: the fast path would add four terms.
        with pytest.raises((ValueError, RuntimeError)):
            svi.step(torch.zeros(6))

    def test_a_site_that_the_guide_does_not_know(self):
        def model(extra):
            fastsvi.sample("x", dist.Normal(0.0, 1.0))
            if extra:
                fastsvi.sample("y", dist.Normal(0.0, 1.0))

        svi = make_svi(model, AutoNormal(model))
        svi.step(False)
        assert isinstance(svi.step(True), float)
        with (
            fastsvi.settings.context(validate="always"),
            pytest.warns(FastSVIWarning, match="in the model but not in the guide: 'y'"),
        ):
            svi.step(True)


def test_layout_changes_do_not_confuse_it():
    """New parameters, rebound memory and a cleared store between steps."""
    guide = AutoNormal(eight_schools)
    svi = make_svi(eight_schools, guide)
    for _ in range(3):
        svi.step()
    fastsvi.param("newcomer", torch.zeros(100))
    svi.step()
    leaf = fastsvi.get_param_store().leaf("AutoNormal.locs.effect")
    leaf.data = torch.full((8,), 3.0)
    svi.step()
    # Adam moves each coordinate by at most lr (and a bit) in a step.
    torch.testing.assert_close(leaf.detach(), torch.full((8,), 3.0), rtol=0, atol=0.02)
    fastsvi.clear_param_store()
    svi.step()
    assert "AutoNormal.locs.effect" in fastsvi.get_param_store()


def test_a_second_guide_of_the_same_name():
    """The store's leaves win, as on the ordinary path; both guides then hold them."""
    first, second = AutoNormal(eight_schools), AutoNormal(eight_schools)
    svi = make_svi(eight_schools, first)
    svi.step()
    svi.step()
    fastsvi.clear_param_store()
    make_svi(eight_schools, second).step()
    for _ in range(2):
        svi.step()
        svi.step()
    for name, leaf in fastsvi.get_param_store().named_parameters():
        path = name.removeprefix("AutoNormal.") + "_unconstrained"
        assert first.get_parameter(path) is leaf


def test_a_parameter_with_another_constraint_is_left_to_the_ordinary_path():
    guide = AutoNormal(eight_schools)
    guide()
    assert guide.fused() is not None
    guide.scales.tau = fastsvi.nn.PyroParam(
        torch.tensor(0.1), constraint=dist.constraints.interval(0.0, 1.0)
    )
    guide()
    assert guide.fused() is None
    guide.scales.tau = torch.tensor(0.2)  # a new value is nothing else
    del guide.scales.tau
    guide.scales.tau = fastsvi.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    guide()
    assert guide.fused() is None


def test_copies_and_pickles_leave_the_slabs_behind():
    guide = AutoNormal(eight_schools)
    svi = make_svi(eight_schools, guide)
    svi.step()
    svi.step()
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert twin._fused is None
        assert twin.median().keys() == guide.median().keys()


def test_the_minibatch_of_a_bad_step_is_known():
    """Only one datum is bad: without the subset of that step it would seldom be found again."""
    data = torch.zeros(1000)
    data[17] = float("nan")

    def model():
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        with fastsvi.plate("data", 1000, subsample_size=20) as index:
            fastsvi.sample("obs", dist.Normal(x, 1.0), obs=data[index])

    guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor(0.0))
    svi = make_svi(model, guide)
    caught = None
    fastsvi.set_rng_seed(0)
    for _ in range(2000):
        try:
            svi.step()
        except NonFiniteError as error:
            caught = str(error)
            break
        except ValueError:  # met in a checked step, which says it all by itself
            continue
    assert "site 'obs'" in caught


def test_gradients_of_leaves_are_views_of_the_flat_gradient():
    guide = AutoNormal(eight_schools)
    elbo = Trace_ELBO()
    elbo.loss_and_grads(eight_schools, guide)
    for _, leaf in fastsvi.get_param_store().named_parameters():
        assert leaf.grad is not None
    total = sum(leaf.grad.abs().sum() for _, leaf in fastsvi.get_param_store().named_parameters())
    assert total > 0


def test_fallback_from_vmap_warns_once_and_goes_on():
    def model():
        x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
        scale = 2.0 if x.item() > 0 else 1.0
        fastsvi.sample("obs", dist.Normal(x, scale), obs=torch.tensor(1.0))

    svi = make_svi(model, AutoNormal(model), num_particles=4, vectorize_particles=True)
    with pytest.warns(FastSVIWarning, match=r"x\.item\(\)"):
        svi.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step()


def test_no_read_back_within_a_step(monkeypatch):
    """The loss and its gradient are made without asking the device for a number."""
    guide = AutoNormal(eight_schools)
    elbo = Trace_ELBO()
    elbo.loss_and_grads(eight_schools, guide)
    program = elbo.program(eight_schools, guide)

    def refuse(*args, **kwargs):
        raise AssertionError("read back")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    elbo.accumulate_grads(program, (), {})
