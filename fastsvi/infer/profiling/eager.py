"""Where the time of an eager step goes: its phases, and torch operations beside Python.

Three kinds of steps are taken, so that no measurement disturbs another: plain ones, timed as
wholes; ones that read the clock where guide, model, gradient and update begin and end, for some
microseconds; and ones in which a dispatch mode times every operation by itself, which makes the
step several times as long.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsvi.infer.profiling.operations import Operations, least_seconds

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

_MIN_STEPS = 5
_OBSERVED_STEPS = 10

OTHER = "checks, bookkeeping"
ELBO = "ELBO"


@dataclass
class EagerStep:
    """An eager step, times in microseconds.

    Attributes:
        step_us: median time of a step; ``lowest_us`` the shortest.
        phases: time of each part of it.
        torch_us: time inside torch operations; the rest is Python, and the calls that lead from it
            through autograd to them.
        operations: how many there are, backward and update included.
        conversions: bytes that each statement of the program converts or copies.
    """

    step_us: float
    lowest_us: float
    phases: dict[str, float] = field(default_factory=dict)
    torch_us: float = 0.0
    operations: int = 0
    conversions: dict[str, int] = field(default_factory=dict)

    @property
    def python_share(self) -> float:
        """Share of the step that is spent outside of torch operations."""
        return max(0.0, 1.0 - self.torch_us / self.step_us)


class Clock:
    """Seconds spent in named phases, each without those that begin inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls are a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        with contextlib.suppress(AttributeError):
            functools.update_wrapper(call, function)
        return call

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class _TimedGuide:
    """Stands for a guide, whose calls are a phase."""

    def __init__(self, guide: Any, clock: Clock) -> None:
        self._guide = guide
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase("guide"):
            return self._guide(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guide, name)


class _TimedFusedGuide(_TimedGuide):
    """Stands for a guide that may draw all sites at once."""

    def fused(self) -> Any:
        drawer = self._guide.fused()
        return None if drawer is None else _TimedDrawer(drawer, self._clock)


class _TimedDrawer:
    def __init__(self, drawer: Any, clock: Clock) -> None:
        self._drawer = drawer
        self.draw = clock.timed("guide", drawer.draw)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drawer, name)


@contextlib.contextmanager
def watched(svi: SVI, clock: Clock) -> Iterator[None]:
    """Have ``clock`` note the phases of the steps that ``svi`` takes."""
    with contextlib.ExitStack() as undo:

        def put(owner: Any, name: str, value: Any) -> None:
            own = vars(owner)
            if name in own:
                undo.callback(own.__setitem__, name, own[name])
            else:
                undo.callback(own.__delitem__, name)
            own[name] = value

        put(svi, "optim", clock.timed("update", svi.optim))
        known = svi._program
        if known is None or svi.elbo is None:
            put(svi, "loss_and_grads", clock.timed("loss and gradient", svi.loss_and_grads))
        else:
            program = copy.copy(known)
            is_fused = getattr(type(known.guide), "fused", None) is not None
            program.guide = (_TimedFusedGuide if is_fused else _TimedGuide)(known.guide, clock)
            program.model = clock.timed("model", known.model)
            put(svi, "_program", program)
            put(svi, "guide", program.guide)
            put(svi, "model", program.model)
            put(svi.elbo, "_estimates", _timed_estimates(svi.elbo._estimates, clock))
            put(svi.elbo, "accumulate_grads", clock.timed("gradient", svi.elbo.accumulate_grads))
        yield


def _timed_estimates(estimates: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """``ELBO._estimates`` with the time until each estimate as a phase; the rest is gradient."""

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        iterator = estimates(*args, **kwargs)
        while True:
            with clock.phase(ELBO):
                estimate = next(iterator, None)
            if estimate is None:
                return
            yield estimate

    return timed


def measure(svi: SVI, args: Any, kwargs: Any, seconds: float) -> EagerStep:
    """Take steps for about ``seconds`` and say where their time went."""

    def step() -> None:
        svi._advance(args, kwargs, by_counter=svi._program is not None)
        wait(svi)

    step()  # checks the program and makes what is kept
    times = _times(step, seconds / 2)
    found = EagerStep(1e6 * statistics.median(times), 1e6 * min(times))
    clock, parts = Clock(), defaultdict(list)
    with watched(svi, clock):

        def watched_step() -> None:
            clock.seconds.clear()
            with clock.phase(OTHER):
                step()
            for name, spent in clock.seconds.items():
                parts[name].append(spent)

        watched_step()
        parts.clear()
        _times(watched_step, seconds / 2)
    medians = {name: statistics.median(spent) for name, spent in parts.items()}
    total = sum(medians.values())
    found.phases = {name: found.step_us * spent / total for name, spent in medians.items()}
    seen = []
    for _ in range(_OBSERVED_STEPS):
        with Operations() as mode:
            step()
        seen.append(mode)
    # Least against least: whatever else the machine does lengthens both.
    found.torch_us = min(1.0, 1e6 * least_seconds(seen) / found.lowest_us) * found.step_us
    found.operations, found.conversions = len(seen[-1].seconds), seen[-1].conversions
    return found


def step_us(svi: SVI, args: Any, kwargs: Any, seconds: float) -> float:
    """Median microseconds of an eager step."""

    def step() -> None:
        svi._advance(args, kwargs, by_counter=svi._program is not None)
        wait(svi)

    step()
    return 1e6 * statistics.median(_times(step, seconds))


def wait(svi: SVI) -> None:
    """Wait for the accelerator, if the parameters are on one."""
    if svi._targets.leaves and svi._targets.leaves[0].is_cuda:
        torch.cuda.synchronize()


def _times(step: Callable[[], None], seconds: float) -> list[float]:
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < _MIN_STEPS or time.perf_counter() < stop:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times
