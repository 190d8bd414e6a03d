"""Large products go to BLAS as few calls as possible, and read their factors where they lie."""

from __future__ import annotations

import re

import pytest
import torch
from torch.func import vmap

from fastsvi.engine.native import NativeStep

X = torch.linspace(-1, 1, 900 * 6, dtype=torch.float64).reshape(900, 6).sin()
NEVER = torch.zeros((), dtype=torch.bool)


def stacked(row):
    return (X @ row.unsqueeze(-1)).squeeze(-1).tanh().sum()


def plain(row):
    return (X @ row).tanh().sum()


def reversed_(row):
    return (row @ X.t()).tanh().sum()


def gradient(function, *inputs):
    """Gradient and value of ``function``, whose first argument it is by."""

    def step(x, *inputs):
        leaf = x.detach().requires_grad_()
        loss = function(leaf, *inputs)
        (slope,) = torch.autograd.grad(loss, leaf)
        return slope, loss.detach(), NEVER

    return step


@pytest.mark.parametrize("model", [stacked, plain, reversed_])
@pytest.mark.parametrize("particles", [1, 3, 16])
def test_one_matrix_with_many_vectors_is_one_product_each_way(model, particles):
    w = torch.linspace(-1, 1, particles * 6, dtype=torch.float64).reshape(particles, 6)
    step = gradient(lambda w: vmap(model)(w).sum())
    slope, loss, _ = step(w)
    native = NativeStep(step, [w])
    body = native.source.split('extern "C"')[1]
    calls = re.findall(r"matrix_(?:matrix|vector|narrow)<[\w, ]+>\(", body)
    assert len(calls) == 2
    assert "for (int64_t b" not in body
    # Neither the matrix nor its transpose is copied, expanded or not: one constant, read twice.
    places = [tensor.untyped_storage().data_ptr() for tensor in native._constants]
    assert places.count(X.untyped_storage().data_ptr()) == 1
    assert max(tensor.untyped_storage().nbytes() for tensor in native._constants) == X.nbytes
    assert native.arena_bytes < 2.2 * 900 * max(2, particles) * 8
    (got,) = native.run(1)
    # 900 terms, each right to an ulp of at most 6.
    torch.testing.assert_close(got, loss, rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(w, slope, rtol=1e-13, atol=1e-11)


def test_weights_are_read_from_the_flat_buffer():
    """Two layers whose matrices are parts of one vector, as parameters are."""
    flat = torch.linspace(-0.5, 0.5, 40 * 30 + 30 + 30 * 8 + 3, dtype=torch.float64).sin()
    data = torch.linspace(-1, 1, 64 * 40, dtype=torch.float64).reshape(64, 40)

    def loss(flat, data):
        first, bias = flat[: 40 * 30].view(30, 40), flat[40 * 30 : 41 * 30]
        second = flat[41 * 30 : 41 * 30 + 30 * 8].view(8, 30)
        hidden = torch.relu(torch.addmm(bias, data, first.t()))
        return (hidden @ second.t()).tanh().square().sum()

    step = gradient(loss)
    slope, value, _ = step(flat, data)
    native = NativeStep(step, [flat], [data])
    body = native.source.split('extern "C"')[1]
    assert body.count("matrix_matrix<") == 5  # two forward, two for the weights, one back
    assert re.search(r"\(a1 \+ 1230\)", body)  # the second matrix is read in the buffer
    (got,) = native.run(1)
    torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat, slope, rtol=1e-12, atol=1e-12)


def test_batches():
    """Batches of matrices, one of which may be the same for all, in every position."""
    x = torch.linspace(-1, 1, 8 * 12 * 10, dtype=torch.float64).reshape(8, 12, 10).sin()
    y = torch.linspace(0, 2, 10 * 9, dtype=torch.float64).reshape(10, 9).cos()
    z = torch.linspace(0, 2, 7 * 12, dtype=torch.float64).reshape(7, 12).cos()

    def loss(x, y, z):
        right = torch.bmm(x, y.expand(8, 10, 9)).tanh()
        left = torch.bmm(z.expand(8, 7, 12), x).tanh()
        both = torch.bmm(x.transpose(1, 2), right)
        row = torch.bmm(x[:, :1], y.expand(8, 10, 9)).tanh()
        return right.square().sum() + left.square().sum() + both.sin().sum() + row.sum()

    step = gradient(loss)
    slope, value, _ = step(x, y, z)
    (got,) = NativeStep(step, [x], [y, z]).run(1)
    torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, slope, rtol=1e-12, atol=1e-12)


