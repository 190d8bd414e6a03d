"""The block form: fits and steps of one launch, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastsvi.engine.cuda.emit import emit_block, emit_kernels
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.record import record
from fastsvi.errors import CaptureError


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_fits_with_their_own_data_steps_with_their_own_rows_and_flags_that_end_nothing(
    emitted_block,
):
    def step(count, total, x, shared):
        total = total * 0.5 + (x * shared).sum(0)
        return count + 1, total, total.sin().sum(), count == 1

    state = [torch.zeros((), dtype=torch.int64), double(5)]
    made = emitted_block(step, state, [double(33, 5), double(5)])
    fits = 3
    states = [[state[0] + fit for fit in range(fits)], [double(5) for _ in range(fits)]]
    shared = double(5)
    inputs = [[double(4, 33, 5) for _ in range(fits)], [shared] * fits]
    new, losses, halts = made.run(states, inputs, steps=4, stepped=[0], fits=fits, seed=3)
    for fit in range(fits):
        count, total = (xs[fit] for xs in states)
        for number in range(4):
            count, total, loss, halt = step(count, total, inputs[0][fit][number], shared)
            torch.testing.assert_close(losses[fit, number], loss, rtol=1e-12, atol=1e-12)
            assert bool(halts[fit, number]) == bool(halt)
        assert int(new[0][fit]) == int(count)
        torch.testing.assert_close(new[1][fit], total, rtol=1e-12, atol=1e-12)


def test_working_memory_that_does_not_fit_in_a_block(emitted_block, check, eager):
    def step(x, y):
        z = x * y.sum(0)
        return z + z.sum(1, keepdim=True), z.sum(), z.isnan().any()

    state, inputs = [double(50, 9)], [double(50, 9)]
    small = emitted_block(step, state, inputs, most_shared=100)
    large = emitted_block(step, state, inputs)
    assert large.made.in_shared
    assert not small.made.in_shared
    check(small, step, state, inputs)
    assert torch.equal(small.run(state, inputs)[0][0], large.run(state, inputs)[0][0])
    fits = 3
    states, given = [[double(50, 9) for _ in range(fits)]], [[double(50, 9) for _ in range(fits)]]
    new, _, _ = small.run(states, given, steps=2, fits=fits)
    for fit in range(fits):
        expected, _, _ = eager(step, [states[0][fit]], [given[0][fit]], 2)
        torch.testing.assert_close(new[0][fit], expected[0], rtol=1e-12, atol=1e-12)


def test_a_loss_that_is_not_a_single_number(emitted_block, check):
    def step(x):
        return x + 1, x * 2, x.isnan().any()

    state = [double(5)]
    check(emitted_block(step, state), step, state, steps=3)


# ---- what is refused


def refused(step, state, inputs, form=emit_block, calls="loops"):
    program = Program(record(step, [*state, *inputs]), calls)
    with pytest.raises(CaptureError) as error:
        form(program, schedule(program, len(state)), len(state))
    return str(error.value)


def test_one_block_refuses_large_passes_and_large_products():
    def elementwise(x):
        return x.sin() + 1, x[0], x[0].isnan()

    assert "70000" in refused(elementwise, [torch.zeros(70000)], [])

    def product(x, w):
        return x @ w, x[0, 0], x[0, 0].isnan()

    large = [torch.zeros(65, 65)], [torch.zeros(65, 65)]
    assert str(65**3) in refused(product, *large)


def test_one_block_refuses_to_read_much_that_lies_far_away():
    data = torch.randn(1 << 17)

    def step(x, places):
        return x + data[places].sum(), x, x.isnan()

    assert "20000" in refused(step, [torch.zeros(())], [torch.arange(20_000)])


def test_long_scatters_at_places_that_vary_are_refused():
    def step(x, places, y):
        return x.index_add(0, places, y), x[0], x[0].isnan()

    inputs = [torch.zeros(70000, dtype=torch.int64), torch.zeros(70000)]
    found = refused(step, [torch.zeros(3)], inputs, emit_kernels, "device")
    assert "70000" in found
    assert "scatter" in found
