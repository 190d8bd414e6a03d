"""Messages: typed fields, and the mapping protocol that Pyro programs use."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastsvi.poutine.message import Message


def make():
    return Message(type="sample", name="x", value=torch.tensor([1.0, 2.0]), infer={"a": 1})


def test_fields_are_items_and_attributes():
    msg = make()
    assert msg["name"] == msg.name == "x"
    msg["value"] = None
    assert msg.value is None
    assert "value" in msg
    assert msg["scale"] == 1.0
    assert msg["mask"] is None
    assert msg["cond_indep_stack"] == ()


def test_results_are_absent_until_set():
    msg = make()
    assert msg.log_prob is None
    assert "log_prob" not in msg
    with pytest.raises(KeyError):
        msg["log_prob"]
    assert msg.get("log_prob", 7) == 7
    msg.log_prob = torch.tensor(3.0)
    assert msg["log_prob"] == 3.0
    assert "log_prob" in msg
    del msg["log_prob"]
    assert msg.log_prob is None
    msg["log_prob_sum"] = torch.tensor(1.0)
    msg.log_prob_sum = None
    assert "log_prob_sum" not in msg


def test_unknown_keys_are_extra():
    msg = make()
    with pytest.raises(KeyError):
        msg["_note"]
    msg["_note"] = 1
    assert msg.extra == {"_note": 1}
    assert msg.setdefault("packed", {}) is msg.packed
    assert msg.pop("_note") == 1
    assert "_note" not in msg
    with pytest.raises(AttributeError):
        msg._note = 1  # a misspelled field is an error, not a new attribute


def test_a_field_cannot_be_removed():
    msg = make()
    with pytest.raises(KeyError):
        del msg["value"]
    assert msg.name == "x"


def test_iteration_update_and_unpacking():
    msg = make()
    msg["_note"] = 1
    assert list(msg)[:3] == ["type", "name", "fn"]
    assert len(msg) == len(list(msg)) == len(dict(msg))
    assert {**msg}["_note"] == 1
    msg.update(name="y", other=2)
    assert (msg.name, msg["other"]) == ("y", 2)


def test_copy_is_shallow_and_independent():
    msg = make()
    msg["_note"] = 1
    other = msg.copy()
    assert other.value is msg.value
    assert other.infer is msg.infer
    other.value = None
    other["_note"] = 2
    assert msg.value is not None
    assert msg["_note"] == 1
    assert copy.copy(msg)["_note"] == 1


def test_copy_has_every_field():
    msg = Message(*range(15))
    msg._extra = {}
    other = msg.copy()
    assert dict(other) == dict(msg)


def test_deepcopy_and_pickle():
    msg = make()
    msg["_note"] = [1]
    for other in (copy.deepcopy(msg), pickle.loads(pickle.dumps(msg))):
        assert other is not msg
        assert torch.equal(other.value, msg.value)
        assert other.value is not msg.value
        assert other["_note"] == [1]
        assert other["_note"] is not msg["_note"]


def test_messages_are_compared_by_identity():
    msg = make()
    assert msg != msg.copy()
    assert msg in {msg}


def test_default_dicts_are_not_shared():
    first, second = Message("sample"), Message("sample")
    first.infer["a"] = 1
    first.kwargs["b"] = 1
    assert second.infer == second.kwargs == {}


def test_repr_shows_what_is_set():
    assert repr(Message("sample", "x", infer={})) == "Message(type='sample', name='x', scale=1.0)"


def test_from_mapping():
    msg = Message.from_mapping({"type": "sample", "name": "x", "mine": 3})
    assert (msg.name, msg["mine"]) == ("x", 3)
    assert Message.from_mapping(msg) is not msg
