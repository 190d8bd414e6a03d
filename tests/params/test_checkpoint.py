"""Files survive crashes, and hostile ones are refused."""

from __future__ import annotations

import builtins
import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsvi.errors import CheckpointError
from fastsvi.params import checkpoint

TENSORS = {
    "moments": torch.tensor([1.0, float("nan"), float("-inf")]),
    "half": torch.tensor([[1.5]], dtype=torch.float16),
    "brain": torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16),
    "double": torch.tensor(3.0, dtype=torch.float64),
    "z64": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64),
    "z128": torch.tensor([[1 + 2j]], dtype=torch.complex128),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "empty": torch.empty(0, 3),
    "step": torch.arange(3),
    "flags": torch.tensor([True, False]),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "a/../b\n\u2028 \N{GREEK SMALL LETTER BETA}": torch.ones(1, 2, 0),
}
HEADER = {"params": [], "optimizer": {"lr": 0.1, "betas": [0.9, 0.999]}, "word": "\u2028 \"'"}


def equal(a, b):
    as_bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b)
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(as_bits[a.element_size()]), b.view(as_bits[b.element_size()]))
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def file(path):
    checkpoint.write(path, TENSORS, HEADER)
    return path


def test_what_is_written_is_read_back_bit_for_bit(file):
    tensors, header = checkpoint.read(file)
    assert set(tensors) == set(TENSORS)
    assert all(equal(TENSORS[name], tensors[name]) for name in TENSORS)
    assert header == HEADER


def test_views_are_written_without_what_they_are_views_of(path):
    whole = torch.zeros(100_000)
    checkpoint.write(
        path, {"a": whole[:3], "b": whole[5:20:3], "c": whole.view(10, -1).t()[:2]}, {}
    )
    tensors, _ = checkpoint.read(path)
    assert path.stat().st_size < 2000
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {"a": (3,), "b": (5,), "c": (2, 10)}


def test_any_reader_of_safetensors_can_open_it(file):
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = load_file(file)
    assert torch.equal(tensors["double"], TENSORS["double"])
    assert torch.equal(torch.view_as_complex(tensors["z128"]), TENSORS["z128"])
    with safe_open(file, "pt") as reader:
        assert reader.metadata()["format"] == "fastsvi"
        assert json.loads(reader.metadata()["content"])["header"] == HEADER


def test_it_holds_no_pickle(file):
    data = file.read_bytes()
    assert not data.startswith(b"PK")
    assert b"torch" not in data


def test_what_cannot_be_written_is_said(path):
    with pytest.raises(CheckpointError, match=r"'x'.*float8_e4m3fn.*convert"):
        checkpoint.write(path, {"x": torch.zeros(1).to(torch.float8_e4m3fn)}, {})
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoint.write(path, {}, {"x": object()})
    with pytest.raises(FileNotFoundError):
        checkpoint.write(path / "no folder" / "x", {}, {})
    assert not path.exists()


def test_files_that_are_not_there(path):
    with pytest.raises(FileNotFoundError):
        checkpoint.read(path)


# --- crashes --------------------------------------------------------------------------------


class CrashError(BaseException):
    """Not an Exception: nothing may catch it by chance."""


class Crasher:
    """Lets the first ``n`` operations on files happen, and fails at the next."""

    def __init__(self, monkeypatch, n):
        self.left = n
        for name in ("open", "replace", "fsync", "fdopen", "close", "chmod"):
            monkeypatch.setattr(os, name, self.guard(getattr(os, name)))

    def guard(self, function):
        def guarded(*args, **kwargs):
            self.tick()
            result = function(*args, **kwargs)
            return _Writes(result, self.tick) if function.__name__ == "fdopen" else result

        return guarded

    def tick(self):
        if self.left == 0:
            raise CrashError
        self.left -= 1


class _Writes:
    """A file whose every write may be the last."""

    def __init__(self, file, tick):
        self.file, self.tick = file, tick

    def write(self, data):
        self.tick()
        half = len(data) // 2
        self.file.write(data[:half])
        self.tick()
        return self.file.write(data[half:])

    def flush(self):
        self.tick()
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()


def test_a_crash_at_any_moment_leaves_one_whole_file(file, monkeypatch):
    new = {"moments": torch.full((3,), 9.0)}
    survived = None
    for n in range(100):
        with monkeypatch.context() as patch:
            Crasher(patch, n)
            try:
                checkpoint.write(file, new, {"new": True})
                survived = n
            except CrashError:
                pass
        tensors, header = checkpoint.read(file)
        if header == HEADER:
            assert set(tensors) == set(TENSORS)
        else:
            assert header == {"new": True}
            assert torch.equal(tensors["moments"], new["moments"])
            checkpoint.write(file, TENSORS, HEADER)
        assert [p.name for p in file.parent.iterdir()] == ["state"]  # no debris
        if survived is not None:
            break
    assert survived is not None
    assert survived > 10


def test_a_crash_before_there_was_a_file_leaves_none(path, monkeypatch):
    with monkeypatch.context() as patch:
        Crasher(patch, 4)
        with pytest.raises(CrashError):
            checkpoint.write(path, TENSORS, {})
    assert list(path.parent.iterdir()) == []


