"""A wide fit takes no more memory than it says, measured by the system in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastsvi.infer.memory import floor_bytes

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads peaks of memory from /proc"
)

# What imports and first small fits take is not counted, and neither are the data.
PROGRAM = """
import gc, sys
import torch
import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi.infer import SVI, Trace_ELBO
from fastsvi.infer.autoguide import AutoNormal

def model(data):
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)

def fit(data, mode):
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, chunk_size=chunk)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo, seed=1)
    return svi, svi.run(8, data, progress_bar=False, compile=mode)

def memory(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))

elements, particles, chunk, mode = (eval(x) for x in sys.argv[1:])
fit(torch.zeros(9), False)
eager = memory("VmRSS:")
fit(torch.zeros(9), True)
gc.collect()  # those two, for moments follow their parameters into larger memory
code = memory("VmRSS:") - eager
data = torch.full((elements,), 0.5)
before = memory("VmRSS:")
svi, run = fit(data, mode)
assert run.native_steps >= 6, run
# ru_maxrss would begin with the peak of the process that this one was forked from.
print(memory("VmHWM:") - before, memory("VmRSS:") - before, code)
"""

# Code of torch that the first recording of a process calls: 2.2 MB of libraries, 0.4 MB else.
CODE = 4 << 20


def measured(*arguments):
    command = [sys.executable, "-c", PROGRAM, *map(repr, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("particles", "chunk", "mode"),
    [(1, None, True), (1, None, "auto"), (4, None, True), (6, 2, True)],
)
def test_peak_is_close_to_the_floor(particles, chunk, mode):
    """At a million elements, few enough for what is not a number to show."""
    elements = 1_000_000
    at_once = chunk or particles
    floor = floor_bytes(2 * elements, elements, at_once, chunked=at_once < particles)
    peak, after, code = measured(elements, particles, chunk, mode)
    assert peak < 1.1 * floor
    # State, the copy that was returned, and no working memory.
    assert after < 1.1 * floor_bytes(2 * elements, 0)
    assert code < CODE
