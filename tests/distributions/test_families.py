"""Every family against Pyro: shapes, densities, draws, and what expand, to_event and mask do."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist

# Same formula up to the order of operations, in float64; "numbers" cases hold float32 in Pyro,
# where a number becomes a float32 tensor, hence the looser pair.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 2e-6, "atol": 2e-6}

SAMPLE_SHAPES = [(), (2, 3)]

# torch's sampler of Wishart draws again while a draw is good, and warns; ours does not.
OTHER_STREAM = {"Wishart"}

# What fails in pyro 1.9.2 on torch 2.13 in float64, so that the oracle needs help.
BROKEN_LOG_PROB = {"GeneralizedPareto"}  # compares with a float32 zero
BROKEN_EXPAND = {"SoftAsymmetricLaplace", "LKJ"}  # look for the __init__ of another class


def tolerance(case, *tensors):
    single = any(t.dtype == torch.float32 for t in tensors) or not any(
        torch.is_tensor(a) and a.dtype == torch.float64 for a in case.arguments().values()
    )
    return (
        SINGLE if single or any(isinstance(a, float) for a in case.arguments().values()) else EXACT
    )


def values(case, sample_shape=()):
    """Values to score: draws of Pyro's, in float64 where they are not integers."""
    torch.manual_seed(1)
    oracle = case.oracle()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Wishart, see above
        value = (
            case.build().sample(sample_shape)
            if case.family in OTHER_STREAM
            else (oracle.sample(torch.Size(sample_shape)))
        )
    return value if value.dtype == torch.int64 else value.double()


def oracle_log_prob(case, oracle, value):
    if case.family not in BROKEN_LOG_PROB:
        return oracle.log_prob(value)
    arguments = {name: a.float() for name, a in case.arguments().items()}
    return type(oracle)(**arguments, validate_args=False).log_prob(value.float())


def test_every_torch_family_is_wrapped_and_tested(families):
    for name in torch.distributions.__all__:
        theirs = getattr(torch.distributions, name)
        if not isinstance(theirs, type) or not issubclass(theirs, torch.distributions.Distribution):
            continue
        if name == "Distribution":
            continue
        ours = getattr(dist, name)
        assert issubclass(ours, theirs), name
        if name in {"ExponentialFamily"}:
            continue
        assert issubclass(ours, dist.TorchDistribution), name
        assert issubclass(ours, dist.Distribution), name
        assert name in dist.__all__
        others = {"Independent", "TransformedDistribution", "MixtureSameFamily"}
        assert name in families or name in others, f"{name} has no case in conftest.py"


def test_shapes_agree_with_pyro(case):
    ours, oracle = case.build(), case.oracle()
    assert ours.batch_shape == oracle.batch_shape
    assert ours.event_shape == oracle.event_shape
    assert ours.event_dim == oracle.event_dim
    assert ours.has_rsample == oracle.has_rsample
    assert ours.has_enumerate_support == oracle.has_enumerate_support
    for sample_shape in [(), (4,), (2, 3)]:
        assert ours.shape(sample_shape) == oracle.shape(torch.Size(sample_shape))
        assert isinstance(ours.shape(sample_shape), torch.Size)


def test_log_prob_agrees_with_pyro(case):
    ours, oracle = case.build(), case.oracle()
    for sample_shape in SAMPLE_SHAPES:
        value = values(case, sample_shape)
        with dist.validation_enabled(case.family not in BROKEN_LOG_PROB):
            actual, expected = ours.log_prob(value), oracle_log_prob(case, oracle, value)
        assert actual.shape == expected.shape == torch.Size(sample_shape) + ours.batch_shape
        assert_close(actual, expected.to(actual.dtype), **tolerance(case, actual, expected))


def test_draws_agree_with_pyro(case):
    """The same seed gives the same draw, and calling a distribution draws by rsample."""
    ours, oracle = case.build(), case.oracle()
    for sample_shape in SAMPLE_SHAPES:
        torch.manual_seed(3)
        drawn = ours(torch.Size(sample_shape))
        assert drawn.shape == ours.shape(sample_shape)
        torch.manual_seed(3)
        assert_close(ours.sample(sample_shape), drawn.detach(), rtol=0, atol=0)
        if case.family not in OTHER_STREAM:
            torch.manual_seed(3)
            expected = oracle(torch.Size(sample_shape))
            assert drawn.dtype == expected.dtype
            assert_close(drawn, expected, **tolerance(case, drawn))


def test_moments_agree_with_pyro(case):
    ours, oracle = case.build(), case.oracle()
    for name in ["mean", "variance", "stddev", "mode"]:
        try:
            expected = getattr(oracle, name)
        except (NotImplementedError, AttributeError, RuntimeError):
            continue
        actual = getattr(ours, name)
        assert actual.shape == expected.shape, name
        tolerances = tolerance(case, actual, expected)
        assert_close(actual, expected.to(actual.dtype), **tolerances, equal_nan=True, msg=name)


