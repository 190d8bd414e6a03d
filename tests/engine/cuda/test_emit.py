"""Both forms of generated CUDA code, on the simulated GPU, against torch and NativeStep."""

from __future__ import annotations

import torch

from fastsvi.engine.cuda.emit import Product
from fastsvi.engine.loops import products
from fastsvi.engine.native import NativeStep
from fastsvi.engine.rounds import round_number, sum_of_rounds

SIZES = [(1, 1), (1, 33), (31, 7), (33, 1025), (1025, 3), (1, 4099), (2, 0), (0, 3)]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_sums_and_extrema_of_all_sizes(emitted, check):
    """Rows for threads, for lanes, cut into chunks; and of nothing."""

    def step(*xs):
        new = []
        for x in xs[: len(SIZES)]:
            y = x.sin()
            rows, columns, total = y.sum(1), y.sum(0), y.sum()
            new += [x * 0.5 + total * 1e-3, rows, columns, (y * 0.1 + 1).prod(1)]
            if x.numel():
                new += [x.amax(0) + x.amin(0), x.amin(1), x.amax() - x.mean()]
        old = iter(xs)
        return *new, sum(x.sum() for x, _ in zip(old, SIZES, strict=False)), xs[0].isnan().any()

    state = [double(*size) for size in SIZES]
    shapes = list(step(*state))[:-2]
    # What is made of the matrices is state as well, which the step does not read.
    order = [k for k, x in enumerate(shapes) if x.dim() == 2]
    others = [k for k in range(len(shapes)) if k not in order]

    def arranged(*xs):
        *new, loss, halt = step(*xs)
        return *(new[k] for k in order), *(new[k] for k in others), loss, halt

    everything = [*state, *(torch.zeros_like(shapes[k]) for k in others)]
    check(emitted(arranged, everything), arranged, everything)


def test_state_that_is_read_by_others_before_it_is_written_over(emitted, check):
    def step(count, a, b, swapped, flags):
        total = (a * b).sum(0)
        a2 = a + 0.1 * b * total + count
        b2 = (b - a.sum(1, keepdim=True)) * 0.9
        flags = flags ^ (a2 > b2)
        return count + 1, a2, b2, swapped.flip(0) + total, flags, total.prod(), count > 1

    state = [torch.zeros((), dtype=torch.int64), double(67, 5), double(67, 5), double(5)]
    state.append(torch.zeros(67, 5, dtype=torch.bool))
    check(emitted(step, state), step, state, steps=4)


def test_numbers_that_change_places(emitted, check):
    def step(a, b, c):
        return b, a, c + a, a - b, c.isnan()

    state = [double(1)[0], double(1)[0], double(1)[0]]
    check(emitted(step, state), step, state, steps=3)


def test_scatter_at_constant_places(emitted, check):
    few, many, sorted_ = torch.randint(-7, 7, (300,)), torch.randint(0, 2, (5000,)), None
    sorted_ = torch.randint(0, 90, (300,)).sort().values
    grid = torch.randint(0, 4, (6, 5))

    def step(a, b, c, d, e, x, y):
        return (
            a.index_add(0, few % 7, x),
            b.index_put((few,), x[:, None] * torch.arange(40.0, dtype=x.dtype), True) * 0.5,
            c.index_put((many,), y, accumulate=True) * 0.5,
            d.index_put((sorted_,), x.cos()),
            e.scatter_add(0, grid, x[:30].view(6, 5)) * 0.5,
            x.sum(),
            x.isnan().any(),
        )

    state = [double(7), double(7, 40), double(2), double(90), double(4, 5)]
    inputs = [double(300), double(5000)]
    check(emitted(step, state, inputs), step, state, inputs)


