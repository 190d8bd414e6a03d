"""Steady steps of all libraries in one process and in turn: no compilation, no import, no start.

    python -m bench.step                     # every workload at the size for this CPU
    python -m bench.step --quick             # eager and compiled steps beside Pyro's, a minute
    python -m bench.step --device cuda --budget 200 --json bench/results/<gpu>-steps.json

Because the libraries take turns of short blocks, a change in the machine's speed meets all of them,
and the ratios hold where the times do not. The rows have the form of :mod:`bench.compare`, with the
figures ``step_us``, ``gate`` and the ``curve`` of the first steps in their one repeat. A library's
times count only if its losses are, step for step, those of the library that took the most steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import gates
from bench.libraries import LIBRARIES, Fit, NotBuilt
from bench.machine import describe, machine
from bench.measure import BLOCK, curve, per_step
from bench.table import microseconds
from bench.workloads import WORKLOADS, Array, Case, case

DEFAULT = ("fastsvi", "numpyro", "torch-compiled", "torch", "pyro", "fastsvi-eager")
QUICK = ("fastsvi", "pyro", "fastsvi-eager")
QUICK_WORKLOADS = ("eight_schools", "intercepts")
ROUNDS = 8
CURVED = 2000  # steps whose losses are kept
HEADER = (
    f"{'workload':<14}{'P':>5}{'F':>6}  {'library':<15}{'step us: median':>16}{'lowest':>10}"
    f"{'highest':>10}{'x':>8}{'loss':>14}"
)


class Turn:
    """A fit of one library that is timed in blocks of steps, all of whose losses are kept."""

    def __init__(self, one: Case, library: str, device: str, block_s: float) -> None:
        self.fit: Fit = LIBRARIES[library].load().prepare(one, device)
        self.losses: list[Array] = []
        self.times: list[float] = []
        self.fit.step()
        if self.fit.fixed_length:
            self.block = max(1, one.steps // 5)
            self._take(self.block)
        self.fit.settle(self.block if self.fit.fixed_length else BLOCK)
        if not self.fit.fixed_length:
            self.block = self._find_block(block_s)

    def _find_block(self, seconds: float) -> int:
        block = BLOCK
        while True:
            took = self._take(block)
            if took > seconds / 4:
                return max(1, int(block * seconds / took))
            block *= 4

    def _take(self, steps: int) -> float:
        """Seconds of so many steps."""
        began = time.perf_counter()
        losses = self.fit.run(steps)
        took = time.perf_counter() - began
        self.losses.append(losses)
        return took

    def time(self) -> None:
        self.times.append(round(per_step(self.fit, self._take, self.block) * 1e6, 4))

    def result(self) -> dict[str, Any]:
        losses = np.concatenate(self.losses)
        # The curve of a slow library is held against its first steps, so it must be fine there.
        begin = curve(losses[:CURVED])
        return {"step_us": self.times, "steps_taken": len(losses), **begin}


def measure(
    one: Case, libraries: Sequence[str], device: str, rounds: int = ROUNDS, block_s: float = 0.1
) -> list[dict[str, Any]]:
    """Rows of one case, one for each library."""
    rows = {name: _row(one, name, device) for name in libraries}
    for group in _groups(libraries):
        turns: dict[str, Turn] = {}
        for name in group:
            try:
                turns[name] = Turn(one, name, device, block_s)
            except NotBuilt as reason:
                rows[name]["note"] = str(reason)
            except Exception as error:  # noqa: BLE001 (whatever a library fails by is its row's text)
                rows[name]["note"] = f"failed: {type(error).__name__}: {error}"[:300]
        for _ in range(rounds):
            for turn in turns.values():
                turn.time()
        for name, turn in turns.items():
            rows[name]["repeats"].append(turn.result())
            rows[name]["note"] = turn.fit.note
    judge(one, list(rows.values()))
    return list(rows.values())


class _CaseWithData(Case):
    """A case whose data are made once for all libraries."""

    @cached_property
    def _data(self) -> tuple[Array, ...]:
        return super().data()

    def data(self) -> tuple[Array, ...]:
        return self._data


def with_data(one: Case) -> Case:
    return _CaseWithData(one.workload, one.size, one.particles, one.name)


def release(device: str) -> None:
    """Let go what a case has left behind, for the next one may be large."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _groups(libraries: Sequence[str]) -> Iterator[list[str]]:
    """Libraries that take turns. The two forms of fastsvi share a store, so one of them waits."""
    both = {"fastsvi", "fastsvi-eager"} <= set(libraries)
    yield [name for name in libraries if not (both and name == "fastsvi-eager")]
    if both:
        yield ["fastsvi-eager"]


