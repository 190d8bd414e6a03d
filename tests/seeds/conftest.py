"""Programs from the web, run as they stand with only their imports changed.

``programs/*.txt`` hold the code of tutorials and questions verbatim (``.txt``, so that no formatter
touches them).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(autouse=True)
def no_window():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def as_fastsvi(source: str) -> str:
    """``source`` with the lines changed that import Pyro or torch's distributions, no others."""
    lines = source.split("\n")
    for i, line in enumerate(lines):
        if line == "import torch.distributions as dd":
            lines[i] = "import fastsvi.distributions as dd"
        if re.match(r"\s*(import|from)\s+pyro\b", line):
            line = re.sub(r"^(\s*)import pyro$", r"\1import fastsvi as pyro", line)
            lines[i] = re.sub(r"^(\s*)(import|from) pyro\.", r"\1\2 fastsvi.", line)
    return "\n".join(lines)


@pytest.fixture
def run_program() -> Callable[..., dict[str, Any]]:
    """``run_program(name, **names)`` runs a program in a namespace of ``names``, and returns it."""

    def run(name: str, **names: Any) -> dict[str, Any]:
        path = PROGRAMS / f"{name}.txt"
        exec(compile(as_fastsvi(path.read_text()), str(path), "exec"), names)
        return names

    return run
