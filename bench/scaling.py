"""How the time of a step grows: with elements D, particles P, fits F and threads.

    python -m bench.scaling                          # all curves, as far as memory and time go
    python -m bench.scaling --curves elements --libraries fastsvi torch --json out.json

Each curve is one workload with one number varied. ``exponent`` is the slope of log time over log
size, by least squares over the upper half of the points: 1 is linear. ``floor_us`` is the time that
a copy, whose bandwidth is measured in the same run, takes to move the bytes of a step that does
everything in one pass: 48 for each latent number (loc, scale and both their moments, read
and written) and each byte of data once. Where all of this lies in a cache, a step may be faster.

The JSON is ``{"machine", "settings", "copy_gb_per_s", "curves": [{"curve", "workload", "library",
"device", "threads", "exponent", "note", "points": [{"size", "step_us", "lowest_us", "highest_us",
"bytes", "floor_us", "loss"}]}]}``; a point that is missing is named in ``note``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.libraries import LIBRARIES, NotBuilt
from bench.machine import describe, machine, threads_environment
from bench.step import Turn
from bench.table import microseconds
from bench.workloads import WORKLOADS, Case, Size

STEPS = 500  # of a run whose length is compiled in, five blocks of a fifth
# What a step may hold at a time, for each latent number and particle: an eager step keeps some
# dozens of temporaries.
_BYTES_PER_NUMBER = 400
_COPY_NUMBERS = 2**24


@dataclass(frozen=True)
class Curve:
    """A workload with one number varied: ``vary`` is ``"particles"`` or a key of its shape."""

    workload: str
    vary: str
    sizes: tuple[int, ...]

    def case(self, size: int, device: str) -> Case:
        workload = WORKLOADS[self.workload]
        shape = dict(workload.sizes[device].shape)
        particles = 1
        if self.vary == "particles":
            particles = size
        else:
            shape[self.vary] = size
        return Case(workload, Size(shape, {particles: STEPS}), particles, self.workload)


CURVES = {
    "elements": Curve("wide", "elements", tuple(10**k for k in range(3, 9))),
    "particles": Curve("eight_schools", "particles", tuple(4**k for k in range(7))),
    "fits": Curve("regressions", "fits", tuple(10**k for k in range(5))),
}
THREADS = (1, 2)
THREADED = Curve("wide", "elements", (1_000_000,))


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """Slope of log time over log size in the upper half of the points; None of fewer than two.

    >>> round(exponent([1, 10, 100, 1000], [5, 5, 10, 100]), 3)
    1.0
    """
    upper = max(2, math.ceil(len(sizes) / 2))
    if len(sizes) < 2:
        return None
    x, y = np.log(sizes[-upper:]), np.log(times[-upper:])
    return float(np.polyfit(x, y, 1)[0])


def step_bytes(one: Case) -> int:
    """Bytes that a step must move if it does everything in one pass."""
    latents = sum(int(np.prod(latent.shape)) for latent in one.latents().values())
    return 48 * latents + sum(array.nbytes for array in one.data())


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and write counted; the best of ten."""
    source = torch.ones(_COPY_NUMBERS, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times)


