"""The operations that :mod:`bench.kernels` times, each beside what one would write in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsvi.kernels import adam, log_prob, normal, normal_adam, philox, transforms
from fastsvi.kernels.segment_table import EXP, IDENTITY, SIGMOID, SegmentTable
from fastsvi.kernels.segments import Segments


@dataclass
class Operation:
    """One operation at one size.

    ``ours`` and ``eager`` take the inputs and return tensors; ``eager`` is what one would write in
    torch. What has a derivative is timed backward too.
    """

    name: str
    ours: Callable[..., Sequence[Tensor]]
    eager: Callable[..., Any]
    inputs: list[Tensor]  # float32
    bytes: int
    bytes_backward: int | None = None
    normals: int = 0
    together: bool = False  # whether to time both passes in one, too


def draw(elements: int, particles: int, device: str) -> Operation:
    """Standard normals ``[1, P, D]``."""
    key, origin = philox.derive_key(0, 0, device), philox.make_origin(step=3, device=device)

    def ours(like: Tensor) -> list[Tensor]:
        return [philox.normal(key, origin, 1, particles, elements, like.dtype)]

    def eager(like: Tensor) -> Tensor:
        return torch.randn(1, particles, elements, device=device)

    size = particles * elements
    like = torch.empty(0, device=device)
    return Operation("philox.normal", ours, eager, [like], 4 * size, normals=size)


def sample(elements: int, particles: int, device: str) -> Operation:
    """A mean-field normal: z and log q from loc and the log of the scale."""
    key, origin = philox.derive_key(0, 0, device), philox.make_origin(step=3, device=device)

    def ours(loc: Tensor, raw: Tensor) -> Sequence[Tensor]:
        return normal.sample(loc, raw, key, origin, particles)

    def eager(loc: Tensor, raw: Tensor) -> Sequence[Tensor]:
        q = torch.distributions.Normal(loc, raw.exp(), validate_args=False)
        z = q.rsample((particles,))
        return z, q.log_prob(z).sum(-1)

    size = particles * elements
    return Operation(
        "normal.sample", ours, eager, list(torch.randn(2, 1, elements, device=device)),
        4 * (2 * elements + size), 4 * (3 * elements + size), normals=size, together=True,
    )  # fmt: skip


def constrain(elements: int, particles: int, device: str) -> Operation:
    """A buffer of thirty segments: real, positive and in the unit interval in turn."""
    kinds = [IDENTITY, EXP, SIGMOID] * 10
    sizes = [elements // 30] * 29 + [elements - 29 * (elements // 30)]
    tables = {
        dtype: SegmentTable.build(kinds, sizes, device=device, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    }

    def ours(x: Tensor) -> Sequence[Tensor]:
        return transforms.constrain_with_log_det(x, tables[x.dtype])

    def eager(x: Tensor) -> Sequence[Tensor]:
        values, log_dets = [], []
        for kind, part in zip(kinds, x.split(sizes), strict=True):
            y = part.exp() if kind == EXP else part.sigmoid() if kind == SIGMOID else part
            log_det = part if kind == EXP else (y * (1 - y)).log() if kind == SIGMOID else part * 0
            values.append(y)
            log_dets.append(log_det.sum())
        return torch.cat(values), torch.stack(log_dets)

    return Operation(
        "transforms.constrain_with_log_det", ours, eager, [torch.randn(elements, device=device)],
        8 * elements, 12 * elements,
    )  # fmt: skip


def update(elements: int, particles: int, device: str) -> Operation:
    """One step of Adam, in place."""
    segments = {device: Segments([elements], device)}
    param, grad, exp_avg = torch.randn(3, elements, device=device).unbind()
    leaf = param.clone().requires_grad_()
    leaf.grad = grad
    optimizer = torch.optim.Adam([leaf], lr=1e-3)

    def ours(*state: Tensor) -> Sequence[Tensor]:
        adam.adam_(*state, segments[device], lr=1e-3)
        return state

    def eager(*state: Tensor) -> None:
        optimizer.step()

    state = [param, grad, exp_avg, exp_avg.square(), torch.ones(1, device=device)]
    return Operation("adam.adam_", ours, eager, state, 28 * elements)


def density(elements: int, particles: int, device: str) -> Operation:
    """Normal log-density of ``[P, D]`` values under ``[D]`` locs and scales, summed to ``[P]``."""
    value = torch.randn(particles, elements, device=device)
    loc, raw = torch.randn(2, elements, device=device).unbind()

    def ours(value: Tensor, loc: Tensor, scale: Tensor) -> list[Tensor]:
        return [log_prob.normal(value, loc, scale, event_ndims=1)]

    def eager(value: Tensor, loc: Tensor, scale: Tensor) -> list[Tensor]:
        q = torch.distributions.Normal(loc, scale, validate_args=False)
        return [q.log_prob(value).sum(-1)]

    size = particles * elements
    return Operation(
        "log_prob.normal", ours, eager, [value, loc, raw.exp()],
        4 * (size + 2 * elements), 4 * (2 * size + 4 * elements),
    )  # fmt: skip


def backward_update(elements: int, particles: int, device: str) -> Operation:
    """The backward pass of a mean-field normal and Adam's update in one, in place."""
    at = philox.derive_key(0, 0, device), philox.make_origin(step=3, device=device)
    grad_z = torch.randn(1, particles, elements, device=device)
    grad_log_q = torch.ones(1, particles, device=device)
    loc, raw, *moments = torch.randn(6, 1, elements, device=device).unbind()
    state = [loc, raw, *(moment.square() for moment in moments), torch.ones(1, device=device)]
    leaves = [loc.clone().requires_grad_(), raw.clone().requires_grad_()]
    optimizer = torch.optim.Adam(leaves, lr=1e-3)

    def ours(grad_z: Tensor, grad_log_q: Tensor, *state: Tensor) -> Sequence[Tensor]:
        loc, raw, *moments, step = state
        normal_adam.backward_adam_(
            loc, raw, *at, grad_z, grad_log_q, moments, step, lr=1e-3, num_particles=particles
        )
        return state

    def eager(grad_z: Tensor, grad_log_q: Tensor, *state: Tensor) -> None:
        q = torch.distributions.Normal(leaves[0], leaves[1].exp(), validate_args=False)
        z = q.rsample((particles,))
        log_q = q.log_prob(z).sum(-1)
        optimizer.zero_grad()
        torch.autograd.backward([z.movedim(1, 0), log_q.movedim(1, 0)], [grad_z, grad_log_q])
        optimizer.step()

    size = particles * elements
    return Operation(
        "normal_adam.backward_adam_", ours, eager, [grad_z, grad_log_q, *state],
        4 * (12 * elements + size), normals=size,
    )  # fmt: skip


