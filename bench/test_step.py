"""Steps of fastsvi, eager and compiled, at the sizes for a CPU."""

from __future__ import annotations

import pytest
import torch

from bench.libraries import NotBuilt
from bench.libraries.with_fastsvi import FastSVIFit
from bench.workloads import WORKLOADS, case

CASES = [
    (name, particles)
    for name, workload in WORKLOADS.items()
    for particles in workload.sizes["cpu"].quick
]


@pytest.mark.parametrize("form", ["eager", "compiled"])
@pytest.mark.parametrize(("name", "particles"), CASES)
def test_steps(benchmark, name, particles, form):
    torch.set_num_threads(1)
    try:
        fit = FastSVIFit(case(name, "cpu", particles), "cpu", compile=form == "compiled")
    except NotBuilt as reason:
        pytest.skip(str(reason))
    fit.step()
    first = fit.run(20).mean()
    if fit.note:
        pytest.skip(fit.note)
    steps = 5 if form == "eager" else 200
    benchmark.extra_info["steps"] = steps
    benchmark(fit.run, steps)
    assert fit.run(20).mean() < first, "the loss did not fall, so the time does not count"
