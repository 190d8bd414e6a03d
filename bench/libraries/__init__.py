"""The libraries that are compared, each behind the same small face.

A module here offers ``prepare(case, device) -> Fit``. It imports its library when it is itself
imported, so that the time and the memory of the import can be told from those of the fit.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from bench.workloads import Array


class NotBuilt(Exception):
    """A library cannot do this workload; the message says what is missing."""


class Fit(Protocol):
    """A fit under way.

    Attributes:
        note: what a reader of the figures must know of how the steps were taken.
        in_blocks: whether a fit may as well be taken in many short runs.
        fixed_length: whether a run is compiled for its length.
    """

    @property
    def note(self) -> str | None: ...

    in_blocks: bool
    fixed_length: bool

    def step(self) -> None:
        """Take the first step, and wait until its loss is known."""

    def run(self, steps: int) -> Array:
        """Take steps, wait for them, and return their losses (the sum over fits)."""

    def settle(self, steps: int) -> None:
        """From here on, take runs of ``steps`` steps in the form in which a long run ends."""

    def posterior(self) -> dict[str, Array]:
        """``loc.<site>`` and ``scale.<site>``, unconstrained; or the weights of the networks."""


@dataclass(frozen=True)
class Library:
    """What the comparison must know of a library before it imports it.

    Attributes:
        module: of :mod:`bench.libraries`.
        package: as it is imported.
        distribution: as it is installed.
        how: the setting in which it is measured.
        caches: whether it keeps compiled code on disk, so that a second process starts warm.
        first_step_apart: whether its first step compiles something that its fit does not use; then
            a process of its own takes the first step.
    """

    module: str
    package: str
    distribution: str
    how: str
    caches: bool = False
    first_step_apart: bool = False

    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def load(self) -> ModuleType:
        return importlib.import_module(f"bench.libraries.{self.module}")


LIBRARIES = {
    "fastsvi": Library(
        "with_fastsvi",
        "fastsvi",
        "fastsvi",
        'svi.run(compile="auto") to fit, compile=True for the steady steps',
        caches=True,
    ),
    "fastsvi-eager": Library("with_fastsvi_eager", "fastsvi", "fastsvi", "svi.run(compile=False)"),
    "numpyro": Library(
        "with_numpyro",
        "numpyro",
        "numpyro",
        "first values and all steps in one jit, many fits by vmap over it, minibatches by randint",
        caches=True,
        first_step_apart=True,
    ),
    "torch-compiled": Library(
        "with_torch_compiled",
        "torch",
        "torch",
        "hand-written loss under torch.compile, fused Adam",
        caches=True,
    ),
    "torch": Library("with_torch", "torch", "torch", "hand-written loss, fused Adam"),
    "pyro": Library("with_pyro", "pyro", "pyro-ppl", "svi.step, Trace_ELBO, validation off"),
    "pyro-jit": Library("with_pyro_jit", "pyro", "pyro-ppl", "svi.step, JitTrace_ELBO"),
}
