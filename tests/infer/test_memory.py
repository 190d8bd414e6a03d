"""Running out of memory, in the words of torch."""

import pytest
import torch

from fastsvi.infer import memory
from fastsvi.infer.memory import available_bytes, in_words, is_out_of_memory, requested_bytes

MESSAGES = {
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000 bytes. Error code 12 (Cannot allocate memory)": 4000,
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 80 bytes.": 80,
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of": 20 * 2**20,
}


def test_torch_still_says_it_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    assert is_out_of_memory(caught.value)
    assert requested_bytes(caught.value) == 4 * 10**14


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message):
    kind = torch.OutOfMemoryError if message.startswith("CUDA") else RuntimeError
    error = kind(message)
    assert is_out_of_memory(error)
    assert requested_bytes(error) == MESSAGES[message]


def test_other_errors():
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    assert requested_bytes(MemoryError()) is None


def test_free_memory(monkeypatch):
    free = available_bytes(RuntimeError())
    assert free is None or 0 <= free < 2**60
    monkeypatch.setattr(memory, "_in_machine", lambda: 500)
    monkeypatch.setattr(memory, "_in_container", lambda: 300)
    assert available_bytes(RuntimeError()) == 300
    monkeypatch.setattr(memory, "_in_container", lambda: None)
    assert available_bytes(RuntimeError()) == 500
    monkeypatch.setattr(memory, "_in_machine", lambda: None)
    assert available_bytes(RuntimeError()) is None


def test_a_container_with_and_without_a_limit(monkeypatch, tmp_path):
    files = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUP", files)
    assert memory._in_container() is None
    files[0].write_text("1000\n")
    files[1].write_text("400\n")
    assert memory._in_container() == 600
    files[0].write_text("max\n")
    assert memory._in_container() is None


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (1023, "1.02e+03 bytes"), (2**41, "2 TiB")]
)
def test_words(size, words):
    assert in_words(size) == words
