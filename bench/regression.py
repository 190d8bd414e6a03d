"""Has this change made fastsvi slower? Ratios inside one run, held against the committed ones.

    python -m bench.regression                  # some two minutes; exit status 1 on a regression
    python -m bench.regression --update         # three runs; writes bench/results/regression.json
    python -m bench.regression --slow sleep     # a self-test: must fail (so must --slow sync)

A time says as much about the machine as about the program, so none is judged here. Each measure is
a ratio of two blocks of work, run in turn: ours, and a reference whose code this repository does
not change (stock Pyro's step, hand-written torch, a dict of parameters). A machine that is slow, or
becomes slow, slows both. Blocks are short, and of many the lower quartile counts: on a crowded
machine most long blocks are interrupted. In every round ours runs twice, so that the same code
measured against itself (A/A) says what noise this run has. The verdict is on logarithms:

    slower = log(ratio / committed ratio)  >  log(1 + margin) + 3 standard errors

where the standard error is what the A/A ratio is off by, or what a bootstrap of the rounds gives,
whichever is larger. What seems slower is measured once more, with twice the rounds, before it is
believed.

Measures fail too if their result is wrong: each has a gate.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.libraries import LIBRARIES, Fit, with_fastsvi
from bench.libraries.with_fastsvi import FastSVIFit
from bench.machine import describe, machine
from bench.plain_store import STORES
from bench.workloads import case

COMMITTED = Path(__file__).parent / "results" / "regression.json"
KEPT = Path(__file__).parents[1] / "out" / "regression.json"
ROUNDS = 40
BLOCK_S = 0.004
MARGIN = 0.5  # of builds and machines, and of what else runs on them
WIDE_MARGIN = 1.0  # of microseconds, beside milliseconds: caches and alignment matter
_ERRORS = 3.0
_BOOTSTRAPS = 200


@dataclass(frozen=True)
class Block:
    """Work to be timed, and how many steps it is."""

    work: Callable[[], Any]
    steps: int = 1


Prepared = tuple[Block, Block, Callable[[], bool]]  # ours, the reference, whether ours is right
Prepare = Callable[[], Prepared]


@dataclass(frozen=True)
class Measure:
    """Two blocks of work whose ratio of times is watched.

    Attributes:
        name: in tables and in the committed file.
        prepare: makes both, and the gate that says whether our results are right.
        margin: by how much the same code may differ from build to build and place to place.
    """

    name: str
    prepare: Prepare
    margin: float = MARGIN


@dataclass(frozen=True)
class Found:
    """What a run found: the ratio of ours to the reference, and the noise of its logarithm."""

    ratio: float
    error: float
    noise: float  # by how much the logarithm of the A/A ratio misses 0
    right: bool = True


# --------------------------------------------------------------------------------------- statistics


def summarise(ours: Sequence[float], again: Sequence[float], reference: Sequence[float]) -> Found:
    """Ratio and noise from the times of the rounds: ours, ours again, and the reference."""
    times = np.array([ours, again, reference])  # [3, rounds]
    own, same, other = np.log(np.quantile(times, 0.25, axis=1))
    chosen = np.random.default_rng(0).integers(0, times.shape[1], (_BOOTSTRAPS, times.shape[1]))
    lower = np.log(np.quantile(times[:, chosen], 0.25, axis=2))  # [3, bootstraps]
    noise = abs(own - same)
    error = max(noise, np.std(lower[0] - lower[2]))
    return Found(float(np.exp(own - other)), float(error), float(noise))


def limit(committed: float, error: float, margin: float) -> float:
    """The largest ratio that is no regression."""
    return committed * (1 + margin) * math.exp(_ERRORS * error)


# ---------------------------------------------------------------------------------------- measuring


def measure(prepared: Prepared, rounds: int) -> Found:
    """Times of the blocks in turn; the order turns round with every round."""
    ours, reference, gate = prepared
    blocks = [calibrated(ours), calibrated(reference)]
    times: dict[str, list[float]] = {"ours": [], "again": [], "reference": []}
    plan = [("ours", blocks[0]), ("reference", blocks[1]), ("again", blocks[0])]
    for index in range(rounds):
        for name, block in plan if index % 2 else reversed(plan):
            times[name].append(block())
    found = summarise(times["ours"], times["again"], times["reference"])
    return Found(found.ratio, found.error, found.noise, right=gate())


def calibrated(block: Block) -> Callable[[], float]:
    """Measures seconds per step, by as many calls as take some :data:`BLOCK_S`."""
    work = block.work
    work()
    calls = 1
    while True:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        took = time.perf_counter() - began
        if took > BLOCK_S / 4:
            break
        calls *= 4
    calls = max(1, round(calls * BLOCK_S / took))

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - began) / calls / block.steps

    return seconds


# ----------------------------------------------------------------------------------------- measures


def eager(name: str, particles: int) -> Prepare:
    """An eager step, beside stock Pyro's."""

    def prepare() -> Prepared:
        one = case(name, "cpu", particles)
        ours = FastSVIFit(one, "cpu", compile=False)
        theirs = LIBRARIES["pyro"].load().prepare(one, "cpu")
        return Block(lambda: ours.run(5), 5), Block(lambda: theirs.run(5), 5), falls(ours)

    return prepare


