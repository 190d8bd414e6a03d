"""Independent, ExpandedDistribution, MaskedDistribution and the base classes."""

from __future__ import annotations

import copy

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.errors import ShapeError


class Plain(dist.TorchDistribution):
    """A user's family without expand: values around a matrix of centres."""

    arg_constraints = {"centre": dist.constraints.real}  # noqa: RUF012
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, centre, validate_args=None):
        self.centre = centre
        super().__init__(centre.shape[:-1], centre.shape[-1:], validate_args)

    def rsample(self, sample_shape=()):
        return self.centre + torch.randn(self.shape(sample_shape), dtype=self.centre.dtype)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        return -(value - self.centre).square().sum(-1)


@pytest.mark.parametrize(
    ("base", "wide"),
    [((), (2, 3)), ((3,), (2, 3)), ((1,), (3,)), ((2, 1, 4), (5, 2, 3, 4)), ((1, 1), (7, 2, 3))],
    ids=str,
)
def test_expanded_draws_are_independent_and_well_placed(base, wide):
    centre = 1000 * torch.arange(torch.Size(base).numel() * 2.0).reshape(*base, 2).double()
    d = Plain(centre).expand(wide)
    assert isinstance(d, dist.ExpandedDistribution)
    x = d.sample((6,))
    assert x.shape == d.shape((6,)) == (6, *wide, 2)
    noise = (x - centre).flatten(0, -2)  # 1000 and more are exact in float64
    assert len(noise.unique(dim=0)) == len(noise)
    # Each entry lies around its own centre: nothing was transposed.
    assert bool(((x - centre).abs() < 20).all())
    expected = -(x - centre).square().sum(-1)
    assert_close(d.log_prob(x), expected)
    assert d.log_prob(x[0, ..., :1, :]).shape == (
        torch.broadcast_shapes(wide, x[0, ..., :1, :].shape[:-1])
    )


def test_expanded_in_two_steps_is_expanded_at_once_and_leaves_the_first_alone():
    d = Plain(torch.zeros(1, 2)).expand([3])
    twice = d.expand([4, 3])
    assert d.batch_shape == (3,)
    assert twice.batch_shape == (4, 3)
    assert twice.base_dist is d.base_dist
    with pytest.raises(ShapeError, match=r"\(3,\) cannot be expanded to \(5,\)"):
        d.expand([5])
    with pytest.raises(ShapeError):
        d.expand([])


def test_expanded_moments_and_support_and_enumeration():
    base = dist.Bernoulli(torch.tensor([0.25]))
    ours = dist.ExpandedDistribution(base, (2, 3))
    oracle = pyro_dist.ExpandedDistribution(pyro_dist.Bernoulli(torch.tensor([0.25])), (2, 3))
    assert_close(ours.mean, oracle.mean)
    assert_close(ours.variance, oracle.variance)
    for expand in (True, False):
        assert_close(ours.enumerate_support(expand), oracle.enumerate_support(expand))
    one_hot = dist.ExpandedDistribution(dist.OneHotCategorical(torch.ones(3) / 3), (2,))
    assert one_hot.enumerate_support().shape == (3, 2, 3)


def test_score_parts_of_expanded_partly_reparameterized():
    class Partly(Plain):
        def score_parts(self, x, *args, **kwargs):
            log_prob = self.log_prob(x)
            return dist.ScoreParts(log_prob, log_prob / 2, log_prob * 3)

    d = Partly(torch.zeros(2))
    x = d.sample()
    parts = d.expand([4]).score_parts(x)
    assert [p.shape for p in parts] == [(4,)] * 3
    assert_close(parts.score_function, d.log_prob(x).expand(4) / 2)
    masked = d.expand([2]).mask(torch.tensor([True, False])).score_parts(x)
    assert masked.entropy_term[1] == 0 == masked.log_prob[1]
    assert masked.score_function[1] != 0  # as in Pyro, the score is not masked


