"""Draws from a source: right in distribution, finite in both tails, differentiable."""

import math

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.distributions.gamma_noise import _slope
from fastsvi.distributions.noise import current_source, drawn_from
from fastsvi.engine.noise import NoiseStream, Seed, StepNoise

# Of name, constructor, parameters; scalars unless the family is over vectors.
PATHWISE = [
    (dist.Normal, {"loc": 1.0, "scale": 2.0}),
    (dist.LogNormal, {"loc": 0.3, "scale": 0.5}),
    (dist.HalfNormal, {"scale": 2.0}),
    (dist.Uniform, {"low": -1.0, "high": 3.0}),
    (dist.Exponential, {"rate": 2.0}),
    (dist.Laplace, {"loc": 1.0, "scale": 2.0}),
    (dist.Cauchy, {"loc": 1.0, "scale": 2.0}),
    (dist.HalfCauchy, {"scale": 2.0}),
    (dist.Gumbel, {"loc": 1.0, "scale": 2.0}),
    (dist.Logistic, {"loc": 1.0, "scale": 2.0}),
    (dist.SkewLogistic, {"loc": 1.0, "scale": 2.0, "asymmetry": 1.5}),
    (dist.SoftLaplace, {"loc": 1.0, "scale": 2.0}),
    (dist.AsymmetricLaplace, {"loc": 1.0, "scale": 2.0, "asymmetry": 1.5}),
    (dist.SoftAsymmetricLaplace, {"loc": 1.0, "scale": 2.0, "asymmetry": 1.5, "softness": 0.5}),
    (dist.Weibull, {"scale": 2.0, "concentration": 1.5}),
    (dist.Pareto, {"scale": 2.0, "alpha": 3.0}),
    (dist.Kumaraswamy, {"concentration1": 2.0, "concentration0": 1.5}),
    (dist.ContinuousBernoulli, {"probs": 0.3}),
    (dist.RelaxedBernoulli, {"temperature": 0.7, "logits": 0.4}),
    (dist.RelaxedOneHotCategorical, {"temperature": 0.7, "logits": [0.4, -0.3, 0.1]}),
    (dist.LogisticNormal, {"loc": [0.4, -0.3], "scale": [1.0, 0.5]}),
    (dist.ProjectedNormal, {"concentration": [0.4, -0.3]}),
    (dist.MultivariateNormal, {"loc": [0.4, -0.3], "scale_tril": [[1.0, 0.0], [0.5, 2.0]]}),
    (
        dist.LowRankMultivariateNormal,
        {"loc": [0.4, -0.3], "cov_factor": [[1.0], [0.5]], "cov_diag": [1.0, 0.5]},
    ),
]
if hasattr(dist, "GeneralizedPareto"):
    PATHWISE.append((dist.GeneralizedPareto, {"loc": 1.0, "scale": 2.0, "concentration": 0.3}))
# Whose gradients are implicit: no draw is a smooth function of them.
IMPLICIT = [
    (dist.Gamma, {"concentration": 0.3, "rate": 2.0}),
    (dist.Gamma, {"concentration": 7.0, "rate": 2.0}),
    (dist.Chi2, {"df": 3.0}),
    (dist.InverseGamma, {"concentration": 2.5, "rate": 2.0}),
    (dist.StudentT, {"df": 4.0, "loc": 1.0, "scale": 2.0}),
    (dist.Beta, {"concentration1": 0.4, "concentration0": 2.0}),
    (dist.Dirichlet, {"concentration": [0.4, 2.0, 1.0]}),
    (dist.FisherSnedecor, {"df1": 6.0, "df2": 9.0}),
    (
        dist.MultivariateStudentT,
        {"df": 6.0, "loc": [0.4, -0.3], "scale_tril": [[1.0, 0.0], [0.5, 2.0]]},
    ),
]


def zero_inflated_geometric(probs, gate):
    return dist.ZeroInflatedDistribution(dist.Geometric(probs), gate=gate)


DISCRETE = [
    (dist.Bernoulli, {"probs": 0.3}),
    (dist.Geometric, {"probs": 0.3}),
    (dist.Categorical, {"probs": [0.2, 0.0, 0.5, 0.3]}),
    (dist.OneHotCategorical, {"probs": [0.2, 0.0, 0.5, 0.3]}),
    (dist.OrderedLogistic, {"predictor": 0.3, "cutpoints": [-1.0, 0.5]}),
    (zero_inflated_geometric, {"probs": 0.3, "gate": 0.3}),
    (dist.Multinomial, {"total_count": 5, "probs": [0.2, 0.5, 0.3]}),
]


