"""The kernel form: large steps, on the simulated GPU."""

from __future__ import annotations

import math

import pytest
import torch

from fastsvi.engine.cuda import band, passes
from fastsvi.engine.cuda.emit import Product
from fastsvi.engine.loops import products


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_gradients_that_are_computed_again(emitted_kernels, check):
    """The pieces of a gradient, in the pass of the update, which writes over what they read."""
    n, rest = 9001, 5

    def step(x, moment, other):
        loc, scale, few = x[:n], x[n : 2 * n], x[2 * n :]
        z = loc + scale.exp() * other
        slope = z.sin() * z
        gradient = torch.cat([slope, slope * scale.exp() * 0.5 - 1, few * 2])
        fine = torch.isfinite(gradient).all()
        moment = torch.where(fine, 0.9 * moment + gradient, moment)
        x = torch.where(fine, x - 0.1 * moment, x)
        return x, moment, other * 0.5, (z * z).sum() + (few * few).sum(), ~fine

    state = [double(2 * n + rest), double(2 * n + rest), double(n)]
    made = emitted_kernels(step, state)
    assert made.made.arena_bytes < 8 * 2 * n
    check(made, step, state, steps=3, rtol=1e-10)
    state[0][n // 2] = math.nan
    check(made, step, state, steps=1, rtol=1e-10)


def test_batches_of_vectors_with_one_matrix_are_one_product(monkeypatch, emitted_kernels, check):
    monkeypatch.setattr(products, "WORTH_A_LAUNCH", 10_000)

    def step(w, v, x):
        rows = torch.bmm(w.sin()[:, None], x.t().expand(6, 7, 301))[:, 0]  # [6, 301]
        slope = torch.bmm(rows.cos()[:, None], x.expand(6, 301, 7))[:, 0]
        columns = torch.bmm(x.expand(6, 301, 7), v[:, :, None])[:, :, 0]
        v = v * 0.5 + columns[:, :7]
        return w - 1e-2 * slope, v, rows.sum() + columns.sum(), w[0, 0].isnan()

    state, inputs = [double(6, 7), double(6, 7)], [double(301, 7)]
    made = emitted_kernels(step, state, inputs)
    by_blas = [x for x in made.made.before if isinstance(x, Product)]
    assert [len(x.out.shape) for x in by_blas] == [2, 2, 2]
    check(made, step, state, inputs, rtol=1e-10)


@pytest.mark.parametrize("shape", [(5, 1501), (1025, 2), (2, 3, 700)])
def test_few_particles_of_many_elements_are_done_together(
    monkeypatch, shape, emitted_kernels, check
):
    monkeypatch.setattr(passes, "_LONG_AXIS", 512)
    monkeypatch.setattr(passes, "SMALL", 64)
    long = max(range(len(shape)), key=lambda k: shape[k])
    others = [k for k in range(len(shape)) if k != long]

    def step(x, along, across):
        y = (x + across.view([n if k == long else 1 for k, n in enumerate(shape)])).sin()
        z = y * y
        largest = y.amax(others)
        return (
            y * 0.9,
            along + z.sum(long),
            across + z.sum(others) - largest,
            z.sum(),
            y.isnan().any(),
        )

    state = [double(*shape), double(*(shape[k] for k in others)), double(shape[long])]
    made = emitted_kernels(step, state)
    assert "[row]" in made.made.source
    check(made, step, state, steps=2, rtol=1e-10)


def regression(w, x, y):
    """A step of a logistic regression, with its gradient by hand."""
    logits = x @ w
    loss = torch.nn.functional.softplus(logits).sum() - (y * logits).sum()
    slope = torch.sigmoid(logits) - y
    return w - 1e-3 * (x.t() @ slope), loss, loss.isnan()


@pytest.mark.parametrize(("rows", "columns"), [(1000, 7), (777, 64), (513, 255), (2048, 1)])
def test_data_that_are_read_twice_are_loaded_once(
    monkeypatch, rows, columns, emitted_kernels, check
):
    monkeypatch.setattr(band, "_SHORTEST", 512)
    monkeypatch.setattr(band, "_CACHE", 16 << 10)
    monkeypatch.setattr(passes, "SMALL", 64)
    state = [double(columns) * 0.1]
    inputs = [double(rows, columns), (double(rows) > 0).double()]
    made = emitted_kernels(regression, state, inputs)
    text = made.made.source
    readers = [part for part in text.split("__launch_bounds__")[1:] if "tile" in part]
    assert len(readers) == (columns > 1)  # products with a single column are elementwise
    check(made, regression, state, inputs, steps=3, rtol=1e-10)


def test_long_sums_of_float32_do_not_drift(emitted_kernels):
    count = 1 << 19

    def step(total, x):
        y = (x + total)[:, None].expand(count, 2)
        return total * 0, y.sum(0).sum() + y.sum(), total.isnan()

    x = torch.full((count,), 0.1)
    made = emitted_kernels(step, [torch.zeros(())], [x])
    _, losses, _ = made.run([torch.zeros(())], [x])
    assert float(losses[0]) == pytest.approx(4 * count * float(x[0]), rel=1e-6)
