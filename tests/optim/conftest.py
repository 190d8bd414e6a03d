"""A toy fit that runs alike under Pyro and fastsvi, for tests that compare the two."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import constraints


class Fit:
    """A fit in float64 whose parameters come, stay away and come back, under one library."""

    def __init__(self, library: str, *, bound: bool = False) -> None:
        self.optim: Any = importlib.import_module(f"{library}.optim")
        self.store = importlib.import_module(f"{library}.primitives").get_param_store()
        self.store.clear()
        self.bound = bound  # gradients are views of the flat one, as fastsvi's SVI has them
        self.step_count = 0
        self.traced: dict[str, torch.Tensor] = {}

    def read(self, name: str, init: Any, constraint: Any = constraints.real) -> torch.Tensor:
        value = self.store.setdefault(name, torch.as_tensor(init, dtype=torch.float64), constraint)
        self.traced[name] = value.unconstrained()
        return value

    def loss(self) -> torch.Tensor:
        """Noisy distances of the parameters of this step from where they should go."""
        step = self.step_count
        noise = torch.Generator().manual_seed(step)

        def distance(value: torch.Tensor, target: float) -> torch.Tensor:
            aim = target + torch.randn(value.shape, generator=noise, dtype=torch.float64)
            return (value - aim).square().sum()

        total = distance(self.read("a", [0.0, 1.0, 2.0]), 3.0)
        scale = self.read("net$$$scale", [[1.0, 2.0], [0.5, 4.0]], constraints.positive)
        total = total + distance(scale, 2.0)
        if step >= 10:
            total = total + distance(self.read("late", 5.0), 1.0)
        if step % 3 == 1:
            total = total + 10.0 * distance(self.read("rare", [0.1] * 5), -1.0)
        if 5 <= step < 40 or step >= 60:
            prob = self.read("prob", [0.2, 0.3, 0.5], constraints.simplex)
            total = total + distance(prob, 0.3)
        return total

    def step(self, optimizer: Callable[..., Any]) -> float:
        self.traced = {}
        loss = self.loss()
        if self.bound:
            for buffer in self.store.buffers.values():
                buffer.bind_grads()
        loss.backward()
        leaves = list(self.traced.values())
        optimizer(leaves)
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        self.step_count += 1
        return loss.item()

    def run(
        self,
        optimizer: Callable[..., Any],
        num_steps: int,
        after: Callable[[int, Any, float], None] = lambda step, optimizer, loss: None,
    ) -> dict[str, torch.Tensor]:
        for _ in range(num_steps):
            loss = self.step(optimizer)
            after(self.step_count, optimizer, loss)
        return self.values()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: leaf.detach().clone() for name, leaf in sorted(self.store.named_parameters())}


@pytest.fixture
def fit() -> type[Fit]:
    return Fit


@pytest.fixture
def assert_same_fit() -> Callable[..., None]:
    """Run a fit under Pyro and under fastsvi and compare the parameters."""

    def compare(
        make: Callable[[Any], Any], num_steps: int = 100, after: Any = None, bound: bool = False
    ) -> None:
        results = []
        for library in ("pyro", "fastsvi"):
            fit = Fit(library, bound=bound and library == "fastsvi")
            args = () if after is None else (after,)
            results.append(fit.run(make(fit.optim), num_steps, *args))
        expected, actual = results
        assert actual.keys() == expected.keys()
        for name in expected:
            # Both sum the same float64 updates; the orders of operations differ by a few
            # roundings (1e-16) per step, which Adam's division amplifies for small gradients.
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)

    return compare
