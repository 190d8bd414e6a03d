"""Distributions over parameters: defined once, used for thousands of backward passes."""

from __future__ import annotations

import gc

import pyro.distributions
import pytest
import torch
from torch import distributions as td
from torch.distributions import constraints as c
from torch.distributions import kl_divergence

from fastsvi.errors import ConstraintError, DtypeError, ShapeError
from fastsvi.params import BoundDistribution
from fastsvi.params.bound import BoundArgumentError


def fit(q, target, steps, lr):
    """A user's loop; the family is named nowhere in it."""
    optimizer = torch.optim.Adam(q.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        samples = q.rsample((200,))
        cost = -(target.log_prob(samples) - q.log_prob(samples)).mean()
        cost.backward()
        optimizer.step()
    return cost


@pytest.mark.slow
@pytest.mark.parametrize("library", [td, pyro.distributions], ids=["torch", "pyro"])
def test_the_loops_of_the_question_converge(store, library):
    """As asked at stackoverflow: Normal(5, 5) and Gamma(5, 5), by changing one word."""
    target = library.Normal(5.0, 5.0)
    q = store.distribution(library.Normal, "normal", loc=1.0, scale=1.0)
    fit(q, target, 400, 0.1)
    # Adam's last steps wander by about lr; the estimate of KL is 0 at the target to first order.
    assert kl_divergence(q, target).item() < 0.01
    assert abs(q.mean.item() - 5.0) < 0.5
    assert abs(q.stddev.item() - 5.0) < 0.5
    target = library.Gamma(5.0, 5.0)
    q = store.distribution(library.Gamma, "gamma", concentration=1.0, rate=1.0)
    fit(q, target, 400, 0.1)
    assert kl_divergence(q, target).item() < 0.01
    assert abs(q.concentration.item() - 5.0) < 1.0
    assert sorted(store) == ["gamma.concentration", "gamma.rate", "normal.loc", "normal.scale"]


FAMILIES = [
    ("Normal", {"loc": 0.5, "scale": torch.tensor([1.0, 2.0])}),
    ("Gamma", {"concentration": 2.0, "rate": torch.tensor([1.0, 3.0])}),
    ("Beta", {"concentration1": 2.0, "concentration0": 3.0}),
    ("LogNormal", {"loc": 0.0, "scale": 1.0}),
    ("StudentT", {"df": 4.0, "loc": 0.0, "scale": 1.0}),
    ("Weibull", {"scale": 1.0, "concentration": 2.0}),
    ("Dirichlet", {"concentration": torch.ones(3)}),
    ("Bernoulli", {"probs": torch.tensor([0.2, 0.7])}),
    ("Bernoulli", {"logits": torch.tensor([-1.0, 1.0])}),
    ("Categorical", {"probs": torch.tensor([0.2, 0.3, 0.5])}),
    ("Categorical", {"logits": torch.zeros(3)}),
    ("MultivariateNormal", {"loc": torch.zeros(2), "scale_tril": torch.eye(2)}),
    ("MultivariateNormal", {"loc": torch.zeros(2), "covariance_matrix": torch.eye(2)}),
    (
        "LowRankMultivariateNormal",
        {"loc": torch.zeros(2), "cov_factor": torch.ones(2, 1), "cov_diag": torch.ones(2)},
    ),
    ("Laplace", {"loc": 0.0, "scale": 1.0}),
    ("Poisson", {"rate": torch.tensor([1.0, 2.0])}),
    ("VonMises", {"loc": 0.0, "concentration": 2.0}),
    ("Kumaraswamy", {"concentration1": 2.0, "concentration0": 2.0}),
]


@pytest.mark.parametrize(("name", "arguments"), FAMILIES, ids=lambda x: str(x)[:20])
def test_any_family_is_like_a_plain_one_at_the_current_values(store, name, arguments):
    family = getattr(td, name)
    q = store.distribution(family, "q", **arguments)
    assert isinstance(q, family)
    assert isinstance(q, BoundDistribution)
    assert len(q.parameters()) == len(arguments) == len(store)
    for update in range(3):
        values = {argument: store[f"q.{argument}"].detach() for argument in arguments}
        plain = family(**values, validate_args=False)
        assert q.batch_shape == plain.batch_shape
        assert q.event_shape == plain.event_shape
        assert q.has_rsample == plain.has_rsample
        torch.manual_seed(update)
        expected = plain.sample((2,))
        torch.manual_seed(update)
        sample = q.sample((2,))
        torch.testing.assert_close(sample, expected)
        torch.testing.assert_close(q.log_prob(sample), plain.log_prob(sample))
        torch.testing.assert_close(q.mean, plain.mean, equal_nan=True)
        assert repr(q.support) == repr(plain.support)
        # One backward pass after the other, of samples and of densities.
        for leaf in q.parameters():
            leaf.grad = None
        loss = q.log_prob(sample).sum()
        if q.has_rsample:
            loss = loss + q.rsample((3,)).sum()
        loss.backward()
        with torch.no_grad():
            for leaf in q.parameters():
                assert leaf.grad is not None
                assert bool(leaf.grad.isfinite().all())
                leaf.add_(0.1)


def test_a_method_that_was_taken_once_can_be_used_again(store):
    q = store.distribution(td.Gamma, "q", concentration=2.0, rate=1.0)
    log_prob, rsample = q.log_prob, q.rsample
    for _ in range(2):
        log_prob(rsample()).backward()


def test_derived_distributions_are_bound_too(store):
    loc, scale = torch.zeros(2, 3), torch.ones(3)
    q = store.distribution(pyro.distributions.Normal, "q", loc=loc, scale=scale)
    for derived, batch_shape, event_shape in (
        (q.to_event(1), (2,), (3,)),
        (q.expand((4, 2, 3)), (4, 2, 3), ()),
        (q.expand_by([5]).to_event(2), (5,), (2, 3)),
        (q.mask(torch.tensor([True, False, True])), (2, 3), ()),
        (td.Independent(q, 1), (2,), (3,)),
        (td.TransformedDistribution(q, td.transforms.ExpTransform()), (2, 3), ()),
    ):
        assert derived.batch_shape == batch_shape
        assert derived.event_shape == event_shape
        before = derived.log_prob(torch.ones(3)).detach()
        for _ in range(2):
            derived.log_prob(derived.rsample().detach()).sum().backward()
        with torch.no_grad():
            store.leaf("q.loc").add_(0.5)
        assert not torch.equal(derived.log_prob(torch.ones(3)), before)
    event = q.to_event(1)
    assert isinstance(event, td.Independent)
    assert event.parameters() == q.parameters()


def test_kl_divergence_in_both_places(store):
    q = store.distribution(td.Normal, "q", loc=1.0, scale=2.0)
    p = td.Normal(0.0, 1.0)
    plain = td.Normal(torch.tensor(1.0), torch.tensor(2.0))
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(plain, p))
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p, plain))
    event = td.Independent(p.expand((3,)), 1)
    for _ in range(2):
        kl_divergence(pyro.distributions.Independent(q.expand((3,)), 1), event).backward()
    assert all(leaf.grad is not None for leaf in q.parameters())


