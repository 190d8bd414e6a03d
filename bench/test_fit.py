"""Whole fits by ``svi.run``, from a fresh store to an ELBO that is right."""

from __future__ import annotations

import pytest
import torch

from bench import agreement, gates
from bench.libraries import NotBuilt
from bench.libraries.with_fastsvi import FastSVIFit
from bench.test_step import CASES
from bench.workloads import case


@pytest.mark.parametrize(("name", "particles"), CASES)
def test_fit(benchmark, name, particles):
    torch.set_num_threads(1)
    one = case(name, "cpu", particles)
    fits = []

    def begin():
        fits.append(FastSVIFit(one, "cpu"))
        return (fits[-1],), {}

    def fit(run):
        run.step()
        run.run(one.steps - 1)

    try:
        begin()
    except NotBuilt as reason:
        pytest.skip(str(reason))
    benchmark.extra_info["steps"] = one.steps
    benchmark.pedantic(fit, setup=begin, rounds=3)
    assert gates.final(*agreement.evaluate(one, fits[-1].posterior()), one) is None
