"""The backward pass of the mean-field normal with Adam's update in it.

The gradients of loc and raw_scale are used where they arise and never written to memory: for wide
guides that saves 8 of some 60 bytes per element and step, and a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsvi.kernels import dispatch, normal, philox
from fastsvi.kernels.normal import Estimator, ScaleMap

# -------------------------------------------------------------------------------- torch reference


def _reference(
    loc: Tensor,
    raw_scale: Tensor,
    key: Tensor,
    origin: Tensor,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    moments: Sequence[Tensor],
    step: Tensor,  # [F] number of this update
    lr: Tensor,  # [F or 1]
    active: Tensor | None,  # bool [F]
    num_particles: int,
    scale_map: ScaleMap,
    estimator: Estimator,
    betas: tuple[float, float],
    eps: float,
) -> None:
    if noise is None:
        noise = normal.draw_noise(raw_scale, key, origin, num_particles)
    grads = normal.backward_reference(raw_scale, noise, grad_z, grad_log_q, scale_map, estimator)
    shared = (step[:, None], lr[:, None], None if active is None else active[:, None], betas, eps)
    params, means, squares = (loc, raw_scale), moments[::2], moments[1::2]
    for param, grad, mean, square in zip(params, grads, means, squares, strict=True):
        _adam(param, grad, mean, square, *shared)


def _adam(
    param: Tensor,
    grad: Tensor | None,
    mean: Tensor,
    square: Tensor,
    step: Tensor,  # [F, 1] number of this update
    lr: Tensor,  # [F or 1, 1]
    active: Tensor | None,  # [F, 1]
    betas: tuple[float, float],
    eps: float,
) -> None:
    grad = torch.zeros_like(param) if grad is None else grad
    new_mean = mean.lerp(grad, 1 - betas[0])
    new_square = (square * betas[1]).addcmul(grad, grad, value=1 - betas[1])
    # In float64: 1 - beta^t of float32 has an error of 6e-5 at t = 1.
    wide = step.double()
    rate = (lr / (1 - betas[0] ** wide)).to(param.dtype)
    correction = (1 / (1 - betas[1] ** wide)).to(param.dtype)
    new_param = param - rate * new_mean / ((new_square * correction).sqrt() + eps)
    for old, new in ((param, new_param), (mean, new_mean), (square, new_square)):
        old.copy_(new if active is None else torch.where(active, new, old))


# ----------------------------------------------------------------------------------- registration


@torch.library.custom_op(
    "fastsvi::normal_backward_adam_", mutates_args=("loc", "raw_scale", "moments")
)
def _backward_adam_op(
    loc: Tensor,  # [F, D]
    raw_scale: Tensor,  # [F, D]
    moments: Sequence[Tensor],  # four [F, D]
    key: Tensor,
    origin: Tensor,
    noise: Tensor | None,  # [F, P, D]
    grad_z: Tensor | None,  # [F, P, D]
    grad_log_q: Tensor | None,  # [F, P]
    step: Tensor,  # [F] number of this update
    lr: Tensor,  # [F or 1]
    active: Tensor | None,  # bool [F]
    num_particles: int,
    scale_map: str,
    estimator: str,
    beta_1: float,
    beta_2: float,
    eps: float,
) -> None:
    drawn = (key, origin, noise, grad_z, grad_log_q)
    update = (moments, step, lr, active)
    options: Any = (num_particles, scale_map, estimator, (beta_1, beta_2), eps)
    if not dispatch.runs_triton(loc.device):
        _reference(loc, raw_scale, *drawn, *update, *options)
        return
    from fastsvi.kernels.triton import normal_adam as kernels

    kernels.backward_adam(loc, raw_scale, *drawn, *update, *options)


# -------------------------------------------------------------------------------- public function


@torch.no_grad()
def backward_adam_(
    loc: Tensor,
    raw_scale: Tensor,
    key: Tensor,
    origin: Tensor,
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    moments: Sequence[Tensor],
    step: Tensor,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    num_particles: int,
    scale_map: ScaleMap = "exp",
    estimator: Estimator = "pathwise",
    noise: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """The backward pass of :func:`sample` and one update of Adam, in place, in one kernel.

    The gradients of loc and raw_scale are never written to memory. Adam as in :mod:`adam`, without
    its options.

    Args:
        loc, raw_scale, key, origin, num_particles, scale_map, estimator, noise: those of the call
            of :func:`sample`. loc and raw_scale are written.
        grad_z: ``[F, P, D]``, gradient of z, or None if there is none.
        grad_log_q: ``[F, P]``, gradient of log q, or None.
        moments: m and v of loc, then m and v of raw_scale, ``[F, D]`` each; written.
        step: ``[F]`` in the dtype of loc, updates made so far; written.
        lr: learning rate, a number or a tensor ``[F]`` or ``[1]``.
        active: bool ``[F]``; fits that are not active keep everything.

    Raises:
        KernelError: shapes, dtypes or devices disagree, or what is written is not contiguous.

    >>> loc, raw_scale, moments = torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(4, 1, 3).unbind()
    >>> at = philox.derive_key(0, 0), philox.make_origin()
    >>> grad_z, step = torch.ones(1, 1, 3), torch.zeros(1)
    >>> backward_adam_(loc, raw_scale, *at, grad_z, None, moments, step, lr=0.1, num_particles=1)
    >>> loc
    tensor([[0.9000, 0.9000, 0.9000]])
    """
    op = "normal_adam.backward_adam_"
    normal.check(op, loc, raw_scale, num_particles, scale_map, estimator, noise)
    philox.check(op, key, origin)
    lr = lr if isinstance(lr, Tensor) else torch.full((1,), lr, dtype=loc.dtype, device=loc.device)
    _check(op, loc, raw_scale, num_particles, grad_z, grad_log_q, moments, step, lr, active)
    others = [x for x in (grad_z, grad_log_q, active) if x is not None]
    form = dispatch.choose(op, loc, raw_scale, key, origin, step, lr, *moments, *others)
    step.add_(1 if active is None else active)
    arguments = (key, origin, noise, grad_z, grad_log_q)
    update = (step, lr, active)
    options = (num_particles, scale_map, estimator)
    if form == "torch":
        _reference(loc, raw_scale, *arguments, moments, *update, *options, betas, eps)
    else:
        _backward_adam_op(loc, raw_scale, moments, *arguments, *update, *options, *betas, eps)


def _check(
    op: str,
    loc: Tensor,
    raw_scale: Tensor,
    num_particles: int,
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    moments: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    active: Tensor | None,
) -> None:
    fits, elements = loc.shape
    like: dict[str, tuple[Tensor, tuple[int, ...]]]
    like = {f"moments[{i}]": (x, (fits, elements)) for i, x in enumerate(moments)}
    like |= {"grad_z": (grad_z, (fits, num_particles, elements))} if grad_z is not None else {}
    like |= {"grad_log_q": (grad_log_q, (fits, num_particles))} if grad_log_q is not None else {}
    like |= {"step": (step, (fits,)), "lr": (lr, (1,) if lr.shape == (1,) else (fits,))}
    for name, (x, shape) in like.items():
        if x.shape != shape or x.dtype != loc.dtype:
            raise dispatch.error(
                op, f"{name} must be {shape} in the dtype of loc", found=x, loc=loc
            )
    if len(moments) != 4:
        raise dispatch.error(op, "there must be four moments", moments=len(moments))
    if active is not None and (active.shape != (fits,) or active.dtype != torch.bool):
        raise dispatch.error(op, f"active must be bool of shape {(fits,)}", active=active)
    for x in (loc, raw_scale, *moments):
        if not x.is_contiguous():
            raise dispatch.error(op, "what is written must be contiguous", found=x)
