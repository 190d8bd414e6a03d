"""The block form through its runtime: the generated kernel on the shim, launched as on a device."""

from __future__ import annotations

import pytest
import torch

from fastsvi.engine.cuda import driver
from fastsvi.engine.cuda.block_fits import BlockFits
from fastsvi.engine.cuda.block_step import BlockStep
from fastsvi.engine.cuda.kernel_loop import KernelLoop
from fastsvi.engine.native import NativeStep
from fastsvi.errors import CaptureError


def averaged(total, count, x, weights):
    """A state in two parts, a sum over rows, a step that may halt."""
    seen = total + (x * weights).sum(0)
    halt = seen.isnan().any()
    return torch.where(halt, total, seen), count + 1, seen.square().sum(), halt


def tensors():
    return [torch.zeros(3), torch.zeros((), dtype=torch.int64)], [torch.ones(5, 3), torch.ones(3)]


@pytest.fixture
def step(simulated):
    return BlockStep(averaged, *tensors())


def test_steps_equal_those_of_native_loops(step):
    found = step.run(4)
    state, inputs = tensors()
    expected = NativeStep(averaged, state, inputs).run(4)
    torch.testing.assert_close(found, expected)
    assert found.shape == (4,)


def test_state_is_changed_in_place_and_its_version_counted(simulated):
    (total, count), inputs = tensors()
    before = total._version
    step = BlockStep(averaged, [total, count], inputs)
    step.run(3)
    step.run(2)
    assert total.tolist() == [25.0] * 3
    assert count.item() == 5
    assert total._version > before


def test_other_tensors_are_used_in_place_of_those_it_was_made_for(step):
    state, inputs = tensors()
    own = step._state[0].clone()
    step.run(2, state=state, inputs=[inputs[0], 2 * inputs[1]])
    assert state[0].tolist() == [20.0] * 3
    torch.testing.assert_close(step._state[0], own)


def test_each_step_reads_its_row_of_what_is_stepped(step):
    weights = torch.arange(1.0, 10.0).view(3, 3)
    step.run(3, inputs=[torch.ones(5, 3), weights], stepped=[1])
    torch.testing.assert_close(step._state[0], 5 * weights.sum(0))
    with pytest.raises(CaptureError, match="too few for 4"):
        step.run(4, inputs=[torch.ones(5, 3), weights], stepped=[1])


def test_a_step_that_halts_is_counted_and_the_run_goes_on(step):
    rows = torch.ones(3, 3)
    rows[1] = torch.nan
    losses = step.run(3, inputs=[torch.ones(5, 3), rows], stepped=[1])
    assert losses.isnan().tolist() == [False, True, False]
    assert step._state[0].tolist() == [10.0] * 3
    assert step._state[1].item() == 3


@pytest.mark.parametrize(
    ("state", "inputs", "message"),
    [
        ([torch.zeros(4), torch.zeros((), dtype=torch.int64)], None, "argument 0"),
        (None, [torch.ones(5, 3).double(), torch.ones(3)], "argument 2"),
        (None, [torch.ones(5, 3)], "4 states and inputs was given 3"),
        ([torch.zeros(6)[::2], torch.zeros((), dtype=torch.int64)], None, "contiguous"),
    ],
)
def test_tensors_that_do_not_fit_are_named(step, state, inputs, message):
    with pytest.raises(CaptureError, match=message):
        step.run(1, state=state, inputs=inputs)


def test_inputs_that_are_not_dense_are_read_as_they_are(step):
    x = torch.arange(15.0).view(3, 5).T
    step.run(1, inputs=[x, torch.ones(3)])
    torch.testing.assert_close(step._state[0], x.sum(0))


def test_a_table_of_addresses_is_sent_once(step, monkeypatch):
    step.build()
    sent = []
    numbers = driver.numbers
    monkeypatch.setattr(driver, "numbers", lambda *given: sent.append(1) or numbers(*given))
    for _ in range(3):
        step.run(2)
    assert len(sent) == 1


def test_one_tensor_may_be_given_twice(simulated):
    x = torch.ones(3)
    total = torch.zeros(3)
    step = BlockStep(lambda t, a, b: (t + a * b, t.sum(), t.isnan().any()), [total], [x, x])
    assert step.run(2, inputs=[x, 3 * x]).tolist() == [0.0, 9.0]


