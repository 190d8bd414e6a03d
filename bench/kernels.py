"""Time the operations of ``fastsvi.kernels`` against their floors and against plain torch.

    python -m bench.kernels                  # all operations and sizes that fit the memory
    python -m bench.kernels --quick          # a minute on a CPU, nothing is written
    python -m bench.kernels adam log_prob --elements 1000000

Each row holds the median time, the bytes that the operation must move (each input read once, each
output written once), the share that this is of the bandwidth of a copy measured in the same run,
the ratio to the usual eager torch code and to ``torch.compile`` of our torch reference, and, beside
the figure, the error of the result against float64. A row whose error is too large is a failure,
and so is the run. Noise is bound by integer arithmetic rather than bytes on a GPU: those rows have
the floor of Philox's multiplications too.

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
from fastsvi.kernels import adam, dispatch, log_prob, normal, philox, transforms
from fastsvi.kernels.segment_table import EXP, IDENTITY, SIGMOID, SegmentTable
from fastsvi.kernels.segments import Segments

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
class Operation:
    """One operation at one size.

    ``ours`` and ``eager`` take the inputs and return tensors; ``eager`` is what one would write in
    torch. What has a derivative is timed backward too.
    """

    name: str
    ours: Callable[..., Sequence[Tensor]]
    eager: Callable[..., Any]
    inputs: list[Tensor]  # float32
    bytes: int
    bytes_backward: int | None = None
    normals: int = 0


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
    error: float

    @property
    def ok(self) -> bool:
        return self.error < MAX_ERROR


# --------------------------------------------------------------------------------------- operations


def draw(elements: int, particles: int, device: str) -> Operation:
    """Standard normals ``[1, P, D]``."""
    key, origin = philox.derive_key(0, 0, device), philox.make_origin(step=3, device=device)

    def ours(like: Tensor) -> list[Tensor]:
        return [philox.normal(key, origin, 1, particles, elements, like.dtype)]

    def eager(like: Tensor) -> Tensor:
        return torch.randn(1, particles, elements, device=device)

    size = particles * elements
    like = torch.empty(0, device=device)
    return Operation("philox.normal", ours, eager, [like], 4 * size, normals=size)


def sample(elements: int, particles: int, device: str) -> Operation:
    """A mean-field normal: z and log q from loc and the log of the scale."""
    key, origin = philox.derive_key(0, 0, device), philox.make_origin(step=3, device=device)

    def ours(loc: Tensor, raw: Tensor) -> Sequence[Tensor]:
        return normal.sample(loc, raw, key, origin, particles)

    def eager(loc: Tensor, raw: Tensor) -> Sequence[Tensor]:
        q = torch.distributions.Normal(loc, raw.exp(), validate_args=False)
        z = q.rsample((particles,))
        return z, q.log_prob(z).sum(-1)

    size = particles * elements
    return Operation(
        "normal.sample", ours, eager, list(torch.randn(2, 1, elements, device=device)),
        4 * (2 * elements + size), 4 * (3 * elements + size), normals=size,
    )  # fmt: skip


def constrain(elements: int, particles: int, device: str) -> Operation:
    """A buffer of thirty segments: real, positive and in the unit interval in turn."""
    kinds = [IDENTITY, EXP, SIGMOID] * 10
    sizes = [elements // 30] * 29 + [elements - 29 * (elements // 30)]
    tables = {
        dtype: SegmentTable.build(kinds, sizes, device=device, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    }

    def ours(x: Tensor) -> Sequence[Tensor]:
        return transforms.constrain_with_log_det(x, tables[x.dtype])

    def eager(x: Tensor) -> Sequence[Tensor]:
        values, log_dets = [], []
        for kind, part in zip(kinds, x.split(sizes), strict=True):
            y = part.exp() if kind == EXP else part.sigmoid() if kind == SIGMOID else part
            log_det = part if kind == EXP else (y * (1 - y)).log() if kind == SIGMOID else part * 0
            values.append(y)
            log_dets.append(log_det.sum())
        return torch.cat(values), torch.stack(log_dets)

    return Operation(
        "transforms.constrain_with_log_det", ours, eager, [torch.randn(elements, device=device)],
        8 * elements, 12 * elements,
    )  # fmt: skip


def update(elements: int, particles: int, device: str) -> Operation:
    """One step of Adam, in place."""
    segments = {device: Segments([elements], device)}
    param, grad, exp_avg = torch.randn(3, elements, device=device).unbind()
    leaf = param.clone().requires_grad_()
    leaf.grad = grad
    optimizer = torch.optim.Adam([leaf], lr=1e-3)

    def ours(*state: Tensor) -> Sequence[Tensor]:
        adam.adam_(*state, segments[device], lr=1e-3)
        return state

    def eager(*state: Tensor) -> None:
        optimizer.step()

    state = [param, grad, exp_avg, exp_avg.square(), torch.ones(1, device=device)]
    return Operation("adam.adam_", ours, eager, state, 28 * elements)


def density(elements: int, particles: int, device: str) -> Operation:
    """Normal log-density of ``[P, D]`` values under ``[D]`` locs and scales, summed to ``[P]``."""
    value = torch.randn(particles, elements, device=device)
    loc, raw = torch.randn(2, elements, device=device).unbind()

    def ours(value: Tensor, loc: Tensor, scale: Tensor) -> list[Tensor]:
        return [log_prob.normal(value, loc, scale, event_ndims=1)]

    def eager(value: Tensor, loc: Tensor, scale: Tensor) -> list[Tensor]:
        q = torch.distributions.Normal(loc, scale, validate_args=False)
        return [q.log_prob(value).sum(-1)]

    size = particles * elements
    return Operation(
        "log_prob.normal", ours, eager, [value, loc, raw.exp()],
        4 * (size + 2 * elements), 4 * (2 * size + 4 * elements),
    )  # fmt: skip


OPERATIONS: dict[str, Callable[[int, int, str], Operation]] = {
    "philox": draw,
    "normal": sample,
    "transforms": constrain,
    "adam": update,
    "log_prob": density,
}

# Their cost does not depend on particles.
WITHOUT_PARTICLES = ("transforms", "adam")


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
        """The forward row of an operation, and the backward row if it has one."""
        for backward in (False, True):
            if backward and operation.bytes_backward is None:
                continue
            moved = operation.bytes_backward if backward else operation.bytes
            assert moved is not None
            ours = self.time_us(prepare(operation.ours, operation.inputs, backward))
            eager = self.time_us(prepare(operation.eager, operation.inputs, backward))
            yield Row(
                operation.name + ".backward" * backward,
                elements,
                particles,
                time_us=ours,
                bytes=moved,
                share_of_copy=1e6 * moved / self.copy_bytes_per_s / ours,
                share_of_philox=self._philox_us(operation.normals, ours),
                eager_ratio=eager / ours,
                compiled_ratio=self._compiled_us(operation, backward, ours),
                error=error(operation, backward),
            )

    def _philox_us(self, normals: int, ours: float) -> float | None:
        if self.device != "cuda" or not normals:
            return None
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "clock_rate", 0) * 1e3
        if not clock:
            return None
        rate = properties.multi_processor_count * clock * WIDE_MULTIPLICATIONS_PER_CYCLE
        return 1e6 * normals / 4 * PHILOX_MULTIPLICATIONS / rate / ours

    def _compiled_us(self, operation: Operation, backward: bool, ours: float) -> float | None:
        if not self.compiled:
            return None
        torch.compiler.reset()
        with dispatch.use("torch"):
            compiled = torch.compile(operation.ours)
            return self.time_us(prepare(compiled, operation.inputs, backward)) / ours


def prepare(
    function: Callable[..., Any], inputs: Sequence[Tensor], backward: bool
) -> Callable[[], Any]:
    """A call of ``function``, or of its backward pass alone."""
    if not backward:
        return lambda: function(*inputs)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    cotangents = [torch.ones_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def error(operation: Operation, backward: bool) -> float:
    """Norm of the difference from float64 over the norm, the worst of all results."""
    found = prepare(operation.ours, [x.clone() for x in operation.inputs], backward)()
    wide = [x.double() for x in operation.inputs]
    with dispatch.use("torch"):
        exact = prepare(operation.ours, wide, backward)()
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
    rows = []
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
    path = options.out
    if path is None and not options.quick:
        short = short_name(about["device"]) if device == "cuda" else "cpu"
        path = RESULTS / f"{short}-kernels.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = [asdict(row) | {"ok": row.ok} for row in rows]
        path.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
        print(f"wrote {path}")
    bad = [row.name for row in rows if not row.ok]
    if bad:
        print(f"error above {MAX_ERROR:g}: {', '.join(bad)}", file=sys.stderr)
    return bool(bad)


HEADER = (
    f"{'operation':<44}{'D':>10}{'P':>6}{'us':>12}{'of copy':>9}{'philox':>8}"
    f"{'eager':>8}{'compiled':>10}{'error':>10}"
)


def line(row: Row) -> str:
    """One row as text; ratios above 1 say that ours is faster."""
    philox_share = "-" if row.share_of_philox is None else f"{row.share_of_philox:.2f}"
    ratio = "-" if row.compiled_ratio is None else f"{row.compiled_ratio:.2f}"
    return (
        f"{row.name:<44}{row.elements:>10}{row.particles:>6}{row.time_us:>12.1f}"
        f"{row.share_of_copy:>9.2f}{philox_share:>8}{row.eager_ratio:>8.2f}{ratio:>10}"
        f"{row.error:>10.1e}{'' if row.ok else '  TOO LARGE'}"
    )


if __name__ == "__main__":
    sys.exit(main())
