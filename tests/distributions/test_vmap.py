"""Families under torch.func.vmap and make_fx, the two ways in which the engine runs a model."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import fastsvi.distributions as dist

# Decided by the data: torch's constructor of Wishart branches on df; von Mises draws are rejected
# until all are accepted; sparse log-probabilities look for the zeros.
NO_VMAP = {"Wishart"}
NO_CAPTURE = {"Wishart", "VonMises"}
POINT_MASSES = {"Delta", "Unit"}


def tensors(case):
    return {name: a for name, a in case.arguments().items() if torch.is_tensor(a)}


def builder(case):
    fixed, varying = case.arguments(), tensors(case)
    family = getattr(dist, case.family)
    return lambda *values: family(**{**fixed, **dict(zip(varying, values, strict=True))})


def particles(case, count):
    return [a.expand(count, *a.shape).clone() for a in tensors(case).values()]


def test_particles_draw_their_own_noise(case):
    """Whether or not the parameters are mapped, and also while arguments are being checked."""
    if case.family in NO_VMAP:
        pytest.skip("branches on data")
    build, count, draws = builder(case), 40, []
    for validate in [True, False] if case.seed == 0 else [False]:
        with dist.validation_enabled(validate):
            shared = torch.vmap(lambda _: build(*tensors(case).values())(), randomness="different")
            draws.append(shared(torch.zeros(count)))
            if tensors(case):
                own = torch.vmap(lambda *values: build(*values)(), randomness="different")
                draws.append(own(*particles(case, count)))
    for draw in draws:
        assert draw.shape == (count, *case.build().shape())
        if case.family not in POINT_MASSES:
            assert len(draw.reshape(count, -1).unique(dim=0)) > 1


def test_log_prob_of_particles_is_that_of_each(case):
    if case.family in NO_VMAP or not tensors(case):
        pytest.skip("nothing to map")
    build, count = builder(case), 3
    value = case.build().sample((count,)).clone()
    with dist.validation_enabled(case.seed == 0 and case.family != "Unit"):
        actual = torch.vmap(lambda v, *values: build(*values).log_prob(v))(
            value, *particles(case, count)
        )
        expected = torch.stack([case.build().log_prob(v) for v in value])
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_capture_of_vmapped_draws_and_densities(one_case):
    if one_case.family in NO_CAPTURE:
        pytest.skip("branches on data")
    build = builder(one_case)

    def particle(_, *values):
        d = build(*values)
        value = d()
        return value, d.log_prob(value)

    def step(*values):
        return torch.vmap(particle, randomness="different")(torch.zeros(4), *values)

    with dist.validation_enabled(False):
        torch.manual_seed(0)
        expected = step(*particles(one_case, 4))
        graph = make_fx(step)(*particles(one_case, 4))
        torch.manual_seed(0)
        actual = graph(*particles(one_case, 4))
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("family", ["Beta", "Dirichlet", "Gamma", "StudentT", "Normal"])
def test_pathwise_gradients_under_vmap_agree_with_a_plain_batch(family):
    """d E[x] / d concentration: the vmapped estimate, within six standard errors of torch's."""
    count = 4000
    arguments = {
        "Beta": lambda a: (a, torch.tensor(1.5)),
        "Dirichlet": lambda a: (torch.stack([a, torch.tensor(1.0), torch.tensor(2.0)]),),
        "Gamma": lambda a: (a, torch.tensor(2.0)),
        "StudentT": lambda a: (torch.tensor(8.0), a, 0.5),
        "Normal": lambda a: (a, 2.0),
    }[family]

    def first_entry(make, a):
        d = make(*arguments(a))
        return d.rsample().reshape(-1)[0].square()

    a = torch.full((count,), 1.3, requires_grad=True)
    with dist.validation_enabled(False):
        x = torch.vmap(lambda a: first_entry(getattr(dist, family), a), randomness="different")(a)
        ours = torch.autograd.grad(x.sum(), a)[0]
        theirs = []
        for _ in range(count // 8):
            b = torch.tensor(1.3, requires_grad=True)
            y = first_entry(getattr(torch.distributions, family), b)
            theirs.append(torch.autograd.grad(y, b)[0])
    theirs = torch.stack(theirs)
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 6 * error


def test_the_same_randomness_for_all_particles_on_request():
    for d in (dist.Beta(1.0, 2.0), dist.Exponential(1.0), dist.Binomial(9, torch.tensor(0.5))):
        draw = torch.vmap(lambda _, d=d: d(), randomness="same")(torch.zeros(5))
        assert len(draw.unique()) == 1


def test_wrappers_under_vmap():
    mask = torch.tensor([True, False, True])

    def particle(loc):
        d = dist.Normal(loc, 1.0).expand([2, 3]).to_event(1).mask(mask[:2])
        return d.log_prob(d()), dist.ExpandedDistribution(dist.Normal(loc, 1.0), (2, 3))()

    log_prob, wide = torch.vmap(particle, randomness="different")(torch.randn(5, 3))
    assert log_prob.shape == (5, 2)
    assert bool((log_prob[:, 1] == 0).all())
    assert wide.shape == (5, 2, 3)
    assert len(wide.unique()) == wide.numel()


def test_errors_under_vmap_count_all_particles():
    scale = torch.tensor([[1.0, 2.0], [1.0, -3.0], [1.0, 1.0]])
    with pytest.raises(
        ValueError, match=r"scale must satisfy .* found -3 at index \(1, 1\), 1 of 6"
    ):
        torch.vmap(lambda s: dist.Normal(0.0, s).log_prob(torch.zeros(2)))(scale)
