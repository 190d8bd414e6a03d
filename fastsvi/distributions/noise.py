"""Random draws that work eagerly, under vmap and in a capture.

torch's families fill an empty tensor in place. Under ``torch.func.vmap`` that tensor is not mapped,
so all particles would share their noise, and vmap refuses. The functions here draw separately for
every particle. Outside vmap they use the stream of random numbers that torch's (and so Pyro's)
families use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsvi.distributions.util import Shape

# Private, hence the fallback: without it every draw takes the mapped way, which is right
# everywhere and only moves the stream of random numbers.
_innermost_transform: Callable[[], Any] = getattr(
    torch._C._functorch, "peek_interpreter_stack", lambda: True
)


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform such as vmap is on."""
    return _innermost_transform() is not None


def normal(shape: Shape, like: Tensor) -> Tensor:
    """Standard normal noise with the dtype and device of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def blank(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A tensor to be filled with noise in place, mapped if a vmap is on."""
    if inside_transform():
        return torch.rand(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def dirichlet(concentration: Tensor) -> Tensor:
    """One draw for each entry of ``concentration`` ``(..., K)``, with pathwise gradients."""
    return _Dirichlet.apply(_mapped(concentration))


def draw(sampler: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``sampler(*parameters)``, one draw without gradient for each entry of the parameters.

    For samplers that vmap cannot map: they see ordinary tensors with the particles in front.
    """
    first, *rest = parameters
    return _Draw.apply(sampler, _mapped(first), *rest)


def _mapped(parameter: Tensor) -> Tensor:
    # A parameter that all particles share is not mapped, and neither would be its draw.
    if not inside_transform():
        return parameter
    return parameter + torch.zeros_like(torch.rand((), device=parameter.device)).to(parameter)


class _Dirichlet(torch.autograd.Function):
    """As torch's own, which has no rule for vmap."""

    @staticmethod
    def forward(concentration: Tensor) -> Tensor:
        return torch._sample_dirichlet(concentration)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, concentration = ctx.saved_tensors
        total = concentration.sum(-1, True).expand_as(concentration)
        slope = torch._dirichlet_grad(x, concentration, total)
        return slope * (grad - (x * grad).sum(-1, True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], concentration: Tensor) -> tuple[Tensor, int]:
        return _Dirichlet.apply(concentration.movedim(in_dims[0], 0)), 0


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(sampler: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        return sampler(*parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        sampler: Callable[..., Tensor],
        *parameters: Tensor,
    ) -> tuple[Tensor, int]:
        pairs = zip(parameters, in_dims[1:], strict=True)
        front = [x if dim is None else x.movedim(dim, 0) for x, dim in pairs]
        return _Draw.apply(sampler, *torch.broadcast_tensors(*front)), 0
