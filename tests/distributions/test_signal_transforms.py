"""Discrete cosine and Haar transforms."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import pytest
import scipy.fft
import torch
from torch.testing import assert_close

from fastsvi.distributions import transforms as T
from fastsvi.distributions.signal_transforms import dct, haar_transform, idct
from fastsvi.errors import ShapeError

f64 = {"dtype": torch.float64}
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 12, 33])


@sizes
def test_dct_against_scipy(size):
    x = torch.randn(3, size, **f64)
    expected = torch.as_tensor(scipy.fft.dct(x.numpy(), norm="ortho"))
    assert_close(dct(x), expected, rtol=1e-12, atol=1e-12)
    assert_close(idct(x), torch.as_tensor(scipy.fft.idct(x.numpy(), norm="ortho")))
    assert dct(x.float()).dtype == torch.float32


@sizes
def test_haar_is_orthonormal_and_agrees_with_pyro(size):
    eye = torch.eye(size, **f64)
    matrix = haar_transform(eye)
    assert_close(matrix @ matrix.mT, eye)
    x = torch.randn(3, size, **f64)
    for flip in (False, True):
        ours, oracle = (lib.HaarTransform(flip=flip) for lib in (T, pyro_dist.transforms))
        assert_close(ours(x), oracle(x))
        assert_close(ours.inv(ours(x)), x)


@pytest.mark.parametrize("dim", [-1, -2, -3])
@pytest.mark.parametrize("smooth", [-1.0, 0.0, 0.5])
def test_dct_transform_agrees_with_pyro_along_any_dimension(dim, smooth):
    x = torch.randn(4, 5, 6, 7, **f64)
    ours, oracle = (lib.DiscreteCosineTransform(dim, smooth) for lib in (T, pyro_dist.transforms))
    y = ours(x)
    assert_close(y, oracle(x))
    assert_close(ours.inv(y), x)
    assert ours.event_dim == oracle.event_dim == -dim
    assert_close(ours.log_abs_det_jacobian(x, y), torch.zeros(x.shape[:dim], **f64))
    assert_close(T.HaarTransform(dim)(x), pyro_dist.transforms.HaarTransform(dim)(x))


def test_they_can_be_mapped():
    x = torch.randn(3, 6)
    for transform in (T.DiscreteCosineTransform(smooth=1.0), T.HaarTransform()):
        assert_close(torch.vmap(transform)(x), transform(x))
        assert_close(torch.vmap(transform.inv)(x), transform.inv(x))


def test_bad_dimensions():
    for family in (T.DiscreteCosineTransform, T.HaarTransform):
        for dim in (0, 1, "last"):
            with pytest.raises(ValueError, match="must be a negative int"):
                family(dim)
        with pytest.raises(ShapeError, match="needs at least 2 dimensions"):
            family(-2).forward_shape((3,))
