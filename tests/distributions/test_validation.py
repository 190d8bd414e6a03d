"""What is checked, what the errors say, and that nothing is checked while validation is off."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import fastsvi.distributions as dist
from fastsvi.distributions import constraints
from fastsvi.errors import ConstraintError, DeviceError, DtypeError, FastSVIError, ShapeError

nan = math.nan


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dist.Normal(0.0, -1.0), r"Normal: argument scale .* but found -1\.0\. .*softplus"),
        (lambda: dist.Normal(0, 0), r"argument scale must satisfy GreaterThan.* found 0\.0"),
        (lambda: dist.Normal(nan, 1.0), r"argument loc must satisfy Real\(\), but found nan"),
        (
            lambda: dist.Normal(torch.zeros(2, 3), torch.tensor([1.0, -2.0, nan])),
            r"scale .* found -2 at index \(1\), 2 of 3 entries .* 1 of 3 entries NaN .*NaN comes",
        ),
        (
            lambda: dist.LogNormal(0.0, torch.tensor(-1.0)),
            r"LogNormal: argument scale .* found -1\.",
        ),
        (lambda: dist.HalfCauchy(-5), r"HalfCauchy: argument scale"),
        (lambda: dist.Bernoulli(1.5), r"Bernoulli: argument probs .* found 1\.5\. .*logits="),
        (lambda: dist.Bernoulli(logits=nan), r"Bernoulli: argument logits"),
        (lambda: dist.Geometric(0.0), r"Geometric: argument probs"),
        (lambda: dist.Poisson(-1.0), r"Poisson: argument rate"),
        (lambda: dist.StudentT(-1.0), r"StudentT: argument df"),
        (lambda: dist.Chi2(torch.tensor([1.0, -1.0])), r"Chi2: argument df .* index \(1\)"),
        (lambda: dist.Uniform(1.0, 0.0), r"Uniform: argument low .* Exchange"),
        (lambda: dist.Uniform(torch.zeros(2), torch.tensor([1.0, -1.0])), r"low .* index \(1\)"),
        (lambda: dist.Gamma(1.0, torch.zeros(1)), r"Gamma: argument rate"),
        (lambda: dist.Weibull(1.0, -1.0), r"Weibull: argument concentration"),
        (lambda: dist.Binomial(-1, 0.5), r"Binomial: argument total_count"),
        (
            lambda: dist.Categorical(logits=torch.full((2, 3), nan)),
            r"Categorical: argument logits .*\[nan, nan, nan\] at index \(0\), 2 of 2",
        ),
        (lambda: dist.Dirichlet(torch.tensor([1.0, -1.0])), r"found \[1\.0, -1\.0\]\. .*exp"),
        (
            lambda: dist.MultivariateNormal(torch.zeros(2), scale_tril=-torch.eye(2)),
            r"scale_tril .* found \[\[-1\.0, .*linalg\.cholesky",
        ),
        (
            lambda: dist.OrderedLogistic(torch.tensor(0.0), torch.tensor([1.0, 0.0])),
            r"OrderedLogistic: argument cutpoints",
        ),
        (lambda: dist.ZeroInflatedPoisson(torch.tensor(-1.0), gate=0.5), r"argument rate"),
        (lambda: dist.Delta(torch.zeros(2), torch.tensor([0.0, nan])), r"argument log_density"),
        (lambda: dist.Unit(torch.tensor(nan)), r"argument log_factor"),
        (lambda: dist.LKJ(3, -1.0), r"LKJCholesky: argument concentration"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ConstraintError, match=message) as caught:
        build()
    assert isinstance(caught.value, ValueError)  # what torch raises
    assert isinstance(caught.value, FastSVIError)


@pytest.mark.parametrize(
    ("d", "value", "message"),
    [
        (dist.Normal(0.0, 1.0), nan, r"Normal: the value must lie in the support Real.* nan.*mask"),
        (dist.HalfNormal(1.0), -1.0, r"HalfNormal: the value .* GreaterThanEq.* found -1\. Check"),
        (dist.Bernoulli(0.5), 0.5, r"Bernoulli: .* Boolean.* found 0\.5\. .*coded"),
        (dist.Poisson(1.0), torch.tensor([1.0, 2.5]), r"2\.5 at index \(1\), 1 of 2 entries"),
        (dist.Categorical(torch.ones(3)), 3, r"IntegerInterval\(lower_bound=0, upper_bound=2\)"),
        (dist.Beta(1.0, 1.0), 2.0, r"Beta: .* Interval"),
        (dist.Dirichlet(torch.ones(2)), torch.ones(2), r"Simplex\(\), but found \[1\.0, 1\.0\]"),
        (dist.Weibull(1.0, 1.0), -1.0, r"Weibull: .* found -1"),
        (dist.Binomial(3, torch.tensor(0.5)), 4, r"Binomial: .* found 4"),
        (dist.LKJ(2, 1.0), 2 * torch.eye(2), r"LKJ: .* CorrMatrix"),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.full((2,), nan), r"Normal: the value"),
        (dist.Normal(0.0, 1.0).mask(True), nan, r"Normal: the value"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_values_outside_the_support(d, value, message):
    with pytest.raises(ConstraintError, match=message):
        d.log_prob(value)


@pytest.mark.parametrize(
    ("d", "shape", "message"),
    [
        (
            dist.Normal(torch.zeros(3), 1.0),
            (2,),
            r"\(2,\) does not broadcast against batch shape \(3,\)",
        ),
        (
            dist.Dirichlet(torch.ones(3)),
            (2,),
            r"must end in the event shape \(3,\), found tensor of",
        ),
        (dist.Dirichlet(torch.ones(3)), (), r"must end in the event shape \(3,\)"),
        (dist.Categorical(torch.ones(2, 3)), (5,), r"does not broadcast"),
        (dist.Weibull(torch.ones(3), 1.0), (4, 2), r"does not broadcast"),
    ],
    ids=lambda x: str(x),
)
def test_values_of_a_wrong_shape(d, shape, message):
    with pytest.raises(ShapeError, match=message):
        d.log_prob(torch.ones(shape))


@pytest.mark.parametrize("bad", ["a", None, [1.0], object(), np.ones(2), 1j], ids=type)
def test_arguments_that_are_no_numbers(bad):
    for build in (
        lambda: dist.Normal(bad, 1),
        lambda: dist.HalfCauchy(bad),
        lambda: dist.Beta(1, bad),
    ):
        with pytest.raises(ValueError, match=r"must be a number or a tensor") as caught:
            build()
        assert isinstance(caught.value, (DtypeError, TypeError))


@pytest.mark.parametrize("bad", ["a", None, [1.0], object()], ids=type)
def test_values_that_are_no_numbers(bad):
    for d in (
        dist.Normal(0, 1),
        dist.Weibull(1, 1),
        dist.Delta(0.0),
        dist.Categorical(torch.ones(2)),
    ):
        with pytest.raises((DtypeError, ValueError), match="must be a tensor or a number"):
            d.log_prob(bad)


def test_arguments_whose_shapes_clash():
    with pytest.raises(
        ShapeError, match=r"Normal: .*do not broadcast: loc \(2,\), scale \(3,\)"
    ) as caught:
        dist.Normal(torch.zeros(2), torch.ones(3))
    assert isinstance(caught.value, RuntimeError)  # what torch raises
    assert isinstance(caught.value, ValueError)


def test_arguments_on_different_devices():
    with pytest.raises(DeviceError, match=r"Normal: .* loc on cpu, scale on meta\. Move them"):
        dist.Normal(torch.zeros(3), torch.ones(3, device="meta"))
    with pytest.raises(DeviceError, match="Weibull"):
        dist.Weibull(torch.ones(3), torch.ones(3, device="meta"))
    # A 0-dimensional CPU tensor goes with any device, and a meta tensor has no values to check.
    assert dist.Normal(torch.tensor(0.0), torch.ones(3, device="meta")).batch_shape == (3,)


@pytest.mark.parametrize(
    "build",
    [
        lambda: dist.Bernoulli(),
        lambda: dist.Bernoulli(0.5, 0.0),
        lambda: dist.Categorical(torch.ones(2), torch.ones(2)),
        lambda: dist.Geometric(),
        lambda: dist.ZeroInflatedPoisson(1.0),
        lambda: dist.ZeroInflatedPoisson(1.0, gate=0.5, gate_logits=0.0),
    ],
)
def test_two_spellings_of_one_parameter(build):
    with pytest.raises(ValueError, match=r"takes either \w+ or \w+, found (neither|\w+ and \w+)"):
        build()


def test_nothing_is_checked_while_validation_is_off():
    with dist.validation_enabled(False):
        assert not dist.is_validation_enabled()
        d = dist.Normal(torch.zeros(2), torch.tensor([1.0, -1.0]))
        assert d.log_prob(torch.tensor([nan, 0.0])).isnan().all()
        assert math.isnan(dist.Normal(0.0, -1.0).log_prob(0.0))
        assert dist.Gamma(1.0, 0.0).log_prob(1.0) == -math.inf
    assert dist.is_validation_enabled()
    # A distribution keeps the choice it was built with, through expand and to_event.
    unchecked = dist.HalfNormal(1.0, validate_args=False)
    assert math.isinf(unchecked.expand([2]).to_event(1).log_prob(torch.tensor([1.0, -1.0])))
    with dist.validation_enabled(False):
        checked = dist.HalfNormal(1.0, validate_args=True)
        with pytest.raises(ConstraintError):
            checked.expand([2]).log_prob(-1.0)
        with pytest.raises(ConstraintError):
            dist.Weibull(-1.0, 1.0, validate_args=True)


def test_validation_that_is_off_reads_no_tensor(monkeypatch):
    def refuse(self):
        raise AssertionError("a tensor was read on the host")

    x = torch.rand(3) + 0.5
    with dist.validation_enabled(False):
        monkeypatch.setattr(torch.Tensor, "__bool__", refuse)
        monkeypatch.setattr(torch.Tensor, "item", refuse)
        for d in (
            dist.Normal(x, x),
            dist.HalfCauchy(x),
            dist.Gamma(x, 1.0),
            dist.Beta(x, x),
            dist.StudentT(x, x, x),
            dist.Weibull(x, x),
            dist.Delta(x, x),
            dist.MultivariateNormal(x, torch.eye(3)),
            dist.Dirichlet(x),
            dist.LKJCholesky(3, 1.0),
            dist.ZeroInflatedPoisson(x, gate=0.5),
        ):
            value = d.expand_by([2]).mask(True)()
            d.log_prob(value)


def test_torch_s_switch_is_ours():
    before = torch.distributions.Distribution._validate_args
    with dist.validation_enabled(not before):
        assert torch.distributions.Distribution._validate_args is (not before)
        assert dist.is_validation_enabled() is (not before)
    assert torch.distributions.Distribution._validate_args is before
    with pytest.raises(RuntimeError, match="inside"), dist.validation_enabled(False):
        raise RuntimeError("inside")
    assert dist.is_validation_enabled() is before


def test_families_without_constraints_or_support_are_told():
    class Bare(dist.TorchDistribution):
        def log_prob(self, value):
            if self._validate_args:
                self._validate_sample(value)
            return value

    with pytest.warns(UserWarning, match="Bare defines no arg_constraints"):
        d = Bare()
    with pytest.warns(UserWarning, match="Bare defines no support"):
        d.log_prob(torch.tensor(0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bare(validate_args=False).log_prob(torch.tensor(0.0))


def test_messages_say_where_in_large_and_odd_values():
    big = torch.ones(100, 20)
    big[7, 3] = -1
    with pytest.raises(ConstraintError, match=r"found -1 at index \(7, 3\), 1 of 2000 entries"):
        dist.Normal(0.0, big)
    matrices = torch.eye(5).repeat(4, 1, 1)
    matrices[2] = 0
    with pytest.raises(
        ConstraintError, match=r"a tensor of shape \(5, 5\).* at index \(2\), 1 of 4"
    ):
        dist.MultivariateNormal(torch.zeros(5), matrices)
    cat = constraints.cat([constraints.positive, constraints.real], -1, [1, 1])
    d = dist.ImproperUniform(cat, (), (2,))
    with pytest.raises(ConstraintError, match=r"support Cat\(\), but found -1 at index \(0\)"):
        dist.MaskedMixture(torch.tensor(True), d, d, validate_args=True)._validate_sample(
            torch.tensor([-1.0, 0.0])
        )
