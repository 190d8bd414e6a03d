"""Eager steps of fastsvi against pyro-ppl, in one process and in turn.

``python -m bench.step`` prints, per workload and number of particles, the median time of a step
of each library, their ratio, and both final losses: a time without its loss says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch

from bench.workloads import WORKLOADS

NAMES = ("eight_schools", "intercepts")


def prepare(pyro: ModuleType, name: str, particles: int) -> Callable[[], float]:
    """A fresh fit of a workload; the returned function takes one step and returns its loss."""
    workload = WORKLOADS[name]
    model, data = workload.model(pyro), workload.data()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pyro.infer.autoguide.AutoNormal(model)
    # Pyro vectorises particles by a plate and must be told how deep the model's plates go.
    elbo = pyro.infer.Trace_ELBO(
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1
    )
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    return lambda: svi.step(*data)


def compare(
    name: str, particles: int, rounds: int, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median microseconds per step and final smoothed loss, by library.

    The libraries take turns of ``steps`` steps, so that a change in the machine's speed meets both.
    """
    import pyro

    import fastsvi

    libraries = {"fastsvi": fastsvi, "pyro": pyro}
    advance = {label: prepare(library, name, particles) for label, library in libraries.items()}
    times: dict[str, list[float]] = {label: [] for label in libraries}
    losses: dict[str, list[float]] = {label: [] for label in libraries}
    for step in advance.values():
        for _ in range(20):
            step()
    for _ in range(rounds):
        for label, step in advance.items():
            start = time.perf_counter()
            losses[label] += [step() for _ in range(steps)]
            times[label].append((time.perf_counter() - start) / steps * 1e6)
    return (
        {label: statistics.median(values) for label, values in times.items()},
        {label: statistics.fmean(values[-200:]) for label, values in losses.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of some seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, steps = (6, 50) if options.quick else (30, 100)
    print(f"torch {torch.__version__}, 1 thread, {rounds} rounds of {steps} steps")
    print(f"{'workload':<16}{'particles':>10}{'pyro us':>10}{'fastsvi us':>12}{'ratio':>8}  loss")
    for name in NAMES:
        for particles in (1, 64):
            times, losses = compare(name, particles, rounds, steps)
            ratio = times["fastsvi"] / times["pyro"]
            print(
                f"{name:<16}{particles:>10}{times['pyro']:>10.0f}{times['fastsvi']:>12.0f}"
                f"{ratio:>8.3f}  {losses['fastsvi']:.2f} (pyro {losses['pyro']:.2f})"
            )


if __name__ == "__main__":
    main()
