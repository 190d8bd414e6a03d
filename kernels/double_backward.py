"""Derivatives of backward passes, for those who differentiate twice.

A backward pass in Triton is an operation that autograd cannot look into. It gets the derivatives of
its twin, the same pass written in torch: slower, but right, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register(op: Any, twin: Callable[..., Sequence[Tensor]]) -> None:
    """Let autograd differentiate ``op`` as it would ``twin``, which takes the same arguments."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        deeper = torch.is_grad_enabled()
        arguments = list(ctx.others)
        found: list[Any] = [
            [None] * len(x) if isinstance(x, (list, tuple)) else None for x in arguments
        ]
        with torch.enable_grad():
            for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
                # Another name for the same tensor: what it is a function of stays out of this.
                arguments[i] = x.view_as(x) if x.requires_grad else x
            wanted = [i for i in ctx.places if arguments[i].requires_grad]
            results = twin(*arguments)
        pairs = [
            (result, grad)
            for result, grad in zip(results, _flat(grads), strict=True)
            if grad is not None and result.requires_grad
        ]
        if pairs and wanted:
            second = torch.autograd.grad(
                [result for result, _ in pairs],
                [arguments[i] for i in wanted],
                [grad for _, grad in pairs],
                create_graph=deeper,
                allow_unused=True,
            )
            for i, grad in zip(wanted, second, strict=True):
                found[i] = grad
        return tuple(found)

    op.register_autograd(backward, setup_context=save)


def pull_back(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Gradients of the inputs, differentiable; outputs without a gradient are left out."""
    pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[1] is not None]
    kept, given = zip(*pairs, strict=True)
    return torch.autograd.grad(kept, inputs, given, create_graph=True, materialize_grads=True)


def as_leaf(x: Tensor) -> Tensor:
    """``x``, or a copy of its name that can be differentiated by."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _flat(grads: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients one by one; those of a list of results come as a list."""
    flat: list[Tensor | None] = []
    for grad in grads:
        flat += grad if isinstance(grad, (list, tuple)) else [grad]
    return flat
