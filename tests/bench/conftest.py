"""bench/ is not installed: tests find it beside them. And what it switches is switched back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def restored_checks():
    """Pyro is measured without its checks, and shares the switch of torch's distributions."""
    checks = torch.distributions.Distribution._validate_args
    yield
    if "pyro" in sys.modules:
        sys.modules["pyro"].enable_validation(True)
    torch.distributions.Distribution.set_default_validate_args(checks)