def test_to_event_moves_dimensions_and_back():
    d = dist.Normal(torch.zeros(2, 3, 4), 1.0)
    assert d.to_event(0) is d
    assert d.to_event().event_shape == (2, 3, 4)
    two = d.to_event(1).to_event(1)
    assert type(two.base_dist) is dist.Normal
    assert two.reinterpreted_batch_ndims == 2
    assert two.to_event(-1).event_shape == (4,)
    assert two.to_event(-2) is d
    with pytest.raises(ShapeError, match="would remove event dimensions"):
        two.to_event(-3)
    with pytest.raises(ValueError, match="there are 3 batch dimensions"):
        d.to_event(4)
    with pytest.warns(DeprecationWarning, match="to_event"):
        assert d.independent(1).event_shape == (4,)
    with pytest.raises(NotImplementedError, match="expand_by"):
        d.reshape(sample_shape=[2])


def test_independent_of_zero_events_and_of_torch_distributions():
    empty = dist.Normal(torch.zeros(2, 0), 1.0).to_event(1)
    assert empty.log_prob(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    wrapped = dist.Independent(torch.distributions.Weibull(torch.ones(3), 2.0), 1)
    assert wrapped.expand([2]).log_prob(torch.ones(3)).shape == (2,)
    assert isinstance(wrapped, torch.distributions.Independent)
    assert dist.Normal(torch.zeros(3), 2.0).to_event(1).entropy().shape == ()


def test_independent_shares_the_validation_of_its_base():
    d = dist.Normal(torch.zeros(2), 1.0, validate_args=False).to_event(1)
    assert not d._validate_args
    assert bool(d.log_prob(torch.tensor([float("nan"), 0.0])).isnan())
    checked = dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1, validate_args=True)
    with dist.validation_enabled(False), pytest.raises(ValueError, match="support"):
        checked.log_prob(torch.tensor([float("nan"), 0.0]))


@pytest.mark.parametrize(
    "mask", [True, False, torch.tensor([True, False, True]), torch.tensor(False)], ids=repr
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_mask_agrees_with_pyro(mask, shape):
    ours = dist.Normal(torch.zeros(shape), 2.0).mask(mask)
    oracle = pyro_dist.Normal(torch.zeros(shape), 2.0).mask(mask)
    assert ours.batch_shape == oracle.batch_shape
    value = torch.randn(4, *oracle.batch_shape)
    for a, b in ((ours, oracle), (ours.expand_by([2]), oracle.expand_by([2]))):
        value = torch.randn(4, *a.batch_shape)
        assert_close(a.log_prob(value), b.log_prob(value))
        for part, expected in zip(a.score_parts(value), b.score_parts(value), strict=True):
            assert_close(torch.as_tensor(part), torch.as_tensor(expected))
        assert_close(a.mean, b.mean)
        assert_close(a.variance, b.variance)
        assert a.has_rsample == b.has_rsample
        assert a().shape == a.shape()
    assert_close(ours.support.check(value), oracle.support.check(value))


def test_mask_false_computes_nothing_and_keeps_the_dtype():
    class Explosive(Plain):
        def log_prob(self, value):
            raise AssertionError("log_prob was computed")

    d = Explosive(torch.zeros(3, 2)).mask(False)
    value = torch.zeros(5, 3, 2, dtype=torch.float64)
    assert d.log_prob(value).shape == (5, 3)
    assert d.log_prob(value).dtype == torch.float64
    assert dist.Bernoulli(0.5).mask(False).log_prob(1).item() == 0.0


def test_masked_values_may_be_missing():
    data = torch.tensor([1.0, float("nan")])
    d = dist.Normal(0.0, 1.0, validate_args=False).mask(~data.isnan())
    assert d.log_prob(data)[1] == 0.0


def test_has_rsample_can_be_switched_on_any_wrapper():
    base = dist.Normal(torch.zeros(2, requires_grad=True), 1.0)
    for d in (
        base.to_event(1),
        base.mask(True),
        dist.ExpandedDistribution(base, (3, 2)),
        dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]),
    ):
        assert d().requires_grad
        assert d.has_rsample_(False) is d
        assert not d.has_rsample
        assert not d().requires_grad
        assert isinstance(d.score_parts(d()).entropy_term, int)
        assert base.has_rsample
        assert d.has_rsample_(True)().requires_grad
    with pytest.raises(ValueError, match="True or False"):
        base.has_rsample_(1)


