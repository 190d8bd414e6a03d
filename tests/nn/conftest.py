"""Programs over PyroModules, run under Pyro and under fastsvi and compared."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributions import constraints

LIBRARIES = ("pyro", "fastsvi")


def load(name: str) -> SimpleNamespace:
    """What a program needs of a library: its primitives, handlers, store and modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get = importlib.import_module
        return SimpleNamespace(
            name=name,
            pyro=get(name),
            dist=get(f"{name}.distributions"),
            poutine=get(f"{name}.poutine"),
            nn=get(f"{name}.nn"),
            module=get(f"{name}.nn.module"),
            settings=get(f"{name}.settings"),
            store=get(name).get_param_store(),
            constraints=constraints,
        )


def summary(trace: Any) -> list[tuple]:
    """Everything of a trace that a program can tell apart: sites in order, and their values."""
    rows = []
    for name, site in trace.nodes.items():
        if name == "_INPUT":
            continue
        stack = site.get("cond_indep_stack", ())  # Pyro's _RETURN has none
        plates = [(frame.name, frame.dim, frame.size) for frame in stack]
        rows.append((site["type"], name, plain(site["value"]), plates))
    return rows


def plain(value: Any) -> Any:
    """Tensors as lists, so that results of two libraries can be compared by ``==``."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@pytest.fixture(params=LIBRARIES)
def lib(request: pytest.FixtureRequest) -> SimpleNamespace:
    return load(request.param)


@pytest.fixture
def ours() -> SimpleNamespace:
    return load("fastsvi")


@pytest.fixture(params=[False, True], ids=["global", "local"])
def local(request: pytest.FixtureRequest) -> bool:
    """Whether parameters are local to their module."""
    return request.param


@pytest.fixture
def same(local: bool) -> Callable[..., Any]:
    """``same(program)`` runs ``program(lib)`` under both libraries and compares the results."""

    def compare(program: Callable[[SimpleNamespace], Any]) -> Any:
        results = []
        for name in LIBRARIES:
            lib = load(name)
            lib.store.clear()
            torch.manual_seed(0)
            with lib.settings.context(module_local_params=local):
                result = plain(program(lib))
            store = [(key, plain(value)) for key, value in lib.store.items()]
            results.append((result, store))
        expected, actual = results
        assert actual == expected
        return actual[0]

    return compare


@pytest.fixture
def traced() -> Callable[..., list[tuple]]:
    """Summary of the trace of a call."""

    def run(lib: SimpleNamespace, module: Any, *args: Any) -> list[tuple]:
        return summary(lib.poutine.trace(module).get_trace(*args))

    return run
