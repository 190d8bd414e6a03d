"""The captured step: what it takes to make one, and what one takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastsvi import settings
from fastsvi.engine.loops.ir import Array
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.native import NativeStep
from fastsvi.errors import CaptureError
from fastsvi.infer.captured import CapturedStep
from fastsvi.infer.profiling.eager import wait

if TYPE_CHECKING:
    from fastsvi.infer.arguments import Arguments
    from fastsvi.infer.svi import SVI

_BLOCKS = 5
_COPY_NUMBERS = 1 << 22
_NOISE = ("normal_noise", "uniform_noise", "random_subset")


@dataclass
class NativeForm:
    """A captured step.

    Attributes:
        step_us, lowest_us: median and least of the microseconds of a step, over blocks of steps.
        record_s: seconds that recording took; ``compile_s`` compiling, or loading what the cache
            had; ``cached`` says which.
        operations: in the recording, of a whole step.
        nests: loop nests in the compiled program; ``calls`` of them are calls of BLAS and the like.
        bytes: that the nests read and write, each array once for each nest.
        copy_us: what a copy of as many bytes takes, measured now, on the threads of torch.
        arena_bytes: working memory.
        moments_bytes: of the optimizer.
        noise: random numbers that a step draws.
    """

    step_us: float
    lowest_us: float
    record_s: float
    compile_s: float
    cached: bool
    operations: int = 0
    nests: int = 0
    calls: int = 0
    bytes: int = 0
    copy_us: float = 0.0
    arena_bytes: int = 0
    moments_bytes: int = 0
    noise: int = 0


def measure(svi: SVI, arguments: Arguments, lifted: Sequence[int], seconds: float) -> NativeForm:
    """Capture a step of ``svi``, check it, and take steps for about ``seconds``.

    Raises:
        CaptureError: the step cannot be captured, or does not agree with an eager one.
    """
    if settings.get("validate") == "always":
        raise CaptureError(
            "every step is to be checked: enable_validation(True), or "
            'settings.set(validate="always")'
        )
    args, kwargs = arguments.args, arguments.kwargs
    start = time.perf_counter()
    step = CapturedStep(svi, arguments, lifted)
    record_s = time.perf_counter() - start
    native = step.loop if isinstance(step.loop, NativeStep) else None
    cached = native is not None and native.is_built
    start = time.perf_counter()
    step.loop.build()
    compile_s = time.perf_counter() - start
    step.check(arguments, lambda: svi._advance(args, kwargs, by_counter=True))
    times = _times(lambda count: _run(step, count, svi), seconds)
    found = NativeForm(statistics.median(times), min(times), record_s, compile_s, cached)
    found.moments_bytes = sum(tensor.nbytes for tensor in step.pure.state[1:-2])
    if native is not None and step.graph is not None:
        found.operations = len(step.graph.nodes)
        found.noise = sum(math.prod(n.shape) for n in step.graph.nodes if n.name in _NOISE)
        found.arena_bytes = native.arena_bytes
        _count_nests(found, native, len(step.pure.state))
        found.copy_us = 1e6 * found.bytes / copy_bandwidth()
    return found


def copy_bandwidth() -> float:
    """Bytes per second of a copy that no cache holds, read and write counted; the best of five."""
    source = torch.ones(_COPY_NUMBERS)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def _run(step: CapturedStep, count: int, svi: SVI) -> None:
    losses = step.run(count)
    wait(svi)
    if len(losses) < count:
        raise CaptureError("a step was not finite while it was measured; svi.step names the site")


def _times(run: Callable[[int], None], seconds: float) -> list[float]:
    """Microseconds per step of some blocks of steps."""
    count, spent = 1, 0.0
    while spent < seconds / (2 * _BLOCKS) and count < 1 << 20:
        start = time.perf_counter()
        run(count)
        spent = time.perf_counter() - start
        count *= 2
    times = []
    for _ in range(_BLOCKS):
        start = time.perf_counter()
        run(count)
        times.append(1e6 * (time.perf_counter() - start) / count)
    return times


def _count_nests(found: NativeForm, native: NativeStep, num_state: int) -> None:
    """Lower the recording once more, for the numbers of which the compiled step keeps none."""
    plan: Any = schedule(Program(native.graph), num_state)
    found.nests = len(plan.nests)
    for nest in plan.nests:
        found.calls += nest.statements[0].call is not None
        touched: set[Array] = set()
        for statement in nest.statements:
            touched |= {statement.array, *statement.also, *statement.loads}
        found.bytes += sum(
            array.size * array.dtype.itemsize
            for array in touched - plan.private - plan.recomputed.keys()
        )
