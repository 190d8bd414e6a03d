"""Every library's text of a workload is the same model: their losses and ELBOs say so."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.libraries import LIBRARIES, NotBuilt
from bench.workloads import WORKLOADS, Case, Size, case, exact
from bench.workloads.log_joints import LOG_JOINTS, elbo

ROOT = Path(__file__).parents[2]
EVERY = [
    (name, particles) for name in WORKLOADS for particles in WORKLOADS[name].sizes["tiny"].steps
]


def first_losses(library: str, one: Case, steps: int = 40) -> float:
    """Mean loss of runs that hardly move: by then noise has averaged out, but not much else."""
    if not LIBRARIES[library].is_installed():
        pytest.skip(f"{library} is not installed")
    fit = LIBRARIES[library].load().prepare(one, "cpu")
    return float(fit.run(steps).mean())


def still(name: str, particles: int) -> Case:
    """The tiny case with a learning rate that does not move it."""
    one = case(name, "tiny", particles)
    slow = one.workload.__class__(**{**one.workload.__dict__, "learning_rate": 1e-8})
    return Case(slow, one.size, particles, name)


@functools.cache
def by_hand(name: str, particles: int) -> float:
    return first_losses("torch", still(name, particles), 400)


@pytest.mark.parametrize("library", ["fastsvi-eager", "pyro"])
@pytest.mark.parametrize(("name", "particles"), EVERY)
def test_losses_are_those_of_hand_written_torch(name, particles, library):
    expected = by_hand(name, particles)
    try:
        found = first_losses(library, still(name, particles), 100)
    except NotBuilt as reason:
        pytest.skip(str(reason))
    # The noise of one loss is below a tenth for scales of 0.1, but of minibatches of a tenth.
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_numpyro_fits_the_same_model(name):
    found = first_losses("numpyro", still(name, 1), 100)
    assert found == pytest.approx(by_hand(name, 1), rel=0.05)


def test_wide_elbo_is_the_evidence_at_the_exact_posterior():
    one = case("wide", "tiny", 1)
    (y,) = one.data()
    posterior = {"loc.z": 0.8 * y, "scale.z": np.full_like(y, np.sqrt(0.2))}
    found, _ = elbo(one, posterior)
    evidence = torch.distributions.Normal(0.0, 1.25**0.5).log_prob(torch.from_numpy(y)).sum()
    # The ELBO equals the evidence draw by draw only with log q of each draw; with the exact
    # entropy it has noise: 50 elements, 100 draws, each draw with a variance of 1/2.
    assert found == pytest.approx(evidence.item(), abs=4 * (50 * 0.5 / 100) ** 0.5)


@pytest.mark.parametrize("name", LOG_JOINTS)
def test_log_joints_keep_particles_apart(name):
    one = case(name, "tiny", 1)
    data = [torch.from_numpy(array) for array in one.data()]
    z = {site: torch.rand(3, *latent.shape) + 0.5 for site, latent in one.latents().items()}
    together = LOG_JOINTS[name](z, *data)
    assert together.shape == (3,)
    alone = [LOG_JOINTS[name]({s: v[i : i + 1] for s, v in z.items()}, *data) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-4)


def test_tables_are_complete():
    for name, workload in WORKLOADS.items():
        assert set(workload.sizes) == {"cpu", "cuda", "tiny"}
        for size in workload.sizes.values():
            assert set(size.quick) <= set(size.steps) or size.quick == (1,), name
        cpu = workload.sizes["cpu"]
        assert set(cpu.quick) <= set(cpu.steps)
        assert cpu.elbo is not None
        assert (cpu.gap is not None) == exact.has_optimum(name)


def test_the_tables_import_neither_torch_nor_jax():
    # NumPyro's process reads the tables, and must not pay for the import of torch.
    code = "import sys, bench.measure, bench.gates; print({'torch', 'jax'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_half_a_percent_is_allowed_where_nothing_is_said():
    assert Size({}, {}).allowed(-200.0) == 1.0
    assert Size({}, {}, tolerance=3.0).allowed(-200.0) == 3.0
