"""Fixtures for every test: a clean default store, and seeds that never depend on the test order.

No test may leave the checks of distributions switched otherwise than it found them.
"""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
import torch

# The tensors of tests are small: threads that wait for each other would take half of the time.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def compiled_steps(tmp_path_factory):
    """A cache of compiled steps for all tests: nobody's own, and nothing is compiled twice."""
    with pytest.MonkeyPatch.context() as patch:
        if "FASTSVI_CACHE" not in os.environ:
            patch.setenv("FASTSVI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def clean_state():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the legacy generator is what Pyro programs draw from)
    torch.manual_seed(0)
    for library in ("fastsvi", "pyro"):
        if library in sys.modules and hasattr(sys.modules[library], "clear_param_store"):
            sys.modules[library].clear_param_store()
    checks = torch.distributions.Distribution._validate_args
    yield
    left = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(checks)
    for library in ("fastsvi", "pyro"):
        if library in sys.modules and hasattr(sys.modules[library], "clear_param_store"):
            sys.modules[library].clear_param_store()
    assert left == checks, "this test left the validation of distributions changed"
