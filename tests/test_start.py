"""What a process does before its first step: as little as can be."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Wanted by few programs, or slow to import: each is imported by the function that needs it.
SELDOM = [
    "fastsvi.cli",
    "fastsvi.contrib",
    "fastsvi.examples",
    "fastsvi.infer.profiling",
    "fastsvi.interop",
    "matplotlib",
    "safetensors",
    "statistics",
    "torch._dynamo",
    "torch._inductor",
    "tqdm",
    "triton",
]


def checked(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def output_of(fresh_python):
    return lambda program: checked(fresh_python(program))


def test_what_few_programs_need_is_not_imported(output_of):
    found = output_of(
        "import json, sys, torch; before = set(sys.modules)\n"
        "import fastsvi, fastsvi.distributions, fastsvi.optim, fastsvi.infer.autoguide\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert not set(json.loads(found)).intersection(SELDOM)


def test_what_is_imported_late_is_there(output_of):
    assert "function profile" in output_of("from fastsvi.infer import profile; print(profile)")
    assert "function profile" in output_of("import fastsvi.infer as i; print(i.profile)")


def test_the_import_leaves_the_garbage_collector_as_it_was(output_of):
    state = "print(gc.isenabled(), gc.get_freeze_count() > 0)"
    assert output_of(f"import gc, fastsvi; {state}") == "True False\n"
    assert output_of(f"import gc; gc.disable(); import fastsvi; {state}") == "False False\n"
    assert output_of(f"import gc; gc.freeze(); import fastsvi; {state}") == "True True\n"


def test_the_import_makes_no_long_collection():
    # In a process that has collected nothing for other programs before.
    program = (
        "import gc, torch; made = []\n"
        "gc.callbacks.append(lambda phase, about: made.append(about['generation']))\n"
        "import fastsvi; print(max(made, default=0), gc.get_count()[1:])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert checked(done) == "0 (0, 0)\n"
