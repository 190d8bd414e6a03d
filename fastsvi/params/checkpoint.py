"""Files of tensors with a JSON header: written so that a crash cannot lose the previous one, read
so that a hostile one can do nothing but be refused.

The format is safetensors, which any of its readers opens; the header is JSON text in its metadata,
beside a SHA-256 digest over header and tensors. No pickle is involved in either direction.

:func:`write` and :func:`read` know nothing of parameters. The parts of a file (``"params"``,
``"optimizer"``, ...) are keys of the header, each with tensors whose names start with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsvi.errors import CheckpointError

PathLike = str | os.PathLike[str]

_FORMAT = "fastsvi"
_VERSION = 1
_MAX_HEADER = 100_000_000  # bytes; what safetensors itself allows

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# safetensors has no complex128, and complex64 in its newest versions only: pairs of reals.
_COMPLEX = {torch.complex128: "complex128", torch.complex64: "complex64"}


def write(path: PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to ``path`` in one atomic step.

    The file is complete or, after a crash at any moment, still the previous one.

    Args:
        path: of the file; its folder must exist.
        tensors: by name; on any device, read back from the CPU.
        header: anything that ``json`` can write.

    Raises:
        CheckpointError: a dtype has no place in a file, or the header is not JSON.
        OSError: the folder is missing, full, or not writable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/state", {"moments": torch.ones(2)}, {"step": 7})
    ...     read(f"{folder}/state")
    ({'moments': tensor([1., 1.])}, {'step': 7})
    """
    entries: dict[str, Any] = {}
    raws: list[Tensor] = []
    complexes: dict[str, str] = {}
    offset = 0
    # Wide dtypes first, so that each tensor starts at a multiple of its element size.
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        tensor = tensors[name].detach()
        if tensor.dtype in _COMPLEX:
            complexes[name] = _COMPLEX[tensor.dtype]
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"cannot write tensor {name!r} to {os.fspath(path)!r}: dtype {tensor.dtype} has no "
                f"place in a file; convert it to one of {sorted(map(str, _DTYPES))}"
            )
        raw = tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + raw.numel()],
        }
        raws.append(raw)
        offset += raw.numel()
    try:
        text = json.dumps({"header": header, "complex": complexes})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot write {os.fspath(path)!r}: its header is not JSON ({error})"
        ) from error
    digest = _digest(text, entries, raws)
    metadata = {"format": _FORMAT, "version": str(_VERSION), "content": text, "sha256": digest}
    head = json.dumps({"__metadata__": metadata, **entries}).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors start at a multiple of 8 bytes
    write_atomically(path, [len(head).to_bytes(8, "little"), head, *_chunks(raws)])


def read(path: PathLike) -> tuple[dict[str, Tensor], Any]:
    """Read back what :func:`write` wrote: tensors, on the CPU, and the header.

    Raises:
        CheckpointError: the file is truncated, damaged, unsafe or of another format.
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        return parse(file.read(), os.fspath(path))


def parse(data: bytes, path: str) -> tuple[dict[str, Tensor], Any]:
    """As :func:`read`, of bytes; ``path`` is for messages."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    metadata, entries = _parse_head(data, path)
    if metadata.get("format") != _FORMAT:
        raise refuse(path, "it holds tensors but was not written by fastsvi", _NOT_OURS)
    version, text = metadata.get("version", ""), metadata.get("content")
    if version != str(_VERSION):
        raise refuse(
            path, f"its format version is {str(version)[:20]!r}, known is {_VERSION}", _NEWER
        )
    if not isinstance(text, str):
        raise refuse(path, "it has no header", _DAMAGED)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise refuse(path, f"its tensors cannot be read ({error})", _DAMAGED) from error
    order = [name for name in entries if name in tensors]
    raws = [tensors[name].reshape(-1).view(torch.uint8) for name in order]
    if set(order) != set(tensors) or metadata.get("sha256") != _digest(text, entries, raws):
        raise refuse(path, "its contents do not match its checksum", _DAMAGED)
    content = _parse_json(text, path)
    complexes = content.get("complex") if isinstance(content, dict) else None
    if not isinstance(complexes, dict) or "header" not in content:
        raise refuse(path, "it has no header", _DAMAGED)
    for name, dtype in complexes.items():
        pairs = tensors.get(name)
        if dtype not in _COMPLEX.values() or pairs is None or pairs.shape[-1:] != (2,):
            raise refuse(path, f"tensor {name[:80]!r} is not complex, as the header says", _DAMAGED)
        tensors[name] = torch.view_as_complex(pairs)
    return tensors, content["header"]


_DAMAGED = "it is truncated or damaged; use another copy"
_NEWER = "update fastsvi, or write the file again with this version"
_NOT_OURS = "read it with safetensors and set the parameters one by one"


def refuse(path: str, found: str, remedy: str) -> CheckpointError:
    """The error for a file that is not read."""
    return CheckpointError(f"cannot read {path!r}: {found}; {remedy}")


def write_atomically(path: PathLike, chunks: Iterable[bytes | memoryview]) -> None:
    """Write to a temporary file beside ``path``, sync it, rename it, sync the folder."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".fastsvi-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    with contextlib.ExitStack() as undo:
        undo.callback(os.unlink, temporary)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
        undo.pop_all()
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _chunks(raws: Iterable[Tensor]) -> Iterator[memoryview]:
    for raw in raws:
        yield raw.numpy().data


def _digest(text: str, entries: Mapping[str, Any], raws: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([text, entries]).encode())
    for chunk in _chunks(raws):
        digest.update(chunk)
    return digest.hexdigest()


def _parse_head(data: bytes, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The safetensors head: metadata, and the entry of each tensor in file order."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise refuse(path, f"it ends after {len(data)} bytes, inside its header", _DAMAGED)
    if length > _MAX_HEADER:
        raise refuse(path, f"its header claims {length} bytes", _DAMAGED)
    head = _parse_json(data[8 : 8 + length], path)
    metadata = head.pop("__metadata__", None) if isinstance(head, dict) else None
    if not isinstance(metadata, dict):
        raise refuse(path, "it is no safetensors file with metadata", _NOT_OURS)
    return metadata, head


def _parse_json(text: str | bytes, path: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name appears twice")
        return result

    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise refuse(path, f"its header is not JSON ({str(error)[:100]})", _DAMAGED) from error
