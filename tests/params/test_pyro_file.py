"""Files of real Pyro are read, and no pickle is ever run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile

import pyro.distributions.constraints as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.params.param_store import ParamStoreDict
from torch import nn
from torch.distributions import constraints as c

from fastsvi.distributions import constraints as fc
from fastsvi.errors import CheckpointError
from fastsvi.params import ParamStore, pyro_file

CONSTRAINTS = {
    "real": c.real,
    "positive": c.positive,
    "softplus_positive": pc.softplus_positive,
    "unit_interval": c.unit_interval,
    "interval": c.interval(-1.0, torch.tensor([1.0, 2.0])),
    "independent": c.independent(pc.softplus_positive, 1),
    "simplex": c.simplex,
    "less_than": c.less_than(5),
    "cat": c.cat([c.real, c.positive], -1, [1, 1]),
    "stack": c.stack([c.real, pc.softplus_positive], -1),
    "ordered_vector": pc.ordered_vector,
}


def value_for(name):
    return torch.tensor([0.25, 0.75])


@pytest.fixture
def theirs():
    store = ParamStoreDict()
    for name, constraint in CONSTRAINTS.items():
        store.setdefault(name, value_for(name), constraint)
    store.setdefault("lower_cholesky", torch.eye(2) * 2, c.lower_cholesky)
    store.setdefault("soft_cholesky", torch.eye(2) * 2, pc.softplus_lower_cholesky)
    store.setdefault("sphere", torch.tensor([0.6, 0.8]), pc.sphere)
    store.setdefault("double", torch.ones(3, dtype=torch.float64))
    store.setdefault("half", torch.ones(3).half(), c.positive)
    store.setdefault("brain", torch.ones(3).bfloat16())
    store.setdefault("complex", torch.tensor([1 + 2j]))
    store.setdefault("empty", torch.empty(0, 2))
    store.setdefault("scalar", torch.tensor(3.0))
    linear = nn.Linear(3, 2)
    store.setdefault("lin$$$weight", linear.weight)
    store.setdefault("lin$$$bias", linear.bias)
    store.setdefault("tied", linear.bias)
    whole = torch.arange(6.0)
    store.setdefault("view", whole[2:4])
    store["view"]._pyro_subsample = {}
    return store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params"


def test_a_file_of_pyro_is_read(theirs, store, path):
    theirs.save(path)
    store.load(path)
    assert list(store) == list(theirs)
    for name in theirs:
        leaf, original = store.leaf(name), theirs._params[name]
        assert torch.equal(leaf, original)
        assert leaf.dtype == original.dtype
        assert type(leaf) is type(original)
        assert leaf.requires_grad
        assert torch.allclose(store[name].detach(), theirs[name].detach())
        assert leaf.untyped_storage().nbytes() == leaf.nbytes
    assert store.leaf("tied") is store.leaf("lin$$$bias")
    assert store.constraint("positive") is c.positive
    assert store.constraint("softplus_positive") is fc.softplus_positive
    assert store.constraint("independent").base_constraint is fc.softplus_positive
    assert store.constraint("stack").cseq[1] is fc.softplus_positive


@pytest.fixture
def run(fresh_python):
    """The words that a program prints in another process."""

    def words(program):
        done = fresh_python(program)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return words


@pytest.mark.slow
def test_a_file_of_ours_is_read_by_pyro(store, path, run):
    for name, constraint in CONSTRAINTS.items():
        own = {"softplus_positive": fc.softplus_positive, "ordered_vector": fc.ordered_vector}
        store.setdefault(name, value_for(name), own.get(name, constraint))
    store.setdefault("nested", value_for("x"), c.independent(fc.softplus_positive, 1))
    store.setdefault("listed", value_for("x"), c.stack([c.real, fc.softplus_positive], -1))
    assert store.buffers
    store.save(path, format="pyro")
    # In another process, where fastsvi is not imported: the file must not need it.
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
import pyro
pyro.get_param_store().load({str(path)!r})
assert not any(name.startswith("fastsvi") for name in sys.modules)
for name, value in pyro.get_param_store().items():
    assert abs(value.detach() - __import__("torch").tensor([0.25, 0.75])).max() < 1e-6, name
print(len(pyro.get_param_store()))
"""
    assert run(program) == [str(len(store))]