def free_bytes(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def needed_bytes(one: Case) -> int:
    return step_bytes(one) // 48 * one.particles * _BYTES_PER_NUMBER


def measure(
    curve: Curve, library: str, device: str, bandwidth: float, stop: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Points of a curve, and why it ends before its last size, if it does."""
    points: list[dict[str, Any]] = []
    for size in curve.sizes:
        one = curve.case(size, device)
        if time.monotonic() > stop:
            return points, f"from {size} on left out: the time given to this run was spent"
        needed, free = needed_bytes(one), free_bytes(device)
        if needed > free:
            return points, (
                f"from {size} on left out: some {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} free"
            )
        try:
            turn = Turn(one, library, device, 0.1)
        except NotBuilt as reason:
            return points, str(reason)
        except Exception as error:  # noqa: BLE001 (whatever fails ends the curve, and is its note)
            return points, f"at {size}: {type(error).__name__}: {error}"[:300]
        for _ in range(5):
            turn.time()
        losses = np.concatenate(turn.losses)
        moved = step_bytes(one)
        points.append(
            {
                "size": size,
                "step_us": float(np.median(turn.times)),
                "lowest_us": min(turn.times),
                "highest_us": max(turn.times),
                "bytes": moved,
                "floor_us": moved / bandwidth * 1e6,
                "loss": float(losses[-10:].mean()),
            }
        )
        if turn.fit.note:
            points[-1]["note"] = turn.fit.note
        if points[-1]["step_us"] <= 0:  # what a run begins with is taken off, and varies
            points[-1]["note"] = "lost in the noise of a busy machine"
        if not np.isfinite(losses).all():
            return points, f"at {size}: the loss is not finite, so its time does not count"
        del turn
        gc.collect()
    return points, None


def threaded(library: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """The threaded curve, each number of threads in a process of its own."""
    found: list[dict[str, Any]] = []
    for threads in THREADS:
        if threads > (os.cpu_count() or 1):
            continue
        command = [sys.executable, "-m", "bench.scaling", "--curves", "one", "--libraries", library]
        command += ["--device", device, "--budget", str(seconds), "--json", "-"]
        done = subprocess.run(
            command,
            env=os.environ | threads_environment(threads),
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            found.append({"size": threads, "note": f"failed: {reason}"})
            continue
        (curve,) = json.loads(done.stdout.strip().splitlines()[-1])["curves"]
        points = curve["points"] or [{"note": curve["note"]}]
        found.append(points[0] | {"size": threads})
    return found


def show(curve: dict[str, Any]) -> None:
    slope = curve["exponent"]
    fitted = "" if slope is None else f", exponent {slope:.2f}"
    print(f"{curve['curve']} ({curve['workload']}, {curve['library']}){fitted}")
    for point in curve["points"]:
        if "step_us" not in point:
            print(f"{point['size']:>12}  {point['note']}")
            continue
        print(
            f"{point['size']:>12}{microseconds(point['step_us']):>12} us "
            f"({microseconds(point['lowest_us'])} to {microseconds(point['highest_us'])}), "
            f"floor {microseconds(point['floor_us'])}  {point.get('note', '')}",
            flush=True,
        )
    if curve["note"]:
        print(f"{'':>12}  {curve['note']}")


def write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = (*CURVES, "threads", "one")
    parser.add_argument("--curves", nargs="+", default=names[:-1], choices=names)
    parser.add_argument("--libraries", nargs="+", default=["fastsvi"], choices=LIBRARIES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each curve")
    parser.add_argument("--largest", type=int, help="leave larger sizes out")
    parser.add_argument("--json", type=Path, help="file to keep the figures in; - prints only JSON")
    options = parser.parse_args(arguments)
    quiet = options.json == Path("-")
    bandwidth = copy_bandwidth(options.device)
    about = machine(options.device)
    if not quiet:
        print(f"{describe(about)}, copy {bandwidth / 1e9:.1f} GB/s")
    curves: list[dict[str, Any]] = []
    document = {
        "machine": about,
        "settings": {"device": options.device, "budget_s": options.budget},
        "copy_gb_per_s": bandwidth / 1e9,
        "curves": curves,
    }
    for name in options.curves:
        for library in options.libraries:
            if not LIBRARIES[library].is_installed():
                print(f"{library} is not installed")
                continue
            curve = {"one": THREADED, "threads": THREADED}.get(name) or CURVES[name]
            if options.largest:
                sizes = tuple(size for size in curve.sizes if size <= options.largest)
                curve = Curve(curve.workload, curve.vary, sizes)
            note: str | None = None
            if name == "threads":
                points = threaded(library, options.device, options.budget)
            else:
                stop = time.monotonic() + options.budget
                points, note = measure(curve, library, options.device, bandwidth, stop)
            timed = [point for point in points if point.get("step_us", 0) > 0]
            found = {
                "curve": name,
                "workload": curve.workload,
                "library": library,
                "device": options.device,
                "threads": None if name == "threads" else torch.get_num_threads(),
                "exponent": exponent([p["size"] for p in timed], [p["step_us"] for p in timed]),
                "note": note,
                "points": points,
            }
            curves.append(found)
            if not quiet:
                show(found)
                write(options.json, document)  # a run may be stopped from outside
    if quiet:
        print(json.dumps(document))
    elif options.json:
        write(options.json, document)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
