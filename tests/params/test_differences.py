"""Every difference from Pyro that is meant, with what Pyro does beside it."""

from __future__ import annotations

import pickle

import pytest
import torch
from pyro.params.param_store import ParamStoreDict
from torch.distributions import constraints as c

from fastsvi.errors import (
    CheckpointError,
    ConstraintError,
    DtypeError,
    FastSVIWarning,
    MissingParamError,
)
from fastsvi.params import ParamStore


@pytest.fixture
def ours():
    return ParamStore()


@pytest.fixture
def theirs():
    return ParamStoreDict()


def test_4_a_replaced_leaf_is_forgotten(ours, theirs):
    for store in (ours, theirs):
        store["x"] = torch.zeros(1)
        store["x"] = torch.ones(1)
    assert len(theirs._param_to_name) == 2
    assert len(ours._param_to_name) == 1


def test_5_an_init_of_another_shape_is_ignored_with_a_warning(ours, theirs):
    for store in (ours, theirs):
        store["x"] = torch.zeros(2)
    assert theirs.setdefault("x", torch.zeros(3)).shape == (2,)
    with pytest.warns(FastSVIWarning, match="'x'"):
        assert ours.setdefault("x", torch.zeros(3)).shape == (2,)


def test_6_a_failed_init_leaves_no_constraint(ours, theirs):
    for store in (ours, theirs):
        with pytest.raises((RuntimeError, DtypeError)):
            store.setdefault("x", torch.tensor([1]), c.real_vector)
        store["x"] = torch.ones(1)
    assert theirs._constraints["x"] is c.real_vector
    assert ours._constraints["x"] is c.real


def test_7_a_value_outside_its_constraint_is_an_error(ours, theirs):
    assert bool(theirs.setdefault("x", torch.tensor(-1.0), c.positive).isnan())
    with pytest.raises(ConstraintError, match=r"'x'.*value -1"):
        ours.setdefault("x", torch.tensor(-1.0), c.positive)


def test_7_a_float_is_a_clear_error(ours, theirs):
    with pytest.raises(AttributeError, match="contiguous"):
        theirs["x"] = 1.0
    with pytest.raises(
        DtypeError, match=r"'x' needs a tensor, found float 1.0; write torch.tensor"
    ):
        ours["x"] = 1.0


def test_7_a_missing_name_is_a_clear_error(ours, theirs):
    for store in (ours, theirs):
        store["scale"] = torch.ones(1)
    with pytest.raises(KeyError, match=r"^'scales'$"):
        theirs["scales"]
    with pytest.raises(MissingParamError, match="did you mean 'scale'"):
        ours["scales"]


def test_8_tied_params_can_both_be_deleted(ours, theirs):
    for store in (ours, theirs):
        shared = torch.zeros(1)
        store["a"] = store["b"] = shared
        del store["a"]
    with pytest.raises(KeyError):
        del theirs["b"]
    del ours["b"]
    assert not ours


def test_10_a_state_without_a_constraint_is_refused_and_not_found_out_later(ours, theirs):
    state = {"params": {"x": torch.zeros(1)}, "constraints": {}}
    theirs.set_state(state)
    with pytest.raises(KeyError):
        theirs["x"]
    with pytest.raises(AssertionError, match="'x'"):
        ours.set_state(state)


def test_11_a_loaded_constraint_is_the_singleton(ours, theirs, tmp_path):
    for store in (ours, theirs):
        store.setdefault("x", torch.ones(1), c.positive)
        store.save(tmp_path / "file")
        store.clear()
        store.load(tmp_path / "file")
    assert theirs._constraints["x"] is not c.positive
    assert ours._constraints["x"] is c.positive


def test_11_files_are_no_pickles(ours, theirs, tmp_path):
    ours["x"] = torch.zeros(1)
    theirs["x"] = torch.zeros(1)
    ours.save(tmp_path / "ours")
    theirs.save(tmp_path / "theirs")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "ours")
    ours.load(tmp_path / "theirs")
    ours.save(tmp_path / "for them", format="pyro")
    theirs.load(tmp_path / "for them")
    with pytest.raises(CheckpointError, match="unknown format"):
        ours.save(tmp_path / "x", format="yaml")


def test_13_a_store_that_was_read_can_be_pickled(ours, theirs):
    for store in (ours, theirs):
        store["x"] = torch.zeros(1)
        assert store["x"] is store["x"]
    with pytest.raises(TypeError, match="weakref"):
        pickle.dumps(theirs)
    assert torch.equal(pickle.loads(pickle.dumps(ours))["x"], torch.zeros(1))


def test_a_param_is_always_a_leaf(ours, theirs):
    value = torch.zeros(1, requires_grad=True) + 1
    assert not theirs.setdefault("x", value).is_leaf  # no optimizer of torch takes it
    assert ours.setdefault("x", value).is_leaf


def test_tensors_that_share_a_params_memory_stop_following_it_once_it_is_in_the_buffer(
    ours, theirs
):
    for store in (ours, theirs):
        whole = torch.zeros(4)
        store["x"] = whole[:2]
        alias = store["x"].detach()
        with torch.no_grad():
            store["x"].fill_(1.0)
        assert whole.tolist() == [1.0, 1.0, 0.0, 0.0]
        if store is ours:
            assert ours.buffers  # from here on
        with torch.no_grad():
            store["x"].fill_(2.0)
        assert store["x"].tolist() == [2.0, 2.0]
        assert whole[0] == alias[0] == (1.0 if store is ours else 2.0)