@pytest.mark.slow
def test_pyro_need_not_be_installed_to_read(theirs, path, run):
    theirs.save(path)
    program = f"""
import sys
sys.modules["pyro"] = None  # importing it fails
from fastsvi.params import ParamStore
store = ParamStore()
store.load({str(path)!r})
print(len(store), type(store.constraint("softplus_positive")).__module__)
"""
    assert run(program) == [str(len(theirs)), "fastsvi.distributions.constraints"]


def test_a_constraint_of_ours_needs_pyro_to_be_written_for_it(store, path, monkeypatch):
    store.setdefault("x", torch.ones(1), fc.softplus_positive)
    monkeypatch.setitem(sys.modules, "pyro.distributions", None)
    with pytest.raises(CheckpointError, match=r'param \'x\'.*Save with format="fastsvi"'):
        store.save(path, format="pyro")
    assert not path.exists()


# --- hostile pickles ------------------------------------------------------------------------


class Bomb:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def torch_file(data_pkl, **members):
    """A file as torch.save writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in {"byteorder": b"little", "version": b"3\n", **members}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def refused(data, words=None):
    store = ParamStore()
    with pytest.raises(CheckpointError, match=words) as caught:
        pyro_file.parse(data, "file")
    assert "'file'" in str(caught.value)
    assert not store


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "bomb",
    [
        lambda mark: Bomb(os.system, f"touch {mark}"),
        lambda mark: Bomb(eval, f"open({mark!r}, 'w')"),
        lambda mark: Bomb(exec, f"open({mark!r}, 'w')"),
        lambda mark: Bomb(open, mark, "w"),
        lambda mark: Bomb(subprocess.check_call, ["touch", mark]),
        lambda mark: Bomb(getattr, nn.Linear, "forward"),
        lambda mark: Bomb(torch.load, mark),
        lambda mark: Bomb(__import__, "antigravity"),
    ],
)
def test_bombs_do_not_go_off(tmp_path, bomb, protocol):
    mark = str(tmp_path / "mark")
    state = {"params": {"x": bomb(mark)}, "constraints": {"x": c.real}}
    data = pickle.dumps(state, protocol=protocol)
    refused(torch_file(data), "it asks for")
    refused(data)
    assert not os.path.exists(mark)


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub.load",
        "torch._utils._rebuild_sparse_tensor",
        "torch.distributions.constraints.torch",
        "torch.distributions.constraints._Real.check",
        "pyro.distributions.constraints.__builtins__",
        "fastsvi.params.store.ParamStore",
        "builtins.dict",
        "collections.defaultdict",
        "torch.serialization._get_layout",
    ],
)
def test_globals_that_are_not_listed_are_refused(name):
    module, _, attribute = name.rpartition(".")
    refused(torch_file(f"c{module}\n{attribute}\n.".encode()), "asks for")


def pickled(*opcodes):
    return torch_file(b"\x80\x02" + b"".join(opcodes) + b".")


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
REAL = b"ctorch.distributions.constraints\n_Real\n"


@pytest.mark.parametrize(
    "data",
    [
        pickled(REAL, b")\x81", b"}(X\x09\x00\x00\x00__class__K\x01ub"),  # BUILD
        pickled(REAL, b"(K\x01K\x02tR"),  # a constraint's class, called
        pickled(REAL, b"}b"),  # BUILD of a class
        pickled(REAL, b"N}(X\x05\x00\x00\x00checkK\x01u\x86b"),  # BUILD of a class, slots
        pickled(TENSOR, b"N}(X\x08\x00\x00\x00functionK\x01u\x86b"),  # BUILD of a function
        pickled(TENSOR, b"}(X\x0c\x00\x00\x00__defaults__K\x01ub"),
        pickled(TENSOR, b"(NNNNNtR"),
        pickled(b"(K\x01K\x02tQ"),  # a persistent id of the wrong form
        pickled(b"K\x01r\xff\xff\xff\x7f"),  # a memo index of two thousand millions
        pickled(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"),  # bytes of eight exbibytes
        pickled(b"\x8a\xff1"),
        pickled(b"\x82\x01"),  # the extension registry
        pickled(b"i__builtin__\neval\n"),
        pickled(b"0"),
        torch_file(b""),
        torch_file(b"."),
        torch_file(b"\x80\x63."),
        torch_file(b"(" * 1000),
        torch_file(b"]" * 100_000 + b"."),
    ],
)
def test_odd_opcodes_are_refused(data):
    refused(data)


def test_the_records_are_not_changed_for_later_files(theirs, store, path):
    """A hostile file that assigns attributes must not reach what the next file is read with."""
    for target in (TENSOR, REAL, b"ccollections\nOrderedDict\n"):
        for attribute in (b"__init__", b"__call__", b"function", b"class_name", b"__class__"):
            text = b"X" + len(attribute).to_bytes(4, "little") + attribute
            refused(pickled(target, b"N}(" + text + b"K\x01u\x86b"))
            refused(pickled(target, b"}(" + text + b"K\x01ub"))
    theirs.save(path)
    store.load(path)
    assert torch.equal(store["scalar"], torch.tensor(3.0))


def reference(numel=4, dtype="FloatStorage", key="0", kind="storage", location="cpu"):
    class Storage:
        pid = (kind, getattr(torch, dtype), key, location, numel)

    return Storage()


def state_file(args, storage=None, constraint=c.real, data=bytes(16), function=None):
    """A file with one tensor that ``_rebuild_tensor_v2`` would make of ``args``."""
    buffer = io.BytesIO()
    storage = storage or reference()

    class Tensor:
        def __reduce__(self):
            return function or torch._utils._rebuild_tensor_v2, (storage, *args)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return getattr(obj, "pid", None)

    Pickler(buffer, 2).dump({"params": {"x": Tensor()}, "constraints": {"x": constraint}})
    return torch_file(buffer.getvalue(), **{"data/0": data})


def test_the_helper_makes_readable_files():
    params, _ = pyro_file.parse(state_file((0, (2, 2), (2, 1), True, {})), "file")
    assert torch.equal(params["x"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((0, (5,), (1,), True, {}), "does not fit"),
        ((1, (4,), (1,), True, {}), "does not fit"),
        ((0, (2, 2), (3, 1), True, {}), "does not fit"),
        ((0, (10**12,), (0,), True, {}), "add up to much more"),
        ((0, (2**40, 2**40), (0, 0), True, {}), "add up to much more"),
        ((-1, (2,), (1,), True, {}), "malformed"),
        ((0, (-2,), (1,), True, {}), "malformed"),
        ((0, (2,), (-1,), True, {}), "malformed"),
        ((0, (2.0,), (1,), True, {}), "malformed"),
        ((0, (2,), (1, 1), True, {}), "malformed"),
        ((0, [2], [1], True, {}), "malformed"),
        ((0, None, None, True, {}), "malformed"),
        ((0, (2**70,), (1,), True, {}), "malformed"),
        ((0, (2,), (1,), True, {0: 1}), "hooks or flags"),
        ((0, (2,), (1,), True, {}, {"conj": True}), "hooks or flags"),
    ],
)
def test_tensors_that_lie_are_refused(args, words):
    refused(state_file(args), words)


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        (reference(numel=5), "5 entries of torch.float32 in 16 bytes"),
        (reference(dtype="DoubleStorage"), "4 entries of torch.float64 in 16 bytes"),
        (reference(numel=-1), "in 16 bytes"),
        (reference(numel="4"), "storage is malformed"),
        (reference(key="../../etc/passwd"), "is missing"),
        (reference(key=0), "storage is malformed"),
        (reference(key="1"), "is missing"),
        (reference(kind="module"), "not a storage"),
        (reference(location="cuda:99"), "not available"),
        (reference(location=3), "storage is malformed"),
        (reference(dtype="ByteStorage", numel=16), "asks for torch.ByteStorage"),
    ],
)
def test_storages_that_lie_are_refused(storage, words):
    refused(state_file((0, (2,), (1,), True, {}), storage), words)


def test_many_tensors_of_one_storage_do_not_fill_the_memory():
    data = state_file((0, (4096,), (1,), True, {}), reference(4096), data=bytes(4 * 4096))
    many = pickle.dumps({f"x{i}": i for i in range(1000)}, 2)
    assert len(many) < len(data)  # the names alone are cheap
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return getattr(obj, "pid", None)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (reference(4096), 0, (4096,), (1,), True, {})

    params = {f"x{i}": Tensor() for i in range(1000)}
    Pickler(buffer, 2).dump({"params": params, "constraints": dict.fromkeys(params, c.real)})
    refused(torch_file(buffer.getvalue(), **{"data/0": bytes(4 * 4096)}), "much more than the file")


@pytest.mark.parametrize(
    "state",
    [
        3,
        [],
        {},
        {"params": {}},
        {"params": [], "constraints": {}},
        {"params": {}, "constraints": {}, "more": 1},
        {"params": {1: 2}, "constraints": {1: 2}},
        {"params": {"x": 1}, "constraints": {}},
        {"params": {"x": 1}, "constraints": {"x": c.real}},
        {"model": {"weight": 3}},
    ],
)
def test_other_pickles_of_torch_are_refused(state):
    refused(torch_file(pickle.dumps(state, 2)))


@pytest.mark.parametrize(
    "constraint",
    [
        3,
        None,
        c.boolean,
        c.greater_than("3"),
        c.greater_than(None),
        c.independent(c.real, 1),
    ],
)
def test_constraints_that_lie_are_refused(constraint):
    if isinstance(constraint, type(c.independent(c.real, 1))):
        constraint.base_constraint = 7
    refused(state_file((0, (2,), (1,), True, {}), constraint=constraint))


def test_a_constraint_without_its_bounds_is_refused():
    constraint = c.greater_than(3.0)
    del constraint.lower_bound
    refused(state_file((0, (2,), (1,), True, {}), constraint=constraint), "without its")


def test_archives_that_lie_are_refused():
    good = state_file((0, (2,), (1,), True, {}))
    refused(good[: len(good) // 2])
    refused(b"PK\x03\x04")
    refused(torch_file(b"N.", byteorder=b"big"), "byte order")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    refused(buffer.getvalue(), "2 pickles")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N" * 10_000_000)
    refused(buffer.getvalue(), "compressed or too large")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w"):
        pass
    refused(buffer.getvalue())


def test_bare_pickles_are_refused_with_the_way_out(theirs, store, path):
    for param in theirs._params.values():
        param.__dict__.pop("unconstrained", None)
    torch.save(theirs.get_state(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1.6; load it with a Pyro"):
        store.load(path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_pickle_is_read_or_refused(noise):
    with contextlib.suppress(CheckpointError):
        pyro_file.parse(torch_file(b"\x80\x02" + noise + b"."), "file")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(pickletools.opcodes), max_size=8), st.binary(max_size=12))
def test_any_sequence_of_opcodes_is_read_or_refused(opcodes, noise):
    program = b"".join(op.code.encode("latin1") + noise[:4] for op in opcodes)
    for prefix in (TENSOR, REAL, b"}"):
        with contextlib.suppress(CheckpointError):
            pyro_file.parse(torch_file(b"\x80\x02" + prefix + program + b"."), "file")
