"""Optimizer state as JSON and tensors: every tree comes back, nothing else gets in."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsvi.errors import CheckpointError
from fastsvi.optim.state_file import decode, encode, move

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.sampled_from(["#", "(", "{", "counter", "a/b"])
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.dictionaries(st.integers(), inner),
    ),
    max_leaves=20,
)


@given(TREES)
def test_every_tree_survives_json(tree):
    data, tensors = encode(tree)
    assert decode(json.loads(json.dumps(data)), tensors, "file") == tree


def test_tensors_are_cut_out():
    tree = {"x": {0: torch.ones(2), "betas": (0.9, [torch.zeros(())])}, "best": float("inf")}
    data, tensors = encode(tree)
    assert set(tensors) == {"optimizer/x/0", "optimizer/x/betas/1/0"}
    back = decode(json.loads(json.dumps(data)), tensors, "file")
    assert back["x"][0] is tree["x"][0]
    assert back["x"]["betas"][1][0] is tree["x"]["betas"][1][0]
    assert back["best"] == float("inf")


def test_counters_survive():
    milestones = Counter([2, 5, 5])
    data, tensors = encode({"milestones": milestones})
    back = decode(json.loads(json.dumps(data)), tensors, "file")["milestones"]
    assert back == milestones
    assert isinstance(back, Counter)


def test_functions_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"'optimizer/x/fn': it is a function"):
        encode({"x": {"fn": lambda: None}})


@pytest.mark.parametrize(
    "data", [{"#": "missing"}, {"#": [1]}, {"(": 3}, {"{": [[1]]}, {"{": [[[], 2]]}, {"counter": 1}]
)
def test_malformed_files_are_refused(data):
    with pytest.raises(CheckpointError, match=r"'a file'.*damaged"):
        decode({"x": data}, {}, "a file")


@pytest.mark.parametrize(
    "map_location",
    ["meta", torch.device("meta"), {"cpu": "meta"}, lambda tensor, location: tensor.to("meta")],
)
def test_tensors_move(map_location):
    moved = move({"x": [torch.ones(2), (torch.zeros(1), 3)]}, map_location)
    assert moved["x"][0].device.type == moved["x"][1][0].device.type == "meta"
    assert moved["x"][1][1] == 3


def test_a_location_may_be_left_alone():
    tensor = torch.ones(2)
    assert move([tensor], None)[0] is tensor
    assert move([tensor], {"cuda:0": "meta"})[0].device.type == "cpu"
    assert move([tensor], lambda tensor, location: None)[0] is tensor
