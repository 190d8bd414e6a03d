"""Trace_ELBO against Pyro under one seed, and against exact gradients by enumeration."""

import copy
import itertools
import math
import pickle
import warnings

import pyro
import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.errors import ConstraintError, FastSVIWarning, ShapeError, SiteError
from fastsvi.infer import ELBO, JitTrace_ELBO, Trace_ELBO


def loss_and_grads(library, make, seed, method="differentiable_loss", **options):
    """Loss and gradients by name, as ``library`` finds them under ``seed``."""
    library.clear_param_store()
    model, guide, args = make(library)
    elbo = library.infer.Trace_ELBO(**options)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "loss":
            return elbo.loss(model, guide, *args), {}
        if method == "loss_and_grads":
            loss = elbo.loss_and_grads(model, guide, *args)
        else:
            loss = elbo.differentiable_loss(model, guide, *args)
            loss.backward()
            loss = loss.item()
    grads = {n: p.grad.clone() for n, p in library.get_param_store().named_parameters()}
    return loss, grads


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("method", ["differentiable_loss", "loss_and_grads", "loss"])
def test_equals_pyro_under_one_seed(program, method, particles):
    for seed in range(2):
        ours, our_grads = loss_and_grads(fastsvi, program, seed, method, num_particles=particles)
        theirs, their_grads = loss_and_grads(pyro, program, seed, method, num_particles=particles)
        # Sums of some ten float32 terms, in another order.
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert our_grads.keys() == their_grads.keys()
        for name, grad in our_grads.items():
            torch.testing.assert_close(grad, their_grads[name], rtol=1e-5, atol=1e-5)


def bernoulli_chain(probs, coupling):
    """Three binary sites, the last observed; returns model and guide of logits ``phi``."""

    def model():
        a = fastsvi.sample("a", dist.Bernoulli(probs[0]))
        with fastsvi.plate("plate", 2):
            b = fastsvi.sample("b", dist.Bernoulli(0.2 + 0.5 * a.unsqueeze(-1)))
            fastsvi.sample("obs", dist.Normal(coupling * b, 1.0), obs=torch.tensor([0.4, 1.1]))

    def guide():
        phi = fastsvi.param("phi", torch.tensor([0.3, -0.4, 0.6]))
        fastsvi.sample("a", dist.Bernoulli(logits=phi[0]))
        with fastsvi.plate("plate", 2):
            fastsvi.sample("b", dist.Bernoulli(logits=phi[1:]))

    return model, guide


def exact_loss(model, guide, names_and_shapes):
    """Minus the ELBO, summed over all values of binary latent sites; differentiable."""
    sizes = [math.prod(shape) for _, shape in names_and_shapes]
    loss = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        parts = torch.tensor(bits).split(sizes)
        values = {
            name: part.reshape(shape)
            for (name, shape), part in zip(names_and_shapes, parts, strict=True)
        }
        log_q = (
            fastsvi.poutine.trace(fastsvi.poutine.condition(guide, data=values))
            .get_trace()
            .log_prob_sum()
        )
        log_p = (
            fastsvi.poutine.trace(fastsvi.poutine.condition(model, data=values))
            .get_trace()
            .log_prob_sum()
        )
        loss = loss + log_q.exp() * (log_q - log_p)
    return loss


def gradient_samples(model, guide, count, elbo=None):
    """``[count, 3]`` estimates of the gradient of ``phi``, and the losses."""
    elbo = elbo or Trace_ELBO()
    grads, losses = [], []
    for _ in range(count):
        loss = elbo.differentiable_loss(model, guide)
        (grad,) = torch.autograd.grad(loss, fastsvi.get_param_store().leaf("phi"))
        grads.append(grad)
        losses.append(loss.detach())
    return torch.stack(grads), torch.stack(losses)


