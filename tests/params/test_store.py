"""What our store has beyond the contract with Pyro."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import constraints as c

from fastsvi.errors import DtypeError, FastSVIWarning, MissingParamError
from fastsvi.params import ParamStore, StoreStateError, UnknownConstraintError


def test_a_missing_name_is_named_with_its_neighbours(store):
    store["AutoNormal.locs.z"] = torch.zeros(1)
    for attempt in (
        lambda: store["AutoNormal.loc.z"],
        lambda: store.leaf("AutoNormal.loc.z"),
        lambda: store.constraint("AutoNormal.loc.z"),
        lambda: store.get_param("AutoNormal.loc.z"),
        lambda: store.__delitem__("AutoNormal.loc.z"),
    ):
        with pytest.raises(
            MissingParamError,
            match=r"no param 'AutoNormal.loc.z' among 1; did you "
            r"mean 'AutoNormal.locs.z'",
        ):
            attempt()
    with pytest.raises(MissingParamError, match="register it first"):
        store["something else"]


def test_leaf_and_constraint(store):
    store.setdefault("x", torch.ones(2), c.positive)
    leaf = store.leaf("x")
    assert leaf is store["x"].unconstrained()
    assert leaf.tolist() == [0.0, 0.0]
    assert store.constraint("x") is c.positive
    assert store.locate(leaf)[1].name == "x"
    assert store.locate(torch.zeros(2)) is None
    assert store.locate(store["x"]) is None


def test_a_second_init_of_another_shape_is_told_of_once(store):
    store.setdefault("x", torch.ones(2), c.positive)
    with pytest.warns(FastSVIWarning, match=r"'x' has the shape \(2,\).*shape \(3,\) is ignored"):
        assert store.setdefault("x", torch.ones(3)).shape == (2,)
    assert store.get_param("x", torch.ones(3)).shape == (2,)
    store.clear()
    store.setdefault("x", torch.ones(3))
    with pytest.warns(FastSVIWarning, match=r"shape \(3,\)"):
        store.get_param("x", torch.ones(2))


def test_the_version_tells_of_every_change(store):
    versions = [store.version]

    def changed():
        versions.append(store.version)
        return versions[-1] != versions[-2]

    store["x"] = torch.zeros(2)
    assert changed()
    assert store["x"] is store.leaf("x")
    store.setdefault("x", torch.zeros(2))
    assert store.buffers
    assert store.constrain_all()
    store.sync()
    assert not changed()
    store["x"] = torch.zeros(2)
    assert changed()
    (buffer,) = store.buffers.values()
    assert not changed()
    inner = buffer.version
    store["y"] = torch.zeros(2)
    assert changed()
    assert buffer.version != inner
    del store["y"]
    assert changed()
    buffer.arrange(["x"])
    store._constraints["x"] = c.positive
    assert changed()
    store.clear()
    assert changed()


def test_arrange_and_release_change_the_version(store):
    for name in "abc":
        store[name] = torch.zeros(2)
    (buffer,) = store.buffers.values()
    before = store.version
    buffer.arrange(["c", "a"])
    assert store.version != before
    before = store.version
    buffer.release()
    assert store.version != before
    before = store.version
    store.leaf("a").data = torch.zeros(5)
    store.sync()
    assert store.version != before


def test_assigning_a_param_to_itself_changes_nothing(store):
    leaf = store.setdefault("x", torch.ones(2))
    version = store.version
    store["x"] = store["x"]
    assert store["x"] is leaf
    assert store.version == version


def test_order_is_that_of_first_registration(store):
    for name in "abc":
        store[name] = torch.zeros(1)
    store["a"] = torch.ones(1)
    assert (
        list(store)
        == list(store._params)
        == [n for n, _ in store.named_parameters()]
        == list("abc")
    )
    assert [name for name, _ in store.items()] == list(store.constrain_all()) == list("abc")
    del store["a"]
    store["a"] = torch.ones(1)
    assert list(store) == list("bca")


def test_repr(store):
    assert repr(store) == "ParamStore()"
    for i in range(10):
        store[f"x{i}"] = torch.zeros(i)
    assert repr(store).startswith("ParamStore(x0: (0,), x1: (1,)")
    assert repr(store).endswith("and 2 more)")


# --- tied parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("first", ["a", "b", "c"])
def test_8_one_tensor_under_several_names(store, settled, first):
    shared = torch.ones(2)
    for name in "abc":
        store[name] = shared
    store["other"] = torch.zeros(3)
    if settled:
        assert sum(len(buffer.layout) for buffer in store.buffers.values()) == 2
    names = ["a", "b", "c"]
    assert store.param_name(shared) == "c"
    for name in (first, *sorted(set("abc") - {first})):
        buffer, segment = store.locate(shared)
        assert segment.name in names
        assert store["a" if "a" in names else names[0]] is shared
        assert buffer.layout.size == 5
        del store[name]
        names.remove(name)
        assert sorted(store) == sorted([*names, "other"])
        assert store.param_name(shared) in (names or [None])
    assert store.locate(shared) is None
    assert shared.tolist() == [1.0, 1.0]
    assert sum(buffer.layout.size for buffer in store.buffers.values()) == 3


def test_8_tied_params_with_different_constraints(store):
    leaf = nn.Parameter(torch.zeros(2))
    store["a"] = leaf
    store._constraints["b"] = c.positive
    store._params["b"] = leaf
    assert store["a"].tolist() == [0.0, 0.0]
    assert store["b"].tolist() == [1.0, 1.0]
    values = store.constrain_all()
    assert (values["a"].tolist(), values["b"].tolist()) == ([0.0, 0.0], [1.0, 1.0])
    store["a"] = torch.full((2,), 5.0)
    assert store.leaf("b") is leaf
    assert store["b"].tolist() == [1.0, 1.0]
    assert store.locate(leaf)[1].name == "b"
    assert store.constraint("b") is c.positive


def test_8_clear_with_tied_params(store):
    shared = torch.ones(2)
    store["a"] = store["b"] = shared
    store.clear()
    assert not store._param_to_name
    store["b"] = shared
    assert store.locate(shared)[1].name == "b"


# --- nothing leaks --------------------------------------------------------------------------


def test_4_nothing_is_left_of_replaced_and_deleted_params(store):
    refs = []
    for i in range(20):
        store.setdefault("x", torch.ones(2), c.positive)
        refs.append(weakref.ref(store.leaf("x")))
        store["x"] = torch.full((2,), float(i + 1))
        store.setdefault("y", torch.ones(3))
        refs.append(weakref.ref(store.leaf("y")))
        assert store.buffers
        del store["y"]
    assert len(store._param_to_name) == 1
    assert sum(len(b._leaves) for b in store._buffers.values()) == 1
    assert store.buffers
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_scopes_leak_nothing(store):
    store["x"] = torch.zeros(2)
    for _ in range(5):
        with store.scope():
            store["x"] = torch.ones(3)
            assert store.buffers
    assert [b.layout.size for b in store._buffers.values()] == [2]


# --- state ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"params": {"x": torch.zeros(1)}, "constraints": {}}, "'x'.*found tensor.*None"),
        ({"params": {"x": 3.0}, "constraints": {"x": c.real}}, "'x'.*found float 3.0"),
        ({"params": {"x": torch.zeros(1)}, "constraints": {"x": "real"}}, "'x'.*'real'"),
        ({"params": {}}, r"found \['params'\]"),
        ([], "found list"),
    ],
)
def test_a_malformed_state_changes_nothing(store, state, words):
    leaf = store.setdefault("a", torch.zeros(1))
    if isinstance(state, dict) and "constraints" in state:
        good = {"a": torch.ones(1), **state["params"]}
        state = {"params": good, "constraints": {"a": c.real, **state["constraints"]}}
    with pytest.raises(StoreStateError, match=words):
        store.set_state(state)
    assert store["a"] is leaf
    assert list(store) == ["a"]


def test_a_state_with_an_unknown_constraint_changes_nothing(store):
    leaf = store.setdefault("a", torch.zeros(1))
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(UnknownConstraintError, match="'b'"):
        store.set_state({"params": params, "constraints": {"a": c.real, "b": c.boolean}})
    assert store["a"] is leaf


def test_a_state_of_loaded_tensors(store):
    """Frozen tensors stay frozen, and what is not a leaf becomes one."""
    source = torch.ones(2, requires_grad=True)
    params = {"frozen": torch.zeros(2), "computed": source * 2}
    store.set_state({"params": params, "constraints": dict.fromkeys(params, type(c.real)())})
    assert not store["frozen"].requires_grad
    assert store.leaf("frozen") is params["frozen"]
    assert store.leaf("computed").is_leaf
    assert store.leaf("computed").requires_grad
    assert store.constraint("frozen") is c.real  # though another object was given


def test_13_a_store_can_be_pickled(mixed):
    mixed["again"] = mixed.leaf("loc")
    mixed["parameter"] = nn.Parameter(torch.ones(3))
    for name in mixed:
        assert mixed[name] is not None
    assert mixed.buffers
    twin = pickle.loads(pickle.dumps(mixed))
    assert list(twin) == list(mixed)
    for name, value in mixed.items():
        assert torch.equal(twin[name], value)
        assert twin.leaf(name) is not mixed.leaf(name)
        assert type(twin.leaf(name)) is type(mixed.leaf(name))
        assert type(twin.constraint(name)) is type(mixed.constraint(name))
    assert twin.leaf("again") is twin.leaf("loc")
    assert len(pickle.dumps(mixed)) < 20_000  # and not the buffers, once for each parameter


def test_13_deepcopy_knows_tied_params_and_modules(store):
    net = nn.Linear(2, 2)
    store["weight"], store["again"] = net.weight, net.weight
    store["bias"] = net.bias
    assert store["bias"] is net.bias
    assert store.buffers
    twin, net_twin = copy.deepcopy((store, net))
    assert twin.leaf("weight") is twin.leaf("again") is net_twin.weight
    assert twin.leaf("bias") is net_twin.bias
    assert twin.locate(net_twin.bias)[1].name == "bias"
    assert store.locate(net_twin.bias) is None
    assert isinstance(twin.leaf("weight"), nn.Parameter)


def test_13_a_module_that_was_read_through_the_store_can_be_pickled(store):
    net = nn.Linear(2, 2)
    store["weight"] = net.weight
    assert store["weight"].unconstrained() is net.weight
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin.weight, net.weight)
    assert twin.weight.unconstrained() is None
    assert copy.deepcopy(store["weight"]).tolist() == net.weight.tolist()


def test_a_read_restores_what_pyro_takes_off_the_leaf(store):
    net = nn.Linear(2, 2)
    store["weight"] = net.weight
    del store["weight"].unconstrained
    assert store["weight"].unconstrained() is net.weight


# --- the private dictionaries ---------------------------------------------------------------


def test_the_private_dictionaries_are_real_and_in_step(store):
    for view in (store._params, store._constraints):
        assert isinstance(view, dict)
    leaf = nn.Parameter(torch.zeros(2))
    store._params.update(a=leaf)
    store._params |= {"b": torch.zeros(3)}
    assert store._params.setdefault("a", torch.ones(9)) is leaf
    assert store._params.setdefault("c", torch.zeros(1)) is store["c"]
    assert list(store) == ["a", "b", "c"]
    assert store.constraint("a") is c.real
    store._constraints["a"] = c.positive
    assert store["a"].tolist() == [1.0, 1.0]
    assert store.locate(leaf)[1].constraint is c.positive
    assert pickle.loads(pickle.dumps(store._constraints)).keys() == {"a", "b", "c"}
    assert type(copy.copy(store._params)) is type(store._params.copy()) is dict


def test_the_private_dictionaries_refuse_what_would_break_the_store(store):
    store["a"] = torch.zeros(1)
    for attempt in (
        lambda: store._params.pop("a"),
        lambda: store._params.popitem(),
        lambda: store._params.clear(),
        lambda: store._params.__delitem__("a"),
        lambda: store._constraints.clear(),
    ):
        with pytest.raises(TypeError, match=r"del store\[name\]"):
            attempt()
    assert copy.deepcopy(store._params)["a"] is not store["a"]
    with pytest.raises(DtypeError, match="'b' needs an unconstrained tensor, found float"):
        store._params["b"] = 1.0
    with pytest.raises(UnknownConstraintError):
        store._constraints["a"] = c.boolean
    assert store.constraint("a") is c.real
    assert list(store) == ["a"]


def test_a_name_that_is_no_string_is_missed_like_any_other(store):
    store._params[3] = torch.zeros(1)
    with pytest.raises(MissingParamError, match="no param 4"):
        store[4]
    assert store[3].shape == (1,)


def test_what_others_write_into_the_names_is_not_believed(store):
    leaf, stranger = torch.zeros(2), torch.zeros(2)
    store._param_to_name[leaf] = "x"
    store["x"] = leaf
    assert store.locate(leaf)[1].name == "x"
    store._param_to_name[stranger] = "x"
    assert store.locate(stranger) is None
    store._param_to_name[stranger] = "nobody"
    assert store.locate(stranger) is None
    store["y"] = stranger
    assert store.locate(stranger)[1].name == "y"


def test_integer_leaves_can_be_put_in_from_outside(store):
    store._params["n"] = torch.tensor([1, 2])
    (buffer,) = store.buffers.values()
    assert buffer.flat.tolist() == [1, 2]
    assert store.constrain_all()["n"].tolist() == [1, 2]


def test_an_orphan_constraint_waits_for_its_param(store):
    store._constraints["x"] = c.positive
    assert "x" not in store
    with pytest.raises(MissingParamError):
        store.constraint("x")
    assert store.get_state() == {"params": {}, "constraints": {}}
    store["x"] = torch.ones(2)
    assert store.constraint("x") is c.positive
    assert store.leaf("x").tolist() == [0.0, 0.0]


# --- tensors of unusual types ---------------------------------------------------------------


def test_tensors_that_track_provenance_are_unwrapped(store):
    from pyro.ops.provenance import ProvenanceTensor

    value = ProvenanceTensor(torch.ones(2), frozenset({"z"}))
    assert type(value) is ProvenanceTensor
    store["x"] = value
    store.setdefault("y", value, c.positive)
    assert type(store.leaf("x")) is type(store.leaf("y")) is torch.Tensor
    assert store.constrain_all()["y"].tolist() == [1.0, 1.0]


def test_subclasses_that_track_nothing_are_kept(store):
    class Mine(nn.Parameter):
        pass

    mine = Mine(torch.ones(2))
    store["x"] = mine
    assert store["x"] is mine
    assert store.buffers
    assert type(store["x"]) is Mine


def test_tensors_made_in_inference_mode_are_copied(store):
    with torch.inference_mode():
        value = torch.ones(2)
    store["x"] = value
    store.setdefault("y", value, c.positive)
    (store["x"] * store["y"]).sum().backward()
    assert store.leaf("x").grad.tolist() == [1.0, 1.0]


def test_complex_params(store):
    value = torch.tensor([1.0 + 2.0j, 3.0j])
    assert store.setdefault("z", value) is value
    (buffer,) = store.buffers.values()
    buffer.bind_grads()
    store["z"].abs().square().sum().backward()
    torch.testing.assert_close(buffer.grad, 2 * value.detach())
    assert torch.equal(store.constrain_all()["z"], value)
    conjugate = torch.tensor([1.0 + 2.0j]).conj()
    store["c"] = conjugate
    assert store.buffers
    assert store["c"].tolist() == [1.0 - 2.0j]


def test_named_parameters_says_that_it_is_unconstrained():
    assert "UNCONSTRAINED" in ParamStore.named_parameters.__doc__
    assert "UNCONSTRAINED" in ParamStore.leaf.__doc__
    assert "UNCONSTRAINED" in ParamStore.get_state.__doc__


def test_reading_warns_of_nothing(mixed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in mixed:
            assert mixed.get_param(name) is not None
        assert mixed.constrain_all()