# Values and parameters of the families, from normal and from uniform numbers; torch's class.
_FAMILIES: dict[str, tuple[Any, Callable[[Tensor, Tensor], list[Tensor]]]] = {
    "bernoulli_logits": (
        lambda logits, **checks: torch.distributions.Bernoulli(logits=logits, **checks),
        lambda z, u: [(u < 0.5).to(z.dtype), z],
    ),
    "poisson": (torch.distributions.Poisson, lambda z, u: [(9 * u).floor(), z.exp()]),
    "student_t": (torch.distributions.StudentT, lambda z, u: [z, 2 + u, z.flip(0), 1 + u]),
    "log_normal": (torch.distributions.LogNormal, lambda z, u: [z.exp(), z.flip(0), 1 + u]),
    "half_normal": (torch.distributions.HalfNormal, lambda z, u: [z.abs(), 1 + u]),
    "half_cauchy": (torch.distributions.HalfCauchy, lambda z, u: [z.abs(), 1 + u]),
    "gamma": (torch.distributions.Gamma, lambda z, u: [z.exp(), 1 + u, 1 + u.flip(0)]),
    "beta": (torch.distributions.Beta, lambda z, u: [0.01 + 0.98 * u, 1 + z.abs(), 2 - u]),
}


def family(name: str) -> Callable[[int, int, str], Operation]:
    """Log-density of a family of ``[D]`` values, each with its own parameters, summed."""
    make, draw = _FAMILIES[name]

    def operation(elements: int, particles: int, device: str) -> Operation:
        inputs = draw(torch.randn(elements, device=device), torch.rand(elements, device=device))

        def ours(value: Tensor, *params: Tensor) -> list[Tensor]:
            return [log_prob.log_prob(name, value, *params, event_ndims=1)]

        def eager(value: Tensor, *params: Tensor) -> list[Tensor]:
            return [make(*params, validate_args=False).log_prob(value).sum(-1)]

        bytes_of_inputs = 4 * elements * len(inputs)
        return Operation(
            f"log_prob.{name}", ours, eager, inputs, bytes_of_inputs, 2 * bytes_of_inputs
        )

    return operation


OPERATIONS: dict[str, Callable[[int, int, str], Operation]] = {
    "philox": draw,
    "normal": sample,
    "transforms": constrain,
    "adam": update,
    "log_prob": density,
    "normal_adam": backward_update,
    **{f"log_prob.{name}": family(name) for name in _FAMILIES},
}
