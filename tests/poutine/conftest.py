"""Programs are written once, against a library given as an argument, and run in Pyro too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions
import pytest

import fastsvi
import fastsvi.distributions

# Test modules are imported without their folder being on the path.
sys.path.append(str(Path(__file__).parent))


def namespace(module):
    return SimpleNamespace(pyro=module, dist=module.distributions, poutine=module.poutine)


@pytest.fixture
def ours():
    return namespace(fastsvi)


@pytest.fixture
def theirs():
    return namespace(pyro)


@pytest.fixture(params=["fastsvi", "pyro"])
def lib(request):
    """Runs the test in both libraries: our reading of Pyro's behaviour is checked with it."""
    return namespace({"fastsvi": fastsvi, "pyro": pyro}[request.param])
