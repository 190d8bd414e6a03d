"""Random draws that work eagerly, under vmap and in a capture.

Two things are in the way of what torch's families do. They fill an empty tensor in place: under
``torch.func.vmap`` that tensor is not mapped, so all particles would share their noise, and vmap
refuses. And they draw from a generator, whose numbers depend on all that was drawn before.

So all noise comes from the functions here. Outside of :func:`drawn_from` they use torch's
generator, with the numbers that torch's (and so Pyro's) families draw. Inside, the noise comes
from a :class:`Source`, which the engine makes of a seed and counters. Families that are drawn by
rejection (Poisson, binomial, von Mises) use up a varying count of random numbers, which no counter
can foresee; they stay with torch's generator. So do very many gamma variables at once; see
:mod:`~fastsvi.distributions.gamma_noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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


# ----------------------------------------------------------------------------------- where from


class Source(Protocol):
    """What noise can be drawn from in place of torch's generator."""

    def normal(self, shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """Standard normals."""

    def uniform(self, shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """Numbers strictly between 0 and 1; in float32 they come as close as 2**-33 and 2**-24."""

    def subset(self, name: str, size: int, subsample_size: int, device: Any) -> Tensor:
        """The subset of ``range(size)`` that the plate of this name shows."""


_source: Source | None = None
_source_depth = 0  # of the transforms that the source knows of


def _depth() -> int:
    transform = _innermost_transform()
    return getattr(transform, "level", int)() if transform is not None else 0


@contextmanager
def drawn_from(source: Source | None) -> Iterator[None]:
    """Draw all noise from ``source`` for the length of a ``with`` block; None is torch's generator.

    >>> class Zeros:
    ...     def normal(self, shape, dtype, device):
    ...         return torch.zeros(shape, dtype=dtype, device=device)
    >>> with drawn_from(Zeros()):
    ...     normal((2,), torch.float32, None)
    tensor([0., 0.])
    """
    global _source, _source_depth
    before = _source, _source_depth
    _source, _source_depth = source, _depth()
    try:
        yield
    finally:
        _source, _source_depth = before


def current_source() -> Source | None:
    """The source that noise is drawn from; None is torch's generator.

    Inside a vmap of the program's own there is none: a source cannot know how often it maps.
    """
    return _source if _source is None or _depth() == _source_depth else None


# ------------------------------------------------------------------------------------- primitives


def normal(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Standard normal noise."""
    source = current_source()
    if source is not None:
        return source.normal(shape, dtype, device)
    return torch.randn(shape, dtype=dtype, device=device)


def uniform(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Uniform noise; from torch's generator it may be 0."""
    source = current_source()
    if source is not None:
        return source.uniform(shape, dtype, device)
    return torch.rand(shape, dtype=dtype, device=device)


def open_uniform(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Uniform noise that is never 0, for those who take its logarithm."""
    source = current_source()
    if source is not None:
        return source.uniform(shape, dtype, device)
    return blank(shape, dtype, device).uniform_(torch.finfo(dtype).tiny, 1)


def exponential(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Standard exponential noise."""
    source = current_source()
    if source is not None:
        # The small numbers have the finer grain, so the long tail is made of them.
        return -source.uniform(shape, dtype, device).log()
    return blank(shape, dtype, device).exponential_()


def cauchy(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Standard Cauchy noise."""
    source = current_source()
    if source is not None:
        u = source.uniform(shape, dtype, device)
        # tan(pi (u - 1/2)), but u - 1/2 would round the left tail away.
        outwards = (torch.minimum(u, 1 - u) * torch.pi).tan().reciprocal()
        return torch.where(u < 0.5, -outwards, outwards)
    return blank(shape, dtype, device).cauchy_()


def laplace(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Standard Laplace noise."""
    source = current_source()
    if source is not None:
        u = source.uniform(shape, dtype, device)
        outwards = -(2 * torch.minimum(u, 1 - u)).log()
        return torch.where(u < 0.5, -outwards, outwards)
    noise = blank(shape, dtype, device)
    noise = noise.uniform_(torch.finfo(dtype).eps - 1, 1)
    return -noise.sign() * torch.log1p(-noise.abs())


def bernoulli(probs: Tensor) -> Tensor:
    """One 0 or 1 for each entry of ``probs``, without gradient."""
    source = current_source()
    if source is not None:
        return (source.uniform(probs.shape, probs.dtype, probs.device) < probs).to(probs.dtype)
    return torch.bernoulli(probs)


def categorical(probs: Tensor, shape: Shape, source: Source) -> Tensor:
    """Indices of ``shape`` below ``K`` with ``probs`` ``(..., K)``, without gradient.

    A category of probability zero is never drawn: the uniform number is below 1, so the scaled
    one is below the last cumulative sum, and an equal cumulative sum counts as passed.
    """
    cumulative = probs.detach().cumsum(-1)
    u = source.uniform(shape, probs.dtype, probs.device).unsqueeze(-1)
    return (cumulative[..., :-1] <= u * cumulative[..., -1:]).sum(-1)


def blank(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A tensor to be filled with noise in place, mapped if a vmap is on."""
    if inside_transform():
        return torch.rand(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


# ---------------------------------------------------------------------- samplers vmap cannot map


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
