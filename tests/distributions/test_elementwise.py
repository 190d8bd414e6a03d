"""The lean families: their operands stay as they were given, and nothing else can be told apart."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.errors import ShapeError

f64 = {"dtype": torch.float64}


def t(*values):
    return torch.tensor(values, **f64)


# family -> (arguments, value), all of shape (3,)
LEAN = {
    "Normal": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, -2.0)),
    "LogNormal": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, 2.0)),
    "HalfNormal": ([t(0.5, 1.0, 2.0)], t(0.3, 1.2, 2.0)),
    "HalfCauchy": ([t(0.5, 1.0, 2.0)], t(0.3, 1.2, 2.0)),
    "Cauchy": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, -2.0)),
    "Laplace": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, -2.0)),
    "StudentT": ([t(1.5, 3.0, 9.0), t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, -2.0)),
    "Exponential": ([t(0.5, 1.0, 2.0)], t(0.3, 1.2, 2.0)),
    "Gamma": ([t(0.5, 1.0, 2.0), t(0.7, 1.5, 3.0)], t(0.3, 1.2, 2.0)),
    "Beta": ([t(0.5, 1.0, 2.0), t(0.7, 1.5, 3.0)], t(0.3, 0.2, 0.9)),
    "Chi2": ([t(0.5, 1.0, 2.0)], t(0.3, 1.2, 2.0)),
    "Bernoulli": ([t(0.2, 0.5, 0.9)], t(0.0, 1.0, 1.0)),
    "Geometric": ([t(0.2, 0.5, 0.9)], t(0.0, 1.0, 4.0)),
    "Poisson": ([t(0.5, 1.0, 2.0)], t(0.0, 1.0, 4.0)),
    "Uniform": ([t(-1.0, 0.0, 1.0), t(1.0, 2.0, 3.0)], t(0.3, 1.2, 2.0)),
    "Logistic": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, -2.0)),
    "SkewLogistic": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0), t(0.5, 1, 2)], t(0.3, 1.2, -2.0)),
    "SoftLaplace": ([t(0.1, -1.0, 2.0), t(0.5, 1.0, 2.0)], t(0.3, 1.2, -2.0)),
    "AsymmetricLaplace": ([t(0.1, -1.0, 2.0), t(0.5, 1, 2), t(0.5, 1, 2)], t(0.3, 1.2, -2.0)),
    "SoftAsymmetricLaplace": ([t(0.1, -1.0, 2.0), t(0.5, 1, 2), t(0.5, 1, 2)], t(0.3, 1.2, -2.0)),
    "BetaBinomial": ([t(0.5, 1.0, 2.0), t(0.7, 1.5, 3.0), t(4.0, 4.0, 4.0)], t(0.0, 1.0, 4.0)),
    "GammaPoisson": ([t(0.5, 1.0, 2.0), t(0.7, 1.5, 3.0)], t(0.0, 1.0, 4.0)),
}
DISCRETE = {"Bernoulli", "Geometric", "Poisson", "BetaBinomial", "GammaPoisson"}
lean = pytest.mark.parametrize("family", LEAN)


@lean
def test_log_prob_has_the_right_gradients(family):
    """By finite differences in float64, also through operands smaller than the batch."""
    arguments, value = LEAN[family]
    leaves = [a.clone().requires_grad_() for a in arguments]
    fixed = len(leaves) - (family == "BetaBinomial")  # not by the number of trials
    if family not in DISCRETE:
        value = value.clone().requires_grad_()

    def log_prob(value, *leaves):
        rest = arguments[fixed:]
        d = getattr(dist, family)(*leaves, *rest, validate_args=False)
        return d.expand([2, 3]).log_prob(value.expand(2, 3)), d.log_prob(value)

    assert gradcheck(log_prob, (value, *leaves[:fixed]))
    scalars = tuple(leaf.detach()[0].clone().requires_grad_() for leaf in leaves[:fixed])

    def log_prob_of_scalars(value, *scalars):
        rest = arguments[fixed:]
        return getattr(dist, family)(*scalars, *rest, validate_args=False).log_prob(value)

    inside = value if family != "Uniform" else t(0.3, 0.2, 0.9).requires_grad_()
    assert gradcheck(log_prob_of_scalars, (inside, *scalars))


@lean
def test_numbers_scalars_and_vectors_mean_the_same(family):
    """Every way of writing a parameter gives the same density, in float64 to rounding."""
    arguments, value = LEAN[family]
    first = [a[0] for a in arguments]
    dist.enable_validation(family != "Uniform")  # whose bounds differ, so some values lie outside
    expected = getattr(dist, family)(*[a.expand(3) for a in first]).log_prob(value)
    spellings = {
        "numbers": [a.item() for a in first],
        "scalars": first,
        "vectors of one": [a.reshape(1) for a in first],
        "numpy": [np.float64(a.item()) for a in first],
        "number first": [first[0].item(), *[a.expand(3) for a in first[1:]]],
        "number last": [*[a.expand(3) for a in first[:-1]], first[-1].item()],
    }
    for how, spelled in spellings.items():
        actual = getattr(dist, family)(*spelled).log_prob(value)
        assert actual.shape == (3,), how
        # A number alone makes float32 where a tensor of it is needed (logits, lgamma of sums).
        assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6, msg=how)


@lean
def test_integer_and_numpy_float32_arguments(family):
    arguments, value = LEAN[family]
    ones = [1.0] * len(arguments)
    if family == "Uniform":
        ones = [0.0, 3.0]
    if family in {"Bernoulli", "Geometric"}:
        return
    expected = getattr(dist, family)(*ones).log_prob(value[1])
    for kind in (int, np.float32, np.int64):
        d = getattr(dist, family)(*map(kind, ones))
        assert_close(d.log_prob(value[1]), expected)
        assert d.sample().dtype == torch.get_default_dtype()


@lean
def test_expand_touches_no_tensor_and_keeps_shapes(family):
    arguments, value = LEAN[family]
    d = getattr(dist, family)(*arguments)
    wide = d.expand([4, 3])
    slot = "_" + d._params[0]
    assert getattr(wide, slot) is getattr(d, slot)
    assert wide.batch_shape == (4, 3)
    assert getattr(wide, d._params[0]).shape == (4, 3)
    assert wide.sample((2,)).shape == (2, 4, 3)
    assert wide.log_prob(value).shape == (4, 3)
    assert wide.expand([5, 4, 3]).log_prob(value).shape == (5, 4, 3)
    assert d.expand([3]).log_prob(value).shape == (3,)
    assert d.batch_shape == (3,)
    # Entries of an expanded batch are independent draws.
    assert family in DISCRETE or len(wide.sample().unique()) == 12


@pytest.mark.parametrize("shape", [(2,), (), (4, 1), (3, 4)], ids=str)
def test_impossible_expansions_are_refused(shape):
    d = dist.Normal(torch.zeros(3), 1.0)
    with pytest.raises(ShapeError, match=r"batch shape \(3,\) cannot be expanded to"):
        d.expand(shape)
    with pytest.raises(RuntimeError):  # what torch raises
        d.expand(shape)
    assert d.batch_shape == (3,)


def test_a_read_under_no_grad_does_not_cut_the_gradient():
    scale = torch.tensor(2.0, requires_grad=True)
    for d in (
        dist.HalfNormal(scale).expand([3]),
        dist.Chi2(scale).expand([3]),
        dist.Bernoulli(logits=scale).expand([3]),
        dist.Normal(torch.zeros(3), scale),
    ):
        d.sample()
        for name in ("scale", "df", "concentration", "probs", "logits"):
            if hasattr(d, name):
                with torch.no_grad():
                    getattr(d, name)
                assert getattr(d, name).requires_grad, (d, name)


def test_parameters_read_at_the_batch_shape_and_can_be_set():
    loc = torch.randn(3)
    d = dist.Normal(loc, 2.0)
    assert d.loc is loc
    assert_close(d.scale, torch.full((3,), 2.0))
    assert d.scale is d.scale
    d.scale = torch.tensor(3.0)
    assert_close(d.scale, torch.full((3,), 3.0))
    assert_close(d.log_prob(loc), torch.full((3,), -math.log(3) - 0.5 * math.log(2 * math.pi)))


def test_dtype_and_device_of_numbers_follow_the_tensors():
    d = dist.Normal(0.0, torch.ones(2, **f64))
    assert d.loc.dtype == d.sample().dtype == torch.float64
    assert dist.Normal(torch.zeros(2, dtype=torch.int64), 1.0).sample().dtype == torch.float32
    meta = dist.Normal(torch.zeros(2, device="meta"), 1.0)
    assert meta.scale.device.type == meta.sample().device.type == "meta"
    assert dist.Normal(0, 1).log_prob(3).dtype == torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert dist.Normal(0.0, 1.0).sample().dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_integer_values_are_scored_in_the_precision_of_the_parameters():
    """lgamma of an int64 tensor is float32 in torch: 1e-7 off in a float64 model."""
    counts = torch.arange(60)
    rate = torch.tensor(30.0, **f64)
    for actual, expected in (
        (dist.Poisson(rate).log_prob(counts), scipy.stats.poisson.logpmf(counts, 30)),
        (dist.Poisson(rate).log_prob(counts.int()), scipy.stats.poisson.logpmf(counts, 30)),
        (dist.GammaPoisson(rate, 1.0).log_prob(counts), scipy.stats.nbinom.logpmf(counts, 30, 0.5)),
        (
            dist.BetaBinomial(rate, 2.0, 59).log_prob(counts),
            scipy.stats.betabinom.logpmf(counts, 59, 30, 2),
        ),
    ):
        assert_close(actual, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    assert_close(
        dist.Bernoulli(0.25).log_prob(torch.tensor([True, False])).exp(), torch.tensor([0.25, 0.75])
    )


@pytest.mark.parametrize(
    ("ours", "scipys", "points"),
    [
        (dist.Normal(t(1.0), 2.0), scipy.stats.norm(1, 2), [-300.0, 0.0, 1.0, 40.0]),
        (dist.LogNormal(t(1.0), 2.0), scipy.stats.lognorm(2, scale=math.e), [1e-9, 1.0, 1e9]),
        (dist.HalfNormal(t(2.0)), scipy.stats.halfnorm(scale=2), [0.0, 1.0, 80.0]),
        (dist.HalfCauchy(t(2.0)), scipy.stats.halfcauchy(scale=2), [0.0, 1.0, 1e9]),
        (dist.Cauchy(t(1.0), 2.0), scipy.stats.cauchy(1, 2), [-1e9, 1.0, 3.0]),
        (dist.Laplace(t(1.0), 2.0), scipy.stats.laplace(1, 2), [-90.0, 1.0, 3.0]),
        (dist.StudentT(t(2.5), 1.0, 2.0), scipy.stats.t(2.5, 1, 2), [-1e6, 1.0, 3.0]),
        (dist.Exponential(t(2.0)), scipy.stats.expon(scale=0.5), [0.0, 1.0, 90.0]),
        (dist.Gamma(t(0.3), 2.0), scipy.stats.gamma(0.3, scale=0.5), [1e-9, 1.0, 90.0]),
        (dist.Beta(t(0.3), 5.0), scipy.stats.beta(0.3, 5), [1e-9, 0.5, 1 - 1e-9]),
        (dist.Uniform(t(-1.0), 3.0), scipy.stats.uniform(-1, 4), [-1.0, 0.0, 2.9]),
        (dist.Chi2(t(3.0)), scipy.stats.chi2(3), [1e-9, 1.0, 90.0]),
        (dist.Logistic(t(1.0), 2.0), scipy.stats.logistic(1, 2), [-900.0, 1.0, 900.0]),
        (dist.SoftLaplace(t(0.0), 2.0), scipy.stats.hypsecant(scale=2), [-90.0, 0.0, 90.0]),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, torch.distributions.Distribution) else "",
)
def test_densities_in_the_tails_against_scipy(ours, scipys, points):
    actual = ours.log_prob(torch.tensor(points, **f64))
    assert_close(actual, torch.as_tensor(scipys.logpdf(points)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probs", [1e-6, 0.3, 0.999])
def test_bernoulli_and_geometric_keep_their_digits(probs):
    logit = math.log(probs) - math.log1p(-probs)
    ours = dist.Bernoulli(logits=t(logit)).log_prob(t(0.0, 1.0))
    expected = t(math.log1p(-probs), math.log(probs))
    # As in torch, the error is that of the logit, absolutely: 14 units of float64's last place.
    assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    # Far out, log P(1) = -exp(-logit), which log(sigmoid) in float32 would round to 0.
    assert_close(dist.Bernoulli(logits=40.0).log_prob(1.0), torch.tensor(-math.exp(-40)))
    geometric = dist.Geometric(t(probs)).log_prob(t(0.0, 7.0))
    assert_close(
        geometric, torch.as_tensor(scipy.stats.geom.logpmf([1, 8], probs)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("d", "outside"),
    [
        (dist.HalfNormal(1.0), -0.5),
        (dist.HalfCauchy(torch.ones(1)), -0.5),
        (dist.Uniform(0.0, 1.0), 1.5),
        (dist.Uniform(torch.zeros(1), 1.0), 1.0),
    ],
    ids=repr,
)
def test_outside_the_support_the_density_is_zero(d, outside):
    value = torch.tensor([outside], requires_grad=True)
    with dist.validation_enabled(False):
        log_prob = d.log_prob(value)
    assert log_prob.item() == -math.inf
    log_prob.sum().backward() if log_prob.requires_grad else None
    assert value.grad is None or bool(torch.isfinite(value.grad).all())


def test_base_dist_and_transforms_of_folded_and_exponentiated_families():
    for family, base in (
        ("LogNormal", "Normal"),
        ("HalfNormal", "Normal"),
        ("HalfCauchy", "Cauchy"),
    ):
        arguments = LEAN[family][0]
        ours = getattr(dist, family)(*arguments).expand([2, 3])
        theirs = getattr(torch.distributions, family)(*arguments).expand([2, 3])
        assert type(ours.base_dist) is getattr(dist, base)
        assert ours.base_dist.batch_shape == theirs.base_dist.batch_shape
        assert_close(ours.base_dist.scale, theirs.base_dist.scale)
        assert ours.transforms == theirs.transforms
        assert isinstance(ours, dist.TransformedDistribution)


def test_a_subclass_with_its_own_constructor_expands_through_its_draws():
    class Shifted(dist.Normal):
        def __init__(self, shift):
            self.shift = shift
            super().__init__(shift, 1.0)

        def log_prob(self, value):
            return super().log_prob(value - self.shift + self.shift)

    class Renamed(dist.Normal):
        pass

    shift = torch.arange(3.0)
    assert isinstance(Shifted(shift).expand([2, 3]), dist.ExpandedDistribution)
    assert Shifted(shift).expand_by([2]).log_prob(torch.zeros(3)).shape == (2, 3)
    assert type(Renamed(shift, 1.0).expand([2, 3])) is Renamed


def test_number_only_families_make_no_tensor_until_asked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was made")

    for name in ("tensor", "as_tensor", "broadcast_tensors", "full"):
        monkeypatch.setattr(torch, name, refuse)
    dist.enable_validation(False)
    value = torch.ones(3)
    for d in (dist.Normal(0.0, 5.0), dist.HalfCauchy(5.0), dist.LogNormal(0.0, 1.0)):
        d.expand([3]).to_event(1).log_prob(value)
    dist.enable_validation(True)
    dist.Normal(0.0, 5.0)  # numbers are checked as numbers


def test_poisson_at_rate_zero_and_sparse_counts():
    assert dist.Poisson(0.0).log_prob(0.0).item() == 0.0
    assert dist.Poisson(t(0.0)).log_prob(t(0.0, 2.0)).tolist() == [0.0, -math.inf]
    rate = torch.rand(4, 5, **f64)
    counts = torch.poisson(rate)
    sparse = dist.Poisson(rate, is_sparse=True)
    assert_close(
        sparse.expand([2, 4, 5]).log_prob(counts),
        dist.Poisson(rate).log_prob(counts).expand(2, 4, 5),
    )


sizes = st.lists(st.sampled_from([1, 2, 3]), max_size=3).map(tuple)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    family=st.sampled_from(["Normal", "LogNormal", "Laplace", "Cauchy", "Gamma", "Beta"]),
    shapes=st.tuples(sizes, sizes, sizes, sizes),
    numbers=st.tuples(st.booleans(), st.booleans()),
)
def test_any_mix_of_shapes_gives_torch_s_shapes_and_densities(family, shapes, numbers):
    """Operands, expansions and values of all shapes that broadcast, against torch."""
    try:
        batch = torch.broadcast_shapes(*(s for s, n in zip(shapes, numbers, strict=False) if not n))
        wide = torch.broadcast_shapes(batch, shapes[2])
    except RuntimeError:
        hypothesis.reject()
    operands = [
        0.75 if number else torch.rand(shape, **f64) + 0.5
        for shape, number in zip(shapes, numbers, strict=False)
    ]
    ours, oracle = (getattr(lib, family)(*operands) for lib in (dist, torch.distributions))
    assert ours.batch_shape == oracle.batch_shape
    ours, oracle = ours.expand(wide), oracle.expand(wide)
    value = torch.rand(shapes[3], **f64) * 0.9 + 0.05
    try:
        torch.broadcast_shapes(wide, value.shape)
    except RuntimeError:
        with pytest.raises(ShapeError, match="does not broadcast"):
            ours.log_prob(value)
        return
    actual, expected = ours.log_prob(value), oracle.log_prob(value)
    assert actual.shape == expected.shape
    # torch holds a number as float32 where no tensor is given; 0.75 is exact in both.
    # Its normaliser is then a float32 too, which counts where the log-density is close to 0.
    tolerance = 1e-6 if all(numbers) else 1e-12
    assert_close(actual, expected.double(), rtol=tolerance, atol=tolerance)
    for name in oracle.arg_constraints:
        assert getattr(ours, name).shape == getattr(oracle, name).shape
    torch.manual_seed(0)
    drawn = ours.rsample((2,))
    torch.manual_seed(0)
    assert_close(drawn, oracle.rsample((2,)), rtol=1e-6, atol=1e-6)
