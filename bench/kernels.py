"""Time the operations of ``fastsvi.kernels`` against their floors and against plain torch.

    python -m bench.kernels                  # all operations and sizes that fit the memory
    python -m bench.kernels --quick          # a minute on a CPU, nothing is written
    python -m bench.kernels adam log_prob --elements 1000000

Each row holds the median time, the bytes that the operation must move (each input read once, each
output written once), the share that this is of the bandwidth of a copy measured in the same run,
the ratio to the usual eager torch code and to ``torch.compile`` of our torch reference, and, beside
the figure, the error of the result against float64. A row whose error is too large is a failure,
and so is the run. Noise is bound by integer arithmetic rather than bytes on a GPU: those rows have
the floor of Philox's multiplications too, and the ratio to a ``torch.randn`` of as many numbers. A
row named ``.both`` is a forward and a backward pass together. On a GPU ``memory_ratio`` is the peak
of memory in a call over its inputs and outputs.

On a GPU times are medians of ``triton.testing.do_bench`` (CUDA events, the cache flushed before
every call); on a CPU medians of ``time.perf_counter`` with warm caches, and our own form is the
torch reference run eagerly.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import machine, short_name
from bench.operations import OPERATIONS, Operation
from fastsvi.kernels import dispatch

RESULTS = Path(__file__).parent / "results"

ELEMENTS = [10**k for k in range(3, 9)]
PARTICLES = [1, 8, 64, 1024]
NOTED = 10**7  # the size of which the aims speak
QUICK_ELEMENTS = [1_000, 100_000]
QUICK_PARTICLES = [1, 8]

# Multiplications of 32 by 32 bits to 64 in ten rounds of Philox, for four normals, and how many of
# those a multiprocessor starts in a cycle (CUDA programming guide, arithmetic throughput).
PHILOX_MULTIPLICATIONS = 20
WIDE_MULTIPLICATIONS_PER_CYCLE = 64

# Of a float32 result, relative to the norm of the float64 one.
MAX_ERROR = 1e-5


@dataclass
class Row:
    """One line of the results; ``time_us`` in microseconds, ratios are of times to ours."""

    name: str
    elements: int
    particles: int
    time_us: float
    bytes: int
    share_of_copy: float  # floor by bytes over time
    share_of_philox: float | None  # floor by multiplications over time
    eager_ratio: float
    compiled_ratio: float | None
    randn_ratio: float | None
    memory_ratio: float | None
    error: float

    @property
    def ok(self) -> bool:
        return self.error < MAX_ERROR


# Their cost does not depend on particles.
WITHOUT_PARTICLES = ("transforms", "adam", *(name for name in OPERATIONS if "." in name))
# Of these a size or two tell enough.
NOTED_ONLY = tuple(name for name in OPERATIONS if "." in name)
NOTED_SIZES = (QUICK_ELEMENTS[-1], NOTED)


# ---------------------------------------------------------------------------------------- measuring


class Bench:
    """What is the same for all rows of a run."""

    def __init__(self, device: str, budget_s: float, compiled: bool) -> None:
        self.device = device
        self.budget_s = budget_s
        self.compiled = compiled
        self.copy_bytes_per_s = self._copy_bandwidth()

    def time_us(self, call: Callable[[], Any]) -> float:
        """Median time of a call."""
        call()
        if self.device == "cuda":
            from triton.testing import do_bench

            return 1e3 * do_bench(call, rep=int(1e3 * self.budget_s), return_mode="median")
        times: list[float] = []
        stop = time.perf_counter() + self.budget_s
        while len(times) < 3 or time.perf_counter() < stop:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times)

    def _copy_bandwidth(self) -> float:
        """Bytes per second of a large copy, read and write counted."""
        source = torch.randn(2**28 if self.device == "cuda" else 2**24, device=self.device)
        target = torch.empty_like(source)
        return 2e6 * source.nbytes / self.time_us(lambda: target.copy_(source))

    def rows(self, operation: Operation, elements: int, particles: int) -> Iterator[Row]:
        """The forward row of an operation, and those with a backward pass if it has one."""
        moved = {"": operation.bytes}
        if operation.bytes_backward is not None:
            moved[".backward"] = operation.bytes_backward
        if operation.together and operation.bytes_backward is not None:
            moved[".both"] = operation.bytes + operation.bytes_backward
        for passes, size in moved.items():
            call = prepare(operation.ours, operation.inputs, passes)
            ours = self.time_us(call)
            eager = self.time_us(prepare(operation.eager, operation.inputs, passes))
            normals = operation.normals * (1 + (passes == ".both"))
            yield Row(
                operation.name + passes,
                elements,
                particles,
                time_us=ours,
                bytes=size,
                share_of_copy=1e6 * size / self.copy_bytes_per_s / ours,
                share_of_philox=self._philox_us(normals, ours),
                eager_ratio=eager / ours,
                compiled_ratio=self._compiled_us(operation, passes, ours),
                randn_ratio=self._randn_us(operation, passes, ours),
                memory_ratio=None if passes == ".both" else self._memory(operation, call),
                error=error(operation, passes),
            )

    def _randn_us(self, operation: Operation, passes: str, ours: float) -> float | None:
        if not operation.normals or passes:
            return None
        size = operation.normals
        return self.time_us(lambda: torch.randn(size, device=self.device)) / ours

    def _memory(self, operation: Operation, call: Callable[[], Any]) -> float | None:
        """Peak of memory in a call, over what it is given and what it returns."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.synchronize()
        given = sum(x.nbytes for x in operation.inputs)
        own = {x.data_ptr() for x in operation.inputs}
        made = sum(x.nbytes for x in results if x is not None and x.data_ptr() not in own)
        return (given + peak) / max(1, given + made)

    def _philox_us(self, normals: int, ours: float) -> float | None:
        if self.device != "cuda" or not normals:
            return None
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "clock_rate", 0) * 1e3
        if not clock:
            return None
        rate = properties.multi_processor_count * clock * WIDE_MULTIPLICATIONS_PER_CYCLE
        return 1e6 * normals / 4 * PHILOX_MULTIPLICATIONS / rate / ours

    def _compiled_us(self, operation: Operation, passes: str, ours: float) -> float | None:
        if not self.compiled:
            return None
        torch.compiler.reset()
        with dispatch.use("torch"):
            compiled = torch.compile(operation.ours)
            return self.time_us(prepare(compiled, operation.inputs, passes)) / ours


