"""Saving and loading the store, in both formats, on this and other devices."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import constraints as c

from fastsvi.distributions import constraints as fc
from fastsvi.errors import CheckpointError
from fastsvi.params import ParamStore, checkpoint, state_file


@pytest.fixture
def full(mixed):
    """All that a file can hold."""
    mixed.setdefault("soft", torch.rand(3) + 0.1, fc.softplus_positive)
    mixed.setdefault("sphere", torch.tensor([0.6, 0.8]), fc.sphere)
    mixed.setdefault("cat", torch.ones(3), c.cat([c.real, c.positive], -1, [1, 2]))
    mixed.setdefault("z128", torch.randn(2, dtype=torch.complex128))
    mixed["parameter"] = nn.Parameter(torch.randn(2, 2))
    mixed["tied"] = mixed.leaf("parameter")
    mixed["frozen"] = torch.ones(2)
    mixed.leaf("frozen").requires_grad_(False)
    mixed["m$$$a.b\n'\u2028"] = torch.ones(1)
    mixed[""] = torch.ones(())
    return mixed


def snapshot(store):
    return {
        name: (leaf, leaf.detach().clone(), store.constraint(name))
        for name, leaf in store.named_parameters()
    }


def assert_unchanged(store, before):
    assert list(store) == list(before)
    for name, (leaf, value, constraint) in before.items():
        assert store.leaf(name) is leaf
        assert torch.equal(leaf, value)
        assert store.constraint(name) is constraint


def assert_same_content(a, b):
    assert list(a) == list(b)
    for name in a:
        x, y = a.leaf(name), b.leaf(name)
        assert torch.equal(x, y)
        assert x.dtype == y.dtype
        assert (type(x), x.requires_grad) == (type(y), y.requires_grad)
        assert y.is_leaf
        assert repr(a.constraint(name)) == repr(b.constraint(name))
        assert torch.equal(a[name], b[name])


@pytest.mark.parametrize("format", ["fastsvi", "pyro"])
@pytest.mark.parametrize("settled", [False, True])
def test_everything_comes_back_bit_for_bit(full, tmp_path, format, settled):
    if settled:
        assert full.buffers
    full.save(tmp_path / "params", format=format)
    loaded = ParamStore()
    loaded.load(str(tmp_path / "params"))
    assert_same_content(full, loaded)
    assert loaded.leaf("tied") is loaded.leaf("parameter")
    assert loaded.constraint("scale") is c.positive
    for leaf in dict(loaded.named_parameters()).values():
        assert leaf.untyped_storage().nbytes() == leaf.nbytes


@pytest.mark.parametrize("format", ["fastsvi", "pyro"])
def test_files_hold_no_more_than_the_params(store, tmp_path, format):
    store["small"] = torch.zeros(3)
    store["gone"] = torch.zeros(100_000)
    assert store.buffers
    del store["gone"]
    store.save(tmp_path / "params", format=format)
    assert os.path.getsize(tmp_path / "params") < 3000


def test_load_merges(store, tmp_path):
    store.setdefault("a", torch.ones(1), c.positive)
    store.save(tmp_path / "params")
    store.clear()
    store["a"], store["b"] = torch.zeros(3), torch.zeros(2)
    store.load(tmp_path / "params")
    assert store["a"].tolist() == [1.0]
    assert store["b"].tolist() == [0.0, 0.0]


def test_an_empty_store(store, tmp_path):
    store.save(tmp_path / "params")
    store.load(tmp_path / "params")
    assert not store


def test_what_has_no_name_is_refused_before_the_file_is_touched(store, tmp_path):
    class Mine(c.Constraint):
        def check(self, value):
            return value == value

    torch.distributions.transform_to.register(
        Mine, lambda constraint: torch.distributions.transforms.ExpTransform()
    )
    store["a"] = torch.zeros(1)
    store.save(tmp_path / "params")
    before = (tmp_path / "params").read_bytes()
    store.setdefault("mine", torch.ones(1), Mine())
    with pytest.raises(CheckpointError, match=r"param 'mine' to .*params.*Mine.*has no name"):
        store.save(tmp_path / "params")
    assert (tmp_path / "params").read_bytes() == before
    del store["mine"]
    store._params[3] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="name 3 is no string"):
        store.save(tmp_path / "params")


def test_a_header_of_any_length_is_told_from_a_pickle(store, tmp_path):
    """The first byte of a file is that of its header's length, and may be that of a pickle."""
    first_bytes = set()
    for length in range(0, 256, 8):
        store.clear()
        store["x" * length] = torch.arange(3.0)
        store.save(tmp_path / "params")
        first_bytes.add((tmp_path / "params").read_bytes()[:1])
        store.clear()
        store.load(tmp_path / "params")
        assert store["x" * length].tolist() == [0.0, 1.0, 2.0]
    assert b"\x80" in first_bytes


