"""Adam, AdamW and ClippedAdam over a flat buffer, in place and wholly on the device.

With gradient ``g``, learning rate ``lr`` and update count ``t`` (both may differ per segment):

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

as Kingma and Ba (2015), Algorithm 1; AdamW is Loshchilov and Hutter (2019), AMSGrad is Reddi et
al. (2018). Pyro's ClippedAdam is the same with three switches: ``clip_value``, ``lrd`` (lr decays
by that factor per update) and ``eps_hat`` (the reordering at the end of section 2 of Kingma and
Ba, which adds eps before the bias is corrected).

Nothing here waits for the device: step counts, activity, norms and the decision to skip a step are
all tensors. Rows of a batched buffer ``[..., N]`` are independent fits: a NaN in one leaves the
others as they would have been, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsvi.kernels import dispatch
from fastsvi.kernels.segments import Segments

# ---------------------------------------------------------------------------------------- constants

# What torch.nn.utils.clip_grad_norm_ adds to the norm before it divides by it.
_NORM_FLOOR = 1e-6


# ---------------------------------------------------------------------------------- torch reference


def _clipped(
    grad: Tensor, segments: Segments, clip_norm: float | None, clip_value: float | None
) -> Tensor:
    """Gradient after the norm of each segment, then each element, was clipped."""
    if clip_norm is not None:
        # The squares in float64: in float32 an entry of 1e20 would make the norm infinite.
        norm = segments.sum(grad.double().square()).sqrt()
        factor = (clip_norm / (norm + _NORM_FLOOR)).clamp(max=1.0).to(grad.dtype)
        grad = grad * segments.expand(factor)
    if clip_value is not None:
        grad = grad.clamp(-clip_value, clip_value)
    return grad


def _bias_correction(beta: float, tick: Tensor) -> Tensor:
    """``beta**t - 1``, which is minus the usual correction, with all digits also for small t.

    ``1 - beta**t`` in float32 has an error of 6e-5 at beta2 = 0.999, t = 1.
    """
    if beta == 0.0:
        return torch.full_like(tick, -1.0)
    return tick.mul(math.log(beta)).expm1_()


class _Rule(NamedTuple):
    """What is the same for all segments."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    eps_hat: bool
    centered: bool
    clip_norm: float | None
    clip_value: float | None


def _update(
    param: Tensor,  # [..., N] unconstrained
    grad: Tensor,  # [..., N]
    moments: list[Tensor],  # two or, for AMSGrad, three [..., N]
    tick: Tensor,  # [..., S] number of this update, from 1
    lr: Tensor | float,
    segments: Segments,
    rule: _Rule,
) -> None:
    beta1, beta2 = rule.betas
    exp_avg, exp_avg_sq, *maxima = moments
    if rule.weight_decay and rule.decoupled:
        rate = segments.expand(lr) if isinstance(lr, Tensor) and lr.dim() else lr
        param.mul_(1.0 - rate * rule.weight_decay)
    elif rule.weight_decay:
        grad = grad.add(param, alpha=rule.weight_decay)

    exp_avg.lerp_(grad, 1.0 - beta1)
    spread = grad - exp_avg if rule.centered else grad
    exp_avg_sq.mul_(beta2).addcmul_(spread, spread, value=1.0 - beta2)
    second = exp_avg_sq
    if maxima:
        second = maxima[0].copy_(torch.maximum(maxima[0], exp_avg_sq))

    correction1 = _bias_correction(beta1, tick)
    correction2 = _bias_correction(beta2, tick)
    if rule.eps_hat:
        correction1 = correction1 / correction2.neg().sqrt()
        denominator = second.sqrt().add_(rule.eps)
    else:
        denominator = (second / segments.expand(correction2)).neg_().sqrt_().add_(rule.eps)
    if isinstance(lr, Tensor):  # divided while there is one number per segment
        correction1, lr = correction1 / lr, 1.0
    denominator.mul_(segments.expand(correction1))  # correction1 < 0: what is added below descends
    param.addcdiv_(exp_avg, denominator, value=lr)


def _adam_reference(
    param: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    step: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
    segments: Segments,
    lr: Tensor | float,
    lrd: Tensor | float | None,
    rule: _Rule,
) -> None:
    written = active
    if skipped is not None:
        finite = torch.isfinite(grad)
        if active is not None:
            finite = finite | ~segments.expand(active)
        finite = finite.all(-1)
        skipped.add_(~finite)
        written = finite.unsqueeze(-1).expand_as(step)
        if active is not None:
            written = written & active

    tick = step + 1 if written is not None else step.add_(1)
    if lrd is not None:
        decay = (tick * lrd.log() if isinstance(lrd, Tensor) else tick * math.log(lrd)).exp_()
        lr = decay * lr
    grad = _clipped(grad, segments, rule.clip_norm, rule.clip_value)
    state = [param, *moments]
    before = [] if written is None else [tensor.clone() for tensor in state]
    _update(param, grad, moments, tick, lr, segments, rule)
    if written is None:
        return
    step.copy_(torch.where(written, tick, step))
    mask = segments.expand(written)
    # Chosen, not multiplied by the mask: 0 * NaN would let a skipped gradient through.
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(torch.where(mask, tensor, old))