def prepare(
    function: Callable[..., Any], inputs: Sequence[Tensor], passes: str = ""
) -> Callable[[], Any]:
    """A call of ``function``, of its ``".backward"`` pass alone, or of ``".both"``."""
    if not passes:
        return lambda: function(*inputs)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    cotangents = [torch.ones_like(output) for output in function(*leaves)]
    if passes == ".both":
        return lambda: torch.autograd.grad(function(*leaves), leaves, cotangents)
    outputs = function(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def error(operation: Operation, passes: str = "") -> float:
    """Norm of the difference from float64 over the norm, the worst of all results."""
    found = prepare(operation.ours, [x.clone() for x in operation.inputs], passes)()
    wide = [x.double() for x in operation.inputs]
    with dispatch.use("torch"):
        exact = prepare(operation.ours, wide, passes)()
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        size = torch.linalg.vector_norm(b).clamp(min=1e-30)
        worst = max(worst, (torch.linalg.vector_norm(a.double() - b) / size).item())
    return worst if worst == worst else float("inf")


def fits(elements: int, particles: int, device: str) -> bool:
    """Whether inputs, results, gradients and their float64 twins fit half of the memory."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 4e9
    return 64 * elements * particles < free / 2 and elements * particles < 2**31


# ------------------------------------------------------------------------------------- command line


def environment(device: str) -> dict[str, Any]:
    """Versions, commit and machine, without which a figure says nothing."""
    about = machine(device)
    driver = {"driver": about["driver"]} if device == "cuda" else {}
    return {
        "device": about.get("gpu") or about["cpu"],
        **driver,
        "threads": torch.get_num_threads(),
        "versions": {"python": about["python"], **about["versions"]},
        "commit": about["commit"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status says whether every error was small enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(OPERATIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few small sizes; write no file")
    parser.add_argument("--elements", type=int, nargs="+", help="sizes D")
    parser.add_argument("--particles", type=int, nargs="+", help="numbers of particles P")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds in all, shared by the operations"
    )
    parser.add_argument(
        "--compiled-at", type=int, nargs="+", help="sizes D at which torch.compile is timed too"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>-kernels.json")
    options = parser.parse_args(arguments)
    unknown = set(options.operations) - set(OPERATIONS)
    if unknown:
        parser.error(f"unknown operations {sorted(unknown)}; the known ones are {[*OPERATIONS]}")

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    compiled = not (options.quick or options.no_compile)
    hurried = options.quick or options.budget < math.inf
    bench = Bench(device, budget_s=0.05 if hurried else 0.3, compiled=compiled)
    about = environment(device) | {"copy_gb_per_s": bench.copy_bytes_per_s / 1e9}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(HEADER)
    path = options.out
    if path is None and not options.quick:
        short = short_name(about["device"]) if device == "cuda" else "cpu"
        path = RESULTS / f"{short}-kernels.json"
    rows: list[Row] = []
    names = options.operations or list(OPERATIONS)
    start = time.monotonic()
    for index, name in enumerate(names):
        left = options.budget - (time.monotonic() - start)
        stop = time.monotonic() + left / (len(names) - index)
        sizes = [
            (elements, particles)
            for elements in options.elements or (QUICK_ELEMENTS if options.quick else ELEMENTS)
            for particles in options.particles or (QUICK_PARTICLES if options.quick else PARTICLES)
            if fits(elements, particles, device)
            and not (name in WITHOUT_PARTICLES and particles > 1)
            and not (name in NOTED_ONLY and not options.elements and elements not in NOTED_SIZES)
        ]
        if options.budget < math.inf:  # what is lost for lack of time are the sizes of least note
            sizes.sort(key=lambda size: abs(math.log10(size[0] / NOTED)))
        for elements, particles in sizes:
            if time.monotonic() > stop:
                print(f"{name}: D = {elements}, P = {particles} and what follows left out: no time")
                break
            operation = OPERATIONS[name](elements, particles, device)
            bench.compiled = compiled and elements in (options.compiled_at or [elements])
            for row in bench.rows(operation, elements, particles):
                print(line(row), flush=True)
                rows.append(row)
            if path is not None:  # each time, for a run may be stopped from outside
                write(path, about, rows)
    if path is not None:
        write(path, about, rows)
        print(f"wrote {path}")
    bad = [row.name for row in rows if not row.ok]
    if bad:
        print(f"error above {MAX_ERROR:g}: {', '.join(bad)}", file=sys.stderr)
    return bool(bad)


def write(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Keep what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [asdict(row) | {"ok": row.ok} for row in rows]
    path.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")


HEADER = (
    f"{'operation':<44}{'D':>10}{'P':>6}{'us':>12}{'of copy':>9}{'philox':>8}"
    f"{'eager':>8}{'compiled':>10}{'randn':>8}{'memory':>8}{'error':>10}"
)


def line(row: Row) -> str:
    """One row as text; ratios above 1 say that ours is faster."""
    philox_share, compiled, randn, memory = (
        "-" if number is None else f"{number:.2f}"
        for number in (row.share_of_philox, row.compiled_ratio, row.randn_ratio, row.memory_ratio)
    )
    return (
        f"{row.name:<44}{row.elements:>10}{row.particles:>6}{row.time_us:>12.1f}"
        f"{row.share_of_copy:>9.2f}{philox_share:>8}{row.eager_ratio:>8.2f}{compiled:>10}"
        f"{randn:>8}{memory:>8}{row.error:>10.1e}{'' if row.ok else '  TOO LARGE'}"
    )


if __name__ == "__main__":
    sys.exit(main())
