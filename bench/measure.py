"""One measurement, in a process of its own: ``python -m bench.measure '<json>'``.

:mod:`bench.compare` starts it with the fields of :class:`Job` as JSON, and the time at which it did
so in ``BENCH_STARTED`` (of the clock ``time.monotonic``, which all processes share). The last line
of the output is the result, as JSON; what is in it says :func:`fit` and :func:`first_step`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.libraries import LIBRARIES, Fit, NotBuilt
from bench.workloads import Array, Case, case

CURVE = 100  # windows, at most, into which the losses of a fit are averaged
BLOCK = 10  # steps between two looks at the clock


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        library, workload, size, particles, device: of what.
        kind: ``"first"``, ``"fit"``, or ``"warm"``: a fit, and no steady steps after it.
        fit_seconds: a fit that is taken step by step stops after so long, and is extrapolated.
        steady_seconds: of the steps after the fit.
        steps: of the fit; 0 for those of the workload's table.
        posterior: file for the fitted guide; none if empty.
    """

    library: str
    workload: str
    size: str
    particles: int
    device: str = "cpu"
    kind: str = "fit"
    fit_seconds: float = 60.0
    steady_seconds: float = 2.0
    steps: int = 0
    posterior: str = ""

    def case(self) -> Case:
        return case(self.workload, self.size, self.particles)


def since_start() -> float:
    """Seconds since this process was asked for."""
    return time.monotonic() - float(os.environ["BENCH_STARTED"])


def measure(job: Job) -> dict[str, Any]:
    module = LIBRARIES[job.library].load()
    imported = {"import_s": since_start(), "import_mb": resident_mb()}
    run = module.prepare(job.case(), job.device)
    if job.kind == "first":
        return imported | first_step(run)
    return imported | fit(run, job)


def first_step(run: Fit) -> dict[str, Any]:
    """``first_step_s``: from the start of the process to the first known loss."""
    run.step()
    return {"first_step_s": since_start()}


def fit(run: Fit, job: Job) -> dict[str, Any]:
    """A whole fit, then steady steps.

    Returns:
        ``first_step_s`` if the first step is part of the fit; ``fit_s`` from the start of the
        process to the last step, ``extrapolated`` if only ``steps_taken`` of ``steps`` were taken
        in the time given; ``peak_mb`` after the fit (of the device, if that is no CPU); ``curve``,
        the mean losses of windows of ``window`` steps; ``step_us``, one figure for each block of
        steady steps; ``note``.
    """
    steps = job.steps or job.case().steps
    found: dict[str, Any] = {"steps": steps}
    if not LIBRARIES[job.library].first_step_apart:
        found |= first_step(run)
        steps -= 1
    began = time.perf_counter()
    losses = run_for(run, steps, job.fit_seconds) if run.in_blocks else run.run(steps)
    seconds = time.perf_counter() - began
    missing = steps - len(losses)
    found["fit_s"] = since_start() + seconds / len(losses) * missing
    found["steps_taken"] = found["steps"] - missing
    found["extrapolated"] = missing > 0
    found["peak_mb"] = device_peak_mb(job) or peak_mb()
    found |= curve(losses)
    if job.posterior:
        with Path(job.posterior).open("wb") as file:
            np.savez(file, **run.posterior())  # type: ignore[arg-type]
    if job.kind == "fit":
        run.settle(found["steps"])
        block = found["steps"] if run.fixed_length else find_block(run, job.steady_seconds / 10)
        found["step_us"] = steady(run, block, job.steady_seconds)
    found["note"] = run.note
    return found


def run_for(run: Fit, steps: int, seconds: float) -> Array:
    """Losses of ``steps`` steps, or of as many as ``seconds`` allow."""
    stop = time.perf_counter() + seconds
    parts: list[Array] = []
    while steps and (not parts or time.perf_counter() < stop):
        parts.append(run.run(min(steps, BLOCK)))
        steps -= len(parts[-1])
    return np.concatenate(parts)


def find_block(run: Fit, seconds: float) -> int:
    """How many steps take about so long."""
    block = BLOCK
    while True:
        began = time.perf_counter()
        run.run(block)
        took = time.perf_counter() - began
        if took > seconds / 4:
            return max(1, int(block * seconds / took))
        block *= 4


def steady(run: Fit, block: int, seconds: float) -> list[float]:
    """Microseconds per step of at least two blocks of steps, and of more while time is left."""

    def take(steps: int) -> float:
        began = time.perf_counter()
        run.run(steps)
        return time.perf_counter() - began

    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < stop:
        times.append(round(per_step(run, take, block) * 1e6, 4))
    return times


def per_step(run: Fit, take: Callable[[int], float], block: int) -> float:
    """Seconds that one more step adds to a long run, if ``take(steps)`` gives those of a run.

    What a run begins with, such as a look whether the program is still the one that was compiled,
    is part of the time to fit and not of this.
    """
    if run.in_blocks or run.fixed_length:  # the beginning is none, or paid for once
        return take(block) / block
    return (take(4 * block) - take(block)) / (3 * block)


def curve(losses: Array) -> dict[str, Any]:
    window = -(-len(losses) // CURVE)  # rounded up
    whole = len(losses) // window * window
    means = losses[:whole].reshape(-1, window).mean(1)
    return {"window": window, "curve": [round(float(mean), 6) for mean in means]}


def resident_mb() -> float:
    """Resident memory of this process now; the peak starts anew from here, where Linux lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_mb()
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """Largest resident memory of this process."""
    if Path("/proc/self/status").exists():
        # ru_maxrss is no less than what the parent had when it started this process.
        return _status_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on a Mac


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def device_peak_mb(job: Job) -> float | None:
    """Largest memory taken on the device, or None on the CPU."""
    if job.device != "cuda":
        return None
    if job.library == "numpyro":
        import jax

        return jax.devices("gpu")[0].memory_stats()["peak_bytes_in_use"] / 2**20
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(measure(job)))
    except NotBuilt as reason:
        print(json.dumps({"missing": str(reason)}))


if __name__ == "__main__":
    main()