def assert_unbiased(samples, exact):
    """Within 4.5 standard errors: under 1e-5 chance of a false alarm per entry, seeds are fixed."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - exact).abs() <= 4.5 * error + 1e-6).all()


def test_score_function_gradient_is_unbiased():
    model, guide = bernoulli_chain(torch.tensor([0.7]), 0.8)
    guide()
    exact = exact_loss(model, guide, [("a", ()), ("b", (2,))])
    (exact_grad,) = torch.autograd.grad(exact, fastsvi.get_param_store().leaf("phi"))
    grads, losses = gradient_samples(model, guide, 800)
    assert_unbiased(grads, exact_grad)
    assert_unbiased(losses, exact.detach())


def test_vectorized_score_function_gradient_is_unbiased():
    model, guide = bernoulli_chain(torch.tensor([0.7]), 0.8)
    guide()
    exact = exact_loss(model, guide, [("a", ()), ("b", (2,))])
    (exact_grad,) = torch.autograd.grad(exact, fastsvi.get_param_store().leaf("phi"))
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    grads, losses = gradient_samples(model, guide, 150, elbo)
    assert_unbiased(grads, exact_grad)
    assert_unbiased(losses, exact.detach())


def test_plates_reduce_the_variance_of_the_gradient():
    def variance(use_plate):
        fastsvi.clear_param_store()
        torch.manual_seed(0)

        def sites(fn, obs):
            if use_plate:
                with fastsvi.plate("plate", 8):
                    z = fastsvi.sample("z", fn)
                    if obs:
                        fastsvi.sample("obs", dist.Normal(z, 1.0), obs=torch.ones(8))
            else:
                z = fastsvi.sample("z", fn.to_event(1))
                if obs:
                    fastsvi.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(8))

        def model():
            sites(dist.Bernoulli(torch.full((8,), 0.5)), obs=True)

        def guide():
            phi = fastsvi.param("phi", torch.zeros(8))
            sites(dist.Bernoulli(logits=phi), obs=False)

        return gradient_samples(model, guide, 200)[0].var(0).mean()

    # Each entry sees one term in place of eight, so about an eighth of the variance or less.
    assert variance(use_plate=True) < 0.25 * variance(use_plate=False)


def test_auxiliary_discrete_sites_of_the_guide_are_unbiased():
    """Their own log q belongs to what they influence; Pyro leaves it out."""

    def model():
        fastsvi.sample("x", dist.Normal(0.0, 1.0))

    def guide():
        phi = fastsvi.param("phi", torch.tensor([0.8, 0.0, 0.0]))
        k = fastsvi.sample("k", dist.Bernoulli(logits=phi[0]), infer={"is_auxiliary": True})
        fastsvi.sample("x", dist.Normal(k + phi[1], 1.0))

    guide()
    phi = fastsvi.get_param_store().leaf("phi")
    p = phi[0].sigmoid()
    # KL of the joint guide: entropy of k, plus a quadratic for x at each k.
    negative_entropy = p * p.log() + (1 - p) * (1 - p).log()
    exact = negative_entropy + 0.5 * (p * (1 + phi[1]) ** 2 + (1 - p) * phi[1] ** 2)
    (exact_grad,) = torch.autograd.grad(exact, phi)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads, _ = gradient_samples(model, guide, 800)
    assert_unbiased(grads, exact_grad)


class TestVectorized:
    def test_needs_no_max_plate_nesting(self, program):
        """Expectations agree with the loop, whatever plates there are."""
        model, guide, args = program(fastsvi)
        name = program.__name__
        losses = {}
        for vectorize in (False, True):
            torch.manual_seed(1)
            elbo = Trace_ELBO(num_particles=40, vectorize_particles=vectorize)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if name == "sequential_plate" else "default")
                losses[vectorize] = torch.tensor(
                    [elbo.loss(model, guide, *args) for _ in range(12)]
                )
        spread = (losses[False].var() / 12 + losses[True].var() / 12).sqrt()
        assert (losses[False].mean() - losses[True].mean()).abs() < 4.5 * spread

    def test_particles_are_independent(self):
        seen = []

        def guide():
            loc = fastsvi.param("loc", torch.tensor(0.0))
            fastsvi.sample("x", dist.Normal(loc, 1.0))

        def model():
            seen.append(fastsvi.sample("x", dist.Normal(0.0, 1.0)))

        elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True)
        loss = elbo.differentiable_loss(model, guide)
        loss.backward()
        # d/dloc of the loss is the mean of x, which has standard error 1000 ** -0.5.
        grad = fastsvi.param("loc").unconstrained().grad
        assert 0 < grad.abs() < 4.5 * 1000**-0.5
        # Once to rehearse and once for all particles.
        assert len(seen) == 2

    def test_particles_share_the_minibatch(self):
        subsets = []

        def model():
            with fastsvi.plate("data", 100, subsample_size=5) as index:
                subsets.append(index)
                fastsvi.sample("obs", dist.Normal(index.float(), 1.0), obs=torch.zeros(5))

        def guide():
            fastsvi.param("unused", torch.tensor(0.0))

        elbo = Trace_ELBO(num_particles=7, vectorize_particles=True)
        losses = {elbo.loss(model, guide) for _ in range(5)}
        assert len(losses) == 5, "each step draws another subset"
        for subset in subsets:
            assert subset.shape == (5,)
            assert len(set(subset.tolist())) == 5

    def test_a_plate_that_changes_its_size(self):
        def model(size):
            with fastsvi.plate("data", size, subsample_size=2) as index:
                fastsvi.sample("obs", dist.Normal(index.float(), 1.0), obs=torch.zeros(2))

        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
        for size in (10, 4, 30):
            assert elbo.loss(model, lambda size: None, size) > 0

    def test_params_are_not_made_under_vmap(self):
        runs = []

        def model():
            fastsvi.sample("x", dist.Normal(0.0, 1.0))

        def guide():
            runs.append(1)
            name = "late" if len(runs) > 2 else "early"
            loc = fastsvi.param(name, torch.randn(2).sum())
            fastsvi.sample("x", dist.Normal(loc, 1.0))

        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
        for _ in range(3):
            elbo.loss_and_grads(model, guide)
        for name in ("early", "late"):
            leaf = fastsvi.get_param_store().leaf(name)
            assert leaf.shape == ()
            assert not torch._C._functorch.is_batchedtensor(leaf)

    def test_data_dependent_control_flow_falls_back_and_says_where(self):
        def model():
            x = fastsvi.sample("x", dist.Normal(0.0, 1.0))
            if x > 0:
                x = 2 * x
            fastsvi.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

        def guide():
            fastsvi.sample("x", dist.Normal(fastsvi.param("loc", torch.tensor(0.0)), 1.0))

        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
        with pytest.warns(FastSVIWarning, match=r"test_trace_elbo.py:\d+ in model: `if x > 0:`"):
            elbo.loss_and_grads(model, guide)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            elbo.loss_and_grads(model, guide)  # once is enough

    def test_an_error_of_the_program_is_its_own(self):
        def model(fails):
            if fails:
                raise RuntimeError("mine")

        def guide(fails):
            pass

        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
        elbo.loss(model, guide, False)
        with pytest.raises(RuntimeError, match="mine"):
            elbo.loss(model, guide, True)
        # It was no fault of vmap, so the next run is vectorised again, and nobody was warned.
        assert not elbo.program(model, guide).is_sequential


class TestChecks:
    def test_shape_mismatch_names_the_site(self):
        def model():
            fastsvi.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

        def guide():
            fastsvi.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))

        with pytest.raises(ShapeError, match="'x'"):
            Trace_ELBO().loss(model, guide)

    def test_missing_plate_names_the_site(self):
        def model():
            fastsvi.sample("obs", dist.Normal(torch.zeros(3), 1.0), obs=torch.zeros(3))

        with pytest.raises(ShapeError, match=r"'obs'.*plate"):
            Trace_ELBO().loss(model, lambda: None)
        fastsvi.settings.set(validate="never")
        try:
            Trace_ELBO().loss(model, lambda: None)
        finally:
            fastsvi.settings.set(validate="first")

    def test_sites_of_one_side_only(self):
        def model():
            fastsvi.sample("weight", dist.Normal(0.0, 1.0))

        def guide():
            fastsvi.sample("wieght", dist.Normal(0.0, 1.0))

        with pytest.warns(FastSVIWarning) as caught:
            Trace_ELBO().loss(model, guide)
        messages = [str(w.message) for w in caught]
        assert any("not in the model: 'wieght' (near 'weight')" in m for m in messages)
        assert any("not in the guide: 'weight' (near 'wieght')" in m for m in messages)

    def test_later_runs_are_not_checked(self):
        def model(scale):
            fastsvi.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(0.0))

        def guide(scale):
            pass

        elbo = Trace_ELBO()
        elbo.loss(model, guide, torch.tensor(1.0))
        with pytest.warns(FastSVIWarning, match="the loss is nan: model site 'x'"):
            elbo.loss(model, guide, torch.tensor(-1.0))
        with (
            fastsvi.settings.context(validate="always"),
            pytest.raises(ValueError, match="scale"),
        ):
            elbo.loss(model, guide, torch.tensor(-1.0))

    def test_enumeration_is_not_silently_ignored(self):
        def model():
            fastsvi.sample("k", dist.Bernoulli(0.5))

        def guide():
            fastsvi.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

        with pytest.warns(FastSVIWarning, match="sampled instead: 'k'"):
            Trace_ELBO().loss(model, guide)

    def test_guide_factor_must_say_whether_it_is_reparameterised(self):
        def guide():
            fastsvi.factor("f", torch.tensor(0.5))

        with pytest.raises(SiteError, match="has_rsample"):
            Trace_ELBO().loss(lambda: None, guide)


class TestInterface:
    def test_options_of_pyro_are_accepted(self):
        elbo = Trace_ELBO(
            num_particles=2,
            max_plate_nesting=1,
            vectorize_particles=True,
            strict_enumeration_warning=False,
            ignore_jit_warnings=True,
            jit_options={},
            retain_graph=True,
            tail_adaptive_beta=-0.5,
        )
        assert elbo.max_plate_nesting == 1
        assert issubclass(JitTrace_ELBO, Trace_ELBO)
        assert JitTrace_ELBO()._takes_densities

    @pytest.mark.parametrize("bad", [0, -1, 2.0, None])
    def test_num_particles_is_a_positive_integer(self, bad):
        with pytest.raises(ConstraintError, match="num_particles"):
            Trace_ELBO(num_particles=bad)

    def test_module_form(self):
        class Model(fastsvi.nn.PyroModule):
            def forward(self):
                fastsvi.sample("x", dist.Normal(0.0, 1.0))

        class Guide(fastsvi.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.loc = torch.nn.Parameter(torch.tensor(3.0))

            def forward(self):
                fastsvi.sample("x", dist.Normal(self.loc, 1.0))

        guide = Guide()
        loss = Trace_ELBO(num_particles=8, vectorize_particles=True)(Model(), guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        # KL of two unit normals has its minimum at 0; Adam at this rate wanders by some 0.1.
        assert abs(guide.loc.item()) < 0.3

    def test_a_subclass_changes_the_loss_of_a_particle(self):
        class Doubled(Trace_ELBO):
            def _differentiable_loss_particle(self, model_trace, guide_trace):
                loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
                return 2 * loss, 2 * surrogate

        def model():
            fastsvi.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

        assert Doubled().loss(model, lambda: None) == pytest.approx(math.log(2 * math.pi))
        assert not Doubled._takes_densities

    def test_an_incomplete_subclass_says_what_is_missing(self):
        class Incomplete(ELBO):
            def _get_trace(self, model, guide, args, kwargs):
                return None, None

        with pytest.raises(NotImplementedError, match="_differentiable_loss_particle"):
            Incomplete().loss(lambda: None, lambda: None)

    def test_copies_and_pickles(self):
        elbo = Trace_ELBO(num_particles=3)
        elbo.loss(lambda: None, lambda: None)
        for other in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
            assert other.num_particles == 3
            assert other.loss(lambda: None, lambda: None) == 0.0

    def test_many_programs_do_not_pile_up(self):
        elbo = Trace_ELBO()
        for _ in range(50):
            elbo.loss(lambda: None, lambda: None)
        assert len(elbo._programs) <= 8

    def test_retain_graph(self):
        x = torch.tensor(1.0, requires_grad=True)
        shared = x.exp()  # its backward needs its value

        def guide():
            fastsvi.param("loc", torch.tensor(0.0))
            fastsvi.sample("x", dist.Normal(shared, 1.0))

        def model():
            fastsvi.sample("x", dist.Normal(0.0, 1.0))

        elbo = Trace_ELBO(num_particles=2, retain_graph=True)
        elbo.loss_and_grads(model, guide)
        elbo = Trace_ELBO(num_particles=2)
        with pytest.raises(RuntimeError, match="second time"):
            elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("size", [10, 1 << 16])
def test_the_run_that_makes_the_parameters_sees_the_indices(size):
    """Large plates do not note them at their site then, where nobody looks."""
    data, seen = torch.linspace(-1.0, 1.0, size), []

    def program(observed):
        loc = fastsvi.param("loc", torch.zeros(()))
        with fastsvi.plate("data", size) as i:
            seen.append(i.clone())
            z = fastsvi.sample("z", dist.Normal(loc, 1.0))
            if observed:
                fastsvi.sample("y", dist.Normal(z, 1.0), obs=data[i])

    svi = fastsvi.infer.SVI(
        lambda: program(True), lambda: program(False), fastsvi.optim.SGD({"lr": 0.0}), Trace_ELBO()
    )
    assert svi._rehearse((), {})
    assert len(seen) == 2
    assert all(torch.equal(i, torch.arange(size)) for i in seen)
