"""fastsvi without compiled steps."""

from __future__ import annotations

from bench.libraries import Fit
from bench.libraries.with_fastsvi import FastSVIFit
from bench.workloads import Case


def prepare(case: Case, device: str) -> Fit:
    return FastSVIFit(case, device, compile=False)
