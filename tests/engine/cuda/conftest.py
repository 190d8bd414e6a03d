"""CUDA source on a CPU: compiled by g++ with shim.h, its kernels launched from Python."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsvi.engine.cuda.emit import Launch, emit_block, emit_kernels
from fastsvi.engine.cuda.prelude import prelude_for
from fastsvi.engine.loops import build
from fastsvi.engine.loops.lower import Program
from fastsvi.engine.loops.schedule import schedule
from fastsvi.engine.record import record

_SHIM = Path(__file__).with_name("shim.h")
# No fused multiplications, so that a sum is the same in every place that it is inlined to; longjmp
# from stack to stack is what _FORTIFY_SOURCE forbids.
_FLAGS = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
_FLAGS += ["-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wreturn-type", "-Werror=return-type"]
# Dynamic shared memory: `extern` does not go with `static`, which shared variables are in the shim.
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w ]+?)\s+(\w+)\[\];")

# Fibers live in one thread, and launches of one library share its memory.
_ONE_AT_A_TIME = threading.Lock()

Argument = Tensor | int | None | Sequence[Tensor]


class Kernels:
    """Kernels of a source, by name."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        launch = self._library.shim_launch
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        launch.argtypes = [pointer, number, pointer, number, ctypes.c_uint64, pointer, number]
        launch.restype = ctypes.c_char_p

    def launch(
        self,
        name: str,
        blocks: int,
        threads: int | tuple[int, int],
        *arguments: Argument,
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        """Run a kernel whose parameters are pointers and integers.

        A tensor stands for its pointer, a sequence of tensors for a table of pointers.

        Raises:
            RuntimeError: threads wait for others that never come.
        """
        keep: list[object] = []
        words = []
        for x in arguments:
            if isinstance(x, Tensor):
                assert x.is_contiguous()
                words.append(x.data_ptr())
            elif x is None or isinstance(x, int):
                words.append((x or 0) & (2**64 - 1))
            else:
                table = (ctypes.c_void_p * max(1, len(x)))(*[t.data_ptr() for t in x])
                keep.append(table)
                words.append(ctypes.addressof(table))
        width, height = threads if isinstance(threads, tuple) else (threads, 1)
        with _ONE_AT_A_TIME:
            found = self._library.shim_launch(
                ctypes.cast(getattr(self._library, name), ctypes.c_void_p),
                blocks,
                (ctypes.c_uint * 3)(width, height, 1),
                shared,
                seed,
                (ctypes.c_uint64 * max(1, len(words)))(*words),
                len(words),
            )
        if found is not None:
            raise RuntimeError(found.decode())


def compile_cuda(source: str) -> Kernels:
    """Compile CUDA source for the CPU; what was compiled before is found again."""
    if sys.platform != "linux":
        pytest.skip("the shim needs ELF sections and ucontext")
    text = _DYNAMIC.sub(r"\1* \2 = (\1*)shim::dynamic_shared;", source)
    digest = hashlib.sha256("\0".join([text, _SHIM.read_text(), *_FLAGS]).encode()).hexdigest()
    target = build.cache_folder() / f"shim-{digest[:32]}.so"
    if not target.exists():
        compiler = build.compiler()
        if compiler is None:
            pytest.skip("no C++ compiler")
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_suffix(f".{os.getpid()}.cpp")
        work.write_text(text)
        made = work.with_suffix(".so")
        command = [compiler, *_FLAGS, "-include", str(_SHIM), str(work), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        work.unlink()
        if done.returncode:
            raise RuntimeError(f"g++ failed:\n{done.stderr[:4000]}")
        os.replace(made, target)
    return Kernels(target)


@pytest.fixture(scope="session")
def shim() -> Callable[[str], Kernels]:
    """``shim(source).launch("kernel", blocks, threads, *arguments, shared=0, seed=0)``."""
    torch.set_num_threads(1)
    return compile_cuda


_BLOCK = """
#define THREADS {threads}
#define RANK ((int)threadIdx.x)
#define TEAM THREADS
#define TEAM_IS_BLOCK 1
#define SYNC() __syncthreads()
"""
_GRID = """
#define THREADS {threads}
#define RANK ((int64_t)blockIdx.x * THREADS + threadIdx.x)
#define TEAM ((int64_t)gridDim.x * THREADS)
#define TEAM_IS_BLOCK 0
#define SYNC()
"""


def _in_form(text: str, blocks: int = 0, threads: int = 64) -> str:
    begin = (_GRID if blocks else _BLOCK).format(threads=threads)
    return begin + prelude_for(text) + text


@pytest.fixture(scope="session")
def form() -> Callable[..., str]:
    """``form(text, blocks, threads)``: a source whose team is a block (0 blocks) or the grid."""
    return _in_form


@pytest.fixture(scope="session")
def block_form() -> Callable[..., str]:
    """``block_form(text, threads)``: a source whose team is a block."""
    return lambda text, threads=64: _in_form(text, 0, threads)


# ----------------------------------------------------------------------------- a device, simulated


class SimulatedDriver:
    """In place of the CUDA driver: kernels run at once, on the CPU and on its tensors.

    Attributes:
        launches: the number of blocks of each launch.
        sources: what was loaded.
        seed: of the order in which threads run.
    """

    def __init__(self) -> None:
        self.launches: list[int] = []
        self.sources: list[str] = []
        self.seed = 0

    def load(self, source: str, device: torch.device) -> SimulatedDriver._Loaded:
        self.sources.append(source)
        return SimulatedDriver._Loaded(self, compile_cuda(source))

    class _Loaded:
        def __init__(self, driver: SimulatedDriver, kernels: Kernels) -> None:
            self._driver, self._kernels = driver, kernels

        def kernel(self, name: str) -> Callable[..., None]:
            def launch(
                blocks: int, threads: int, arguments: Sequence[int], shared_bytes: int = 0
            ) -> None:
                driver = self._driver
                driver.launches.append(blocks)
                self._kernels.launch(
                    name, blocks, threads, *arguments, shared=shared_bytes, seed=driver.seed
                )

            return launch


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedDriver:
    """What fastsvi.engine.cuda launches runs on the shim."""
    from fastsvi.engine.cuda import driver

    found = SimulatedDriver()
    monkeypatch.setattr(driver, "load", found.load)
    monkeypatch.setattr(driver, "most_shared_bytes", lambda device: 200 << 10)
    return found


@pytest.fixture
def gpu(simulated: SimulatedDriver, monkeypatch: pytest.MonkeyPatch) -> SimulatedDriver:
    """The CPU passes for a GPU: whole runs take its forms of steps, a graph being its launches."""
    from fastsvi.engine import cuda_graph
    from fastsvi.infer import pure_step

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        body()  # the warm-up
        return body

    monkeypatch.setattr(pure_step, "kind_of", lambda device: "cuda")
    monkeypatch.setattr(cuda_graph, "Capturer", lambda: capture)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    return simulated


# ------------------------------------------------------------------------- the two forms of a step


class BlockForm:
    """The block form of a step, run on the simulated GPU."""

    def __init__(self, step, state, inputs=(), **options):
        self.graph = record(step, [*state, *inputs])
        program = Program(self.graph, "loops")
        self.made = emit_block(program, schedule(program, len(state)), len(state), **options)
        self._constants = [*(tensor for _, tensor in program.constants), *self.made.tables]
        self._kernels = compile_cuda(self.made.source)

    def run(self, state, inputs=(), steps=1, stepped=(), fits=None, seed=0):
        """New state, losses and flags; ``state`` and ``inputs`` hold one tensor or one per fit."""
        rows = fits or 1
        state = [[x.clone() for x in (xs if fits else [xs])] for xs in state]
        given = [xs if fits else [xs] for xs in inputs]
        table = [xs[fit] for fit in range(rows) for xs in [*state, *given]]
        strides = [0] * len(state)
        strides += [
            xs[0].stride(0) * xs[0].element_size() if k in stepped else 0
            for k, xs in enumerate(given)
        ]
        loss = self.graph.outputs[-2]
        losses = torch.full((rows, steps, *loss.shape), math.nan, dtype=loss.dtype)
        halts = torch.zeros(rows, steps, dtype=torch.bool)
        arena = torch.full((rows * self.made.arena_bytes + 16,), 255, dtype=torch.uint8)
        shared = self.made.in_shared
        self._kernels.launch(
            "run",
            rows,
            self.made.threads,
            table,
            len(strides),
            torch.tensor([*strides, 0]),
            self._constants,
            None if shared else arena,
            self.made.arena_bytes,
            losses,
            losses[0].numel() * losses.element_size(),
            halts,
            steps,
            shared=self.made.arena_bytes if shared else 0,
            seed=seed,
        )
        if fits:
            return state, losses, halts
        return [xs[0] for xs in state], losses[0], halts[0]


class KernelForm:
    """The kernel form of a step, run on the simulated GPU."""

    def __init__(self, step, state, inputs=()):
        self.graph = record(step, [*state, *inputs])
        program = Program(self.graph, "device")
        self.made = emit_kernels(program, schedule(program, len(state)), len(state))
        self._constants = [*(tensor for _, tensor in program.constants), *self.made.tables]
        self._kernels = compile_cuda(self.made.source)

    def run(self, state, inputs=(), steps=1, seed=0):
        """New state, losses and flags."""
        state = [x.clone() for x in state]
        memory = torch.full((self.made.arena_bytes + 256,), 255, dtype=torch.uint8)
        start = -memory.data_ptr() % 256
        self._arena = memory[start : start + self.made.arena_bytes]
        self._inputs = [*state, *inputs]
        self._seed = seed
        losses, halts = [], []
        for _ in range(steps):
            self._do(self.made.before, 0)
            for number in range(self.made.rounds if self.made.body else 0):
                self._do(self.made.body, number)
            self._do(self.made.after, 0)
            losses.append(self._found(self.made.loss_offset, self.graph.outputs[-2]))
            halts.append(self._found(self.made.halt_offset, self.graph.outputs[-1]))
        return state, torch.stack(losses), torch.stack(halts)

    def _do(self, items, number):
        for item in items:
            if isinstance(item, Launch):
                tables = self._inputs, self._constants, self._arena, number
                self._kernels.launch(item.name, item.blocks, item.threads, *tables, seed=self._seed)
            else:
                a, b, out = (self._view(x, item.dtype) for x in (item.a, item.b, item.out))
                out.copy_(a @ b)

    def _view(self, place, dtype):
        if place.of == "arena":
            memory = self._arena.view(dtype)
        else:
            tensors = self._inputs if place.of == "input" else self._constants
            memory = tensors[place.number]
        start = memory.storage_offset() + place.offset
        return memory.as_strided(place.shape, place.strides, start)

    def _found(self, offset, node):
        size = math.prod(node.shape) * node.dtype.itemsize
        return self._arena[offset : offset + size].clone().view(node.dtype).view(node.shape)


_FORMS = {"block": BlockForm, "kernels": KernelForm}


@pytest.fixture(params=_FORMS)
def emitted(request):
    """``emitted(step, state, inputs)`` makes either form of a step."""
    return _FORMS[request.param]


@pytest.fixture
def emitted_block():
    """``emitted_block(step, state, inputs, most_shared=...)`` makes the block form."""
    return BlockForm


@pytest.fixture
def emitted_kernels():
    """``emitted_kernels(step, state, inputs)`` makes the kernel form."""
    return KernelForm


def eager(step, state, inputs=(), steps=1):
    """The same steps by torch."""
    state, losses, halts = list(state), [], []
    for _ in range(steps):
        *state, loss, halt = step(*state, *inputs)
        losses.append(loss)
        halts.append(halt)
    return state, torch.stack(losses), torch.stack(halts)


def check(made, step, state, inputs=(), steps=2, rtol=1e-12, atol=1e-12):
    """Results are those of torch, the same again, and the same whichever thread comes first.

    Sums of float64 in another order differ by some 1e-16 of the sum of absolute values.
    """
    expected, losses, halts = eager(step, state, inputs, steps)
    runs = [made.run(state, inputs, steps=steps, seed=seed) for seed in (1, 1, 2)]
    for new, found, flags in runs:
        torch.testing.assert_close(new, list(expected), rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(found, losses, rtol=rtol, atol=atol, equal_nan=True)
        assert torch.equal(flags, halts)
        for mine, first in zip(new, runs[0][0], strict=True):
            assert torch.equal(mine.nan_to_num(), first.nan_to_num())
        assert torch.equal(found.nan_to_num(), runs[0][1].nan_to_num())


@pytest.fixture(name="eager")
def _eager():
    return eager


@pytest.fixture(name="check")
def _check():
    return check
