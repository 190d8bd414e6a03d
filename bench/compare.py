"""Whole runs of fastsvi beside pyro-ppl and NumPyro: steady time per step and final loss.

``python -m bench.compare`` runs every (workload, library) in a process of its own, in turn, several
times, on one thread; a library that is not installed is left out, and said to be. ``--json FILE``
keeps the figures with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.workloads import WORKLOADS

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
LIBRARIES = {"fastsvi": "fastsvi", "numpyro": "numpyro", "pyro": "pyro-ppl"}
PYRO_STEPS = 200  # a stock Pyro step takes some milliseconds


# ---- one measurement, in a process of its own


def measure(library: str, name: str, particles: int) -> dict[str, Any]:
    """Time a run; the first steps, which compile, are timed apart."""
    steps = max(500, WORKLOADS[name].steps // max(1, particles // 16))
    run = {"fastsvi": run_fastsvi, "numpyro": run_numpyro, "pyro": run_pyro}[library]
    return run(name, particles, steps)


def run_fastsvi(name: str, particles: int, steps: int) -> dict[str, Any]:
    import torch

    import fastsvi as pyro
    from fastsvi.infer import SVI, Trace_ELBO
    from fastsvi.infer.autoguide import AutoNormal

    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    model, data = workload.model(pyro), workload.data()
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step(*data)
    svi.run(steps, *data, progress_bar=False, compile=True)
    start = time.perf_counter()
    run = svi.run(steps, *data, progress_bar=False, compile=True)
    seconds = time.perf_counter() - start
    return result(seconds, run.losses[-steps // 4 :].mean().item(), steps, run.obstacle)


def run_numpyro(name: str, particles: int, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    workload = WORKLOADS[name]
    model = workload.numpyro_model()
    data = tuple(jnp.asarray(x.numpy()) for x in workload.data())
    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.01), Trace_ELBO(particles))
    state = svi.init(jax.random.PRNGKey(0), *data)

    def scan(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, *data), state, None, length=steps)

    compiled = jax.jit(scan)
    state, losses = compiled(state)
    losses.block_until_ready()
    start = time.perf_counter()
    state, losses = compiled(state)
    losses.block_until_ready()
    return result(time.perf_counter() - start, float(losses[-steps // 4 :].mean()), steps)


def run_pyro(name: str, particles: int, steps: int) -> dict[str, Any]:
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    torch.set_num_threads(1)
    steps = min(steps, PYRO_STEPS)
    workload = WORKLOADS[name]
    model, data = workload.model(pyro), workload.data()
    pyro.set_rng_seed(0)
    # Pyro vectorises particles by a plate and must be told how deep the model's plates go.
    elbo = Trace_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(5):
        svi.step(*data)
    start = time.perf_counter()
    losses = [svi.step(*data) for _ in range(steps)]
    note = f"loss after {steps} steps only"
    return result(time.perf_counter() - start, statistics.fmean(losses[-50:]), steps, note)


def result(seconds: float, loss: float, steps: int, note: str | None = None) -> dict[str, Any]:
    return {"us": seconds / steps * 1e6, "loss": loss, "steps": steps, "note": note}


# ---- all of them, in turn


def in_own_process(library: str, name: str, particles: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.compare", "--measure", library, name, str(particles)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": reason[0]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(libraries: list[str], repeats: int, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for particles in WORKLOADS[name].particles:
            found: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
            for _ in range(repeats):
                for library in libraries:
                    found[library].append(in_own_process(library, name, particles))
            rows.append({"workload": name, "particles": particles, "results": found})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """One line per library: median, range, ratio of fastsvi to it, and the final loss."""
    own = row["results"]["fastsvi"]
    for library, results in row["results"].items():
        times = [r["us"] for r in results if "us" in r]
        label = f"{row['workload']:<14}{row['particles']:>6}  {library:<9}"
        if not times:
            print(f"{label} failed: {results[0]['error']}", flush=True)
            continue
        pairs = [
            a["us"] / b["us"] for a, b in zip(own, results, strict=True) if "us" in a and "us" in b
        ]
        if not pairs:
            pairs = [math.nan]
        ratio = f"{statistics.median(pairs):8.3f}"
        spread = f"{min(times):.1f} to {max(times):.1f}"
        loss, note = results[-1]["loss"], results[-1]["note"] or ""
        print(
            f"{label}{statistics.median(times):>11.1f} us ({spread:>20}) {ratio}  "
            f"loss {loss:.2f} {note}",
            flush=True,
        )


def machine() -> dict[str, str]:
    """Where and with what the figures were made."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    packages = {p: version(p) for p in ("torch", *LIBRARIES.values()) if is_installed(p)}
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        **packages,
    }


def is_installed(package: str) -> bool:
    module = {"pyro-ppl": "pyro"}.get(package, package)
    return importlib.util.find_spec(module) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        library, name, particles = options.measure
        print(json.dumps(measure(library, name, int(particles))))
        return
    libraries = [name for name in options.libraries if is_installed(LIBRARIES[name])]
    for name in set(options.libraries) - set(libraries):
        print(f"{LIBRARIES[name]} is not installed and left out")
    where = machine()
    print(", ".join(f"{key} {value}" for key, value in where.items()) + ", 1 thread")
    print("median time per step (range), fastsvi's time over it, final loss")
    rows = compare(libraries, options.repeats, options.workloads)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