def test_data_is_synced_before_the_rename_and_the_folder_after(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        mode = os.fstat(descriptor).st_mode
        events.append("sync folder" if stat.S_ISDIR(mode) else "sync file")
        fsync(descriptor)

    def note_replace(a, b):
        events.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoint.write(path, TENSORS, {})
    assert events == ["sync file", "rename", "sync folder"]


def test_links_and_permissions_are_kept(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    file.chmod(0o640)
    checkpoint.write(link, {}, {"new": 1})
    assert link.is_symlink()
    assert checkpoint.read(file)[1] == {"new": 1}
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    checkpoint.write(tmp_path / "a", {}, {})
    with builtins.open(tmp_path / "b", "wb"):
        pass
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


# --- damage ---------------------------------------------------------------------------------

# One file for all examples of the fuzz tests.
_DATA = None


def data_of_a_file(tmp_path_factory):
    global _DATA
    if _DATA is None:
        path = tmp_path_factory.mktemp("fuzz") / "state"
        checkpoint.write(path, TENSORS, HEADER)
        _DATA = path.read_bytes()
    return _DATA


def parses_equal_or_refuses(data):
    try:
        tensors, header = checkpoint.parse(data, "file")
    except CheckpointError as error:
        found, _, remedy = str(error).partition("; ")
        if not (found.startswith("cannot read 'file'") and remedy):
            raise AssertionError(f"not a helpful error: {error}") from error
        return False
    assert header == HEADER
    assert all(equal(TENSORS[name], tensors[name]) for name in TENSORS)
    return True


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1))
def test_flipped_bits_are_found(tmp_path_factory, flips):
    data = bytearray(data_of_a_file(tmp_path_factory))
    for position, mask in flips:
        data[int(position * len(data))] ^= mask
    parses_equal_or_refuses(bytes(data))


def test_every_single_flipped_byte_is_found(tmp_path_factory):
    data = data_of_a_file(tmp_path_factory)
    head = 8 + int.from_bytes(data[:8], "little")
    loaded = []
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x21
        if parses_equal_or_refuses(bytes(damaged)):
            loaded.append(position)
    assert all(position < head for position in loaded)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0, 1, exclude_max=True), st.binary(max_size=20))
def test_truncated_and_extended_files_are_found(tmp_path_factory, part, more):
    data = data_of_a_file(tmp_path_factory)
    assert not parses_equal_or_refuses(data[: int(part * len(data))] + more)
    assert not more or not parses_equal_or_refuses(data + more)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    assert not parses_equal_or_refuses(noise)


def safetensors_file(head, body=b"", length=None):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
OURS = {"format": "fastsvi", "version": "1", "content": '{"header": {}, "complex": {}}'}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends after 0 bytes"),
        (b"1234567", "ends after 7 bytes"),
        (safetensors_file({}, length=2**63), "inside its header"),
        (safetensors_file({}, length=10**9), "inside its header"),
        (safetensors_file(b"\xff\xfe"), "not JSON"),
        (safetensors_file(b"[" * 100_000), "not JSON"),
        (safetensors_file(b'{"a": 1, "a": 2}'), "appears twice"),
        (safetensors_file([]), "no safetensors file with metadata"),
        (safetensors_file({"a": ENTRY}, b"1234"), "no safetensors file with metadata"),
        (safetensors_file({"__metadata__": {"format": "pt"}}), "not written by fastsvi"),
        (safetensors_file({"__metadata__": {**OURS, "version": "2"}}), "version is '2'"),
        (safetensors_file({"__metadata__": {**OURS, "version": [2]}}), "version is"),
        (safetensors_file({"__metadata__": {**OURS, "content": 1}}), "no header"),
        (safetensors_file({"__metadata__": OURS}), "do not match its checksum"),
        (safetensors_file({"__metadata__": OURS, "a": ENTRY}), "cannot be read"),
        (
            safetensors_file(
                {"__metadata__": OURS, "a": {**ENTRY, "shape": [10**12], "data_offsets": [0, 4]}},
                b"1234",
            ),
            "cannot be read",
        ),
        (
            safetensors_file({"__metadata__": OURS, "a": {**ENTRY, "dtype": "F64"}}, b"1234"),
            "cannot be read",
        ),
        (
            safetensors_file({"__metadata__": OURS, "a": ENTRY, "b": ENTRY}, b"1234"),
            "cannot be read",
        ),
    ],
)
def test_hostile_files_are_refused(path, data, words):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.read(path)
    assert repr(str(path)) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{}", '{"header": 1}', '{"header": 1, "complex": {"a": "complex64"}}', "nonsense"],
)
def test_a_forged_checksum_does_not_help(path, content):
    entries = {"a": ENTRY}
    raw = torch.zeros(4, dtype=torch.uint8)
    digest = checkpoint._digest(content, entries, [raw])
    metadata = {**OURS, "content": content, "sha256": digest}
    path.write_bytes(safetensors_file({"__metadata__": metadata, **entries}, bytes(4)))
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