def test_scatter_at_places_that_vary(emitted, check):
    def step(a, b, c, d, places, grid, x):
        return (
            a.index_add(0, places, x) * 0.5,
            b.index_put((places,), x[:, None] * b[places], accumulate=True) * 0.5,
            c.index_put((places,), x, accumulate=True) * 0.5,  # too many targets to look from each
            d.scatter_add(1, grid, x[:30].view(6, 5)) * 0.5,
            x.sum(),
            x.isnan().any(),
        )

    state = [double(7), double(7, 5), double(20000), double(6, 4)]
    inputs = [torch.randint(0, 7, (300,)), torch.randint(0, 4, (6, 5)), double(300)]
    check(emitted(step, state, inputs), step, state, inputs)


def test_rounds(emitted, check):
    def step(total, w, x):
        number = round_number(w, 5)
        part = (x * (number + 1)).sin() * w
        rows = sum_of_rounds(part.sum(1), number)
        everything = sum_of_rounds(part.sum(), number)
        return (
            total + rows,
            w * 0.9 + sum_of_rounds(part[0], number),
            everything,
            rows.isnan().any(),
        )

    def unrolled(total, w, x):
        parts = [(x * (number + 1)).sin() * w for number in range(5)]
        rows = sum(part.sum(1) for part in parts)
        first = sum(part[0] for part in parts)
        everything = sum(part.sum() for part in parts)
        return total + rows, w * 0.9 + first, everything, rows.isnan().any()

    state, inputs = [double(9), double(70)], [double(9, 70)]
    check(emitted(step, state, inputs), unrolled, state, inputs)


def test_products(emitted, monkeypatch, check):
    monkeypatch.setattr(products, "WORTH_A_LAUNCH", 10_000)

    def step(w, v, x, batches):
        hidden = (x @ w).tanh()
        image = hidden @ w.t()
        each = torch.bmm(batches, w.expand(3, 34, 33))
        return (
            w * 0.9 + x.t() @ hidden * 1e-3,
            v + x.t() @ (x @ v) * 1e-2,
            (image.sum() + each.square().sum()),
            image.isnan().any(),
        )

    state = [double(34, 33) * 0.1, double(34, 1)]
    inputs = [double(65, 34), double(3, 65, 34)]
    made = emitted(step, state, inputs)
    check(made, step, state, inputs, rtol=1e-10)
    if emitted.__name__ == "KernelForm":
        by_blas = [x for x in made.made.before if isinstance(x, Product)]
        assert len(by_blas) == 4  # and those with a vector are loops


def test_what_is_drawn_and_called_is_that_of_native_steps(emitted):
    """Noise, subsets, running sums and factorizations come from the same routines."""
    key = torch.tensor([3, 5])

    def step(total, origin, x):
        noise = torch.ops.fastsvi.normal_noise(key, origin, 0, 1, 7, 300, torch.float32)[0]
        few = torch.ops.fastsvi.uniform_noise(key, origin, 300, 1, 70, 5, torch.float32)[0]
        places = torch.ops.fastsvi.random_subset(key, origin, 0, 1000, 40)
        spread = x.cumsum(0)[places] + noise.mean(0)[:40]
        a = few.t() @ few + torch.eye(5)
        factor = torch.linalg.cholesky(a)
        total = total + spread.sum() + factor.sum(0)
        return total, origin + origin.new_tensor([0, 1, 0, 0]), spread.sum(), total.isnan().any()

    state = [torch.zeros(5), torch.tensor([0, 7, 0, 0])]
    inputs = [torch.randn(1000)]
    native = [x.clone() for x in state]
    expected = NativeStep(step, native, inputs).run(3)
    made = emitted(step, state, inputs)
    found = [made.run(state, inputs, steps=3, seed=seed) for seed in (0, 1)]
    for new, losses, _ in found:
        # Sums of some thousand float32 of order one, whose mathematics differ by an ulp or two.
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(new[0], native[0], rtol=1e-4, atol=1e-3)
        assert torch.equal(new[1], native[1])
        assert torch.equal(losses, found[0][1])
