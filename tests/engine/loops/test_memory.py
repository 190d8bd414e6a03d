"""Temporaries that do not live at the same time share memory, and cheap ones take none."""

from __future__ import annotations

import torch

from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.memory import place
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.native import NativeStep
from fastsvi.engine.record import record

NEVER = torch.zeros((), dtype=torch.bool)
SIZE = 1 << 14


def long_chain(x):
    """Every link needs the sum of the one before, so each is a nest of its own."""
    for _ in range(8):
        x = (x - x.exp().mean()).sin()
    return x, x.sum(), NEVER


def test_a_chain_takes_the_memory_of_two_links():
    x = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    expected, loss, _ = long_chain(x)
    native = NativeStep(long_chain, [x])
    assert native.arena_bytes < 2.1 * SIZE * 8
    (got,) = native.run(1)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, loss, rtol=1e-10, atol=1e-10)


def test_arrays_alive_together_are_apart():
    def step(x, y):
        kept = [(x * k).exp() for k in range(1, 6)]
        total = sum(part.mean() for part in kept)
        again = [(part * total).sin() for part in kept]
        more = sum(part.mean() for part in again)
        return x + sum(a * b for a, b in zip(kept, again, strict=True)) * more, y, total, NEVER

    state = [torch.linspace(-1, 1, SIZE, dtype=torch.float64), torch.ones(3)]
    program = Program(record(step, state))
    plan = schedule(program, 2)
    layout = place(program, plan, 2)
    lives = {}
    for time, nest in enumerate(plan.nests):
        for statement in nest.statements:
            for array in (statement.array, *statement.loads):
                lives.setdefault(array, []).append(time)
    placed = [(layout.offsets[a], a.size * a.dtype.itemsize, lives[a]) for a in layout.offsets]
    for k, (start, size, life) in enumerate(placed):
        assert start + size <= layout.size
        for other, length, span in placed[k + 1 :]:
            apart = start + size <= other or other + length <= start
            assert apart or max(life) < min(span) or max(span) < min(life)
    expected = step(*state)
    (loss,) = NativeStep(step, state).run(1)
    torch.testing.assert_close([*state, loss], list(expected[:3]), rtol=1e-10, atol=1e-10)


def test_cheap_values_are_computed_again_instead_of_stored():
    """As the moments of Adam: read again after a reduction that only looks at them."""

    def step(x, moment):
        moment = moment * 0.9 + x * 0.1
        finite = torch.isfinite(moment).all()
        return torch.where(finite, x - moment, x), torch.where(finite, moment, x), x.sum(), ~finite

    state = [torch.linspace(-1, 1, SIZE), torch.zeros(SIZE)]
    expected = step(*state)
    native = NativeStep(step, state)
    assert native.arena_bytes < SIZE * 4
    native.run(1)
    torch.testing.assert_close(state, list(expected[:2]))


def test_what_is_overwritten_is_not_read_again_later():
    """The new state is written while a value made of the old one is still to come."""

    def step(x, y):
        shifted = x * 2 + 1
        total = shifted.sum()
        new = x.flip(0) + total
        return new, shifted * total + new.sum(), total, NEVER

    state = [torch.linspace(-1, 1, SIZE, dtype=torch.float64) for _ in range(2)]
    expected = step(*state)
    (loss,) = NativeStep(step, state).run(1)
    torch.testing.assert_close([*state, loss], list(expected[:3]))
