"""What a program may rely on, run against Pyro's own store too, so that the oracle is tested."""

from __future__ import annotations

import copy
import re
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import constraints, transform_to


def same(a, b):
    return torch.allclose(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


VALUES = [
    (constraints.real, torch.tensor([-1.0, 2.0])),
    (constraints.real, torch.tensor(3.0)),
    (constraints.real, torch.zeros(0, 2)),
    (constraints.real, torch.randn(2, dtype=torch.complex64)),
    (constraints.real_vector, torch.randn(3)),
    (constraints.positive, torch.rand(2, 3, dtype=torch.float64) + 0.1),
    (constraints.nonnegative, torch.tensor([0.0, 1.0])),
    (constraints.unit_interval, torch.tensor([0.25, 0.5])),
    (constraints.interval(-1.0, 3.0), torch.tensor([0.0, 2.5])),
    (constraints.interval(torch.zeros(2), torch.tensor([1.0, 9.0])), torch.tensor([0.5, 8.0])),
    (constraints.half_open_interval(0.0, 2.0), torch.tensor([0.5, 1.5])),
    (constraints.greater_than(2.0), torch.tensor([2.5])),
    (constraints.greater_than_eq(2.0), torch.tensor([2.5])),
    (constraints.less_than(-1.0), torch.tensor([-4.0])),
    (constraints.independent(constraints.positive, 1), torch.rand(2, 2) + 0.1),
    (constraints.simplex, torch.tensor([[0.2, 0.3, 0.5]])),
    (constraints.lower_cholesky, torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
    (constraints.positive_definite, torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    (constraints.corr_cholesky, torch.eye(3)),
    (constraints.stack([constraints.real, constraints.positive], -1), torch.tensor([-1.0, 2.0])),
    (constraints.cat([constraints.real, constraints.positive], -1, [1, 2]), torch.ones(3)),
]


@pytest.mark.parametrize(("constraint", "value"), VALUES, ids=lambda x: type(x).__name__)
def test_a_value_is_read_back_and_stored_by_transform_to(either, constraint, value):
    read = either.setdefault("x", value, constraint)
    assert read.shape == value.shape
    assert read.dtype == value.dtype
    assert same(read, value)
    leaf = dict(either.named_parameters())["x"]
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert same(transform_to(constraint)(leaf), value)
    assert either["x"].unconstrained() is leaf


def test_dict_interface(either):
    assert not either
    assert len(either) == 0
    assert list(either) == []
    either["a"] = torch.zeros(2)
    either.setdefault("b", lambda: torch.ones(3), constraints.positive)
    assert either
    assert len(either) == 2
    assert list(either) == list(either.keys()) == ["a", "b"]
    assert "a" in either
    assert "c" not in either
    assert [name for name, _ in either.items()] == ["a", "b"]
    assert [tuple(value.shape) for value in either.values()] == [(2,), (3,)]
    del either["a"]
    assert list(either) == ["b"]
    either.clear()
    assert not either
    assert list(either.keys()) == []


def test_it_is_not_a_dict(either):
    for method in ("get", "pop", "update", "copy", "popitem"):
        assert not hasattr(either, method)


def test_missing_names_are_key_errors(either):
    for attempt in (
        lambda: either["x"],
        lambda: either.get_param("x"),
        lambda: either.__delitem__("x"),
    ):
        with pytest.raises(KeyError):
            attempt()


@pytest.mark.parametrize("value", [torch.zeros(3), nn.Parameter(torch.zeros(3)), torch.zeros(())])
def test_1_a_real_param_is_the_tensor_itself(either, value):
    assert either.setdefault("x", value) is value
    assert value.requires_grad
    assert either["x"] is value
    assert either["x"]._cdata == value._cdata
    assert either["x"].unconstrained() is value
    assert either.param_name(value) == "x"


def test_2_a_non_contiguous_init_is_copied(either):
    value = nn.Parameter(torch.zeros(3, 2).t())
    read = either.setdefault("x", value)
    assert read is not value
    assert type(read) is torch.Tensor
    assert read.is_contiguous()
    expanded = torch.zeros(()).expand(3)
    assert either.setdefault("y", expanded) is not expanded


def test_3_constrained_values_are_fresh(either):
    either.setdefault("x", torch.ones(2), constraints.positive)
    a, b = either["x"], either["x"]
    assert a is not b
    assert a.grad_fn is not None
    assert not hasattr(a.detach(), "unconstrained")
    assert a.unconstrained() is b.unconstrained()


def test_3_the_reference_to_the_leaf_is_weak(either):
    either.setdefault("x", torch.ones(2), constraints.positive)
    with torch.no_grad():
        value = either["x"]
    either.clear()
    assert value.unconstrained() is None


def test_3_a_live_graph_keeps_the_leaf(either):
    either.setdefault("x", torch.ones(2), constraints.positive)
    value = either["x"]
    either.clear()
    leaf = value.unconstrained()
    value.sum().backward()
    assert same(leaf.grad, torch.ones(2))


def test_4_assignment_keeps_the_constraint_and_makes_a_new_leaf(either):
    either.setdefault("x", torch.ones(2), constraints.positive)
    old = either["x"].unconstrained()
    either["x"] = torch.full((3,), 2.0)
    new = either["x"].unconstrained()
    assert new is not old
    assert same(new, torch.full((3,), 2.0).log())
    assert either.param_name(new) == "x"


def test_5_a_second_init_is_ignored(either):
    first = either.setdefault("x", torch.ones(2))
    assert either.setdefault("x", torch.full((2,), 9.0), constraints.positive) is first
    assert either.setdefault("x", lambda: pytest.fail("not called")) is first
    assert either.get_param("x", torch.full((2,), 7.0), event_dim=1) is first


def test_7_a_simplex_is_normalised(either):
    read = either.setdefault("x", torch.ones(4), constraints.simplex)
    assert same(read, torch.full((4,), 0.25))


@pytest.mark.parametrize("constraint", [constraints.simplex, constraints.lower_cholesky])
def test_7_projections_take_any_value_that_they_can_project(either, constraint):
    read = either.setdefault("x", torch.full((2, 5, 5), 1e-4), constraint)
    assert bool(constraint.check(read).all())


def test_9_match_is_anchored_at_the_start(either):
    for name in ("ab", "abc", "xab"):
        either[name] = torch.zeros(1)
    assert set(either.match("ab")) == {"ab", "abc"}
    assert set(either.match(".*ab$")) == {"ab", "xab"}
    with pytest.raises(re.error):
        either.match("(")


def test_10_get_state_is_shallow(either):
    leaf = either.setdefault("x", torch.ones(2), constraints.positive).unconstrained()
    state = either.get_state()
    assert set(state) == {"params", "constraints"}
    assert state["params"]["x"] is leaf
    either.clear()
    assert state["params"]["x"] is leaf


def test_10_set_state_merges(make_either):
    one, two = make_either(), make_either()
    one.setdefault("a", torch.ones(1), constraints.positive)
    two.setdefault("a", torch.zeros(3))
    two.setdefault("b", torch.zeros(2))
    two.set_state(one.get_state())
    assert set(two) == {"a", "b"}
    assert two["a"].unconstrained() is one["a"].unconstrained()
    assert same(two["a"], torch.ones(1))


@pytest.mark.parametrize(
    "state", [{}, {"params": {}}, {"params": {}, "constraints": {}, "x": 1}, 3]
)
def test_10_a_malformed_state_is_an_assertion_error(either, state):
    with pytest.raises(AssertionError):
        either.set_state(state)


def test_12_scope_yields_its_state_and_restores(either):
    outer = either.setdefault("x", torch.zeros(1))
    state = {"params": {}, "constraints": {}}
    with either.scope(state) as inside:
        assert inside is state
        assert not either
        inner = either.setdefault("y", torch.ones(1))
    assert list(either) == ["x"]
    assert either["x"] is outer
    assert state["params"]["y"] is inner
    with either.scope(state):
        assert either["y"] is inner
    with either.scope() as fresh:
        assert not either
    assert fresh == {"params": {}, "constraints": {}}


def test_12_scope_after_an_exception(either):
    either["x"] = torch.zeros(1)
    state = {"params": {}, "constraints": {}}

    def fail():
        with either.scope(state):
            either["y"] = torch.zeros(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(either) == ["x"]
    assert state == {"params": {}, "constraints": {}}


def test_12_a_scope_nested_in_itself_sees_what_was_there_before_entry(either):
    with either.scope() as state:
        either["first"] = torch.zeros(1)
    with either.scope(state):
        either["second"] = torch.zeros(1)
        with either.scope(state):
            assert list(either) == ["first"]
        assert set(either) == {"first", "second"}


def test_13_deepcopy_is_independent(either):
    either.setdefault("x", torch.ones(2))
    either.setdefault("y", torch.ones(2), constraints.positive)
    assert either["x"] is either["x"]  # a read, which puts a weak reference on the leaf
    twin = copy.deepcopy(either)
    with torch.no_grad():
        either["x"].add_(1)
    assert same(twin["x"], torch.ones(2))
    assert twin["x"] is not either["x"]
    assert twin.param_name(twin["y"].unconstrained()) == "y"


def test_15_attributes_of_the_leaf_last(either):
    either.setdefault("x", torch.ones(4), constraints.positive)
    either["x"].unconstrained()._pyro_subsample = {-1: 3}
    assert either["x"].unconstrained()._pyro_subsample == {-1: 3}


def test_16_data_can_be_written_and_exchanged(either):
    leaf = either.setdefault("x", torch.ones(3), constraints.positive).unconstrained()
    leaf.data.fill_(1.0)
    assert same(either["x"], torch.ones(3).exp())
    leaf.data = torch.zeros(3)
    assert same(either["x"], torch.ones(3))
    with torch.no_grad():
        leaf.copy_(torch.full((3,), 2.0))
    assert same(either["x"], torch.full((3,), 2.0).exp())


def test_17_corr_cholesky_is_stored_as_a_vector(either):
    either.setdefault("x", torch.eye(3), constraints.corr_cholesky)
    assert either["x"].shape == (3, 3)
    assert either["x"].unconstrained().shape == (3,)


def test_private_dictionaries(either):
    assert either._params == {}
    assert either._param_to_name == {}
    assert either._constraints == {}
    leaf = either.setdefault("x", torch.ones(2), constraints.positive).unconstrained()
    assert dict(either._params) == {"x": leaf}
    assert either._params["x"] is leaf
    assert either._constraints["x"] is constraints.positive
    assert either._param_to_name[leaf] == "x"
    assert list(copy.copy(either._params)) == ["x"]
    assert list(either._params.copy()) == ["x"]
    assert "x" in either._params
    either.clear()
    assert either._params == {}
    assert either._param_to_name == {}
    assert either._constraints == {}


def test_writing_the_private_dictionaries_as_pyro_modules_do(either):
    leaf = nn.Parameter(torch.zeros(2))
    either._constraints["m.x"] = constraints.positive
    either._params["m.x"] = leaf
    either._param_to_name[leaf] = "m.x"
    assert same(either["m.x"], torch.ones(2))
    assert either["m.x"].unconstrained() is leaf
    as_parameter = nn.Parameter(leaf)
    either._params["m.x"] = as_parameter
    either._param_to_name[as_parameter] = "m.x"
    assert either["m.x"].unconstrained() is as_parameter
    del either["m.x"]
    assert not either
    assert "m.x" not in either._constraints


def test_deprecated_methods(either):
    leaf = either.setdefault("x", torch.ones(2))
    with pytest.warns(DeprecationWarning, match="get_all_param_names"):
        assert list(either.get_all_param_names()) == ["x"]
    with pytest.warns(DeprecationWarning, match="replace_param"):
        either.replace_param("x", torch.zeros(2), leaf)
    assert same(either["x"], torch.zeros(2))
    with pytest.warns(DeprecationWarning, match="replace"), pytest.raises(AssertionError):
        either.replace_param("x", torch.zeros(2), leaf)


def test_param_name_of_a_stranger(either):
    assert either.param_name(torch.zeros(1)) is None


def test_a_step_of_training(either):
    either.setdefault("loc", torch.zeros(2))
    either.setdefault("scale", torch.ones(2), constraints.positive)
    optimizer = torch.optim.Adam([leaf for _, leaf in either.named_parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (either["loc"] - 1).square().sum() + (either["scale"] - 2).square().sum()
        loss.backward()
        optimizer.step()
    assert bool((either["loc"] > 0.2).all())
    assert bool((either["scale"] > 1.2).all())


def test_a_deleted_leaf_goes_away(either):
    leaf = either.setdefault("x", torch.ones(2), constraints.positive).unconstrained()
    ref = weakref.ref(leaf)
    del leaf
    del either["x"]
    assert ref() is None