def test_arguments_are_attributes_and_belong_to_the_store(store):
    q = store.distribution(td.Normal, "q", loc=1.0, scale=2.0)
    assert q.scale.item() == pytest.approx(2.0)
    assert q.scale.unconstrained() is store.leaf("q.scale")
    store["q.scale"] = torch.tensor(3.0)
    assert q.stddev.item() == pytest.approx(3.0)
    with pytest.raises(AttributeError, match="'scale' is a parameter of the store"):
        q.scale = torch.tensor(4.0)
    assert q.parameters()[1] is store.leaf("q.scale")


def test_has_rsample_can_be_changed(store):
    q = store.distribution(pyro.distributions.Normal, "q", loc=1.0, scale=2.0)
    assert q.has_rsample_(False) is q
    assert not q.has_rsample
    assert q.score_parts(torch.tensor(0.0)).score_function is not None
    q.has_rsample = True
    assert q.has_rsample
    assert q().requires_grad  # rsample, for Pyro's __call__


def test_in_a_pyro_program(store):
    q = store.distribution(pyro.distributions.Normal, "q", loc=torch.zeros(3), scale=1.0)

    def guide():
        with pyro.plate("data", 3):
            return pyro.sample("z", q)

    for _ in range(2):
        trace = pyro.poutine.trace(guide).get_trace()
        trace.log_prob_sum().backward()
    assert trace.nodes["z"]["value"].shape == (3,)


def test_existing_params_are_taken_as_they_are(store):
    store.setdefault("q.scale", torch.tensor(5.0), c.positive)
    q = store.distribution(td.Normal, "q", loc=0.0, scale=1.0)
    assert q.scale.item() == pytest.approx(5.0)
    again = store.distribution(td.Normal, "q", loc=9.0, scale=1.0)
    assert again.loc.item() == 0.0


