"""Random subsets: permutations for every size, uniform, and equal for every form."""

from __future__ import annotations

import itertools
import time

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from conformance import Case, Suite
from hypothesis import given, settings

from fastsvi.errors import KernelError
from fastsvi.kernels import dispatch, philox, subsample

KEY = philox.derive_key(3, 9)


def case(fits: int, particles: int, size: int, subsample_size: int, **options) -> Case:
    return Case(
        f"{subsample_size}-of-{size}",
        make=lambda _: (KEY, philox.make_origin(step=2)),
        call=lambda key, origin: subsample.indices(
            key, origin, fits, particles, size, subsample_size
        ),
        batched=(0, 1),
        dtypes=(torch.float64,),  # there are none
        **options,
    )


class TestIndices(Suite):
    cases = (
        case(2, 3, 0, 0, capture=False),
        case(2, 3, 1, 1, capture=False),
        case(2, 1, 40, 5, vmap=True, compile=True, strided_interpreted=True),
        case(1, 1, 1024, 1024, capture=False, interpret=False),
        case(1, 1, 300, 299, capture=False),  # three blocks
        case(2, 3, 1025, 1025, capture=False, interpret=False),
        # A grid with cells beyond the size.
        case(2, 1, 1031, 17, vmap=True, strided_interpreted=True),
        case(2, 0, 5000, 10, capture=False),
        case(1, 2, 1_000_003, 129, capture=False),
        case(1, 1, subsample.MAX_SIZE, 3, capture=False),
    )


def draws(size: int, subsample_size: int, number: int) -> torch.Tensor:
    """Independent subsets [number, b]: particles of one call."""
    return subsample.indices(KEY, philox.make_origin(), 1, number, size, subsample_size)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 1023, 1024, 1025, 1031, 2047, 2048, 4099])
def test_a_full_subset_is_a_permutation(size):
    subsets = subsample.indices(KEY, philox.make_origin(), 2, 3, size, size)
    assert torch.equal(subsets.sort(-1).values, torch.arange(size).expand(2, 3, size))


@given(size=st.integers(1, 3000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_subsets_are_prefixes_of_a_permutation(size, data):
    count = data.draw(st.integers(0, size))
    subset = subsample.indices(KEY, philox.make_origin(), 1, 1, size, count)
    whole = subsample.indices(KEY, philox.make_origin(), 1, 1, size, size)
    assert torch.equal(subset, whole[..., :count])
    assert len(set(subset.flatten().tolist())) == count


@given(size=st.integers(1025, 1 << 40))
@settings(max_examples=200, deadline=None)
def test_grids_are_tight_and_near_square(size):
    rows, columns = subsample.grid_of(size)
    assert 0 <= rows * columns - size < max(rows, 2)
    assert rows - 1 <= columns <= 4 * rows + 4
    # Reference arithmetic: hash * columns must stay below 2^63.
    assert columns < 1 << 31


def test_walks_end_inside_however_long_they_are(monkeypatch):
    # A grid with far more cells than points makes walks long; the table must still end them all.
    for size in (1025, 1100, 1500):
        monkeypatch.setitem(subsample._grids, size, (45, 46))
        whole = subsample.indices(KEY, philox.make_origin(), 1, 20, size, size)
        assert torch.equal(whole.sort(-1).values, torch.arange(size).expand(1, 20, size))


@pytest.mark.parametrize(("size", "count"), [(5, 2), (4, 4), (6, 3)])
def test_small_subsets_are_uniform_over_all_ordered_subsets(size, count):
    codes = {p: i for i, p in enumerate(itertools.permutations(range(size), count))}
    seen = [codes[tuple(row)] for row in draws(size, count, 24_000).tolist()]
    counts = np.bincount(seen, minlength=len(codes))
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [100, 1025, 1031, 5000])
def test_marginals_are_uniform(size):
    subsets = draws(size, 10, 20_000)
    for position in (0, 1, 9):
        counts = np.bincount(subsets[:, position].numpy(), minlength=size)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    counts = np.bincount(subsets.flatten().numpy(), minlength=size)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [100, 1025, 1031, 5000])
