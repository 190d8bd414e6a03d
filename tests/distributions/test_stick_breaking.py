"""Stick-breaking by sums of logarithms: torch's values, without torch's look at the data."""

import pytest
import torch
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions import transforms as td
from torch.testing import assert_close

import fastsvi.distributions as dist
from fastsvi.distributions.transforms import CorrCholeskyTransform, StickBreakingTransform
from fastsvi.engine.record import record

PAIRS = [
    (StickBreakingTransform(), td.StickBreakingTransform(), (1, 2, 5, 40)),
    (CorrCholeskyTransform(), td.CorrCholeskyTransform(), (1, 3, 6, 28)),
]
CASES = [(ours, torchs, n) for ours, torchs, sizes in PAIRS for n in sizes]


def identify(value):
    return type(value).__name__ if isinstance(value, td.Transform) else str(value)


@pytest.mark.parametrize(("ours", "torchs", "n"), CASES, ids=identify)
def test_values_and_log_dets_are_those_of_torch(ours, torchs, n):
    x = torch.randn(50, n, dtype=torch.float64)
    y = ours(x)
    # Sums of n logarithms, and torch's clipping of shares at an eps from 1.
    assert_close(y, torchs(x), rtol=1e-12, atol=1e-14)
    log_det = ours.log_abs_det_jacobian(x, y)
    # torch takes the logarithm of 1 minus the sum of squares, which cancels.
    assert_close(log_det, torchs.log_abs_det_jacobian(x, torchs(x)), rtol=1e-7, atol=1e-7)
    assert_close(ours.inv(y), x, rtol=1e-7, atol=1e-7)
    assert ours.forward_shape((7, n)) == torchs.forward_shape((7, n))
    assert isinstance(ours, type(torchs))


@pytest.mark.parametrize(("ours", "torchs", "n"), CASES, ids=identify)
def test_gradients(ours, torchs, n):
    x = torch.randn(min(n, 6), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ours, [x])
    torch.autograd.gradcheck(lambda x: ours.log_abs_det_jacobian(x, ours(x)), [x])
    torch.autograd.gradgradcheck(ours, [x])


@pytest.mark.parametrize(("ours", "torchs", "n"), CASES, ids=identify)
def test_log_dets_are_those_of_the_jacobians(ours, torchs, n):
    x = 2 * torch.randn(n, dtype=torch.float64)

    def free(x):
        """The entries that are not determined by the others."""
        y = ours(x)
        return y[:-1] if y.dim() == 1 else y[tuple(torch.tril_indices(len(y), len(y), -1))]

    jacobian = torch.autograd.functional.jacobian(free, x)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert_close(ours.log_abs_det_jacobian(x, ours(x)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
@pytest.mark.parametrize(("ours", "n"), [(PAIRS[0][0], 5), (PAIRS[1][0], 6)], ids=identify)
def test_far_out_all_is_finite_and_inside_the_support(ours, n, size, dtype):
    x = torch.cat([size * torch.eye(n), -size * torch.eye(n), size * torch.ones(2, n)]).to(dtype)
    x[-1] *= -1
    x.requires_grad_()
    y = ours(x)
    log_det = ours.log_abs_det_jacobian(x, y)
    parts = y if y.dim() == 2 else y.diagonal(dim1=-2, dim2=-1)
    (slope,) = torch.autograd.grad(parts.log().sum() + log_det.sum(), [x])
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert slope.isfinite().all()
    assert ours.codomain.check(y).all()
    assert (parts > 0).all()
    assert ours.inv(y).isfinite().all() or isinstance(ours, CorrCholeskyTransform)


def test_many_parts_still_sum_to_one():
    # What constraints.simplex asks for; rounding of a part is that of a logarithm of about 7.
    x = torch.randn(100, 999)
    assert constraints.simplex.check(StickBreakingTransform()(x)).all()


def test_the_registries_give_them():
    for registry in (biject_to, transform_to, dist.biject_to):
        assert isinstance(registry(constraints.corr_cholesky), CorrCholeskyTransform)
    assert isinstance(biject_to(constraints.simplex), StickBreakingTransform)
    assert biject_to(constraints.simplex) == td.StickBreakingTransform()
    assert isinstance(
        dist.LogisticNormal(torch.zeros(2), 1.0).transforms[0], StickBreakingTransform
    )


@pytest.mark.parametrize(("ours", "torchs", "n"), CASES, ids=identify)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_capture_survives_the_gradient(ours, torchs, n, mapped):
    def loss(x):
        y = ours(x)
        return y.square().sum() + ours.log_abs_det_jacobian(x, y).sum()

    def step(x):
        total = torch.func.vmap(loss)(x).sum() if mapped else loss(x)
        return [total, *torch.autograd.grad(total, [x])]

    x = torch.randn(3, n, requires_grad=True)
    assert record(step, [x]).nodes


def test_bad_sizes_name_the_shape():
    with pytest.raises(ValueError, match=r"found shape \(2, 4\)"):
        CorrCholeskyTransform()(torch.zeros(2, 4))