def test_missing_files(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        store.load(tmp_path / "params")
    with pytest.raises(FileNotFoundError):
        store.save(tmp_path / "no folder" / "params")


# --- devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["fastsvi", "pyro"])
@pytest.mark.parametrize(
    "map_location",
    [
        "cpu",
        torch.device("cpu"),
        {"meta": "cpu", "cpu": "cpu"},
        {},
        None,
        lambda storage, location: storage,
        lambda storage, location: None,
    ],
)
def test_map_location_to_where_it_was(store, tmp_path, format, map_location):
    store["x"] = torch.arange(3.0)
    store["y"] = torch.arange(2.0, dtype=torch.float64)
    store.save(tmp_path / "params", format=format)
    store.clear()
    store.load(tmp_path / "params", map_location)
    assert store["x"].tolist() == [0.0, 1.0, 2.0]
    assert store["y"].tolist() == [0.0, 1.0]


def on_meta(storage):
    return torch.empty(len(storage), dtype=torch.uint8, device="meta").untyped_storage()


@pytest.mark.parametrize("format", ["fastsvi", "pyro"])
@pytest.mark.parametrize(
    "map_location", ["meta", {"cpu": "meta"}, lambda storage, location: on_meta(storage)]
)
def test_map_location_elsewhere(store, tmp_path, format, map_location):
    store["x"] = torch.arange(3.0)
    store.save(tmp_path / "params", format=format)
    store.load(tmp_path / "params", map_location)
    assert store["x"].is_meta
    assert store["x"].shape == (3,)


def test_map_location_is_told_where_tensors_were(store, tmp_path):
    store["x"] = torch.arange(3.0)
    store.save(tmp_path / "params")
    locations = []
    store.load(tmp_path / "params", lambda storage, location: locations.append(location))
    assert locations == ["cpu"]


@pytest.mark.parametrize("format", ["fastsvi", "pyro"])
def test_a_device_that_is_not_here(store, tmp_path, format):
    leaf = store.setdefault("x", torch.arange(3.0))
    store.save(tmp_path / "params", format=format)
    for map_location in ("cuda:99", {"cpu": "cuda:99"}, "nonsense"):
        with pytest.raises(CheckpointError, match="is not available; load it with map_location"):
            store.load(tmp_path / "params", map_location)
    assert store["x"] is leaf


# --- files that lie -------------------------------------------------------------------------


def rewrite(path, change):
    """A file with a valid checksum whose section ``change`` has altered."""
    tensors, header = checkpoint.read(path)
    section = header["params"]
    changed = change(section, tensors)
    checkpoint.write(path, tensors, {"params": section if changed is None else changed})


def set_item(record, key, value):
    def change(section, tensors):
        section[record][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: {}, "list of params is malformed"),
        (lambda s, t: [3], "record 3 is malformed"),
        (lambda s, t: [*s, s[0]], "is malformed or double"),
        (lambda s, t: s[:1], "entries of 'params/cpu/float32' belong to no param"),
        (set_item(0, "name", 3), "is malformed"),
        (set_item(0, "shape", [10**12]), "does not fit into"),
        (set_item(0, "shape", [-3]), "does not fit into"),
        (set_item(0, "shape", [2**62, 2**62]), "does not fit into"),
        (set_item(0, "shape", [2.0]), "does not fit into"),
        (set_item(0, "shape", "3"), "does not fit into"),
        (set_item(0, "shape", [True, 3]), "does not fit into"),
        (set_item(0, "tensor", "params/cpu/float64"), "'a' is malformed"),
        (set_item(0, "tensor", ["params/cpu/float32"]), "'a' is malformed"),
        (set_item(0, "requires_grad", 1), "'a' is malformed"),
        (set_item(0, "constraint", {"name": "os.system"}), "'a': unknown constraint"),
        (set_item(0, "constraint", {"name": "square"}), "no transform"),
        (set_item(0, "same_as", "b"), "the same as an unknown one"),
        (set_item(1, "same_as", []), "the same as an unknown one"),
        (lambda s, t: t.update({"params/x": torch.zeros(1)}), "'params/x' is not flat"),
        (lambda s, t: t.update({"params/cpu/f": torch.zeros(1, 1)}), "is not flat"),
        (lambda s, t: t.update({"params/tpu:9/f": torch.zeros(1)}), "'tpu:9' is not available"),
    ],
)
def test_sections_that_lie_are_refused(store, tmp_path, change, words):
    path = tmp_path / "params"
    store["a"] = torch.arange(3.0)
    store.setdefault("b", torch.ones(2), c.positive)
    store.save(path)
    rewrite(path, change)
    store["a"] = torch.zeros(4)
    before = snapshot(store)
    with pytest.raises(CheckpointError, match=words) as caught:
        store.load(path)
    assert str(path) in str(caught.value)
    assert_unchanged(store, before)