def test_pairs_are_uniform(size):
    # The difference of two positions, modulo the size, is uniform on 1 .. size - 1.
    subsets = draws(size, 3, 40_000)
    for i, j in [(0, 1), (1, 2), (0, 2)]:
        difference = (subsets[:, i] - subsets[:, j]) % size
        counts = np.bincount(difference.numpy(), minlength=size)
        assert counts[0] == 0
        assert scipy.stats.chisquare(counts[1:]).pvalue > 1e-4
        # And both halves of the range meet each other as often as themselves.
        sides = np.bincount(
            ((subsets[:, i] * 2 // size) * 2 + subsets[:, j] * 2 // size).numpy(), minlength=4
        )
        half = np.array([np.sum(np.arange(size) * 2 // size == s) for s in (0, 1)])
        pairs = np.outer(half, half) - np.diag(half)
        assert scipy.stats.chisquare(sides, 40_000 * (pairs / pairs.sum()).flatten()).pvalue > 1e-4


@pytest.mark.parametrize("size", [50, 1025, 5000])
def test_steps_particles_and_fits_differ(size):
    def first(**at):
        return subsample.indices(KEY, philox.make_origin(**at), 1, 1, size, 10).flatten().tolist()

    subsets = [first(), first(step=1), first(particle=1), first(fit=1)]
    assert all(a != b for a, b in itertools.combinations(subsets, 2))
    both = subsample.indices(KEY, philox.make_origin(), 2, 2, size, 10)
    assert both[0, 1].tolist() == first(particle=1)
    assert both[1, 0].tolist() == first(fit=1)


@pytest.mark.parametrize("size", [50, 5000])
def test_the_group_of_the_origin_is_not_used(size):
    at = [philox.make_origin(element=e, step=4) for e in (0, 4096)]
    subsets = [subsample.indices(KEY, origin, 1, 1, size, 10) for origin in at]
    assert torch.equal(*subsets)


@pytest.mark.parametrize("size", [50, 5003])
def test_a_block_of_steps_equals_its_steps(size):
    block = subsample.indices_block(KEY, philox.make_origin(step=5), 4, 2, 3, size, 10)
    for k in range(4):
        one = subsample.indices(KEY, philox.make_origin(step=5 + k), 2, 3, size, 10)
        assert torch.equal(block[k], one)


@pytest.mark.parametrize("size", [40, 5000])
@pytest.mark.parametrize("form", ["torch", "triton" if torch.cuda.is_available() else "interpret"])
def test_the_operation_passes_opcheck(form, size):
    device = "cuda" if form == "triton" else "cpu"
    at = KEY[None].to(device), philox.make_origin(device=device)[None]
    with dispatch.use(form):
        torch.library.opcheck(torch.ops.fastsvi.subsample_indices.default, (*at, 1, 1, 1, size, 3))


def test_time_does_not_grow_with_the_size():
    def seconds(size):
        subsample.indices(KEY, philox.make_origin(), 1, 1, size, 100)
        best = []
        for _ in range(5):
            start = time.perf_counter()
            subsample.indices(KEY, philox.make_origin(), 1, 1, size, 100)
            best.append(time.perf_counter() - start)
        return min(best)

    # A permutation of 2^40 entries would not even fit the memory.
    assert seconds(1 << 40) < 5 * seconds(1 << 12)


class TestBadInput:
    @pytest.mark.parametrize(
        ("size", "count", "words"),
        [
            (10, 11, "subsample_size = 11, size = 10"),
            (10, -1, "subsample_size = -1"),
            (-1, -1, "size = -1"),
            ((1 << 40) + 1, 3, "2.40"),
        ],
    )
    def test_sizes(self, size, count, words):
        with pytest.raises(KernelError, match=f"subsample.indices: .*{words}"):
            subsample.indices(KEY, philox.make_origin(), 1, 1, size, count)

    def test_key(self):
        with pytest.raises(KernelError, match=r"subsample.indices: key.*shape \(3,\)"):
            subsample.indices(torch.zeros(3).long(), philox.make_origin(), 1, 1, 5, 2)
