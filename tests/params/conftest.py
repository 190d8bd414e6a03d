"""Stores under test: ours, and Pyro's own as the oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import constraints

from fastsvi.params import ParamStore

# Test modules are imported without their folder being on the path.
sys.path.append(str(Path(__file__).parent))


def pyro_store():
    from pyro.params.param_store import ParamStoreDict

    return ParamStoreDict()


@pytest.fixture
def store():
    return ParamStore()


@pytest.fixture(params=[ParamStore, pyro_store], ids=["fastsvi", "pyro"])
def either(request):
    """A store of either library: what a test asserts of it is what Pyro's does."""
    return request.param()


@pytest.fixture(params=[ParamStore, pyro_store], ids=["fastsvi", "pyro"])
def make_either(request):
    return request.param


@pytest.fixture
def mixed(store):
    """A store with constraints of all sorts, several dtypes, and odd sizes."""
    c = constraints
    store.setdefault("loc", torch.randn(3))
    store.setdefault("scale", torch.rand(2, 2) + 0.5, c.positive)
    store.setdefault("p", torch.rand(()), c.unit_interval)
    store.setdefault("empty", torch.empty(0, 3))
    store.setdefault("simplex", torch.rand(2, 4).softmax(-1), c.simplex)
    store.setdefault("between", torch.full((5,), 0.5), c.interval(-1.0, 2.0))
    store.setdefault("below", torch.full((2,), -3.0), c.less_than(1.0))
    store.setdefault("bounds", torch.ones(3), c.greater_than(torch.tensor([0.0, -1.0, 0.5])))
    store.setdefault("event", torch.rand(4) + 0.1, c.independent(c.positive, 1))
    store.setdefault("factor", torch.eye(3) * 2, c.lower_cholesky)
    store.setdefault("corr", torch.eye(3), c.corr_cholesky)
    store.setdefault("wide", torch.randn(700))
    store.setdefault("double", torch.rand(3, dtype=torch.float64), c.positive)
    store.setdefault("half", torch.rand(3).half() + 1, c.positive)
    store.setdefault("brain", torch.rand(3).bfloat16())
    store.setdefault("complex", torch.randn(2, dtype=torch.complex64))
    return store
