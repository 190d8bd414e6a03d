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
    calls = re.findall(r"matrix_(?:matrix|vector)<\w+>\(", body)
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
