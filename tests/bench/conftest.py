"""bench/ is not installed: tests find it beside them. And what it switches is switched back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))

# NumPyro is an oracle here: what counts is what it computes, and most of its time is compiling.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True)
def restored_checks():
    """Pyro is measured without its checks, and shares the switch of torch's distributions."""
    checks = torch.distributions.Distribution._validate_args
    yield
    if "pyro" in sys.modules:
        sys.modules["pyro"].enable_validation(True)
    torch.distributions.Distribution.set_default_validate_args(checks)
