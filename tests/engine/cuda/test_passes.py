"""How loop nests are taken apart and shared among threads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastsvi.engine.cuda.block import _find_registers
from fastsvi.engine.cuda.emission import joined, passes_of
from fastsvi.engine.cuda.emit import emit_kernels
from fastsvi.engine.cuda.levels import levels, place
from fastsvi.engine.cuda.passes import Pass, Shape, Team, parts_of, shape_of
from fastsvi.engine.cuda.pieces import find_pieces
from fastsvi.engine.cuda.write import Writer
from fastsvi.engine.loops.ir import Array
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.record import record

BLOCK, GRID = Team(256, is_block=True), Team(256, is_block=False)


@pytest.mark.parametrize(
    ("rows", "terms", "along", "team", "expected"),
    [
        # A single number: every warp sums for itself if that is short, else warps share it.
        (1, 1, True, BLOCK, Shape(everywhere=True)),
        (1, 10, True, BLOCK, Shape(16, 1, everywhere=True)),
        (1, 128, True, BLOCK, Shape(32, 1, everywhere=True)),
        (1, 4096, True, BLOCK, Shape(32, 8)),
        # Rows enough for all threads, and rows too few.
        (256, 10, True, BLOCK, Shape(1, 1)),
        (10, 64, True, BLOCK, Shape(16, 1)),
        # A grid: neighbouring terms are read by neighbouring lanes, neighbouring rows by threads.
        (1_000_000, 100, True, GRID, Shape(8, 1)),
        (100, 1_000_000, False, GRID, Shape(1, 1311)),
        (1, 1_000_000, True, GRID, Shape(32, 4096)),
        (1_000_000, 3, True, GRID, Shape(1, 1)),
        (1, 1, True, GRID, Shape()),
    ],
)
def test_the_shape_follows_from_the_extents(rows, terms, along, team, expected):
    assert shape_of(rows, terms, along, team) == expected


@pytest.mark.parametrize("team", [BLOCK, GRID, Team(32, is_block=True)])
@pytest.mark.parametrize("along", [True, False])
def test_lanes_are_a_part_of_a_warp_and_no_chunk_is_empty(team, along):
    for rows in (1, 2, 31, 33, 1000, 1 << 20):
        for terms in (0, 1, 2, 3, 31, 33, 127, 1025, 1 << 20):
            lanes, chunks, everywhere = shape_of(rows, terms, along, team)
            assert lanes in (1, 2, 4, 8, 16, 32)
            assert chunks == 1 or lanes * (chunks - 1) < terms
            assert not everywhere or (rows == 1 and team.is_block)


def planned(step, *tensors, num_state=1, team=BLOCK):
    program = Program(record(step, list(tensors)), "loops")
    plan = schedule(program, num_state)
    return program, plan, Writer(program, plan, team)


def test_sums_over_different_axes_of_a_nest_are_different_passes_and_stores_come_last():
    def step(x, y):
        z = x * y.exp()
        return z, z.sum(0).sum() + z.sum(1).sin().sum(), z.isnan().any()

    _, plan, _ = planned(step, torch.randn(40, 7), torch.randn(40, 7))
    parts = parts_of(plan.nests[0], plan, BLOCK)
    assert [len(part.reduced) for part in parts] == [1, 1, 2, 0]
    assert all(placed.statement.combine is None for placed in parts[-1].placed)


def test_a_sum_and_elementwise_work_over_the_same_elements_are_one_pass():
    def step(x, y):
        z = x * y.exp()
        return z, z.sum(1).sin().sum(), z[0, 0].isnan()

    _, plan, _ = planned(step, torch.randn(300, 7), torch.randn(300, 7))
    (part,) = parts_of(plan.nests[0], plan, BLOCK)
    assert [bool(placed.statement.reduced) for placed in part.placed].count(True) == 1
    assert len(part.placed) > 1


def test_numbers_that_all_threads_hold_cost_no_barrier():
    """A chain of scalars, from one sum to the next, stays in registers."""

    def step(x):
        a = x.sum()
        b = (a * 2).sin() + a
        return x * b, b.exp(), b.isnan()

    _, _, writer = planned(step, torch.randn(10))
    _find_registers(writer, 1)
    groups = levels(passes_of(writer))
    # The sum, what is made of it, and the new state, which must wait: the sum reads the old one.
    assert len(groups) == 2


def test_levels_wait_for_what_is_read_and_for_the_readers_of_what_is_overwritten():
    first = Pass([], writes={"x"})
    reader = Pass([], reads={"x", "state"}, writes={"y"})
    overwrites = Pass([], writes={"state"})
    elsewhere = Pass([], reads={"other"})
    groups = levels([first, reader, overwrites, elsewhere])
    assert groups == [[first, elsewhere], [reader], [overwrites]]


def test_parts_of_one_array_are_written_side_by_side_but_additions_to_it_wait():
    pieces = [Pass([], writes={"x"}) for _ in range(3)]
    added = Pass([], reads={"x"}, writes={"x"})
    assert levels([*pieces, added]) == [pieces, [added]]


def test_the_loop_over_rounds_shares_no_level_with_what_is_around_it():
    before, inside, after = (Pass([], writes={str(k)}, phase=k) for k in range(3))
    assert levels([before, inside, after]) == [[before], [inside], [after]]


def wide_step(x, moment, count, elsewhere=lambda gradient: gradient):
    """A gradient from two pieces of one length and one of another, checked, then used."""
    n = 10000
    loc, scale, rest = x[:n], x[n : 2 * n], x[2 * n :]
    z = loc + scale.exp() * 0.5
    slope = z.sin() * z
    gradient = torch.cat([slope, slope * scale.exp() * 0.5 - 1, rest * 2])
    fine = torch.isfinite(gradient).all()
    moment = torch.where(fine, 0.9 * moment + elsewhere(gradient), moment)
    x = torch.where(fine, x - 0.1 * moment, x)
    return x, moment, count + 1, (z * z).sum() + (rest * rest).sum(), ~fine


def test_a_gradient_that_is_put_together_is_not_stored():
    state = [torch.randn(20007), torch.randn(20007), torch.zeros(())]
    program = Program(record(wide_step, state), "device")
    plan = schedule(program, 3)
    pieces = find_pieces(program, plan)
    ((array, found),) = pieces.items()
    assert array.size == 20007
    assert found.groups() == [(10000, [0, 10000]), (7, [20000])]
    made = emit_kernels(program, plan, 3)
    assert made.arena_bytes < 4 * 20007  # no room for it


def test_a_gradient_that_is_read_elsewhere_is_stored():
    def step(*state):
        return wide_step(*state, lambda gradient: gradient.flip(0))

    state = [torch.randn(20007), torch.randn(20007), torch.zeros(())]
    program = Program(record(step, state), "device")
    assert not find_pieces(program, schedule(program, 3))


def test_a_gradient_of_what_others_write_over_is_stored():
    """The update of one element must not change what the gradient of another is made of."""
    n = 10000

    def step(x):
        slope = x[:n] * x[:n].flip(0)
        return x - torch.cat([slope, slope]), x.sum(), x[0].isnan()

    program = Program(record(step, [torch.randn(2 * n)]), "device")
    plan = schedule(program, 1)
    assert not find_pieces(program, plan) or not plan.aliased


def test_passes_that_loop_over_the_same_are_one():
    """The check of a gradient runs along with the sums over what it is made of."""
    state = [torch.randn(20007), torch.randn(20007), torch.zeros(())]
    program = Program(record(wide_step, state), "device")
    plan = schedule(program, 3)
    writer = Writer(program, plan, GRID, pieces=find_pieces(program, plan))
    groups = levels(passes_of(writer))
    together = joined(writer, groups)
    long = [[one for one in group if one.work == 10000] for group in groups]
    assert list(map(len, long))[:1] == [2]
    assert sum(one.work == 10000 for one in together[0]) == 1


def test_memory_is_shared_by_arrays_that_are_not_in_use_together():
    arrays = [Array(name, (1000,), torch.float32, "temporary") for name in "abc"]
    groups = [
        [Pass([], writes={"a"})],
        [Pass([], reads={"a"}, writes={"b"})],
        [Pass([], reads={"b"}, writes={"c"})],
    ]
    layout = place(arrays, groups, ["c"], 16)
    a, b, c = (layout.offsets[array] for array in arrays)
    assert a == c
    assert abs(b - a) >= 4000
    assert layout.size == 2 * 4000


def test_an_array_that_each_round_reads_keeps_its_memory_for_all_rounds():
    arrays = [Array(name, (1000,), torch.float32, "temporary") for name in "abc"]
    groups = [
        [Pass([], writes={"a"})],
        [Pass([], reads={"a"}, writes={"b"}, phase=1)],
        [Pass([], reads={"b"}, writes={"c"}, phase=1)],
    ]
    layout = place(arrays, groups, [], 16)
    places = sorted(layout.offsets.values())
    assert all(high - low >= 4000 for low, high in itertools.pairwise(places))


@pytest.mark.parametrize("alignment", [16, 256])
def test_memory_is_aligned(alignment):
    arrays = [Array(f"x{n}", (n,), torch.float32, "temporary") for n in (1, 3, 300, 301)]
    groups = [[Pass([], writes={array.name for array in arrays})]]
    layout = place(arrays, groups, [], alignment)
    assert all(offset % alignment == 0 for offset in layout.offsets.values())
    taken = sorted((at, at + 4 * math.prod(x.shape)) for x, at in layout.offsets.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