def test_a_file_of_something_else(store, tmp_path):
    checkpoint.write(tmp_path / "optimizer", {}, {"optimizer": {}})
    with pytest.raises(CheckpointError, match="holds no parameters; save it with"):
        store.load(tmp_path / "optimizer")
    (tmp_path / "text").write_text("hello, this is not a store")
    with pytest.raises(CheckpointError):
        store.load(tmp_path / "text")


def test_other_sections_share_the_file(store, tmp_path):
    """As an optimizer's state will."""
    store["a"] = torch.arange(3.0)
    tensors, section = state_file.encode(store.get_state(), "file")
    tensors["optimizer/moments"] = torch.ones(3)
    checkpoint.write(tmp_path / "all", tensors, {"params": section, "optimizer": {"lr": 0.1}})
    store.clear()
    store.load(tmp_path / "all")
    assert store["a"].tolist() == [0.0, 1.0, 2.0]
    assert checkpoint.read(tmp_path / "all")[1]["optimizer"] == {"lr": 0.1}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.sampled_from(["fastsvi", "pyro"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
    st.floats(0.5, 1.0) | st.just(1.0),
)
def test_fuzzed_files_load_equal_or_not_at_all(tmp_path_factory, format, flips, part):
    store, path = ParamStore(), tmp_path_factory.mktemp("fuzz") / "params"
    store.setdefault("loc", torch.arange(40.0))
    store.setdefault("scale", torch.ones(2, 2), c.interval(0.0, torch.tensor(2.0)))
    store["double"] = torch.ones(3, dtype=torch.float64)
    store.save(path, format=format)
    data = bytearray(path.read_bytes())
    for position, mask in flips:
        data[int(position * len(data))] ^= mask
    path.write_bytes(data[: int(part * len(data))])
    other = ParamStore()
    other["loc"] = torch.zeros(2)
    before = snapshot(other)
    try:
        other.load(path)
    except CheckpointError:
        assert_unchanged(other, before)
    else:
        assert set(other) == set(store)
        if format == "fastsvi":  # a pickle has no checksum of its own: names may be other ones
            assert_same_content(store, other)


def test_the_header_is_plain_json(store, tmp_path):
    store.setdefault("scale", torch.ones(2), c.positive)
    store.save(tmp_path / "params")
    _, header = checkpoint.read(tmp_path / "params")
    assert header == {
        "params": [
            {
                "name": "scale",
                "constraint": {"name": "greater_than", "lower_bound": 0.0},
                "tensor": "params/cpu/float32",
                "shape": [2],
                "requires_grad": True,
                "is_parameter": False,
            }
        ]
    }
    assert json.dumps(header)
