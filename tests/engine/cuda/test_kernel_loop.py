"""The kernel form through its runtime: kernels on the shim, calls in place of a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from fastsvi.engine.cuda.emit import Product
from fastsvi.engine.cuda.kernel_loop import KernelLoop
from fastsvi.engine.native import NativeStep
from fastsvi.errors import CaptureError


def called(body):
    """In place of a graph. The first call stands for the warm-up."""
    body()
    return body


def averaged(total, count, x, weights):
    """A state in two parts, a sum over rows, a step that may halt."""
    seen = total + (x * weights).sum(0)
    halt = seen.isnan().any()
    return torch.where(halt, total, seen), count + 1, seen.square().sum(), halt


def tensors():
    return [torch.zeros(3), torch.zeros((), dtype=torch.int64)], [torch.ones(5, 3), torch.ones(3)]


@pytest.fixture
def loop(simulated):
    return KernelLoop(averaged, *tensors(), capture=called)


def test_steps_equal_those_of_native_loops(loop):
    found = torch.cat([loop.run(20), loop.run(3)])  # a whole graph and single steps
    state, inputs = tensors()
    torch.testing.assert_close(found, NativeStep(averaged, state, inputs).run(23))


def test_to_capture_changes_nothing(loop):
    loop.build()
    assert not any(bool(x.any()) for x in loop._state)


def test_another_state_is_used_and_the_live_one_kept(loop):
    state = [torch.ones(3), torch.zeros((), dtype=torch.int64)]
    loop.run(2, state=state)
    assert state[0].tolist() == [11.0] * 3
    assert state[1].item() == 2
    assert not any(bool(x.any()) for x in loop._state)


def test_inputs_are_copied_to_where_the_kernels_read_them(loop):
    rows = torch.arange(9.0).view(3, 3)
    loop.run(3, inputs=[2 * torch.ones(5, 3), rows], stepped=[1])
    torch.testing.assert_close(loop._state[0], 10 * rows.sum(0))


def test_a_step_that_halts_is_counted_and_the_run_goes_on(loop):
    rows = torch.ones(3, 3)
    rows[1] = torch.nan
    losses = loop.run(3, inputs=[torch.ones(5, 3), rows], stepped=[1])
    assert losses.isnan().tolist() == [False, True, False]
    assert loop._state[0].tolist() == [10.0] * 3
    assert loop._state[1].item() == 3


def test_large_products_are_left_to_the_library(simulated):
    data = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))

    def step(weight, x):
        predicted = torch.tanh(data @ weight) @ x.T
        return (
            weight - 1e-3 * data.T @ (predicted @ x),
            predicted.square().sum(),
            weight.isnan().any(),
        )

    def made(kind, **options):
        weight = torch.full((64, 32), 0.01)
        return kind(step, [weight], [torch.ones(48, 32)], **options), weight

    loop, weight = made(KernelLoop, capture=called)
    emitted = loop.emitted
    launched = [*emitted.before, *emitted.body, *emitted.after]
    assert sum(isinstance(one, Product) for one in launched) == 4
    losses = loop.run(3)
    native, expected = made(NativeStep)
    # Four products of up to 300 terms per step.
    torch.testing.assert_close(losses, native.run(3), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def test_what_a_graph_cannot_hold_is_reported(simulated):
    def fails(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    loop = KernelLoop(averaged, *tensors(), capture=fails)
    with pytest.raises(CaptureError, match="a CUDA graph cannot hold the step: operation not"):
        loop.run(1)


def test_one_tensor_may_be_given_twice(simulated):
    x, total = torch.ones(3), torch.zeros(3)
    step = lambda t, a, b: (t + a * b, (t + a).sum(), t.isnan().any())  # noqa: E731
    loop = KernelLoop(step, [total], [x, x], capture=called)
    assert loop.run(2, inputs=[x, 3 * x]).tolist() == [3.0, 12.0]
    assert loop.run(1).tolist() == [21.0]
    assert x.tolist() == [1.0] * 3


def test_a_step_has_one_loss(simulated):
    with pytest.raises(CaptureError, match="a step has one loss"):
        KernelLoop(lambda x: (x + 1, x * 2, x.isnan().any()), [torch.ones(3)], capture=called)
