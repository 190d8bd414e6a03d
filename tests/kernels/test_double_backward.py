"""Backward passes in Triton can be differentiated as often as the reference can.

Second derivatives of every operation are compared in the conformance suite (test_second).
"""

from __future__ import annotations

import torch
from conformance import FORMS

from fastsvi.kernels import dispatch, log_prob

FORM = FORMS[-1]
DEVICE = "cuda" if FORM == "triton" else "cpu"


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def test_third_derivatives():
    value, scale = numbers(1.0, 2.0), numbers(0.5, 3.0).requires_grad_()
    with dispatch.use(FORM):
        derivative = log_prob.normal(value, 0.0, scale, event_ndims=1)
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), scale, create_graph=True)
    # Of -log s - v^2 / (2 s^2).
    expected = -2 / scale**3 + 12 * value**2 / scale**5
    torch.testing.assert_close(derivative, expected)


def test_a_gradient_that_depends_on_nothing_more_has_none():
    loc, value = numbers(1.0).requires_grad_(), numbers(2.0)
    with dispatch.use(FORM):
        density = log_prob.normal(value, loc, 1.0)
        (slope,) = torch.autograd.grad(density, loc, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, loc, create_graph=True)
        (nothing,) = torch.autograd.grad(curvature, loc, allow_unused=True, materialize_grads=True)
    assert slope.item() == 1.0
    assert curvature.item() == -1.0
    assert nothing.item() == 0.0


def test_only_what_is_asked_for_gets_a_derivative():
    value, loc = numbers(2.0), numbers(1.0)
    scale = numbers(3.0).requires_grad_()
    with dispatch.use(FORM):
        (slope,) = torch.autograd.grad(log_prob.normal(value, loc, scale), scale, create_graph=True)
        slope.backward()
    torch.testing.assert_close(scale.grad, 1 / scale**2 - 3 * (value - loc) ** 2 / scale**4)
    assert value.grad is None
    assert loc.grad is None
