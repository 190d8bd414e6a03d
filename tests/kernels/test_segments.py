from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsvi.errors import KernelError
from fastsvi.kernels.segments import TILE, Segments


@given(sizes=st.lists(st.integers(0, 6), max_size=12), lead=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_sum_and_expand_against_python(sizes, lead):
    segments = Segments(sizes)
    values = torch.randn(lead, sum(sizes))
    parts = values.split(list(sizes), -1) if sizes else []
    expected = [part.sum(-1) for part in parts]
    expected = torch.stack(expected, -1) if expected else values.new_zeros(lead, 0)
    torch.testing.assert_close(segments.sum(values), expected)

    numbers = torch.arange(float(len(sizes)))
    expanded = segments.expand(numbers).expand(sum(sizes)) if len(sizes) == 1 else (
        segments.expand(numbers)
    )  # fmt: skip
    assert torch.equal(expanded, numbers.repeat_interleave(torch.tensor(sizes, dtype=torch.int64)))
    assert segments.offsets.tolist() == [sum(sizes[:s]) for s in range(len(sizes) + 1)]


@pytest.mark.parametrize("short", [1, 9_000])  # few segments, and too many to walk over
def test_long_unequal_segments_do_not_drift(short):
    # A running float32 sum of ones stops at 2^24 = 16777216.
    segments = Segments([18_000_000] + [1] * short)
    assert segments.sum(torch.ones(18_000_000 + short)).tolist() == [18_000_000.0] + [1.0] * short


def test_few_long_segments_are_walked_over_with_the_same_result():
    sizes = [4096, 0, 5000, 3]
    segments = Segments(sizes)
    x = torch.randn(2, sum(sizes), dtype=torch.float64)
    expected = torch.stack([part.sum(-1) for part in x.split(sizes, -1)], -1)
    torch.testing.assert_close(segments.sum(x), expected)


@given(sizes=st.lists(st.integers(0, 2500), max_size=8))
@settings(max_examples=40, deadline=None)
def test_chunks_cut_the_buffer_by_segments_and_tiles(sizes):
    segments = Segments(sizes)
    expected = []
    for s, (start, stop) in enumerate(zip(segments.offsets, segments.offsets[1:], strict=False)):
        at = int(start)
        while at < int(stop):
            end = min(int(stop), (at // TILE + 1) * TILE)
            expected.append([s, at, end])
            at = end
    assert segments.chunks.tolist() == expected
    owners = [row[0] for row in expected]
    firsts = [sum(owner < s for owner in owners) for s in range(len(sizes) + 1)]
    assert segments.chunk_offsets.tolist() == firsts


def test_sum_is_differentiable_and_batches():
    segments = Segments([2, 0, 3])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(segments.sum, (x,))
    assert torch.equal(torch.func.vmap(segments.sum)(x), segments.sum(x))


def test_negative_sizes_are_refused():
    with pytest.raises(KernelError, match=r"negative.*\(2, -1\)"):
        Segments([2, -1])
