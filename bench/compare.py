"""fastsvi beside NumPyro, Pyro and hand-written torch: whole fits, each in a process of its own.

    python -m bench.compare                              # everything: an hour or two
    python -m bench.compare --quick                      # within ten minutes on two cores
    python -m bench.compare --workloads wide --libraries fastsvi numpyro --json out.json

The libraries take turns. Model, data, first values, optimizer, precision, number of steps and of
threads are the same; each library is in its best setting (:data:`bench.libraries.LIBRARIES` says
which). Reported are, as medians with the range where there are several repeats:

``first``   seconds from the start of the process, imports included, to the first known loss, with
            all caches of compiled code empty
``cold``    seconds from the start of the process to the end of the fit, caches empty
``warm``    the same in a second process, with the caches of the first; ``=`` where a library
            keeps none, so that warm is cold
``step``    microseconds per step in a long run, compiled before
``x``       fastsvi's time per step over this one's: below 1, fastsvi is faster
``MB``      peak memory of the fit beyond that of the imports (``cuda``: peak of the device)
``ELBO``    of the fitted guide on all data, by one evaluator for all, in float64: without noise
            (:mod:`bench.workloads.exact`), or for the auto-encoder from draws with the same noise
``apart``   how far the guide is from NumPyro's, at worst over all its numbers, in standard
            deviations of what noise does to two fits (:mod:`bench.agreement`); ``?`` without one

``~`` marks a fit that was stopped when its time was up and extrapolated. A fit whose ELBO is above
the best there is or too far below it, or whose guide is not NumPyro's up to noise (a stopped one:
whose losses miss those of whole fits), does not count: its row says so and shows no time. What is
not installed, not built, failed, or left out for lack of time says so in its row.

``--json FILE`` keeps one document::

    {"machine": {"cpu", "cores", "load", "python", "commit", "versions": {...}, "gpu", "driver"},
     "settings": {"threads", "repeats", "device", "size", "quick", "started", "seconds",
                  "libraries": {name: how it was used}},
     "rows": [{"workload", "particles", "fits", "library", "device", "size",
               "note": what a reader must know, or null,
               "repeats": [{"first_step_s", "fit_cold_s", "fit_warm_s", "import_s",
                            "steps", "steps_taken", "extrapolated",
                            "step_us": [of each block of steady steps],
                            "peak_mb", "import_mb", "elbo", "elbo_error",
                            "apart": {"loc", "log_scale": largest differences in units of the
                                      guide, "errors", "site", "bound"},
                            "window", "curve": [mean loss of each window of steps],
                            "gate": "passed", or why the times do not count,
                            "error": only where it failed}, ...]}, ...]}

A figure that a row does not have is absent from its repeats, and ``note`` says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import gates
from bench.libraries import LIBRARIES
from bench.machine import (
    cache_environment,
    describe,
    keep_bytecode,
    machine,
    threads_environment,
)
from bench.measure import Job
from bench.table import HEADER, line
from bench.workloads import WORKLOADS, Array, Case, case

DEFAULT = ("fastsvi", "numpyro", "torch-compiled", "torch", "pyro", "pyro-jit")
QUICK_BUDGET_S = 540.0
_LEFT_OUT = "left out: the time given to this run was spent"


@dataclass
class Settings:
    """How a comparison is made."""

    libraries: Sequence[str] = DEFAULT
    workloads: Sequence[str] = tuple(WORKLOADS)
    particles: Sequence[int] | None = None
    device: str = "cpu"
    size: str = "cpu"
    repeats: int = 3
    threads: int = 1
    quick: bool = False
    fit_seconds: float = 60.0
    steady_seconds: float = 3.0
    budget_s: float | None = None
    steps: int = 0

    def cases(self) -> Iterator[Case]:
        for name in self.workloads:
            size = WORKLOADS[name].sizes[self.size]
            for particles in self.particles or (size.quick if self.quick else size.steps):
                if particles in size.steps:
                    yield case(name, self.size, particles)

    def rounds(self) -> Iterator[tuple[Case, Sequence[str]]]:
        """Cases with the libraries to measure in turn: a quick run takes the essential ones first,
        so that a slow machine loses the others."""
        tiers = [self.libraries]
        if self.quick:
            first = ("fastsvi", "numpyro")
            tiers = [
                [name for name in self.libraries if name in first],
                [name for name in self.libraries if name not in first],
            ]
        for tier in filter(None, tiers):
            for one in self.cases():
                yield one, tier


class Comparison:
    """Rows of figures, filled by :meth:`run`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self._posteriors = Posteriors()
        self._start = time.monotonic()

    def run(self) -> None:
        keep_bytecode()
        for one, libraries in self.settings.rounds():
            rows = [self._row(one, library) for library in libraries]
            for _ in range(self.settings.repeats):
                for row in rows:
                    if LIBRARIES[row["library"]].is_installed():
                        row["repeats"].append(self._repeat(one, row["library"]))
            self.rows += rows
            same = [row for row in self.rows if _is_of(one, row)]
            self._posteriors.compare(one, same)
            judge(one, same)
            own = next((r for r in self.rows if _is_of(one, r) and r["library"] == "fastsvi"), None)
            for row in rows:
                print(line(row, own), flush=True)

    def document(self) -> dict[str, Any]:
        settings = {
            "threads": self.settings.threads,
            "repeats": self.settings.repeats,
            "device": self.settings.device,
            "size": self.settings.size,
            "quick": self.settings.quick,
            "seconds": round(self.seconds, 1),
            "libraries": {name: LIBRARIES[name].how for name in self.settings.libraries},
        }
        return {"settings": settings, "rows": self.rows}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def _left_s(self) -> float:
        budget = self.settings.budget_s
        return float("inf") if budget is None else budget - self.seconds

    def _row(self, one: Case, library: str) -> dict[str, Any]:
        known = LIBRARIES[library]
        missing = None if known.is_installed() else f"{known.distribution} is not installed"
        return {
            "workload": one.name,
            "particles": one.particles,
            "fits": one.fits,
            "library": library,
            "device": self.settings.device,
            "size": self.settings.size,
            "note": missing,
            "repeats": [],
        }

    def _repeat(self, one: Case, library: str) -> dict[str, Any]:
        """All processes of one repeat: first step, cold fit, warm fit."""
        known = LIBRARIES[library]
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            posterior = folder / "posterior.npz"
            if known.first_step_apart:
                result = self._process(self._job(one, library, "first"), folder / "first")
                if _failed(result):
                    return result
                found["first_step_s"] = result["first_step_s"]
            result = self._process(self._job(one, library, "fit", posterior), folder / "caches")
            if _failed(result):
                return found | result
            found["fit_cold_s"] = result.pop("fit_s")
            found |= result
            if not found["extrapolated"]:
                found["elbo"], found["elbo_error"] = self._posteriors.take(one, library, posterior)
            if known.caches:
                result = self._process(self._job(one, library, "warm"), folder / "caches")
                if _failed(result):
                    found["warm_error"] = result.get("error") or result.get("missing")
                else:
                    found["fit_warm_s"] = result["fit_s"]
        return found

    def _job(self, one: Case, library: str, kind: str, posterior: Path | None = None) -> Job:
        return Job(
            library,
            one.name,
            self.settings.size,
            one.particles,
            self.settings.device,
            kind,
            self.settings.fit_seconds,
            self.settings.steady_seconds,
            self.settings.steps,
            str(posterior or ""),
        )

    def _process(self, job: Job, caches: Path) -> dict[str, Any]:
        left = self._left_s()
        if left < 10:
            return {"missing": _LEFT_OUT}
        environment = os.environ | threads_environment(self.settings.threads)
        environment |= cache_environment(caches)
        environment |= {
            "BENCH_STARTED": str(time.monotonic()),
            # Or JAX finds its cache by luck only: NumPyro walks over sets.
            "PYTHONHASHSEED": "0",
            "JAX_PLATFORMS": "cuda" if job.device == "cuda" else "cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, "-m", "bench.measure", json.dumps(asdict(job))]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment,
                cwd=Path(__file__).parents[1],
                check=False,
                timeout=None if left == float("inf") else left + 20,
            )
        except subprocess.TimeoutExpired:
            return {"missing": _LEFT_OUT}
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return {"error": reason[0][:300]}
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


