"""ci/compile_kernels.py: good kernels pass, and each kind of bad one is caught.

In a process of its own, for the tests' process may hold interpreted kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

BAD_KERNELS = '''
import sys
sys.path.insert(0, {ci!r})

import triton
import triton.language as tl
from compile_kernels import compile_case, with_ones
from triton import CompilationError
from fastsvi.kernels.triton.launch import CompileCase


@triton.jit
def copy_kernel(in_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(in_ptr + at, mask=at < num_elements), mask=at < num_elements)


@triton.jit
def hoarding_kernel(in_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    """Holds 16 values of {many} elements a thread, and uses the first last."""
    at = tl.arange(0, BLOCK)
    held = ()
    for i in tl.static_range(16):
        held += (tl.load(in_ptr + i * num_elements + at),)
    for i in tl.static_range(16):
        tl.store(out_ptr + i * num_elements + at, held[15 - i] * held[i])


@triton.jit
def long_kernel(in_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    at = num_elements.to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(in_ptr + at))


def case(name, kernel, block, **options):
    types = {{"in_ptr": "*fp32", "out_ptr": "*fp32", "num_elements": "i32"}}
    return CompileCase(name, kernel, types, {{"BLOCK": block}}, threads=32, **options)


aligned = ("in_ptr", "out_ptr", "num_elements")
for case, target in [
    (case("good", copy_kernel, 512, divisible=aligned, wide_loads=4, wide_stores=4), "cuda:90"),
    (case("good", copy_kernel, 512, divisible=aligned, wide_loads=2, wide_stores=2), "hip:gfx942"),
    (case("unaligned", copy_kernel, 512, wide_loads=4, wide_stores=4), "cuda:90"),
    (case("large", copy_kernel, 512, max_bytes=100), "cuda:90"),
    (case("spilling", hoarding_kernel, 1024, divisible=aligned), "cuda:90"),
    (case("spilling", hoarding_kernel, 4096, divisible=aligned), "hip:gfx942"),
]:
    print(case.name, target, "|", "; ".join(compile_case(case, target).faults(case)))

brittle = CompileCase("brittle", long_kernel, {{"in_ptr": "*fp32", "out_ptr": "*fp32",
                      "num_elements": "i32"}}, {{"BLOCK": 32}}, threads=32)
compile_case(brittle, "cuda:90")
try:
    compile_case(with_ones(brittle), "cuda:90")
except CompilationError as error:
    print("brittle ones |", "to" in str(error))

from compile_kernels import kernels_without_a_case, main
from fastsvi.kernels.triton import philox
sys.stderr = sys.stdout
print("unknown name |", main(["nonsense"]))
print("forgotten nothing |", kernels_without_a_case())
del philox.COMPILE_CASES
print("forgotten philox |", kernels_without_a_case())
'''


def run(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_faults_are_found(tmp_path):
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS.format(ci=str(ROOT / "ci"), many=32))
    out = run(str(script))
    lines = [line.split(" |") for line in out.splitlines() if " |" in line]
    found = {tuple(head.split()): faults.strip() for head, faults in lines}
    assert found["good", "cuda:90"] == ""
    assert found["good", "hip:gfx942"] == ""
    assert "0 128-bit loads, expected at least 4" in found["unaligned", "cuda:90"]
    assert "0 128-bit stores, expected at least 4" in found["unaligned", "cuda:90"]
    assert found["brittle", "ones"] == "True"
    assert "too large" in found["large", "cuda:90"]
    assert "spills" in found["spilling", "cuda:90"]
    assert "spills" in found["spilling", "hip:gfx942"]
    assert "no case has such a name" in out
    assert found["unknown", "name"] == "1"
    assert found["forgotten", "nothing"] == "[]"
    assert found["forgotten", "philox"] == "['fastsvi.kernels.triton.philox.draw_kernel']"


def test_a_kernel_of_ours_compiles_for_every_target(tmp_path):
    table = tmp_path / "table.tsv"
    out = run("ci/compile_kernels.py", "philox.draw-normal-short", "--out", str(table))
    assert "5 compiled, 0 at fault" in out
    header, *rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert header[:2] == ["case", "target"]
    assert {row[1] for row in rows} == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