def test_entropy_and_cdf_agree_with_pyro(case):
    value = values(case)
    with dist.validation_enabled(False):
        for compute in (
            lambda d: d.entropy(),
            lambda d: d.cdf(value),
            lambda d: d.icdf(d.cdf(value)),
        ):
            try:
                expected = compute(case.oracle())
            except (NotImplementedError, RuntimeError):
                continue
            actual = compute(case.build())
            assert_close(actual, expected, **tolerance(case, actual, expected), equal_nan=True)


def test_enumerate_support_agrees_with_pyro(case):
    ours, oracle = case.build(), case.oracle()
    if not ours.has_enumerate_support:
        with pytest.raises(NotImplementedError):
            ours.enumerate_support()
        return
    for expand in (True, False):
        actual, expected = (d.enumerate_support(expand=expand) for d in (ours, oracle))
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, rtol=0, atol=0)


def test_support_agrees_with_pyro(case):
    ours, oracle = case.build(), case.oracle()
    assert ours.support.event_dim == oracle.support.event_dim
    assert ours.support.is_discrete == oracle.support.is_discrete
    if case.family != "Unit":
        assert bool(ours.support.check(values(case)).all())


def every_second(d):
    shape = torch.Size(d.batch_shape)
    return d.mask(torch.arange(shape.numel()).reshape(shape) % 2 == 0)


def test_reshaping_agrees_with_pyro(case):
    def everything(d):
        wide = every_second(d.expand(torch.Size((3, 2)) + d.batch_shape))
        return every_second(wide.to_event(1)).expand_by([2])

    check_reshaping(case, everything)
    if case.seed == 0:
        check_reshaping(case, lambda d: d.expand(torch.Size((3, 2)) + d.batch_shape))
        check_reshaping(case, lambda d: d.to_event())
        check_reshaping(case, every_second)


def check_reshaping(case, reshape):
    ours, oracle = reshape(case.build()), case.oracle()
    if case.family in BROKEN_EXPAND:
        oracle = pyro_dist.ExpandedDistribution(oracle, oracle.batch_shape)
    oracle = reshape(oracle)
    assert ours.batch_shape == oracle.batch_shape
    assert ours.event_shape == oracle.event_shape
    value = values(case).expand(ours.shape())  # a value that every reshaping can score
    with dist.validation_enabled(False):
        assert ours.sample((2,)).shape == ours.shape((2,))
        if case.family in BROKEN_LOG_PROB:
            assert ours.log_prob(value).shape == ours.batch_shape
            return
        actual, expected = ours.log_prob(value), oracle.log_prob(value)
        parts, oracle_parts = ours.score_parts(value), oracle.score_parts(value)
    assert actual.shape == expected.shape == ours.batch_shape
    assert_close(actual, expected.to(actual.dtype), **tolerance(case, actual, expected))
    for part, oracle_part in zip(parts, oracle_parts, strict=True):
        assert torch.is_tensor(part) == torch.is_tensor(oracle_part)
        if torch.is_tensor(part):
            expected_part = oracle_part.to(part.dtype)
            assert_close(part, expected_part, **tolerance(case, part, oracle_part))


def test_a_smaller_value_broadcasts_against_an_expanded_batch(case):
    """log_prob has the broadcast shape even where lazily expanded parameters are smaller."""
    ours = case.build()
    value = values(case)
    if ours.batch_shape:
        value = value[(0,) * len(ours.batch_shape)]
    wide = torch.Size((5,)) + ours.batch_shape
    with dist.validation_enabled(False):
        actual, expected = ours.expand(wide).log_prob(value), ours.log_prob(value).expand(wide)
    assert actual.shape == wide
    assert_close(actual, expected, **EXACT, equal_nan=True)


def test_expand_keeps_the_class_and_the_choice_of_has_rsample(case):
    d = case.build()
    assert type(d.expand_by([2])) is type(d)
    if d.has_rsample:
        d.has_rsample_(False)
        assert not d.has_rsample
        assert not d.expand_by([2]).has_rsample
        assert not d.expand_by([2]).to_event(1).has_rsample
        assert not d().requires_grad


def test_rsample_carries_gradients_and_sample_does_not(one_case):
    if not one_case.build().has_rsample or one_case.family in {"Delta", "Unit", "LKJ"}:
        pytest.skip("no gradients to be had")
    arguments = {
        name: a.clone().requires_grad_() if torch.is_tensor(a) else a
        for name, a in one_case.arguments().items()
    }
    leaves = [a for a in arguments.values() if torch.is_tensor(a)]
    if not leaves:
        loc = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        first = next(iter(arguments))
        arguments[first], leaves = loc, [loc]
    d = getattr(dist, one_case.family)(**arguments)
    for owner in (d, d.expand_by([2])):
        with torch.no_grad():
            owner.rsample()  # Nothing read under no_grad may be remembered without its gradient.
        assert not owner.sample().requires_grad
        assert owner.rsample().requires_grad
        grads = torch.autograd.grad(
            owner.rsample().sum(), leaves, allow_unused=True, retain_graph=True
        )
        assert any(g is not None for g in grads)