def name(case):
    return case.__name__ if isinstance(case, type) else ""


def tensors(parameters, dtype=torch.float32):
    return {
        key: value if isinstance(value, int) else torch.tensor(value, dtype=dtype)
        for key, value in parameters.items()
    }


def source(seed=0):
    noise = StepNoise(NoiseStream(Seed(seed)))
    noise.begin()
    return noise


class Fixed:
    """Uniform numbers of one value, and no normals."""

    def __init__(self, u):
        self.u = u

    def uniform(self, shape, dtype, device):
        return torch.full(shape, self.u, dtype=dtype, device=device)


@pytest.mark.parametrize(("family", "parameters"), PATHWISE + IMPLICIT + DISCRETE, ids=name)
def test_the_distribution_is_that_of_torch(family, parameters):
    d = family(**tensors(parameters))
    by_torch = d.sample((100_000,)).double().reshape(100_000, -1)
    with drawn_from(source()):
        # In pieces: very many gamma variables at once are left to torch.
        drawn = torch.cat([d.sample((2000,)) for _ in range(50)]).double().reshape(100_000, -1)
    assert drawn.shape == by_torch.shape
    for one, other in zip(drawn.T, by_torch.T, strict=True):
        # With seeds fixed this is one draw of 60 p-values; below 1e-4 something is wrong.
        assert scipy.stats.ks_2samp(one.numpy(), other.numpy()).pvalue > 1e-4
    correlations = torch.corrcoef(drawn.T) - torch.corrcoef(by_torch.T)
    if family not in (dist.Cauchy, dist.HalfCauchy):
        # Each has a standard error of at most 1 / sqrt(1e5); some columns are constant.
        assert correlations.nan_to_num().abs().max() < 6 * math.sqrt(2 / 100_000)


