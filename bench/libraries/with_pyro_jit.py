"""Stock Pyro with its loss traced by ``torch.jit``."""

from __future__ import annotations

import warnings

from bench.libraries import Fit
from bench.libraries.with_pyro import PyroFit
from bench.workloads import Case


def prepare(case: Case, device: str) -> Fit:
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # deprecated, and Pyro's only way
    return PyroFit(case, device, jit=True)