def test_the_mixin_suits_a_torch_class():
    class Mine(torch.distributions.Normal, dist.TorchDistributionMixin):
        pass

    d = Mine(torch.zeros(3), torch.ones(3))
    assert d.expand_by([2]).to_event(1).mask(True)().shape == (2, 3)
    assert type(d.expand([2, 3])) is Mine
    assert d.shape((4,)) == (4, 3)


def test_a_user_s_family_may_also_be_a_module():
    class Learned(dist.TorchDistribution, torch.nn.Module):
        arg_constraints = {}  # noqa: RUF012
        support = dist.constraints.real

        def __init__(self):
            super().__init__((2,))
            self.weight = torch.nn.Parameter(torch.ones(2))

        def log_prob(self, value):
            return -self.weight * value

    d = Learned()
    assert [name for name, _ in d.named_parameters()] == ["weight"]
    assert d.batch_shape == (2,)


def test_plain_distributions_have_score_parts_and_defaults():
    class Coin(dist.Distribution):
        def sample(self, bias=0.5):
            return bias

        def log_prob(self, value):
            return torch.tensor(-1.0)

    coin = Coin()
    assert coin(bias=0.25) == 0.25
    assert coin.score_parts(0) == (torch.tensor(-1.0), torch.tensor(-1.0), 0)
    assert not coin.has_rsample
    with pytest.raises(NotImplementedError, match="Coin"):
        coin.enumerate_support()
    with pytest.raises(NotImplementedError, match="Coin"):
        coin.conjugate_update(coin)
    coin.has_rsample_(True)
    assert coin.score_parts(0).score_function == 0


def test_wrappers_copy():
    d = dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(True)
    twin = copy.deepcopy(d)
    assert_close(twin.log_prob(torch.ones(3)), d.log_prob(torch.ones(3)))


def test_transformed_distribution_forgets_cached_values():
    transform = dist.transforms.ExpTransform(cache_size=1)
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])
    value = d.rsample()
    assert transform.inv(value) is transform._cached_x_y[0]
    d.clear_cache()
    assert transform._cached_x_y == (None, None)
    assert_close(d.log_prob(value), dist.LogNormal(0.0, 1.0).log_prob(value))


def test_transformed_distribution_agrees_with_pyro():
    def build(lib):
        base = lib.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
        chain = [lib.transforms.AffineTransform(1.0, 2.0), lib.transforms.ExpTransform()]
        return lib.TransformedDistribution(base, chain)

    ours, oracle = build(dist), build(pyro_dist)
    for a, b in ((ours, oracle), (ours.expand_by([2]), oracle.expand_by([2]))):
        assert (a.batch_shape, a.event_shape) == (b.batch_shape, b.event_shape)
        value = b.sample((4,))
        assert_close(a.log_prob(value), b.log_prob(value))


def test_mixture_of_a_family_agrees_with_pyro():
    def build(lib):
        mixture = lib.Categorical(logits=torch.tensor([0.0, 1.0]))
        return lib.MixtureSameFamily(mixture, lib.Normal(torch.tensor([-3.0, 3.0]), torch.ones(2)))

    ours, oracle = build(dist), build(pyro_dist)
    value = torch.linspace(-5, 5, 7)
    assert_close(ours.log_prob(value), oracle.log_prob(value))
    assert_close(ours.log_prob(0.5), oracle.log_prob(torch.tensor(0.5)))
    assert_close(ours.expand([7]).log_prob(value), oracle.expand([7]).log_prob(value))
    torch.manual_seed(0)
    drawn = ours.sample((5,))
    torch.manual_seed(0)
    assert_close(drawn, oracle.sample((5,)))
    many = torch.vmap(lambda _: ours(), randomness="different")(torch.zeros(50))
    assert len(many.unique()) == 50