@pytest.mark.parametrize("kind", [BlockStep, KernelLoop])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: (x.double(), x.sum(), x.isnan().any()), "state 0 was .3,., torch.float32"),
        (lambda x: (x[:2], x.sum(), x.isnan().any()), "state 0"),
        (lambda x: (x + 1, x.sum()), "its 1 states, a loss and whether to halt, found 2"),
    ],
)
def test_a_step_must_return_states_like_those_it_is_given(simulated, kind, step, message):
    with pytest.raises(CaptureError, match=message):
        kind(step, [torch.zeros(3)])


@pytest.mark.parametrize("kind", [BlockStep, KernelLoop])
def test_a_state_must_be_contiguous(simulated, kind):
    step = lambda x: (x + 1, x.sum(), x.isnan().any())  # noqa: E731
    with pytest.raises(CaptureError, match=r"state 0 of a step must be contiguous.*\(1, 2\)"):
        kind(step, [torch.zeros(3, 2).T])


def test_memory_outside_of_the_block(simulated, monkeypatch):
    monkeypatch.setattr(driver, "most_shared_bytes", lambda device: 0)
    step = BlockStep(averaged, *tensors())
    assert not step.emitted.in_shared
    assert step.run(3).tolist() == [75.0, 300.0, 675.0]
    step.release()
    assert step._arena is None


class TestFits:
    def test_each_has_its_own_state_and_inputs(self, step):
        totals, counts = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
        weights = torch.arange(12.0).view(4, 3)
        fits = BlockFits(step, [totals, counts], [torch.ones(5, 3), weights], [False, True])
        losses, halts = fits.run(2)
        torch.testing.assert_close(totals, 10 * weights)
        torch.testing.assert_close(losses[:, 1], (10 * weights).square().sum(1))
        assert losses.shape == halts.shape == (4, 2)
        assert not halts.any()

    def test_some_of_them(self, step):
        totals, counts = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
        fits = BlockFits(step, [totals, counts], tensors()[1], [False, False])
        for chosen, found in (([1, 3], 2), ([1, 3], 2), ([], 0), ([0], 1)):
            losses, _ = fits.run(3, torch.tensor(chosen, dtype=torch.int64))
            assert (losses.shape, losses.dtype) == ((found, 3), torch.float32)
        fits.run(1)
        assert counts.tolist() == [4, 7, 1, 7]

    def test_one_that_fails_leaves_the_others_alone(self, step):
        totals, counts = torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)
        weights = torch.ones(3, 3)
        weights[1, 2] = torch.nan
        fits = BlockFits(step, [totals, counts], [torch.ones(5, 3), weights], [False, True])
        losses, halts = fits.run(2)
        assert halts.tolist() == [[False, False], [True, True], [False, False]]
        assert losses.isnan().any(1).tolist() == [False, True, False]
        assert totals[:, 0].tolist() == [10.0, 0.0, 10.0]

    def test_steps_with_rows_of_their_own(self, step):
        totals, counts = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        weights = torch.arange(18.0).view(3, 2, 3)  # steps, fits
        fits = BlockFits(
            step, [totals, counts], [torch.ones(5, 3), weights], [False, True], [False, True]
        )
        fits.run(3)
        torch.testing.assert_close(totals, 5 * weights.sum(0))

    def test_more_than_there_is_memory_for_are_taken_in_turns(self, simulated, monkeypatch):
        from fastsvi.engine.cuda import block_step

        monkeypatch.setattr(driver, "most_shared_bytes", lambda device: 0)
        step = BlockStep(averaged, *tensors())
        monkeypatch.setattr(block_step, "_MOST_MEMORY", 2 * step.emitted.arena_bytes)
        totals, counts = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
        weights = torch.arange(15.0).view(5, 3)
        fits = BlockFits(step, [totals, counts], [torch.ones(5, 3), weights], [False, True])
        losses, _ = fits.run(2)
        torch.testing.assert_close(totals, 10 * weights)
        torch.testing.assert_close(losses[:, 0], (5 * weights).square().sum(1))
        assert simulated.launches == [2, 2, 1]
        assert len(step._arena) == 2 * step.emitted.arena_bytes

    def test_tensors_that_do_not_fit_are_refused(self, step):
        counts = torch.zeros(4, dtype=torch.int64)
        inputs = tensors()[1]
        with pytest.raises(CaptureError, match=r"needs a tensor of shape \(4, 3\)"):
            BlockFits(step, [torch.zeros(4, 2), counts], inputs, [False, False])
        with pytest.raises(CaptureError, match="contiguous"):
            BlockFits(step, [torch.zeros(3, 4).T, counts], inputs, [False, False])