@pytest.mark.parametrize(("family", "parameters"), PATHWISE + IMPLICIT + DISCRETE, ids=name)
def test_without_a_source_the_generator_is_used_and_with_one_it_is_not(family, parameters):
    d = family(**tensors(parameters))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with drawn_from(source(seed=3)):
        first = d.sample((7,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1000)
    with drawn_from(source(seed=3)):
        assert torch.equal(d.sample((7,)), first)
    torch.manual_seed(0)
    one = d.sample((7,))
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert torch.equal(d.sample((7,)), one)


@pytest.mark.parametrize(("family", "parameters"), PATHWISE, ids=name)
def test_gradients_are_those_of_the_draw(family, parameters):
    given = tensors(parameters, torch.float64)
    leaves = [value.requires_grad_() for value in given.values()]

    def draw(*values):
        with drawn_from(source(seed=1)):
            arguments = dict(zip(given, values, strict=True))
            # Not checked: moved a little, a triangular matrix is none.
            return family(**arguments, validate_args=False).rsample((3,))

    torch.autograd.gradcheck(draw, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_slopes_are_those_of_the_quantile(dtype):
    a = torch.tensor([1.0, 1.3, 2.0, 5.0, 20.0, 300.0, 1e4], dtype=torch.float64).unsqueeze(-1)
    q = torch.tensor([1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6], dtype=torch.float64)
    a, q = torch.broadcast_tensors(a, q)

    def log_quantile(a):
        return torch.as_tensor(scipy.stats.gamma.ppf(q.numpy(), a.numpy())).log()

    h = 1e-5 * a  # an error of h**2 in theory, and of about 1e-15 / h by rounding
    expected = (log_quantile(a + h) - log_quantile(a - h)) / (2 * h)
    actual = _slope(a.to(dtype), log_quantile(a).to(dtype)).double()
    # In float32 log x alone is known to 1e-6 at a = 1e4, where its spread is 1e-2.
    tolerance = 5e-4 if dtype == torch.float32 else 1e-7
    assert_close(actual, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("a", "b"), [(0.05, 0.3), (0.5, 3.0), (1.0, 1.0), (4.0, 0.7), (30.0, 80.0)]
)
def test_gradients_of_gammas_and_betas_are_unbiased(a, b):
    n = 8000  # as many as are drawn by counter, twice for a beta variable
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (a, b))

    def check(mean_of, family):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with drawn_from(source(seed=2)):
            # One parameter for each draw, so that every draw shows its own gradient.
            each = [x.detach().expand(n).clone().requires_grad_() for x in (a, b)]
            grads = torch.autograd.grad(family(*each).rsample().sum(), each)
        assert torch.equal(torch.get_rng_state(), state)
        expected = torch.autograd.grad(mean_of(a, b), [a, b])
        for grad, mean in zip(grads, expected, strict=True):
            assert (grad.mean() - mean).abs() < 5 * grad.std() / n**0.5

    check(lambda a, b: a / b, dist.Gamma)
    check(lambda a, b: a / (a + b), dist.Beta)


def test_tiny_concentrations_stay_inside_the_support():
    for dtype in (torch.float32, torch.float64):
        small = torch.full((1000,), 1e-3, dtype=dtype, requires_grad=True)
        with drawn_from(source()):
            drawn = [dist.Gamma(small, 1.0).rsample(), dist.Beta(small, small).rsample()]
            drawn += [dist.Dirichlet(small.unsqueeze(-1).expand(1000, 3)).rsample()]
        for x in drawn:
            assert ((x > 0) & (x.isfinite())).all()
            assert torch.autograd.grad(x.sum(), small, retain_graph=True)[0].isfinite().all()
        assert (drawn[1] < 1).all()


def test_very_many_gammas_are_left_to_torch():
    state = torch.get_rng_state()
    with drawn_from(source()):
        dist.Gamma(torch.ones(100_000), 1.0).rsample()
    assert not torch.equal(torch.get_rng_state(), state)


BY_UNIFORMS = [
    case
    for case in PATHWISE
    if "Normal" not in case[0].__name__ and case[0] is not dist.SoftAsymmetricLaplace
]


@pytest.mark.parametrize("u", [2.0**-33, 2.0**-24, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "parameters"), BY_UNIFORMS, ids=name)
def test_the_outermost_numbers_give_finite_draws(family, parameters, dtype, u):
    given = tensors(parameters, dtype)
    leaves = [value.requires_grad_() for value in given.values()]
    with drawn_from(Fixed(u)):
        x = family(**given).rsample((2,))
    assert x.dtype == dtype
    assert x.isfinite().all()
    for grad in torch.autograd.grad(x.sum(), leaves, allow_unused=True):
        assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("u", [2.0**-33, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_tails_are_symmetric_where_the_numbers_are(u):
    for family in (dist.Laplace, dist.Cauchy):
        d = family(torch.tensor(0.0), torch.tensor(1.0))
        exact = {
            dist.Laplace: scipy.stats.laplace.ppf(u),
            dist.Cauchy: scipy.stats.cauchy.ppf(u),
        }[family]
        with drawn_from(Fixed(u)):
            # tan close to its pole doubles the relative error of its argument's rounding.
            assert_close(d.sample(), torch.tensor(exact).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("u", [2.0**-33, 0.3, 1 - 2.0**-24])
def test_impossible_categories_are_never_drawn(u):
    for probs, possible in (
        ([0.0, 1.0, 0.0], {1}),
        ([1.0, 0.0, 0.0], {0}),
        ([0.0, 0.5, 0.0, 0.5, 0.0], {1, 3}),
        ([0.1] * 10 + [0.0], set(range(10))),
    ):
        with drawn_from(Fixed(u)):
            assert int(dist.Categorical(torch.tensor(probs)).sample()) in possible
    with drawn_from(Fixed(u)):
        assert dist.Bernoulli(torch.tensor([0.0, 1.0])).sample().tolist() == [0, 1]


def test_a_vmap_of_the_programs_own_is_left_to_torch():
    one = torch.ones(4)
    with drawn_from(source()):
        assert current_source() is not None
        drawn = torch.func.vmap(lambda x: dist.Normal(x, 1.0).rsample(), randomness="different")(
            one
        )
    assert len(drawn.unique()) == 4


def test_the_source_before_is_restored_after_an_error():
    outer = source()
    with drawn_from(outer):
        with pytest.raises(RuntimeError, match="inside"), drawn_from(source()):
            raise RuntimeError("inside")
        assert current_source() is outer
        with drawn_from(None):
            assert current_source() is None
    assert current_source() is None


def test_half_precision_stays_inside_the_open_interval():
    for dtype in (torch.float16, torch.bfloat16):
        with drawn_from(source()):
            u = current_source().uniform((200_000,), dtype)
            assert u.dtype == dtype
            assert u.min() > 0
            assert u.max() < 1
