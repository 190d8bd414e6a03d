"""Constraints as data, there and back."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pyro.distributions import constraints as pc
from torch import Tensor
from torch.distributions import constraints as c

from fastsvi.distributions import constraints as fc
from fastsvi.params.constraint_names import (
    UnnamedConstraintError,
    from_arguments,
    from_data,
    to_data,
)


def alike(a, b):
    """Same class and same arguments, tensors compared by value."""
    if isinstance(a, c.Constraint):
        same_class = type(a).__name__ == type(b).__name__
        return same_class and alike(sorted(vars(a).items()), sorted(vars(b).items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


SINGLETONS = [
    c.real,
    c.positive,
    c.nonnegative,
    c.unit_interval,
    c.simplex,
    c.lower_triangular,
    c.lower_cholesky,
    c.corr_cholesky,
    c.square,
    c.symmetric,
    c.positive_semidefinite,
    c.positive_definite,
    fc.softplus_positive,
    fc.softplus_lower_cholesky,
    fc.unit_lower_cholesky,
    fc.sphere,
    fc.corr_matrix,
    fc.ordered_vector,
    fc.positive_ordered_vector,
]
OTHERS = [
    c.real_vector,
    c.greater_than(0.1),
    c.greater_than(-3),
    c.greater_than(float("-inf")),
    c.greater_than_eq(torch.tensor(2.5)),
    c.less_than(torch.tensor([0.1, 1e-38], dtype=torch.float32)),
    c.interval(torch.zeros(2, 1, dtype=torch.float64), torch.tensor([0.1, 0.2]).bfloat16()),
    c.interval(0.0, torch.tensor(7)),
    c.half_open_interval(-1.0, 1e300),
    c.independent(c.independent(c.interval(-1.0, 1.0), 1), 2),
    c.cat([c.real, c.positive, c.simplex], -1, [1, 2, 3]),
    c.stack([c.real, c.less_than(1.0)], 0),
]


@pytest.mark.parametrize("constraint", [*SINGLETONS, *OTHERS], ids=repr)
def test_there_and_back(constraint):
    data = json.loads(json.dumps(to_data(constraint)))
    back = from_data(data)
    assert alike(back, constraint)
    if constraint in SINGLETONS:
        assert back is constraint


@pytest.mark.parametrize(
    "name",
    [
        "softplus_positive",
        "softplus_lower_cholesky",
        "unit_lower_cholesky",
        "sphere",
        "corr_matrix",
        "ordered_vector",
        "positive_ordered_vector",
    ],
)
def test_pyros_own_constraints_become_ours(name):
    assert from_data(to_data(getattr(pc, name))) is getattr(fc, name)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False, width=32))
def test_bounds_are_exact(lower, upper):
    constraint = c.interval(lower, torch.tensor(upper))
    assert alike(from_data(json.loads(json.dumps(to_data(constraint)))), constraint)


def test_what_has_no_name_is_said():
    class Mine(c.Constraint):
        pass

    for constraint in (Mine(), c.boolean, c.dependent, c.multinomial(3), c.independent(Mine(), 1)):
        with pytest.raises(UnnamedConstraintError, match="has no name in a file; the known ones"):
            to_data(constraint)
    with pytest.raises(UnnamedConstraintError, match="not a number"):
        to_data(c.greater_than("0"))


def test_a_class_that_only_has_a_known_name_is_not_known():
    class _Real(c.Constraint):
        pass

    with pytest.raises(UnnamedConstraintError, match="_Real"):
        to_data(_Real())


@pytest.mark.parametrize(
    "data",
    [
        None,
        "real",
        [],
        {},
        {"name": 3},
        {"name": "os.system"},
        {"name": "real", "lower_bound": 0},
        {"name": "greater_than"},
        {"name": "greater_than", "lower_bound": "0"},
        {"name": "greater_than", "lower_bound": True},
        {"name": "greater_than", "lower_bound": None},
        {"name": "greater_than", "lower_bound": 10**400},
        {"name": "greater_than", "lower_bound": []},
        {"name": "interval", "lower_bound": 0.0, "upper_bound": {"name": "real"}},
        {
            "name": "independent",
            "base_constraint": {"name": "real"},
            "reinterpreted_batch_ndims": -1,
        },
        {"name": "independent", "base_constraint": 3, "reinterpreted_batch_ndims": 1},
        {"name": "cat", "cseq": {}, "dim": 0, "lengths": []},
        {"name": "cat", "cseq": [{"name": "real"}], "dim": 0, "lengths": [1, 2]},
        {"name": "cat", "cseq": [{"name": "real"}], "dim": "0", "lengths": [1]},
        {"name": "stack", "cseq": [3], "dim": 0},
    ],
)
def test_data_that_lie_are_refused(data):
    with pytest.raises(UnnamedConstraintError):
        from_data(data)


@pytest.mark.parametrize(
    "bound",
    [
        {},
        {"dtype": "float32", "shape": [2], "values": [1.0]},
        {"dtype": "float32", "shape": [-1], "values": [1.0]},
        {"dtype": "float32", "shape": [10**12, 10**12], "values": [1.0]},
        {"dtype": "float32", "shape": [1], "values": ["1"]},
        {"dtype": "complex64", "shape": [1], "values": [1.0]},
        {"dtype": "int32", "shape": [1], "values": [1e300]},
        {"dtype": [], "shape": [1], "values": [1.0]},
    ],
)
def test_bounds_that_lie_are_refused(bound):
    with pytest.raises(UnnamedConstraintError):
        from_data({"name": "greater_than", "lower_bound": bound})


def test_nesting_is_bounded():
    data = {"name": "real"}
    for _ in range(100):
        data = {"name": "independent", "base_constraint": data, "reinterpreted_batch_ndims": 1}
    with pytest.raises(UnnamedConstraintError):
        from_data(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["greater_than", "interval", "independent", "cat", "stack", "real"]),
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("lower_bound", "upper_bound", "base_constraint", "cseq", "dim", "lengths"), json_values
        ),
    ),
)
def test_any_data_give_a_constraint_or_an_error(name, arguments):
    try:
        constraint = from_data({"name": name, **arguments})
    except UnnamedConstraintError:
        return
    assert isinstance(constraint, c.Constraint)


def test_numbers_equal_to_those_of_a_singleton_give_it():
    assert from_arguments("interval", {"lower_bound": 0, "upper_bound": 1}) is c.unit_interval
    assert from_arguments("interval", {"lower_bound": 0, "upper_bound": 2}) is not c.unit_interval