SHAPES = [(5000, 1), (1400, 3), (700, 7), (520, 8), (517, 12), (300, 20), (203, 37), (101, 64)]
SHAPES += [(129, 65), (7, 600), (4, 2100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_a_vector_of_every_width(dtype):
    """Rows that fill registers, leave some lanes, or are shorter than one; both directions."""
    matrices = [torch.linspace(-40, 40, m * k, dtype=dtype).reshape(m, k).sin() for m, k in SHAPES]
    matrices[5][4, 11], matrices[6][2, 30] = torch.inf, torch.nan  # in lanes that are read twice

    def step(out, *matrices):
        rows = [x @ torch.linspace(1, 2, x.shape[1], dtype=dtype) for x in matrices]
        columns = [torch.linspace(1, 2, x.shape[0], dtype=dtype) @ x for x in matrices]
        new = torch.cat([*rows, *columns])
        return new, new[0], NEVER

    out = torch.zeros(sum(m + k for m, k in SHAPES), dtype=dtype)
    native = NativeStep(step, [out], matrices)
    body = native.source.split('extern "C"')[1]
    assert body.count("matrix_vector<") + body.count("matrix_narrow<") == 2 * len(SHAPES)
    assert body.count("matrix_narrow<") >= 4
    native.run(1)
    wide = [x.double() for x in matrices]
    weights = [[torch.linspace(1, 2, n, dtype=dtype).double() for n in x.shape] for x in wide]
    exact = [x @ w for x, (_, w) in zip(wide, weights, strict=True)]
    exact += [w @ x for x, (w, _) in zip(wide, weights, strict=True)]
    size = torch.cat([x.abs() @ w for x, (_, w) in zip(wide, weights, strict=True)])
    size = torch.cat(
        [size, *(w @ x.abs() for x, (w, _) in zip(wide, weights, strict=True))]
    ).nan_to_num(0, 0)
    expected = torch.cat(exact)
    finite = expected.isfinite()
    # The sums of a vector register's lanes, each of at most 5000 / 8 terms, then of the lanes: an
    # ulp of the sum of absolute values per addition at worst, and far less as they average out.
    slack = 30 * torch.finfo(dtype).eps * size
    assert ((out - expected).abs() <= slack)[finite].all()
    assert out[~finite].tolist() == pytest.approx(expected[~finite].tolist(), nan_ok=True)


def test_a_gathered_minibatch_is_copied_once():
    """The encoder's product and its gradient read the same rows."""
    data = torch.linspace(-1, 1, 500 * 40, dtype=torch.float64).reshape(500, 40).sin()
    rows = torch.arange(0, 500, 8)
    w = torch.linspace(-1, 1, 40 * 30, dtype=torch.float64).reshape(40, 30).cos()

    def loss(w, data, rows):
        return (data[rows] @ w).tanh().sum()

    step = gradient(loss)
    slope, value, _ = step(w, data, rows)
    native = NativeStep(step, [w], [data, rows])
    assert native.source.split('extern "C"')[1].count("matrix_matrix<") == 2
    minibatch = len(rows) * 40 * 8
    assert native.arena_bytes < 2 * minibatch + 4 * w.nbytes
    (got,) = native.run(1)
    torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w, slope, rtol=1e-12, atol=1e-12)


# What a step makes of the gradients of two weights that lie in one vector, beside putting them
# together, and how many of the two products may be written there at once.
ASIDE = {
    "nothing": (lambda first, second: first.new_zeros(()), 2),
    "a norm of one": (lambda first, second: first.square().sum(), 1),
    "a product with one": (lambda first, second: (first @ first.t()).sum(), 1),
}


@pytest.mark.parametrize("name", ASIDE)
def test_gradients_of_weights_are_written_into_the_flat_vector(name):
    aside, landed = ASIDE[name]
    flat = torch.linspace(-0.5, 0.5, 5 + 40 * 30 + 30 * 20, dtype=torch.float64).sin()
    data = torch.linspace(-1, 1, 64 * 40, dtype=torch.float64).reshape(64, 40)

    def step(flat, data):
        first = flat[5:1205].view(40, 30).detach().requires_grad_()
        second = flat[1205:].view(30, 20).detach().requires_grad_()
        loss = ((data @ first).tanh() @ second).tanh().square().sum()
        slopes = torch.autograd.grad(loss, [first, second])
        whole = torch.cat([flat[:5] * 0, *(x.reshape(-1) for x in slopes)])
        return flat - 0.1 * whole, loss.detach() + aside(*slopes), NEVER

    new, value, _ = step(flat, data)
    native = NativeStep(step, [flat], [data])
    targets = re.findall(r", \(a\d+ \+ (\d+)\)\);", native.source)
    assert len(targets) == landed
    assert set(targets) <= {"5", "1205"}
    (got,) = native.run(1)
    torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat, new, rtol=1e-12, atol=1e-12)


def test_results_lie_so_that_few_tiles_stick_out():
    """BLAS computes tiles of 16 by 4: 50 columns are padded to 64, but 16 rows are whole."""

    def step(out, x, w):
        new = (w @ x).tanh() + out
        return new, new.sum(), NEVER

    out, w = torch.zeros(16, 50), torch.linspace(-1, 1, 16 * 90).reshape(16, 90).sin()
    x = torch.linspace(-1, 1, 90 * 50).reshape(90, 50).cos()
    expected = (w.double() @ x.double()).tanh()
    native = NativeStep(step, [out], [x, w])
    assert "blas[0], 50, 16, 90," in native.source
    native.run(1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
