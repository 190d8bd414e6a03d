"""Every operation that native loops are tested with, as generated CUDA: values and gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastsvi.engine.cuda.block_step import BlockStep
from fastsvi.engine.cuda.kernel_loop import KernelLoop

ENGINE = Path(__file__).parents[1]


def functions_of(path: Path):
    """The table ``FUNCTIONS`` of another test module."""
    spec = importlib.util.spec_from_file_location(f"functions_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FUNCTIONS


def called(body):
    """In place of a CUDA graph. The first call stands for the warm-up."""
    body()
    return body


# The two forms share how a pass is written, so each of them takes one of the tables.
FORMS = {
    "loops/test_operations.py": lambda step, state: BlockStep(step, state),
    "test_native.py": lambda step, state: KernelLoop(step, state, capture=called),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", FORMS)
def test_values_and_gradients_equal_those_of_eager_torch(path, simulated):
    """All functions in one step, for one compilation."""
    functions = functions_of(ENGINE / path)

    def one(function, x):
        leaf = x.detach().requires_grad_()
        loss = function(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, loss.detach().reshape(())

    def step(*states):
        results = [one(*pair) for pair in zip(functions.values(), states[:-1], strict=True)]
        losses = torch.stack([loss for _, loss in results])
        return (*(gradient for gradient, _ in results), losses, losses.sum(), losses.isnan().all())

    start = [torch.linspace(-1.5, 1.3, 12, dtype=torch.float64) for _ in functions]
    start.append(torch.zeros(len(functions), dtype=torch.float64))
    *gradients, losses, _, _ = step(*start)
    state = [x.clone() for x in start]
    FORMS[path](step, start).run(1, state=state)
    # An expression has up to some 30 calls, each right to a few ulp.
    tolerance = 120 * torch.finfo(torch.float64).eps
    for name, loss, expected, gradient, wanted in zip(
        functions, state[-1], losses, state, gradients, strict=False
    ):
        assert abs(loss - expected) <= tolerance * (abs(expected) + 1), name
        error = (gradient - wanted).abs().max()
        assert error <= tolerance * (wanted.abs().max() + 1), name