# ------------------------------------------------------------------------------------- registration


@torch.library.custom_op(
    "fastsvi::adam_",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "skipped"),
)
def _adam_op(
    param: Tensor,  # [B, N]
    grad: Tensor,  # [B, N]
    exp_avg: Tensor,  # [B, N]
    exp_avg_sq: Tensor,  # [B, N]
    max_exp_avg_sq: Tensor | None,  # [B, N]
    step: Tensor,  # [B, S]
    active: Tensor | None,  # bool [B, S]
    skipped: Tensor | None,  # int64 [B]
    lr_tensor: Tensor | None,  # [B, S]
    lrd_tensor: Tensor | None,  # [B, S]
    chunks: Tensor,
    chunk_offsets: Tensor,
    lr: float,
    lrd: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    eps_hat: bool,
    centered: bool,
    clip_norm: float | None,
    clip_value: float | None,
) -> None:
    from fastsvi.kernels.triton import adam as kernels

    kernels.update(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, active, skipped,
        lr_tensor, lrd_tensor, chunks, chunk_offsets, lr, lrd, beta1, beta2, eps,
        weight_decay, decoupled, eps_hat, centered, clip_norm, clip_value,
    )  # fmt: skip


@_adam_op.register_fake
def _(*args: Any) -> None:
    return None


def _has_rows(tensor: Tensor) -> bool:
    """Whether a view ``[B, n]`` with contiguous rows can be taken."""
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1)


def _rows(tensor: Tensor, num_columns: int) -> Tensor:
    """``[..., n]`` as ``[B, n]`` with contiguous rows: a view, else a copy."""
    tensor = tensor if _has_rows(tensor) else tensor.contiguous()
    return tensor if tensor.dim() == 2 else tensor.view(tensor.shape[:-1].numel(), num_columns)


def _adam_triton(
    param: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    step: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
    segments: Segments,
    lr: Tensor | float,
    lrd: Tensor | float | None,
    rule: _Rule,
) -> None:
    columns, count = segments.num_elements, len(segments)
    written = [param, *moments]
    buffers = [_rows(tensor, columns) for tensor in written]
    per_segment = [
        _rows(value.expand_as(step), count) if isinstance(value, Tensor) else None
        for value in (active, lr, lrd)
    ]
    steps, skips = step.contiguous(), None if skipped is None else skipped.contiguous()
    _adam_op(
        buffers[0],
        _rows(grad, columns),
        buffers[1],
        buffers[2],
        buffers[3] if len(buffers) > 3 else None,
        steps.view(buffers[0].shape[0], count),
        per_segment[0],
        None if skips is None else skips.view(-1),
        *per_segment[1:],
        segments.chunks,
        segments.chunk_offsets,
        0.0 if isinstance(lr, Tensor) else lr,
        1.0 if lrd is None or isinstance(lrd, Tensor) else lrd,
        *rule.betas,
        *rule[1:],
    )
    # What had to be copied for the kernel goes back.
    for home, guest in zip(written, buffers, strict=True):
        if not _has_rows(home):
            home.copy_(guest.view(home.shape))
    if not step.is_contiguous():
        step.copy_(steps)
    if skipped is not None and skips is not None and not skipped.is_contiguous():
        skipped.copy_(skips)


# ---------------------------------------------------------------------------------- public function


