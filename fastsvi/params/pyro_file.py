"""Parameter files of Pyro, which are pickles, read without running them.

The unpickler here hands the file nothing that can act. Every global that such a file may name
becomes an inert record; anything else is refused. Tensors and constraints are made from the
records afterwards, by ordinary code that checks sizes and types. So a hostile file can at worst be
refused, and Pyro need not be installed.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from fastsvi.errors import CheckpointError
from fastsvi.params import constraint_names
from fastsvi.params.checkpoint import PathLike, refuse, write_atomically
from fastsvi.params.constraint_names import UnnamedConstraintError
from fastsvi.params.relocation import MapLocation, relocate

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}

# Tensors of a sound file are not much larger than the file; a small one must not fill the memory.
_MAX_EXPANSION = 4

# All that the Python code of pickle and zipfile is known to raise on bad input.
_BAD_INPUT = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    struct.error,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    ImportError,
    MemoryError,
    OSError,
)

_DAMAGED = "it is truncated, damaged or unsafe; use another copy"


def looks_like_one(data: bytes) -> bool:
    """Does the file start as ``torch.save`` starts one, now (zip) or before torch 1.6 (pickle)?"""
    if data[:4] == b"PK\x03\x04":
        return True
    # The length that safetensors starts with may begin with this byte too; JSON follows it.
    return data[:1] == b"\x80" and data[8:9] != b"{"


def parse(
    data: bytes, path: str, map_location: MapLocation = None
) -> tuple[dict[str, Tensor], dict[str, Constraint]]:
    """Unconstrained leaves and constraints of a file that Pyro's store saved.

    Raises:
        CheckpointError: the file is of another kind, damaged or unsafe.
    """
    if data[:4] != b"PK\x03\x04":
        raise refuse(
            path,
            "it is a bare pickle, as torch wrote them before version 1.6",
            "load it with a Pyro that you trust it with, and save it again",
        )
    try:
        archive = _Archive(data)
        state = _Unpickler(io.BytesIO(archive.member("data.pkl"))).load()
    except _BAD_INPUT as error:
        raise refuse(path, _first_line(error), _DAMAGED) from error
    if not (
        isinstance(state, dict)
        and set(state) == {"params", "constraints"}
        and all(isinstance(part, dict) for part in state.values())
        and all(isinstance(name, str) for part in state.values() for name in part)
        and set(state["params"]) <= set(state["constraints"])
    ):
        raise refuse(
            path,
            "it is not the state of a Pyro param store, which has params and constraints by name",
            "save one with pyro.get_param_store().save",
        )
    builder = _Builder(archive, path, map_location)
    params = {name: builder.leaf(name, record) for name, record in state["params"].items()}
    constraints = {
        name: builder.constraint(name, state["constraints"][name]) for name in state["params"]
    }
    return params, constraints


# --- the archive ----------------------------------------------------------------------------


class _Archive:
    """The zip file that ``torch.save`` writes: members without compression in one folder."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._zip = zipfile.ZipFile(io.BytesIO(data))
        roots = [n[: -len("data.pkl")] for n in self._zip.namelist() if n.endswith("data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"it holds {len(roots)} pickles, expected 1")
        self._root = roots[0]
        if f"{self._root}byteorder" in self._zip.namelist():
            order = self.member("byteorder")
            if order != b"little":
                raise ValueError(f"its byte order is {order[:20]!r}, expected little")

    def member(self, name: str) -> bytes:
        info = self._zip.getinfo(self._root + name)
        # Without compression nothing can be larger than the file that holds it.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise ValueError(f"its member {name!r} is compressed or too large")
        return self._zip.read(info)


# --- records: what the pickle can make ------------------------------------------------------


class _Call:
    """A function that the pickle may call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _StorageRecord:
    __slots__ = ("dtype", "key", "location", "numel")

    def __init__(self, dtype: Any, key: Any, location: Any, numel: Any) -> None:
        self.dtype, self.key, self.location, self.numel = dtype, key, location, numel


class _TensorRecord:
    __slots__ = ("is_parameter", "offset", "requires_grad", "size", "storage", "stride")

    def __init__(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, *rest: Any
    ) -> None:
        # rest: backward hooks, which cannot be here, and flags of conjugated tensors
        if any(rest):
            raise ValueError("a tensor with hooks or flags")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.requires_grad, self.is_parameter = requires_grad, False


class _ConstraintRecord:
    """Base of the throw-away classes that stand for a constraint's class in one file."""

    class_name: str


def _parameter(data: Any, requires_grad: Any, hooks: Any, *state: Any) -> _TensorRecord:
    if not isinstance(data, _TensorRecord) or hooks:
        raise ValueError("a malformed nn.Parameter")
    record = _TensorRecord(data.storage, data.offset, data.size, data.stride, requires_grad)
    record.is_parameter = True
    return record


def _from_type(function: Any, cls: Any, args: Any, state: Any) -> Any:
    return function(*args) if isinstance(function, _Call) else None


def _dict(*args: Any) -> dict[Any, Any]:
    if args:
        raise ValueError("a malformed OrderedDict")
    return {}


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _TensorRecord,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("collections", "OrderedDict"): _dict,
}
_MARKS = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter")}


# The Python form, for the C one allots memory for whatever memo index a file names.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Makes records; every other global is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _Call(_CALLS[module, name])
        if (module, name) in _MARKS:
            return f"{module}.{name}"
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if constraint_names.known_class(module, name):
            return type(name, (_ConstraintRecord,), {"class_name": name})
        raise pickle.UnpicklingError(f"it asks for {module[:50]}.{name[:50]}")

    def persistent_load(self, pid: Any) -> _StorageRecord:
        kind, dtype, key, location, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        return _StorageRecord(dtype, key, location, numel)


# --- tensors and constraints from records ---------------------------------------------------


class _Builder:
    def __init__(self, archive: _Archive, path: str, map_location: MapLocation) -> None:
        self._archive = archive
        self._path = path
        self._map_location = map_location
        self._storages: dict[str, tuple[Any, Tensor]] = {}
        self._leaves: dict[int, Tensor] = {}
        self._bytes_left = _MAX_EXPANSION * archive.size

    def leaf(self, name: str, record: Any) -> Tensor:
        """A leaf with memory of its own; the same one for the same record."""
        if id(record) not in self._leaves:
            value = self._tensor(name, record)
            can = value.is_floating_point() or value.is_complex()
            requires_grad = record.requires_grad is True and can
            self._leaves[id(record)] = (
                nn.Parameter(value, requires_grad=requires_grad)
                if record.is_parameter
                else value.requires_grad_(requires_grad)
            )
        return self._leaves[id(record)]

    def constraint(self, name: str, record: Any, depth: int = 0) -> Constraint:
        if not isinstance(record, _ConstraintRecord) or depth > 16:
            raise self._refuse(name, "its constraint is none")
        state = {key: self._argument(name, item, depth) for key, item in vars(record).items()}
        try:
            return constraint_names.from_class(record.class_name, state)
        except UnnamedConstraintError as error:
            raise self._refuse(name, str(error)) from error

    def _argument(self, name: str, item: Any, depth: int) -> Any:
        if isinstance(item, _ConstraintRecord):
            return self.constraint(name, item, depth + 1)
        if isinstance(item, list):
            return [self._argument(name, part, depth + 1) for part in item[:10_000]]
        if isinstance(item, _TensorRecord):
            return self._tensor(name, item)
        return item

    def _tensor(self, name: str, record: Any) -> Tensor:
        if not isinstance(record, _TensorRecord):
            raise self._refuse(name, "it is not a tensor")
        storage = self._storage(name, record.storage)
        size, stride, offset = record.size, record.stride, record.offset
        counts = (offset, *size, *stride) if _are_tuples(size, stride) else (None,)
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise self._refuse(name, "its size is malformed")
        numel, last = 1, offset
        for extent, step in zip(size, stride, strict=True):
            numel *= extent
            last += max(extent - 1, 0) * step
        if numel and last >= storage.numel():
            raise self._refuse(name, f"its shape {size} does not fit into its storage")
        self._bytes_left -= numel * storage.element_size()
        if self._bytes_left < 0:
            raise self._refuse(name, "the tensors add up to much more than the file")
        return storage.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def _storage(self, name: str, record: Any) -> Tensor:
        if not (
            isinstance(record, _StorageRecord)
            and isinstance(record.dtype, torch.dtype)
            and isinstance(record.key, str)
            and isinstance(record.location, str)
            and type(record.numel) is int
        ):
            raise self._refuse(name, "its storage is malformed")
        if record.key not in self._storages:
            try:
                raw = bytearray(self._archive.member(f"data/{record.key}"))
            except _BAD_INPUT as error:
                raise self._refuse(name, f"its storage {record.key[:50]!r} is missing") from error
            if len(raw) != record.numel * record.dtype.itemsize:
                raise self._refuse(
                    name, f"{record.numel} entries of {record.dtype} in {len(raw)} bytes"
                )
            flat = torch.frombuffer(raw, dtype=record.dtype) if raw else _empty(record.dtype)
            moved = relocate(flat, record.location, self._map_location, self._path)
            self._storages[record.key] = (record.dtype, moved)
        dtype, storage = self._storages[record.key]
        if dtype != record.dtype:
            raise self._refuse(name, "its storage has two dtypes")
        return storage

    def _refuse(self, name: str, found: str) -> CheckpointError:
        return refuse(self._path, f"param {name[:100]!r}: {found}", _DAMAGED)


def _are_tuples(size: Any, stride: Any) -> bool:
    return isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)