def test_fixed_arguments_and_chosen_constraints(store):
    q = store.distribution(td.StudentT, "q", fixed={"df": 3.0}, loc=0.0, scale=1.0)
    assert sorted(store) == ["q.loc", "q.scale"]
    assert q.df.item() == 3.0
    between = c.interval(0.5, 2.0)
    store.distribution(td.Normal, "n", constraints={"scale": between}, loc=0.0, scale=1.0)
    assert store.constraint("n.scale") is between
    uniform = store.distribution(
        td.Uniform, "u", fixed={"low": 0.0}, constraints={"high": c.greater_than(0.0)}, high=2.0
    )
    uniform.log_prob(torch.tensor(0.5)).backward()
    assert uniform.high.item() == pytest.approx(2.0)
    binomial = store.distribution(td.Binomial, "b", fixed={"total_count": 10}, probs=0.5)
    assert binomial.mean.item() == pytest.approx(5.0)


def test_tensors_given_become_leaves_and_numbers_follow_their_dtype(store):
    loc = torch.zeros(2, dtype=torch.float64)
    q = store.distribution(td.Normal, "q", loc=loc, scale=1)
    assert store.leaf("q.loc") is loc
    assert store.leaf("q.scale").dtype == torch.float64
    assert q.rsample().dtype == torch.float64
    lazy = store.distribution(td.Normal, "lazy", loc=lambda: torch.ones(2), scale=1.0)
    assert lazy.mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("family", "arguments", "error", "words"),
    [
        (td.Gamma, {"concentration": 1.0, "rate": -1.0}, ConstraintError, "'q.rate'.*value -1"),
        (td.Gamma, {"concentration": 1.0, "rate": "1"}, DtypeError, "'rate' must be a number"),
        (td.Gamma, {"concentration": 1.0, "rate": True}, DtypeError, "'rate' must be a number"),
        (td.Gamma, {"concentration": 1.0, "rate": None}, DtypeError, "'rate' must be a number"),
        (td.Gamma, {"concentration": 1.0, "beta": 1.0}, BoundArgumentError, "'beta', only for"),
        (td.Gamma, {"concentration": 1.0}, TypeError, "rate"),
        (
            td.Normal,
            {"loc": torch.zeros(2), "scale": torch.ones(3)},
            ShapeError,
            r"loc = tensor of shape \(2,\).*scale = tensor of shape \(3,\)",
        ),
        (td.Uniform, {"low": 0.0, "high": 1.0}, BoundArgumentError, "depends on its other"),
        (td.Binomial, {"total_count": 3, "probs": 0.5}, BoundArgumentError, "discrete.*fixed="),
        (
            td.Categorical,
            {"probs": torch.tensor([0.5, -0.5])},
            ConstraintError,
            "'q.probs'.*Simplex",
        ),
        (
            td.MultivariateNormal,
            {"loc": torch.zeros(2), "covariance_matrix": torch.tensor([[1.0, 2.0], [2.0, 1.0]])},
            ValueError,
            "'q.covariance_matrix'",
        ),
        (td.Normal, {"loc": torch.tensor([1]), "scale": 1.0}, DtypeError, "'q.loc'.*int64"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_bad_arguments_are_named_and_leave_nothing(store, family, arguments, error, words):
    store["q.concentration"] = torch.tensor(7.0)
    before = store.get_state()
    with pytest.raises(error, match=words):
        store.distribution(family, "q", **arguments)
    assert store.get_state() == before


def test_what_is_no_distribution_is_refused(store):
    def family(loc):
        return loc

    family.arg_constraints = {"loc": c.real}
    with pytest.raises(BoundArgumentError, match="not a distribution"):
        store.distribution(family, "q", loc=1.0)
    assert not store


def test_a_family_of_ones_own(store):
    """Without validate_args, and with an alternative that it derives from a factory."""

    class Mine(td.Normal):
        def __init__(self, loc, scale):
            super().__init__(loc, scale)

    q = store.distribution(Mine, "q", loc=0.0, scale=1.0)
    for _ in range(2):
        q.log_prob(torch.tensor(1.0)).backward()
    assert isinstance(q, Mine)


def test_values_are_still_validated(store):
    q = store.distribution(td.Gamma, "q", concentration=1.0, rate=1.0)
    with pytest.raises(ValueError, match="support"):
        q.log_prob(torch.tensor(-1.0))


def test_no_memory_is_kept_between_uses(store):
    q = store.distribution(td.Normal, "q", loc=torch.zeros(3), scale=1.0)
    before = None
    for i in range(60):
        q.log_prob(q.rsample()).sum().backward()
        if i == 20:
            gc.collect()
            before = len(gc.get_objects())
    gc.collect()
    assert len(gc.get_objects()) - before < 50


def test_repr(store):
    q = store.distribution(td.Normal, "q", loc=0.0, scale=1.0)
    assert repr(q) == "BoundNormal(loc: 0.0, scale: 1.0)"