@torch.no_grad()
def adam_(
    param: Tensor,  # [..., N] unconstrained
    grad: Tensor,  # [..., N]
    exp_avg: Tensor,  # [..., N]
    exp_avg_sq: Tensor,  # [..., N]
    step: Tensor,  # [..., S]
    segments: Segments,
    *,
    lr: Tensor | float,  # or [..., S] or []
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    lrd: Tensor | float | None = None,  # or [..., S] or []
    clip_value: float | None = None,
    clip_norm: float | None = None,
    eps_hat: bool = False,
    centered: bool = False,
    max_exp_avg_sq: Tensor | None = None,  # [..., N]
    active: Tensor | None = None,  # bool [..., S]
    skipped: Tensor | None = None,  # int64 [...]
) -> None:
    """One update of a flat buffer of parameters, in place.

    Only ``param``, the moments, ``step`` and ``skipped`` are written; ``grad`` stays as it is.
    With one segment, a number for ``lr`` and no option this is 14 dispatches: give segments that
    share a step count as one.

    Args:
        param: unconstrained values; leading dimensions are independent fits.
        grad: their gradient.
        exp_avg, exp_avg_sq: the moments m and v.
        step: updates made so far, in the dtype of ``param`` (exact up to 2^24 in float32).
        segments: the cut of the last dimension into parameters.
        lr: learning rate.
        betas, eps: as in the formula above.
        weight_decay: added to the gradient as an L2 penalty or, if ``decoupled``, applied to the
            parameter (AdamW).
        lrd: the t-th update uses ``lr * lrd**t`` (ClippedAdam). ``lr`` itself is not written.
        clip_norm: largest Euclidean norm of the gradient of each segment, as Pyro's
            ``clip_args={"clip_norm": ...}``; done before ``clip_value``.
        clip_value: largest magnitude of each entry of the gradient. It serves both Pyro's
            ``clip_args={"clip_value": ...}`` and ClippedAdam's ``clip_norm``, which clips entries.
        eps_hat: add eps to ``sqrt(v)`` before the bias is corrected (ClippedAdam).
        centered: use ``(g - m)^2`` in v (ClippedAdam's ``centered_variance``).
        max_exp_avg_sq: running maximum of v; when given, the update is AMSGrad's.
        active: segments to update. The others keep everything: value, moments, step count.
        skipped: when given, a fit that has a non-finite gradient in an active segment keeps
            everything, and its count here goes up by one.

    Raises:
        KernelError: shapes or dtypes do not fit together, or an option is out of range.

    >>> param, grad, m, v = torch.ones(3), torch.tensor([2.0, -3.0, 0.0]), *torch.zeros(2, 3)
    >>> adam_(param, grad, m, v, torch.zeros(1), Segments([3]), lr=0.1)
    >>> param
    tensor([0.9000, 1.1000, 1.0000])
    """
    moments = [exp_avg, exp_avg_sq]
    if max_exp_avg_sq is not None:
        moments.append(max_exp_avg_sq)
    _check(param, [grad, *moments], step, segments, active, skipped)
    _check_options(betas, eps, lr, clip_norm, clip_value)

    rule = _Rule(betas, eps, weight_decay, decoupled, eps_hat, centered, clip_norm, clip_value)
    form = dispatch.choose("adam.adam_", param, grad, *moments, step, segments.offsets)
    run = _adam_reference if form == "torch" else _adam_triton
    run(param, grad, moments, step, active, skipped, segments, lr, lrd, rule)


def _check(
    param: Tensor,
    others: list[Tensor],
    step: Tensor,
    segments: Segments,
    active: Tensor | None,
    skipped: Tensor | None,
) -> None:
    op = "adam.adam_"
    shape = param.shape
    if not shape or shape[-1] != segments.num_elements:
        raise dispatch.error(
            op,
            f"the last dimension must be the {segments.num_elements} elements of {segments!r}; "
            "rebuild the segments after the layout has changed",
            param=param,
        )
    for other in others:
        if other.shape != shape or other.dtype != param.dtype:
            raise dispatch.error(
                op,
                "gradient and moments must have the shape and dtype of the parameters",
                param=param,
                found=other,
            )
    per_segment = (*shape[:-1], len(segments))
    if step.shape != per_segment or step.dtype != param.dtype:
        raise dispatch.error(
            op, f"step must have shape {per_segment} and the dtype of param", step=step, param=param
        )
    if active is not None and (active.shape != per_segment or active.dtype != torch.bool):
        raise dispatch.error(op, f"active must be bool of shape {per_segment}", active=active)
    if skipped is not None and skipped.shape != shape[:-1]:
        raise dispatch.error(
            op, f"skipped must have shape {tuple(shape[:-1])}, one count per fit", skipped=skipped
        )


def _check_options(
    betas: tuple[float, float],
    eps: float,
    lr: Tensor | float,
    clip_norm: float | None,
    clip_value: float | None,
) -> None:
    op = "adam.adam_"
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise dispatch.error(op, "each of betas must lie in [0, 1)", betas=betas)
    if eps < 0.0:
        raise dispatch.error(op, "eps must not be negative", eps=eps)
    if not isinstance(lr, Tensor) and lr < 0.0:
        raise dispatch.error(op, "lr must not be negative; gradients are always descended", lr=lr)
    for name, limit in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if limit is not None and limit < 0.0:
            raise dispatch.error(op, f"{name} must not be negative", **{name: limit})