def compiled(name: str, particles: int, steps: int) -> Prepare:
    """A compiled step, of a run of so many, beside one of hand-written torch on the same data.

    A run begins with a look whether the program is still the one that was compiled, some tens of
    milliseconds; the steps of each take about as long again, so that neither may slow down.
    """

    def prepare() -> Prepared:
        one = case(name, "cpu", particles)
        ours = FastSVIFit(one, "cpu")
        theirs = LIBRARIES["torch"].load().prepare(one, "cpu")
        ours.step()
        gate = falls(ours)
        ours.settle(one.steps)
        # A step that is no longer compiled need not be taken by the thousand to be found slow.
        count = 5 if ours.note else steps
        return Block(lambda: ours.run(count), count), Block(lambda: theirs.run(5), 5), gate

    return prepare


def store(operation: str, count: int) -> Prepare:
    """An operation of the flat store, beside that of a dict of parameters."""

    def prepare() -> Prepared:
        folder = Path(tempfile.mkdtemp())
        flat, plain = (make(count, folder / name) for name, make in STORES.items())
        for operations in (flat, plain):
            operations["fill_grad"]()
        one = "parameter.1"  # positive
        right = torch.allclose(flat["constrain_all"]()[one], plain["constrain_all"]()[one])
        return Block(flat[operation]), Block(plain[operation]), lambda: right

    return prepare


def falls(fit: Fit) -> Callable[[], bool]:
    """A gate: the loss falls, and is finite."""
    first = fit.run(20).mean()

    def gate() -> bool:
        last = fit.run(20).mean()
        return bool(np.isfinite(last) and last < first)

    return gate


MEASURES = (
    Measure("eager eight schools / Pyro", eager("eight_schools", 1)),
    Measure("eager eight schools, 64 particles / Pyro", eager("eight_schools", 64)),
    Measure("eager VAE / Pyro", eager("vae", 1)),
    Measure("compiled eight schools / torch", compiled("eight_schools", 1, 150_000)),
    Measure("compiled eight schools, 64 particles / torch", compiled("eight_schools", 64, 4000)),
    Measure("compiled intercepts / torch", compiled("intercepts", 1, 10_000)),
    Measure("compiled logistic, 16 particles / torch", compiled("logistic", 16, 60)),
    Measure("compiled minibatch / torch", compiled("minibatch", 1, 3000)),
    Measure("compiled VAE / torch", compiled("vae", 1, 15)),
    Measure("compiled regressions, 1,000 fits / torch", compiled("regressions", 1, 100)),
    Measure("store: constrain 1,000 / dict", store("constrain_all", 1000)),
    Measure("store: clear 1,000 gradients / dict", store("zero_grad", 1000), WIDE_MARGIN),
    Measure("store: update 1,000 / dict", store("update", 1000), WIDE_MARGIN),
    Measure("store: look one up / dict", store("lookup", 1000), WIDE_MARGIN),
)


