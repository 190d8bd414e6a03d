"""Fixtures for every test: a clean default store, and seeds that never depend on the test order.

No test may leave the checks of distributions switched otherwise than it found them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

# The tensors of tests are small: threads that wait for each other would take half of the time.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def compiled_steps(tmp_path_factory):
    """A cache of compiled steps for all tests: nobody's own, and nothing is compiled twice."""
    with pytest.MonkeyPatch.context() as patch:
        if "FASTSVI_CACHE" not in os.environ:
            patch.setenv("FASTSVI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Python as it is after ``import torch``, over and over: each program begins in a fork of its own.
_AFTER_TORCH = """
import json, os, sys
import torch
for line in sys.stdin:
    about = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in ((1, about["stdout"]), (2, about["stderr"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
os.environ.update(about["environment"])
exec(about["program"], {"__name__": "__main__"})
"""


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory):
    """Runs a program, the text of it, where nothing but torch was imported before.

    As a process of its own would, but for the seconds that the import of torch takes each time.
    Further arguments are variables of its environment.
    """
    command = [sys.executable, "-c", _AFTER_TORCH]
    folder, count = tmp_path_factory.mktemp("fresh"), iter(range(10**6))
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(program, **environment):
        files = {name: folder / f"{name}{next(count)}" for name in ("stdout", "stderr")}
        about = {name: str(file) for name, file in files.items()}
        about |= {"program": program, "environment": {**os.environ, **environment}}
        print(json.dumps(about), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        outputs = (file.read_text() for file in files.values())
        return subprocess.CompletedProcess([*command, program], code, *outputs)

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(autouse=True)
def clean_state():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the legacy generator is what Pyro programs draw from)
    # Where there is no GPU, torch.manual_seed is busy with those that there might be later.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)
    for library in ("fastsvi", "pyro"):
        if library in sys.modules and hasattr(sys.modules[library], "clear_param_store"):
            sys.modules[library].clear_param_store()
    checks = torch.distributions.Distribution._validate_args
    yield
    left = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(checks)
    for library in ("fastsvi", "pyro"):
        if library in sys.modules and hasattr(sys.modules[library], "clear_param_store"):
            sys.modules[library].clear_param_store()
    assert left == checks, "this test left the validation of distributions changed"
