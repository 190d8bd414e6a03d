"""Large work is divided among threads: same bits for any number of them, small work untouched."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.engine.loops import blas, team
from fastsvi.engine.loops.divide import PART, cut, shared_call
from fastsvi.engine.loops.index import Axis
from fastsvi.engine.native import NativeStep
from fastsvi.engine.native_fits import NativeFits
from fastsvi.engine.noise_op import normal_noise, uniform_noise
from fastsvi.engine.rounds import round_number, sum_of_rounds
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal
from fastsvi.kernels import philox

NEVER = torch.zeros((), dtype=torch.bool)
LONG = 100_003  # a prime: no block fits
WIDE = torch.linspace(-2, 2, LONG)
FLAT = torch.linspace(-2, 2, 3 * 41_011).reshape(3, 41_011)
TALL = FLAT.t().contiguous()
SQUARE = torch.linspace(-2, 2, 401 * 307).reshape(401, 307)
PLACES = (torch.arange(401 * 307) * 7919 % 97).reshape(401, 307)


@pytest.fixture(autouse=True)
def threads():
    """The number of threads, which a test may set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wavy(rows, columns):
    """All of one sign, so that sums of products do not cancel."""
    return torch.linspace(-40, 40, rows * columns).reshape(rows, columns).sin() + 1.5


# Functions of a vector of ten numbers.
NESTS = {
    "elements": lambda x: (WIDE * x[0]).exp().tanh(),
    "sum": lambda x: (WIDE * x[0]).exp().sum(),
    "sum in float64": lambda x: (WIDE.double() * x[0]).exp().sum(),
    "extrema": lambda x: torch.stack([(WIDE * x[0]).sin().amax(), (WIDE * x[1]).cos().amin()]),
    "all": lambda x: ((WIDE * x[0]).exp() > 0.01).all().float(),
    "product": lambda x: (1 + 1e-6 * (WIDE.double() * x[0]).sin()).prod(),
    "sums over both axes": lambda x: torch.cat(
        [(SQUARE * x[0]).exp().sum(0), (SQUARE * x[0]).exp().sum(1)]
    ),
    "sum over few": lambda x: (FLAT * x[0]).exp().sum(0),
    "sums of few": lambda x: (FLAT * x[0]).exp().sum(1),
    "sum over few columns": lambda x: (TALL * x[0]).exp().sum(1),
    "positions": lambda x: (SQUARE * x[0]).sin().argmax(1).float(),
    "gather": lambda x: SQUARE.flatten()[(WIDE * 1000).long().abs()] * (WIDE * x[0]).exp(),
    "scatter along rows": lambda x: torch.zeros(401, 97).scatter_add(
        1, PLACES, (SQUARE * x[0]).exp()
    ),
    "scatter to few": lambda x: torch.zeros(97).index_put(
        (PLACES.flatten(),), (SQUARE * x[0]).exp().flatten(), accumulate=True
    ),
    "scatter to many": lambda x: torch.zeros(LONG).index_put(
        ((torch.arange(LONG) * 31 % LONG),), (WIDE * x[0]).exp(), accumulate=True
    ),
    "put": lambda x: torch.zeros(97).index_put((PLACES.flatten(),), (SQUARE * x[0]).flatten()),
    "put along rows": lambda x: torch.zeros(401, 97).scatter(1, PLACES, (SQUARE * x[0]).exp()),
    "nothing": lambda x: (torch.zeros(0, LONG) * x[0]).exp().sum(0),
}
# Rows, columns and terms of products that are cut along rows, columns, both, terms, and not at all.
PRODUCTS = [(800, 40, 60), (16, 3000, 50), (203, 1001, 80), (16, 20, 9001), (70, 65, 64)]
VECTORS = [(10_000, 50), (30, 9000), (300, 2000)]


def results(x):
    found = {name: function(x) for name, function in NESTS.items()}
    for m, n, k in PRODUCTS:
        found[f"{m} x {n} x {k}"] = (wavy(m, k) * x[0]) @ (wavy(k, n) * x[1])
        found[f"turned {m} x {n} x {k}"] = (wavy(k, m) * x[0]).t() @ (wavy(n, k) * x[1]).t()
    for m, k in VECTORS:
        found[f"matrix {m} x {k} and vector"] = wavy(m, k) @ (wavy(1, k)[0] * x[0])
        found[f"vector and matrix {m} x {k}"] = (wavy(1, m)[0] * x[0]) @ wavy(m, k)
    left = wavy(600, 70).view(60, 10, 70) * x[0]
    found["many products"] = torch.bmm(left, wavy(60 * 70, 12).view(60, 70, 12) * x[1])
    few = wavy(400, 300).view(2, 200, 300) * x[0]
    found["two products"] = torch.bmm(few, wavy(600, 210).view(2, 300, 210) * x[1])
    return found


