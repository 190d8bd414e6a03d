"""ClippedAdam, AdagradRMSProp and DCTAdam as torch optimizers: by hand, and against Pyro's."""

from __future__ import annotations

import importlib

import pytest
import scipy.fft
import torch

from fastsvi.errors import DtypeError
from fastsvi.optim.adagrad_rmsprop import AdagradRMSProp
from fastsvi.optim.clipped_adam import ClippedAdam
from fastsvi.optim.dct_adam import DCTAdam, dct, idct

CASES = {
    "clipped": ("clipped_adam.ClippedAdam", {"lr": 0.1, "lrd": 0.9, "clip_norm": 0.5}),
    "clipped_decay": ("clipped_adam.ClippedAdam", {"lr": 0.1, "weight_decay": 0.2}),
    "clipped_centered": ("clipped_adam.ClippedAdam", {"lr": 0.1, "centered_variance": True}),
    "adagrad_rmsprop": ("adagrad_rmsprop.AdagradRMSProp", {"eta": 0.3, "t": 0.2, "delta": 0.01}),
    "dct": ("dct_adam.DCTAdam", {"lr": 0.1, "lrd": 0.9}),
    "dct_subsample": ("dct_adam.DCTAdam", {"lr": 0.1, "subsample_aware": True}),
}


def find(library, path):
    module, name = path.split(".")
    return getattr(importlib.import_module(f"{library}.optim.{module}"), name)


# Pyro cannot subsample a time series.
GRID = [
    pytest.param(*case, time_dim, id=f"{name}-{time_dim}")
    for name, case in CASES.items()
    for time_dim in ((None, -1, -2) if name == "dct" else (None,))
]


@pytest.mark.parametrize(("path", "options", "time_dim"), GRID)
@pytest.mark.parametrize("duration", [7, 8])
def test_same_updates_as_pyros(path, options, time_dim, duration):
    results = []
    for library in ("pyro", "fastsvi"):
        random = torch.Generator().manual_seed(1)
        leaf = torch.zeros(3, 4, duration, dtype=torch.float64, requires_grad=True)
        if time_dim is not None:
            leaf._pyro_dct_dim = time_dim
        optimizer = find(library, path)([leaf], **options)
        for _ in range(20):
            leaf._pyro_subsample = {
                -3: torch.randperm(3, generator=random)[:2],
                -1: torch.randperm(duration, generator=random)[:4],
            }
            leaf.grad = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
            optimizer.step()
        results.append(leaf.detach())
    # 20 steps of size 0.1, each with a Fourier transform's few roundings of 1e-16
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


def test_a_subsampled_time_series_moves_where_it_was_seen():
    """Pyro cannot do this one."""
    leaf = torch.zeros(3, 8, requires_grad=True)
    leaf._pyro_dct_dim = -1
    leaf._pyro_subsample = {-2: torch.tensor([0, 2])}
    leaf.grad = torch.ones(3, 8)
    DCTAdam([leaf], lr=0.1, subsample_aware=True).step()
    assert (leaf[[0, 2]] < 0).all()
    assert (leaf[1] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 30])
@pytest.mark.parametrize("dim", [-1, -2])
def test_cosine_transform(size, dim):
    x = torch.randn(3, size, size, dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), axis=dim, norm="ortho"))
    torch.testing.assert_close(dct(x, dim), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(idct(dct(x, dim), dim), x, rtol=0, atol=1e-13)


def test_clipped_adam_by_hand():
    leaf = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    optimizer = ClippedAdam([leaf], lr=1.0, lrd=0.5, clip_norm=2.0, eps=0.0, betas=(0.0, 0.0))
    for expected in (-0.5, -0.75, -0.875):  # signs of the gradient times 1/2, 1/4, 1/8
        leaf.grad = torch.tensor([100.0], dtype=torch.float64)
        optimizer.step()
        assert leaf.item() == expected
        assert leaf.grad.item() == 2.0  # clipped in place, as in Pyro
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_adagrad_rmsprop_by_hand():
    leaf = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdagradRMSProp([leaf], eta=1.0, delta=0.0, t=0.5)
    leaf.grad = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    assert leaf.item() == -3 / (1 + 3)
    leaf.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    expected = -0.75 - 2**-0.5 / (1 + (0.5 * 9 + 0.5 * 1) ** 0.5)
    assert leaf.item() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("constructor", [ClippedAdam, AdagradRMSProp, DCTAdam])
def test_closures_and_missing_gradients(constructor):
    leaf, idle = (torch.zeros(2, requires_grad=True) for _ in range(2))

    def closure():
        leaf.grad = None
        loss = (leaf - 1.0).square().sum()
        loss.backward()
        return loss

    optimizer = constructor([leaf, idle])
    assert optimizer.step(closure).item() == 2.0
    assert (leaf > 0).all()
    assert (idle == 0).all()


def test_adagrad_rmsprop_refuses_sparse_gradients():
    leaf = torch.zeros(2, requires_grad=True)
    leaf.grad = torch.zeros(2).to_sparse()
    with pytest.raises(DtypeError, match="SparseAdam"):
        AdagradRMSProp([leaf]).step()
