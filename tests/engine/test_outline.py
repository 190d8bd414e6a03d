"""Recordings without values, against recordings that compute everything."""

from __future__ import annotations

import pytest
import torch

from fastsvi.engine import record as recording
from fastsvi.engine.noise_op import normal_noise
from fastsvi.engine.outline import NeedsValues, outline
from fastsvi.engine.record import record
from fastsvi.engine.replay import replay
from fastsvi.kernels import philox

aten = torch.ops.aten
X, FLAG = torch.rand(3, 4), torch.tensor([True, False, True, True])
CALLS = [
    (aten.add.Tensor, (X, torch.rand(4)), {}),
    (aten.mul.Scalar, (X, 2), {}),
    (aten.gt.Scalar, (X, 0.5), {}),
    (aten.div.Tensor, (torch.arange(4), 3), {}),
    (aten.pow.Tensor_Scalar, (X, 2), {}),
    (aten.where.self, (FLAG, X, torch.zeros(())), {}),
    (aten.masked_fill.Scalar, (X, FLAG, 0.0), {}),
    (aten.clone.default, (X,), {}),
    (aten._to_copy.default, (X,), {"dtype": torch.float64}),
    (aten.full_like.default, (X, 3), {"dtype": torch.int64}),
    (aten.sum.default, (X,), {}),
    (aten.sum.default, (FLAG,), {}),
    (aten.sum.dim_IntList, (X, [-1]), {"dtype": torch.float64}),
    (aten.sum.dim_IntList, (X, [0], True), {}),
    (aten.mean.dim, (X, [0, 1], True), {}),
    (aten.amax.default, (X, [0]), {}),
    (aten.all.dim, (FLAG, 0), {}),
    (aten.any.default, (FLAG,), {}),
    (aten.cat.default, ([X, torch.rand(2, 4)],), {}),
    (aten.cat.default, ([X, torch.rand(3, 1)], -1), {}),
    (aten.transpose.int, (X, 0, 1), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS, ids=lambda x: getattr(x, "_name", ""))
def test_shape_and_dtype(func, args, kwargs):
    found, right = outline(func, args, kwargs), func(*args, **kwargs)
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    assert found._is_view() == right._is_view()


def test_noise():
    key, origin = philox.derive_key(0, 0), philox.make_origin()
    args = (key, origin, 0, 1, 2, 10**12, torch.float64)
    with pytest.raises(RuntimeError, match="allocate"):  # of that size, and not drawn
        outline(torch.ops.fastsvi.normal_noise.default, args, {})
    found = outline(torch.ops.fastsvi.normal_noise.default, (*args[:5], 7, torch.float64), {})
    assert (found.shape, found.dtype) == ((1, 2, 7), torch.float64)


def test_no_rule():
    with pytest.raises(NeedsValues, match="cumsum"):
        outline(aten.cumsum.default, (X, 0), {})


def wide(x, key, origin):
    noise = normal_noise(key, origin, 0, 1, 1, x.numel(), x.dtype)[0, 0]
    z = (x + noise).requires_grad_()
    scale = torch.zeros_like(z)
    scale.add_(z.detach().abs())
    with torch.enable_grad():
        (grad,) = torch.autograd.grad((z.square() / (1 + scale)).sum(), z)
    return [torch.where(grad.isfinite().all(), x - grad, x), scale.sum()]


@pytest.mark.parametrize("more", [lambda x: x, lambda x: x.cumsum(0)], ids=["known", "unknown"])
def test_the_recording_is_the_same(more, monkeypatch):
    inputs = [torch.rand(1000), philox.derive_key(0, 0), philox.make_origin(step=3)]

    def function(*inputs):
        new, total = wide(*inputs)
        return [more(new), total]

    full = record(function, inputs)
    monkeypatch.setattr(recording, "_LARGE", 500)
    hollow = record(function, inputs)
    assert full.difference(hollow) is None
    for found, right in zip(replay(hollow, inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, right)


def test_nothing_large_is_computed(monkeypatch):
    """Counted by what is asked of an operation that must not run."""
    calls = []
    library = torch.library.Library("fastsvi_test", "FRAGMENT")
    library.define("slow(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
    library.impl("slow", lambda x: calls.append(x.numel()) or x.clone(), "CPU")
    monkeypatch.setattr(recording, "_LARGE", 500)
    slow = torch.ops.fastsvi_test.slow
    record(lambda x: [slow(x + 1), slow(x.sum())], [torch.rand(1000)])
    assert calls == [1, 1]  # for their dtypes: not even the small one, which is made of large ones
    calls.clear()
    record(lambda x: [slow(x + 1)], [torch.rand(400)])
    assert calls == [400]