# ----------------------------------------------------------------------------------- the self-test


SLOW: dict[str, Callable[[Any], Any]] = {
    "sleep": lambda value: time.sleep(0.001),
    "sync": lambda value: value.sum().item(),  # a value that the host waits for
}


class _Slow:
    """A library whose ``sample`` does something careless with every value."""

    def __init__(self, library: Any, does: Callable[[Any], Any]) -> None:
        self._library = library
        self._does = does

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        value = self._library.sample(*args, **kwargs)
        self._does(value)
        return value


@contextmanager
def careless(how: str) -> Iterator[None]:
    """Within, every sample statement of fastsvi's models is slowed down in this way."""
    original = with_fastsvi.programs
    with_fastsvi.programs = lambda name, pyro, shape: original(
        name, _Slow(pyro, SLOW[how]) if how in SLOW else pyro, shape
    )
    try:
        yield
    finally:
        with_fastsvi.programs = original


# ------------------------------------------------------------------------------------ command line


def run(measures: Sequence[Measure], committed: dict[str, float], rounds: int) -> dict[str, Any]:
    """Measure all, and once more what seems slower; returns the rows of the document, by name."""
    rows: dict[str, Any] = {}
    for one in measures:
        expected = committed.get(one.name)
        with torch.random.fork_rng(devices=[]):
            prepared = one.prepare()
            found = measure(prepared, rounds)
            if expected is not None and found.ratio > limit(expected, found.error, one.margin):
                found = measure(prepared, 2 * rounds)
        allowed = None if expected is None else limit(expected, found.error, one.margin)
        slower = allowed is not None and found.ratio > allowed
        rows[one.name] = asdict(found) | {
            "committed": expected,
            "limit": allowed,
            "passed": found.right and not slower,
        }
        print(line(one.name, rows[one.name]), flush=True)
    return rows


HEADER = f"{'measure':<46}{'ratio':>9}{'A/A noise':>11}{'committed':>11}{'limit':>9}"


def line(name: str, row: dict[str, Any]) -> str:
    known = row["committed"] is not None
    committed = f"{row['committed']:.4g}" if known else "none"
    allowed = f"{row['limit']:.4g}" if known else "none"
    verdict = "" if row["passed"] else "  SLOWER" if row["right"] else "  WRONG RESULT"
    return (
        f"{name:<46}{row['ratio']:>9.4g}{row['noise']:>11.1%}{committed:>11}{allowed:>9}{verdict}"
    )


def update(measures: Sequence[Measure], rounds: int) -> None:
    """Write the medians of three runs as what is to be kept."""
    runs = [run(measures, {}, rounds) for _ in range(3)]
    ratios = {}
    for one in measures:
        some = [found[one.name]["ratio"] for found in runs]
        ratios[one.name] = {"ratio": statistics.median(some), "runs": some}
    document = {"machine": machine(), "ratios": ratios}
    COMMITTED.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {COMMITTED}")


def main(arguments: list[str] | None = None) -> int:
    """The exit status says whether something became slower, or wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="commit to what is measured now")
    parser.add_argument("--slow", default="none", choices=("none", "sleep", "sync"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", help="measures whose name contains this")
    parser.add_argument("--json", type=Path, default=KEPT, help="file to keep the figures in")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measures = [one for one in MEASURES if not options.only or options.only in one.name]
    about = machine()
    print(describe(about))
    print(HEADER)
    if options.update:
        update(measures, options.rounds)
        return 0
    if not COMMITTED.exists():
        print(f"there is no {COMMITTED}; write it with --update")
        return 1
    kept = json.loads(COMMITTED.read_text())["ratios"]
    start = time.monotonic()
    with careless(options.slow):
        rows = run(measures, {name: row["ratio"] for name, row in kept.items()}, options.rounds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": about, "measures": rows}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    bad = [name for name, row in rows.items() if not row["passed"]]
    print(f"{time.monotonic() - start:.0f} s; {len(bad)} of {len(rows)} failed; {options.json}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