def _row(one: Case, library: str, device: str) -> dict[str, Any]:
    return {
        "workload": one.name,
        "particles": one.particles,
        "fits": one.fits,
        "library": library,
        "device": device,
        "note": None,
        "repeats": [],
    }


def judge(one: Case, rows: list[dict[str, Any]]) -> None:
    """Hold the losses of each row against those of the row with the most steps."""
    repeats = [(row, repeat) for row in rows for repeat in row["repeats"]]
    if not repeats:
        return
    longest = max((repeat for _, repeat in repeats), key=lambda repeat: repeat["steps_taken"])
    for row, repeat in repeats:
        wholes = [] if repeat is longest else [longest]
        repeat["gate"] = gates.partial(repeat, wholes, one.size) or "passed"
        if repeat["gate"] != "passed":
            row["note"] = "; ".join(
                filter(None, ["does not count: " + repeat["gate"], row["note"]])
            )


def line(row: dict[str, Any], own: dict[str, Any] | None) -> str:
    """One row as text; ``x`` is fastsvi's median over this one's."""
    label = f"{row['workload']:<14}{row['particles']:>5}{row['fits']:>6}  {row['library']:<15}"
    note = f"  {row['note']}" if row["note"] else ""
    times = _times(row)
    if not times:
        return f"{label}{'-':>16}{'-':>10}{'-':>10}{'-':>8}{'-':>14}{note}"
    mine = _times(own) if own else []
    ratio = f"{np.median(mine) / np.median(times):.3f}" if mine else "?"
    loss = row["repeats"][0]["curve"][-1]
    return (
        f"{label}{microseconds(float(np.median(times))):>16}{microseconds(min(times)):>10}"
        f"{microseconds(max(times)):>10}{ratio:>8}{loss:>14.2f}{note}"
    )


def _times(row: dict[str, Any]) -> list[float]:
    counted = [r for r in row["repeats"] if r["gate"] == "passed"]
    return [time for repeat in counted for time in repeat["step_us"]]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status says whether everything that was measured counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases and libraries, a minute")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("cpu", "cuda", "tiny"), help="default: the device's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = options.size or options.device
    libraries = options.libraries or (QUICK if options.quick else DEFAULT)
    installed = [name for name in libraries if LIBRARIES[name].is_installed()]
    about = machine(options.device)
    print(f"{describe(about)}; {options.threads} thread(s)")
    for name in libraries:
        if name not in installed:
            print(f"{name}: {LIBRARIES[name].distribution} is not installed")
    print(HEADER)
    settings = {"threads": options.threads, "device": options.device, "size": size}
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    for name in options.workloads or (QUICK_WORKLOADS if options.quick else WORKLOADS):
        sizes = WORKLOADS[name].sizes[size]
        for particles in sizes.quick if options.quick else sizes.steps:
            one = case(name, size, particles)
            if time.monotonic() - start > options.budget:
                some = [_row(one, library, options.device) for library in installed]
                for row in some:
                    row["note"] = "left out: the time given to this run was spent"
            else:
                some = measure(with_data(one), installed, options.device, options.rounds)
                release(options.device)
            rows += [row | {"size": size} for row in some]
            own = next((row for row in some if row["library"] == "fastsvi"), None)
            for row in some:
                print(line(row, own), flush=True)
            if options.json:  # each time, for a run may be stopped from outside
                document = {"machine": about, "settings": settings, "rows": rows}
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.json:
        print(f"wrote {options.json}")
    gate = [repeat["gate"] for row in rows for repeat in row["repeats"]]
    return int(any(found != "passed" for found in gate))


if __name__ == "__main__":
    sys.exit(main())
