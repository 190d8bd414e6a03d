"""Constraints: what they admit, and that the registered transforms lead into them."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import torch
from torch.distributions import transforms as torch_transforms
from torch.testing import assert_close

from fastsvi.distributions import biject_to, constraints, transform_to

f64 = {"dtype": torch.float64}
low = torch.tensor([[1.0, 0.0], [0.5, 2.0]], **f64)
corr = torch.tensor([[1.0, 0.3], [0.3, 1.0]], **f64)

EXAMPLES = {
    "corr_matrix": (corr, [2 * corr, low, torch.ones(2, 2, **f64), corr + 0.1 * low]),
    "integer": (torch.tensor(-3.0), [torch.tensor(0.5)]),
    "ordered_vector": (
        torch.tensor([-1.0, 5.0]),
        [torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])],
    ),
    "positive_ordered_vector": (
        torch.tensor([0.1, 0.2]),
        [torch.tensor([-1.0, 2.0]), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])],
    ),
    "softplus_positive": (torch.tensor(0.1), [torch.tensor(0.0), torch.tensor(-1.0)]),
    "softplus_lower_cholesky": (low, [low.T, -low]),
    "sphere": (torch.tensor([0.6, 0.8]), [torch.tensor([0.6, 0.9]), torch.zeros(2)]),
    "unit_lower_cholesky": (low / low.diagonal(), [low, low.T / low.diagonal()]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_inside_and_outside(name):
    constraint, oracle = getattr(constraints, name), getattr(pyro_dist.constraints, name)
    inside, outside = EXAMPLES[name]
    assert bool(constraint.check(inside))
    for value in outside:
        assert not bool(constraint.check(value))
        assert not bool(oracle.check(value))
    # Batches are checked event by event.
    batch = torch.stack([inside, outside[0]]).expand(3, 2, *inside.shape)
    assert constraint.check(batch).tolist() == [[True, False]] * 3
    assert constraint.is_discrete == oracle.is_discrete
    assert "object at" not in repr(constraint)


def test_event_dims_are_those_of_pyro_but_for_one():
    for name in EXAMPLES:
        ours, oracle = getattr(constraints, name), getattr(pyro_dist.constraints, name)
        # A positive ordered vector is a vector, which Pyro's class does not say.
        expected = 1 if name == "positive_ordered_vector" else oracle.event_dim
        assert ours.event_dim == expected, name


def test_a_vector_of_one_entry_is_ordered():
    assert bool(constraints.ordered_vector.check(torch.zeros(1)))
    assert constraints.ordered_vector.check(torch.zeros(4, 1)).shape == (4,)


def test_all_names_of_torch_and_pyro_are_there():
    for name in pyro_dist.constraints.__all__:
        assert name in constraints.__all__
        assert hasattr(constraints, name)
    assert constraints.positive is torch.distributions.constraints.positive
    assert constraints.corr_cholesky_constraint is constraints.corr_cholesky


@pytest.mark.parametrize("registry", [biject_to, transform_to], ids=["biject_to", "transform_to"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_transforms_lead_into_the_constraint_and_back(registry, name):
    constraint = getattr(constraints, name)
    try:
        oracle = registry(getattr(pyro_dist.constraints, name))
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            registry(constraint)
        return
    transform = registry(constraint)
    shape = oracle.inverse_shape(EXAMPLES[name][0].shape)
    x = torch.randn(5, *shape, **f64)
    y = transform(x)
    assert constraint.check(y).all()
    assert_close(y, oracle(x))
    if transform.bijective:
        assert_close(transform.inv(y), x)
        assert_close(transform.log_abs_det_jacobian(x, y), oracle.log_abs_det_jacobian(x, y))


def test_pyro_s_own_constraints_still_go_to_pyro_s_transforms():
    ours, theirs = (lib.softplus_positive for lib in (constraints, pyro_dist.constraints))
    assert type(ours) is not type(theirs)
    assert isinstance(transform_to(theirs), pyro_dist.transforms.SoftplusTransform)
    assert isinstance(transform_to(ours), torch_transforms.SoftplusTransform)
    # That of positive is torch's: exp, then an affine map of 0 and 1.
    assert isinstance(transform_to(constraints.positive).parts[0], torch_transforms.ExpTransform)