def of_all_kinds(dtype):
    """A step with all of the above, its state, and the names of what it computes."""
    start = torch.linspace(0.5, 1.5, 10)
    expected = results(start)

    def step(*state):
        found = results(state[-1])
        return (*found.values(), state[-1] * 1.01, state[-1].sum(), NEVER)

    return NativeStep(step, [*(torch.zeros_like(x) for x in expected.values()), start]), expected


@pytest.fixture(scope="module")
def kinds():
    return of_all_kinds(torch.float32)


def taken(native, threads, steps=2):
    torch.set_num_threads(threads)
    state = [x.clone() for x in native._state]
    losses = native.run(steps, state=state)
    return [*state, losses]


def test_all_kinds_have_the_same_bits_for_any_number_of_threads(kinds):
    native, expected = kinds
    alone, names = taken(native, 1), [*expected, "x", "loss"]
    for threads in (2, 3, 8):
        for name, one, other in zip(names, alone, taken(native, threads), strict=True):
            assert torch.equal(one, other), (name, threads)


def test_all_kinds_are_right(kinds):
    native, expected = kinds
    found = taken(native, 2, steps=1)
    for (name, wanted), got in zip(expected.items(), found, strict=False):
        # Some 50 roundings on average, of sums in blocks and of products up to 10,000 long.
        scale = wanted.abs().max() if wanted.numel() else torch.zeros(())
        assert (got - wanted).abs().sum() <= 1e-5 * scale * max(1, wanted.numel()), name


def test_what_is_large_is_divided(kinds):
    native, _ = kinds
    body = native.source.split("run_many")[0]
    for routine in ("matrix_matrix", "matrix_vector", "matrix_narrow"):
        assert f"shared_{routine}<" in body.split('extern "C"')[1]
    assert len(re.findall(r"team_each\(team, \d+, \[=\]\(int64_t part\) \{ nest", body)) >= 10


def test_draws_have_the_same_bits_for_any_number_of_threads():
    shapes = [
        (1, 1, 70_001),
        (1, 3, 5_000),
        (2, 900, 50),
        (1, 5000, 10),
        (2, 4000, 3),
        (1, 70, 300),
    ]
    key, origin = philox.derive_key(3, 1), philox.make_origin(step=5, particle=7, fit=4)
    dtypes = (torch.float32, torch.float64)

    def step(*tensors):
        *_, origin, key = tensors
        new = [normal_noise(key, origin, 512, *s, d) for s in shapes for d in dtypes]
        new += [uniform_noise(key, origin, 0, *s, torch.float32) for s in shapes]
        return (*new, origin + torch.tensor([0, 1, 0, 0]), new[0].sum(), NEVER)

    state = [torch.zeros(s, dtype=d) for s in shapes for d in dtypes]
    state += [torch.zeros(s) for s in shapes]
    native = NativeStep(step, [*state, origin], [key])
    assert native.source.split('extern "C"')[1].count("shared_philox_draw<") == 3 * len(shapes)
    alone = taken(native, 1)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, alone, taken(native, threads)))
    last = philox.make_origin(element=4 * 512, step=6, particle=7, fit=4)
    for got, (shape, dtype) in zip(alone, [(s, d) for s in shapes for d in dtypes], strict=False):
        expected = philox.normal(key, last, *shape, dtype=dtype)
        tolerance = 32 * torch.finfo(dtype).eps  # as in test_draws
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_loops_over_rounds_have_the_same_bits_for_any_number_of_threads():
    def step(x, count):
        number = round_number(count, 4)
        each = (x * number).exp().tanh() * x.sin()
        new = x - 1e-3 * sum_of_rounds(each, number)
        return new, count + 1, sum_of_rounds(each.sum(), number), NEVER

    native = NativeStep(step, [WIDE.clone(), torch.zeros((), dtype=torch.int64)])
    assert native._is_divided
    alone = taken(native, 1)
    assert all(map(torch.equal, alone, taken(native, 3)))
    each = [(WIDE * k).exp().tanh() * WIDE.sin() for k in range(4)]
    # The mean of 1e5 terms of size 1 in each round.
    assert abs(alone[-1][0] - sum(x.double().sum() for x in each)) <= 1e-6 * LONG
    torch.testing.assert_close(taken(native, 2, steps=1)[0], WIDE - 1e-3 * sum(each))


