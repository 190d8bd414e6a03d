"""TraceMeanField_ELBO: analytic divergences, against Pyro and against Trace_ELBO."""

import pyro
import pytest
import torch

import fastsvi
import fastsvi.distributions as dist
from fastsvi.errors import FastSVIWarning, MissingSiteError, SiteError
from fastsvi.infer import Trace_ELBO, TraceMeanField_ELBO
from fastsvi.infer.autoguide import AutoNormal


def reparameterised(library):
    """Plates, subsampling, scale, mask; a Gamma site whose divergence is known."""
    d, poutine = library.distributions, library.poutine

    def model(data):
        x = library.sample("x", d.Normal(0.0, 2.0).expand([2]).to_event(1))
        with poutine.scale(scale=1.5), library.plate("data", 6, subsample_size=3) as index:
            rate = library.sample("rate", d.Gamma(2.0, 1.0))
            mask = torch.tensor([True, False, True])
            with poutine.mask(mask=mask):
                library.sample("obs", d.Normal(x.sum() * rate, 1.0), obs=data[index])

    def guide(data):
        loc = library.param("loc", torch.tensor([0.1, -0.2]))
        shape = library.param("shape", torch.tensor(2.5), constraint=d.constraints.positive)
        library.sample("x", d.Normal(loc, 0.5).to_event(1))
        with poutine.scale(scale=1.5), library.plate("data", 6, subsample_size=3):
            library.sample("rate", d.Gamma(shape, 2.0).expand([3]))

    return model, guide, (torch.linspace(-1, 1, 6),)


def run(library, seed, particles=2):
    library.clear_param_store()
    model, guide, args = reparameterised(library)
    torch.manual_seed(seed)
    elbo = library.infer.TraceMeanField_ELBO(num_particles=particles)
    loss = elbo.loss_and_grads(model, guide, *args)
    return loss, {n: p.grad for n, p in library.get_param_store().named_parameters()}


def test_equals_pyro_under_one_seed():
    for seed in range(3):
        ours, our_grads = run(fastsvi, seed)
        theirs, their_grads = run(pyro, seed)
        assert ours == pytest.approx(float(theirs), rel=1e-5)
        for name in ("loc", "shape"):
            torch.testing.assert_close(our_grads[name], their_grads[name], rtol=1e-5, atol=1e-5)


def test_divergences_leave_no_noise():
    def model():
        fastsvi.sample("x", dist.Normal(0.0, 1.0))

    def guide():
        fastsvi.sample("x", dist.Normal(0.5, 2.0))

    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.5, 2.0), torch.distributions.Normal(0.0, 1.0)
    ).item()
    assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected, rel=1e-6)


def constrained_model():
    rate = fastsvi.sample("rate", dist.Gamma(2.0, 1.0))
    fastsvi.sample("obs", dist.Poisson(rate), obs=torch.tensor(4.0))


def test_automatic_guides_keep_their_jacobians():
    """Pyro's formula for a Delta drops its log-density, and with it the change of variables."""
    guide = AutoNormal(constrained_model)
    guide()
    torch.manual_seed(0)
    losses = {}
    for cls in (Trace_ELBO, TraceMeanField_ELBO):
        elbo = cls(num_particles=4000, vectorize_particles=True)
        losses[cls] = elbo.differentiable_loss(constrained_model, guide).item()
    # The loss of one particle has a spread of about 0.2, so this is some 5 standard errors.
    assert losses[Trace_ELBO] == pytest.approx(losses[TraceMeanField_ELBO], abs=0.02)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vectorized_expectation():
    model, guide, args = reparameterised(fastsvi)
    means = []
    for vectorize in (False, True):
        torch.manual_seed(3)
        elbo = TraceMeanField_ELBO(num_particles=30, vectorize_particles=vectorize)
        losses = torch.tensor([elbo.loss(model, guide, *args) for _ in range(20)])
        means.append((losses.mean(), losses.var() / 20))
    (a, var_a), (b, var_b) = means
    assert (a - b).abs() < 4.5 * (var_a + var_b).sqrt()


def test_sites_without_reparameterisation_are_an_error():
    def model():
        fastsvi.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(SiteError, match="'k'"):
        TraceMeanField_ELBO().loss(model, model)


def test_a_site_that_the_guide_lacks_is_an_error():
    def model():
        fastsvi.sample("x", dist.Normal(0.0, 1.0))

    with fastsvi.settings.context(validate="never"), pytest.raises(MissingSiteError, match="'x'"):
        TraceMeanField_ELBO().loss(model, lambda: None)


def test_order_of_sites_is_checked():
    def model():
        fastsvi.sample("a", dist.Normal(0.0, 1.0))
        fastsvi.sample("b", dist.Normal(0.0, 1.0))

    def guide():
        b = fastsvi.sample("b", dist.Normal(0.0, 1.0))
        fastsvi.sample("a", dist.Normal(b, 1.0))

    with pytest.warns(FastSVIWarning, match=r"\['a', 'b'\] in the model"):
        TraceMeanField_ELBO().loss(model, guide)
