"""The store that the flat one is measured against: a dict with one tensor for each parameter.

It is what a plain program keeps: unconstrained leaves, a transform each, ``torch.optim.Adam`` over
all of them, ``torch.save`` for files. Both stores are driven through :class:`Operations`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from fastsvi.optim import Adam
from fastsvi.primitives import get_param_store

SIZE = 4  # numbers in a parameter
Operations = dict[str, Callable[[], Any]]  # OPERATIONS, and fill_grad, which is not timed


def _names(count: int) -> list[tuple[str, Any]]:
    """Every second parameter is positive."""
    kinds = (constraints.real, constraints.positive)
    return [(f"parameter.{i}", kinds[i % 2]) for i in range(count)]


def plain(count: int, file: Path) -> Operations:
    """Operations of a dict of ``count`` parameters."""
    leaves: dict[str, Tensor] = {}
    transforms: dict[str, Any] = {}
    for name, constraint in _names(count):
        leaves[name] = torch.zeros(SIZE, requires_grad=True)
        transforms[name] = biject_to(constraint)
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-3)
    last = f"parameter.{count - 1}"

    def zero_grad() -> None:
        for leaf in leaves.values():
            assert leaf.grad is not None
            leaf.grad.zero_()

    def fill_grad() -> None:
        for leaf in leaves.values():
            leaf.grad = torch.ones(SIZE)

    def load() -> None:
        with torch.no_grad():
            for name, value in torch.load(file).items():
                leaves[name].copy_(value)

    return {
        "lookup": lambda: transforms[last](leaves[last]),
        "constrain_all": lambda: {name: transforms[name](leaf) for name, leaf in leaves.items()},
        "zero_grad": zero_grad,
        "update": optimizer.step,
        "save": lambda: torch.save({name: leaf.detach() for name, leaf in leaves.items()}, file),
        "load": load,
        "fill_grad": fill_grad,
    }


def flat(count: int, file: Path) -> Operations:
    """The same operations of a flat store."""
    store = get_param_store()  # optimizers know the parameters of this one
    store.clear()
    for name, constraint in _names(count):
        store.setdefault(name, torch.ones(SIZE), constraint)
    optimizer = Adam({"lr": 1e-3})
    leaves = [store.leaf(name) for name in store]

    def fill_grad() -> None:
        (buffer,) = store.buffers.values()
        buffer.bind_grads()
        buffer.grad.fill_(1.0)

    def zero_grad() -> None:
        (buffer,) = store.buffers.values()
        buffer.zero_grad()

    def load() -> None:
        store.load(file)  # into new leaves
        leaves[:] = [store.leaf(name) for name in store]

    last = f"parameter.{count - 1}"
    return {
        "lookup": lambda: store[last],
        "constrain_all": store.constrain_all,
        "zero_grad": zero_grad,
        "update": lambda: optimizer(leaves),
        "save": lambda: store.save(file),
        "load": load,
        "fill_grad": fill_grad,
    }


STORES: dict[str, Callable[[int, Path], Operations]] = {"flat": flat, "plain": plain}
OPERATIONS = ("lookup", "constrain_all", "zero_grad", "update", "save", "load")
