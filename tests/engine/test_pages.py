"""Memory given back."""

from __future__ import annotations

import sys

import pytest
import torch

from fastsvi.engine.pages import blocks_apart, trim_heap, zero_pages


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 100_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("offset", [0, 1, 777])
def test_zeros_and_nothing_else(size, dtype, offset):
    whole = torch.ones(size + 5000, dtype=dtype)
    zero_pages(whole[offset : offset + size])
    assert whole.sum() == 5000
    assert not whole[offset : offset + size].any()


def test_what_is_not_in_one_piece():
    whole = torch.ones(3000, 8)
    zero_pages(whole[:, 2])
    assert whole.sum() == 3000 * 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_given_back():
    x = torch.ones(1 << 24)  # 64 MiB
    before = resident()
    zero_pages(x)
    assert before - resident() > 60 << 20
    x += 1
    assert x.sum() == 1 << 24


def test_apart():
    with blocks_apart():
        x = torch.ones(1 << 20)
    assert x.sum() == 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_gaps_are_given_back_where_blocks_are_apart():
    small = [torch.ones(4 << 10) for _ in range(4000)]  # 16 KiB each, in the heap
    del small[::2]
    full = resident()
    trim_heap()  # nothing, for it takes time
    assert full - resident() < 1 << 20
    with blocks_apart():
        pins = [torch.ones(4 << 10) for _ in range(4000)]
        del pins[::2]
        full = resident()
        trim_heap()
        # Of 31 MiB between the others; a page at either end of a gap is shared with them.
        assert full - resident() > 15 << 20
    assert len(small) == len(pins) == 2000