class Posteriors:
    """The guides that libraries fitted, for as long as they may be compared with NumPyro's."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, str], list[dict[str, Array]]] = {}
        self._laws: dict[tuple[str, int], Any] = {}

    def take(self, one: Case, library: str, path: Path) -> tuple[float, float]:
        """Read a guide; its ELBO and standard error by the evaluator that all libraries share."""
        import numpy as np

        from bench import agreement

        with np.load(path) as file:
            posterior = dict(file)
        if agreement.can_compare(one):
            self._found.setdefault((one.name, one.particles, library), []).append(posterior)
        return agreement.evaluate(one, posterior)

    def compare(self, one: Case, rows: list[dict[str, Any]]) -> None:
        """Put ``apart`` into the whole fits of a case, if NumPyro is among them."""
        key = one.name, one.particles
        reference = self._found.get((*key, "numpyro"))
        if reference is None:
            return
        from bench import agreement

        if key not in self._laws:
            self._laws[key] = agreement.law(one)
        for row in rows:
            whole = [repeat for repeat in row["repeats"] if "elbo" in repeat]
            found = self._found.get((*key, row["library"]), [])
            if row["library"] != "numpyro":
                for repeat, posterior in zip(whole, found, strict=True):
                    repeat["apart"] = agreement.apart(self._laws[key], posterior, reference[0])


def judge(one: Case, rows: list[dict[str, Any]]) -> None:
    """Pass or fail every repeat of the rows of a case, and note what a reader must know."""
    repeats = [(row, repeat) for row in rows for repeat in row["repeats"]]
    wholes = [repeat for _, repeat in repeats if "elbo" in repeat]
    for row, repeat in repeats:
        if "elbo" in repeat:
            others = [r["elbo"] for other, r in repeats if other is not row and "elbo" in r]
            reason = gates.final(repeat["elbo"], repeat["elbo_error"], one, others)
            if reason is None and "apart" in repeat:
                reason = gates.posterior(repeat["apart"])
            repeat["gate"] = reason or "passed"
        elif "curve" in repeat:
            repeat["gate"] = gates.partial(repeat, wholes, one.size) or "passed"
    for row in rows:
        row["note"] = "; ".join(_notes(row)) or None


def _notes(row: dict[str, Any]) -> list[str]:
    notes = [] if row["repeats"] else [row["note"] or _LEFT_OUT]
    for repeat in row["repeats"]:
        if "error" in repeat:
            notes.append(f"failed: {repeat['error']}")
        if repeat.get("gate", "passed") != "passed":
            notes.append(f"does not count: {repeat['gate']}")
        notes += [repeat[key] for key in ("missing", "note") if repeat.get(key)]
        if repeat.get("warm_error"):
            notes.append(f"no warm fit: {repeat['warm_error']}")
        if repeat.get("extrapolated"):
            notes.append(f"stopped after {repeat['steps_taken']} of {repeat['steps']} steps")
    return list(dict.fromkeys(notes))


def _failed(result: dict[str, Any]) -> bool:
    return "error" in result or "missing" in result


def _is_of(one: Case, row: dict[str, Any]) -> bool:
    return (row["workload"], row["particles"]) == (one.name, one.particles)


def parse(arguments: list[str] | None = None) -> tuple[Settings, Path | None]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="See the top of bench/compare.py for what the columns and the JSON hold.",
    )
    parser.add_argument("--quick", action="store_true", help="few cases, once; under ten minutes")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--libraries", nargs="+", default=list(DEFAULT), choices=LIBRARIES)
    parser.add_argument("--particles", nargs="+", type=int, help="only these numbers of particles")
    parser.add_argument("--repeats", type=int, help="processes for each figure (3; quick: 1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("cpu", "cuda", "tiny"), help="default: the device's")
    parser.add_argument("--budget", type=float, help="seconds after which nothing more is started")
    parser.add_argument("--fit-seconds", type=float, help="longest fit of a library that can stop")
    parser.add_argument("--steps", type=int, default=0, help="of a fit (the gates then fail)")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    found = parser.parse_args(arguments)
    quick = found.quick
    settings = Settings(
        libraries=found.libraries,
        workloads=found.workloads,
        particles=found.particles,
        device=found.device,
        size=found.size or found.device,
        repeats=found.repeats or (1 if quick else 3),
        threads=found.threads,
        quick=quick,
        fit_seconds=found.fit_seconds or (2.0 if quick else 60.0),
        steady_seconds=1.0 if quick else 3.0,
        budget_s=found.budget or (QUICK_BUDGET_S if quick else None),
        steps=found.steps,
    )
    return settings, found.json


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status says whether every figure that was measured counts."""
    settings, path = parse(arguments)
    about = machine(settings.device)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{describe(about)}; {settings.threads} thread(s), {settings.repeats} repeat(s)")
    print(HEADER)
    comparison = Comparison(settings)
    comparison.run()
    document = {"machine": about} | comparison.document()
    document["settings"]["started"] = started
    print(
        f"{comparison.seconds:.0f} s in all. = no cache on disk, so warm is cold. ~ extrapolated."
    )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {path}")
    repeats = [repeat for row in comparison.rows for repeat in row["repeats"]]
    return int(any("error" in r or r.get("gate", "passed") != "passed" for r in repeats))


if __name__ == "__main__":
    sys.exit(main())