@pytest.mark.parametrize("particles", [1, 8])
def test_a_fit_has_the_same_bits_for_any_number_of_threads(particles):
    """A linear model of 20,000 rows, mean-field: noise, products, sums over each axis, Adam."""
    x, y = wavy(20_000, 30) - 1.5, wavy(1, 20_000)[0]

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            each = pyro.sample("each", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal((x @ w.unsqueeze(-1)).squeeze(-1) + each, 0.5), obs=y)

    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = Trace_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=1)
        svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        # The first step is an eager one, whose sums torch may order by the number of threads.
        torch.set_num_threads(1)
        svi.run(1, compile=True, progress_bar=False)
        torch.set_num_threads(threads)
        result = svi.run(10, compile=True, progress_bar=False)
        assert result.obstacle is None
        found.append([result.losses, *result.params.values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# ---- small steps


@pytest.mark.parametrize("size", [0, 1, 10, 2000])
def test_small_steps_are_those_of_one_thread(size):
    def step(x, w):
        new = (x - 0.1 * x.exp()).tanh()
        return new, w, new.sum() + (w @ w).sum(), NEVER

    native = NativeStep(step, [torch.linspace(-1, 1, size), wavy(30, 30)])
    assert "team" not in native.source
    assert not native._is_divided


def test_a_cut_keeps_what_is_added_up_small():
    rows, columns = Axis("i0", 8), Axis("i1", 100_000)
    work = 1e8
    over_rows = (frozenset({rows}), 100_000.0)
    found = cut((rows, columns), work, [over_rows, (frozenset({columns}), 8.0)])
    assert found.axis == columns  # cut rows would make eight sums of 100,000 numbers each
    assert found.size % 64 == 0
    assert found.parts * found.size >= columns.extent > (found.parts - 1) * found.size
    assert cut((rows, columns), work, []).parts >= 8
    everywhere = (frozenset({rows, columns}), float("inf"))
    assert cut((rows, columns), work, [everywhere]) is None
    assert cut((rows, columns), 3 * PART, []) is None
    assert cut((), work, []) is None
    assert cut((Axis("i0", 0),), 0.0, []) is None
    assert cut((Axis("i0", 70),), work, []) is None  # not two whole cache lines


def test_products_of_a_blas_with_threads_of_its_own_are_left_to_it(monkeypatch):
    text = "matrix_matrix<float>(blas[0], 900, 900, 900, a1, 1, 900, a2, 1, 900, a3);"
    work = 900.0**3
    vector = "matrix_vector<float>(9000, 900, (a1 + 0), 900, 1, (a2 + 0), 1, a3);"
    shared = "shared_matrix_matrix<float>(team, blas[0], 900,"
    if blas.pointers()[blas.THREADS]:
        assert shared_call(text, work).startswith(shared)
    monkeypatch.setattr(blas, "pointers", lambda: [1, 1, 0])
    assert shared_call(text, work) == text
    assert shared_call(vector, work).startswith("shared_matrix_vector<float>(team, 9000,")
    assert shared_call(vector, 10.0) == vector


# ---- whom the threads serve


def moving(x):
    new = (x - 0.01 * (x * x).exp()).sin()
    return new, new.sum(), new.isnan().any()


def test_several_runs_at_once():
    starts = [torch.linspace(-1, k, LONG) for k in range(5)]
    native = NativeStep(moving, [starts[0].clone()])
    assert native._is_divided
    torch.set_num_threads(2)
    alone = [native.run(40, state=[start.clone()]) for start in starts]
    with ThreadPoolExecutor(5) as pool:
        runs = list(pool.map(lambda start: native.run(40, state=[start.clone()]), starts))
    assert all(map(torch.equal, alone, runs))


def test_many_fits_take_one_thread_each():
    states = torch.stack([torch.linspace(-1, k, LONG) for k in range(3)])
    native = NativeStep(moving, [states[0].clone()])
    torch.set_num_threads(1)
    alone = [native.run(3, state=[state.clone()]) for state in states]
    torch.set_num_threads(3)
    fits, losses = NativeFits(native, [states], [], []), torch.empty(3, 3)
    assert fits.run(torch.arange(3), losses).tolist() == [3, 3, 3]
    assert torch.equal(losses, torch.stack(alone))


def test_more_threads_than_parts_or_than_there_are():
    native = NativeStep(moving, [WIDE.clone()])
    alone = taken(native, 1)
    assert all(map(torch.equal, alone, taken(native, 300)))
    torch.set_num_threads(2)


def test_without_a_team_one_thread_does_it_all(monkeypatch):
    native = NativeStep(moving, [WIDE.clone()])
    alone = taken(native, 1)
    monkeypatch.setattr(team, "share", lambda: None)
    assert all(map(torch.equal, alone, taken(native, 2)))


# ---- the team itself

Part = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
Share = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, Part, ctypes.c_void_p)


def shared(threads, parts, body):
    """Have the team do ``body`` of each part; returns part and thread, in the order of the work."""
    done = []

    def part(_, number):
        done.append((number, threading.get_ident()))
        body(number)

    Share(team.share())(threads, parts, Part(part), None)
    return done


def rest():
    """Until the team has forgotten that it was held up."""
    time.sleep(0.3)


@pytest.mark.parametrize("parts", [1, 2, 7, 100])
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_every_part_is_done_once(threads, parts):
    for _ in range(20):
        done = shared(threads, parts, lambda number: None)
        assert sorted(number for number, _ in done) == list(range(parts))


def test_others_take_what_is_left():
    rest()
    own = threading.get_ident()
    found = set()
    for _ in range(5):
        found |= {who for _, who in shared(3, 12, lambda number: time.sleep(0.002))}
    assert own in found
    assert len(found) > 1


def test_after_waiting_for_nothing_a_thread_goes_alone_for_a_while():
    rest()
    own = threading.get_ident()

    def slow_elsewhere(number):
        time.sleep(0.02 if threading.get_ident() != own else 0.001)

    for _ in range(20):  # until another thread has got a part, and was waited for
        if len({who for _, who in shared(2, 2, slow_elsewhere)}) > 1:
            break
    done = shared(2, 50, lambda number: time.sleep(0.001))
    assert {who for _, who in done} == {own}
    end = time.monotonic() + 30
    while len({who for _, who in shared(2, 50, lambda number: time.sleep(0.001))}) == 1:
        assert time.monotonic() < end


_FORKED = """
import os, sys, torch
from fastsvi.engine.native import NativeStep
from tests_step import moving
torch.set_num_threads(2)
native = NativeStep(moving, [torch.linspace(-2, 2, 100003)])
# Before the fork, for torch's own loops hang in a child of a process that has run them on threads.
starts = [[torch.linspace(-2, 2, 100003)] for _ in range(2)]
alone = native.run(5, state=starts[0])
child = os.fork()
again = native.run(5, state=starts[1])
same = torch.equal(alone, again)
if child == 0:
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
sys.exit(status or not same)
"""

_SIGNALS = """
import os, sys, torch
from pathlib import Path
from fastsvi.engine.native import NativeStep
from tests_step import moving
native = NativeStep(moving, [torch.linspace(-2, 2, 100003)])
def tasks():
    return set(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
before = tasks()
native.run(2)
new = tasks() - before
assert len(new) == 2, new
for task in new:
    text = Path(f"/proc/self/task/{task}/status").read_text()
    blocked = int(next(line for line in text.splitlines() if "SigBlk" in line).split()[1], 16)
    assert blocked >> 1 & 1  # SIGINT is the second
"""


@pytest.mark.parametrize("script", [_FORKED, _SIGNALS], ids=["fork", "signals"])
def test_processes(script, tmp_path):
    if not hasattr(os, "fork") or not os.path.isdir("/proc/self/task"):
        pytest.skip("needs fork and /proc")
    (tmp_path / "tests_step.py").write_text(
        "def moving(x):\n"
        "    new = (x - 0.01 * (x * x).exp()).sin()\n"
        "    return new, new.sum(), new.isnan().any()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