def test_log_prob_gradients_agree_with_pyro(case):
    if case.family in BROKEN_LOG_PROB:
        pytest.skip("nothing to compare with")

    def gradients(make):
        arguments = {
            name: a.detach().clone().requires_grad_() if torch.is_tensor(a) else a
            for name, a in case.arguments().items()
        }
        d = make(**arguments)
        value = values(case).clone()
        # Not by total_count: it is an integer in a float's clothes.
        leaves = [a for n, a in arguments.items() if torch.is_tensor(a) and n != "total_count"]
        if value.is_floating_point() and not d.support.is_discrete:
            leaves.append(value.requires_grad_())
        with dist.validation_enabled(False):
            log_prob = d.log_prob(value).sum()
        if not log_prob.requires_grad or not leaves:
            return []
        return torch.autograd.grad(log_prob, leaves, allow_unused=True)

    ours = gradients(getattr(dist, case.family))
    oracle = gradients(getattr(pyro_dist, case.family))
    assert len(ours) == len(oracle)
    for actual, expected in zip(ours, oracle, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and bool(torch.isfinite(expected).all()):
            assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_copies_and_pickles_score_the_same(case):
    d = case.build()
    value = values(case)
    with dist.validation_enabled(False):
        expected = d.log_prob(value)
        for twin in (copy.copy(d), copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert type(twin) is type(d)
            assert_close(twin.log_prob(value), expected, rtol=0, atol=0)


def test_repr_names_the_family(case):
    for d in (
        case.build(),
        case.build().expand_by([2]),
        case.build().to_event(),
        case.build().mask(True),
    ):
        assert case.family in repr(d)


def test_numbers_are_scored_like_tensors(case):
    d = case.build()
    if d.event_shape or case.family in {"Delta"}:
        pytest.skip("an event is not a number")
    number = float(values(case).reshape(-1)[0])
    with dist.validation_enabled(False):
        expected = d.log_prob(torch.tensor(number, dtype=torch.float64))
        actual = d.log_prob(number).double()
        assert_close(actual, expected.double(), rtol=2e-6, atol=2e-6, equal_nan=True)
        assert d.log_prob(number).shape == d.batch_shape


def test_signatures_name_pyro_s_arguments(one_case):
    ours = inspect.signature(getattr(dist, one_case.family)).parameters
    theirs = inspect.signature(getattr(pyro_dist, one_case.family)).parameters
    named = [n for n, p in theirs.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert [n for n in named if n not in ours] == []
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    kept = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert kept[: len(positional)] == positional


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("Normal", {"loc": (3, 1), "scale": (4,)}),
        ("Uniform", {"low": (2, 1), "high": (3,)}),
        ("Dirichlet", {"concentration": (2, 3)}),
        ("Categorical", {"probs": (2, 3)}),
        ("OneHotCategorical", {"logits": (2, 3)}),
        ("Multinomial", {"total_count": (), "probs": (2, 3)}),
        ("MultivariateNormal", {"loc": (3,), "scale_tril": (2, 3, 3)}),
        ("LowRankMultivariateNormal", {"loc": (3,), "cov_factor": (2, 3, 1), "cov_diag": (3,)}),
        ("DirichletMultinomial", {"concentration": (2, 3), "total_count": (2,)}),
        ("MultivariateStudentT", {"df": (4, 1), "loc": (3,), "scale_tril": (2, 3, 3)}),
        ("ProjectedNormal", {"concentration": (4, 3)}),
        ("AffineBeta", {"concentration1": (2, 1), "concentration0": (), "loc": (3,), "scale": ()}),
        ("Bernoulli", {"logits": (5,)}),
        ("Gamma", {"concentration": (5,), "rate": ()}),
    ],
)
def test_infer_shapes_agrees_with_pyro(family, shapes):
    ours = getattr(dist, family).infer_shapes(**shapes)
    oracle = getattr(pyro_dist, family).infer_shapes(**shapes)
    assert tuple(map(tuple, ours)) == tuple(map(tuple, oracle))


def test_a_name_that_only_pyro_has_says_so():
    with pytest.raises(AttributeError, match=r"pyro\.distributions\.Stable can be used"):
        _ = dist.Stable
    with pytest.raises(AttributeError, match="no attribute 'Nomral'"):
        _ = dist.Nomral
    missing = set(pyro_dist.__all__) - set(dist.__all__)
    assert missing == set(dist._ONLY_IN_PYRO)