def _empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --- writing --------------------------------------------------------------------------------


def write(
    path: PathLike, params: Mapping[str, Tensor], constraints: Mapping[str, Constraint]
) -> None:
    """Write a file that Pyro's own store can load.

    Raises:
        CheckpointError: a constraint is fastsvi's own, and Pyro is not installed to name its own.
    """
    copies: dict[int, Tensor] = {}
    for leaf in params.values():
        # Clones, for a view would be written with the whole buffer that it is a view of.
        value = leaf.detach().clone()
        if isinstance(leaf, nn.Parameter):
            copies[id(leaf)] = nn.Parameter(value, requires_grad=leaf.requires_grad)
        else:
            copies[id(leaf)] = value.requires_grad_(leaf.requires_grad)
    state = {
        "params": {name: copies[id(leaf)] for name, leaf in params.items()},
        "constraints": {name: _as_pyro(name, constraints[name], path) for name in params},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, [buffer.getbuffer()])


def _as_pyro(name: str, constraint: Constraint, path: PathLike) -> Constraint:
    """Pyro's own constraint in place of fastsvi's of the same name, inside others as well."""
    if type(constraint).__module__.startswith("fastsvi."):
        try:
            from pyro.distributions import constraints as theirs

            named: Constraint = getattr(theirs, constraint_names.to_data(constraint)["name"])
            return named
        except (ImportError, AttributeError, UnnamedConstraintError) as error:
            raise CheckpointError(
                f"cannot save param {name!r} to {os.fspath(path)!r} in Pyro's format: Pyro has no "
                f'constraint {constraint!r} here ({error}). Save with format="fastsvi"'
            ) from error
    inner = {
        argument: [_as_pyro(name, part, path) for part in value]
        if argument == "cseq"
        else _as_pyro(name, value, path)
        for argument, value in vars(constraint).items()
        if argument in ("cseq", "base_constraint")
    }
    if not inner:
        return constraint
    copied = copy.copy(constraint)
    vars(copied).update(inner)
    return copied
