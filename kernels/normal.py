"""The mean-field normal: samples and their log density under it, in one operation.

:func:`sample` draws, :func:`sample_constrained` goes on to constrained values in the same pass;
:mod:`normal_adam` has the backward pass of sample with the optimizer's update in it.

With ``scale = map(raw_scale)`` and standard normal ``noise`` drawn by :mod:`philox`::

    z     = loc + scale * noise                                                   [F, P, D]
    log q = sum over D of  -noise^2 / 2 - log(scale) - log(2 pi) / 2              [F, P]

The noise is not kept for the backward pass but drawn again. ``log(scale)`` is computed from
``raw_scale``, so it stays right where ``scale`` itself has underflowed.

Gradients of log q, by ``estimator``:

- ``"pathwise"``: of the formula above, noise held fixed: 0 for loc, -1 for each log scale.
- ``"stl"``: "sticking the landing" (Roeder, Wu and Duvenaud, NeurIPS 2017): loc and scale inside
  log q are detached, so its gradient flows through z alone. No variance where q is exact.
- ``"entropy"``: log q is replaced by its mean, minus the entropy; the same gradients as pathwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastsvi.kernels import dispatch, double_backward, philox, transforms
from fastsvi.kernels.scale_maps import (
    SCALE_MAPS,
    ScaleMap,
    log_scale_of,
    log_scale_slope,
    scale_of,
    scale_slope,
)
from fastsvi.kernels.segment_table import SegmentTable

Estimator = Literal["pathwise", "stl", "entropy"]

ESTIMATORS: tuple[str, ...] = get_args(Estimator)

_Options = tuple[int, ScaleMap, Estimator]  # number of particles, ...

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# Sums of more terms than this are accumulated in float64: float32 would drift.
_LONG_SUM = 4096


# -------------------------------------------------------------------------------- torch reference


def sum_elements(x: Tensor) -> Tensor:
    """Sum over the last axis; long sums come back in float64."""
    return x.sum(-1, dtype=torch.float64) if x.shape[-1] > _LONG_SUM else x.sum(-1)


def _forward_reference(
    loc: Tensor, raw_scale: Tensor, noise: Tensor, scale_map: ScaleMap, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    scale = scale_of(raw_scale, scale_map)
    z = torch.addcmul(loc.unsqueeze(1), scale.unsqueeze(1), noise)  # [F, P, D]
    log_scale = sum_elements(log_scale_of(raw_scale, scale, scale_map)).unsqueeze(1)  # [F, 1]
    constant = loc.shape[-1] * _HALF_LOG_2PI
    if estimator == "entropy":
        negative_entropy = -(constant + 0.5 * loc.shape[-1]) - log_scale
        log_q = negative_entropy.to(z.dtype).expand(z.shape[:-1]).contiguous()
    else:
        squares = sum_elements(noise * noise)  # [F, P]
        log_q = (-constant - torch.add(log_scale, squares, alpha=0.5)).to(z.dtype)
    return z, log_q


def backward_reference(
    raw_scale: Tensor,
    noise: Tensor,
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    scale_map: ScaleMap,
    estimator: Estimator,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of loc and raw_scale, both [F, D], summed over particles."""
    scale = scale_of(raw_scale, scale_map)
    slope = scale_slope(raw_scale, scale, scale_map)
    if grad_log_q is not None and estimator == "stl":
        through_z = (grad_log_q.unsqueeze(-1) * noise) / scale.unsqueeze(1)
        grad_z = -through_z if grad_z is None else grad_z - through_z
        grad_log_q = None
    grad_loc = grad_raw = entropy = None
    # In an order in which few tensors are alive at once, for wide models.
    if grad_log_q is not None:
        entropy = grad_log_q.sum(1, keepdim=True)  # [F, 1]
        log_slope = log_scale_slope(raw_scale, scale, slope, scale_map)
        entropy = entropy.expand_as(raw_scale) if log_slope is None else entropy * log_slope
        del log_slope
    del scale
    if grad_z is not None:
        grad_loc = _over_particles(grad_z)
        grad_raw = _over_particles(grad_z * noise)
        grad_raw = grad_raw if slope is None else grad_raw * slope
    if entropy is not None:
        grad_raw = -entropy if grad_raw is None else grad_raw - entropy
    return grad_loc, grad_raw


def _over_particles(x: Tensor) -> Tensor:
    """Sum of [F, P, D] over P; of one particle without a copy."""
    return x.squeeze(1) if x.shape[1] == 1 else x.sum(1)


def draw_noise(raw_scale: Tensor, key: Tensor, origin: Tensor, num_particles: int) -> Tensor:
    fits, elements = raw_scale.shape
    counts = (fits, num_particles, elements)
    return philox.draw_reference(key, origin, None, *counts, philox.NORMAL, raw_scale.dtype)


class _Sample(torch.autograd.Function):
    """The torch form. Its body is plain operations, which vmap and captures see through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        loc: Tensor,
        raw_scale: Tensor,
        key: Tensor,
        origin: Tensor,
        noise: Tensor | None,
        num_particles: int,
        scale_map: ScaleMap,
        estimator: Estimator,
    ) -> tuple[Tensor, Tensor]:
        if noise is None:
            noise = draw_noise(raw_scale, key, origin, num_particles)
        return _forward_reference(loc, raw_scale, noise, scale_map, estimator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, raw_scale, key, origin, noise, *ctx.options = inputs
        ctx.save_for_backward(raw_scale, key, origin, noise)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raw_scale, key, origin, noise = ctx.saved_tensors
        num_particles, scale_map, estimator = ctx.options
        if noise is None:
            noise = draw_noise(raw_scale, key, origin, num_particles)
        grad_z, grad_log_q = grads
        grad_loc, grad_raw = backward_reference(
            raw_scale, noise, grad_z, grad_log_q, scale_map, estimator
        )
        return grad_loc, grad_raw, None, None, None, None, None, None


def _sample_reference(
    loc: Tensor,
    raw_scale: Tensor,
    key: Tensor,
    origin: Tensor,
    noise: Tensor | None,
    table: SegmentTable | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Value, log q and, if there is a table, log|det|."""
    z, log_q = _Sample.apply(loc, raw_scale, key, origin, noise, *options)
    if table is None:
        return z, log_q, None
    y, log_dets = transforms.constrain_with_log_det(z, table)
    return y, log_q, log_dets.sum(-1)


# ------------------------------------------------------------------------- autograd, registration
#
# The Triton forms as operations of torch. They take a batch axis B in front of the fits, which only
# vmap uses: each batch has its own key and origin, or all share one. ``table`` is empty, or the
# segment of each element [D] and kind, shift and scale of each segment [S].


@torch.library.custom_op("fastsvi::normal_forward", mutates_args=())
def _forward_op(
    loc: Tensor,  # [B, F, D]
    raw_scale: Tensor,  # [B, F, D]
    key: Tensor,  # [B or 1, 2]
    origin: Tensor,  # [B or 1, 4]
    noise: Tensor | None,  # [B, F, P, D]
    table: Sequence[Tensor],
    kinds: int,
    num_particles: int,
    scale_map: str,
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options: Any = (num_particles, scale_map, estimator)
    if not dispatch.runs_triton(loc.device):
        tensors = (loc, raw_scale, key, origin, noise)
        value, log_q, log_det = _by_batch(_forward_batch, tensors, table, options)
        return value, log_q, log_det if len(table) else loc.new_empty(0)
    from fastsvi.kernels.triton import normal as kernels

    return kernels.forward(loc, raw_scale, key, origin, noise, table, kinds, *options)


@_forward_op.register_fake
def _(loc: Tensor, raw_scale: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, table, _, num_particles, _, _ = args
    batches, fits, elements = loc.shape
    log_q = loc.new_empty((batches, fits, num_particles))
    value = loc.new_empty((batches, fits, num_particles, elements))
    return value, log_q, loc.new_empty(log_q.shape if len(table) else (0,))


@torch.library.custom_op("fastsvi::normal_backward", mutates_args=())
def _backward_op(
    loc: Tensor,  # [B, F, D]
    raw_scale: Tensor,  # [B, F, D]
    key: Tensor,  # [B or 1, 2]
    origin: Tensor,  # [B or 1, 4]
    noise: Tensor | None,  # [B, F, P, D]
    grad_value: Tensor | None,  # [B, F, P, D]
    grad_log_q: Tensor | None,  # [B, F, P]
    grad_log_det: Tensor | None,  # [B, F, P]
    table: Sequence[Tensor],
    kinds: int,
    num_particles: int,
    scale_map: str,
    estimator: str,
) -> tuple[Tensor, Tensor]:
    options: Any = (num_particles, scale_map, estimator)
    tensors = (loc, raw_scale, key, origin, noise)
    grads = (grad_value, grad_log_q, grad_log_det)
    if not dispatch.runs_triton(loc.device):
        return _by_batch(_backward_batch, (*tensors, *grads), table, options)
    from fastsvi.kernels.triton import normal_backward as kernels

    return kernels.backward(*tensors, table, kinds, *grads, *options)


@_backward_op.register_fake
def _(loc: Tensor, raw_scale: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return loc.new_empty(loc.shape), loc.new_empty(loc.shape)


# The same in torch: for second derivatives, and for graphs that were captured on a GPU and are run
# on a CPU. A call on a CPU never comes here.


def _by_batch(
    function: Any, tensors: tuple[Tensor | None, ...], table: Sequence[Tensor], options: _Options
) -> Any:
    batches = max(x.shape[0] for x in tensors if x is not None)
    every = [None if x is None else x.expand(batches, *x.shape[1:]) for x in tensors]
    rows = [
        function(*(None if x is None else x[b] for x in every), table, *options)
        for b in range(batches)
    ]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _forward_batch(loc: Tensor, raw_scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
    key, origin, noise, table, num_particles, *maps = args
    noise = draw_noise(raw_scale, key, origin, num_particles) if noise is None else noise
    z, log_q = _forward_reference(loc, raw_scale, noise, *maps)
    if not table:
        return z, log_q, loc.new_empty(0)
    ids, *of_segments = table
    y, log_slope = transforms.by_element(z, *(x[ids] for x in of_segments))
    return y, log_q, log_slope.sum(-1)


def _backward_batch(loc: Tensor, raw_scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
    key, origin, noise, grad, grad_log_q, grad_log_det, table, num_particles, *maps = args
    noise = draw_noise(raw_scale, key, origin, num_particles) if noise is None else noise
    if table and (grad is not None or grad_log_det is not None):
        z, _ = _forward_reference(loc, raw_scale, noise, *maps)
        ids, kinds, _, scale = table
        slope, log_slope = transforms.slopes_by_element(z, kinds[ids], scale[ids])
        through_y = 0.0 if grad is None else grad * slope
        through_det = 0.0 if grad_log_det is None else grad_log_det.unsqueeze(-1) * log_slope
        grad = through_y + through_det
    grads = backward_reference(raw_scale, noise, grad, grad_log_q, *maps)
    return tuple(torch.zeros_like(loc) if grad is None else grad for grad in grads)


def _backward_twin(*args: Any) -> tuple[Tensor, ...]:
    *tensors, table, _, num_particles, scale_map, estimator = args
    options = (num_particles, scale_map, estimator)
    return tuple(_by_batch(_backward_batch, tuple(tensors), table, options))


double_backward.register(_backward_op, _backward_twin)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, table, kinds, num_particles, scale_map, estimator = inputs
    ctx.save_for_backward(*tensors, *table)
    ctx.options = (kinds, num_particles, scale_map, estimator)
    ctx.set_materialize_grads(False)


def _forward_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    loc, raw_scale, key, origin, noise, *table = ctx.saved_tensors
    if not table:
        grads = (*grads[:2], None)
    grad_loc = grad_raw = None
    if any(grad is not None for grad in grads):
        grad_loc, grad_raw = _backward_op(
            loc, raw_scale, key, origin, noise, *grads, table, *ctx.options
        )
    return grad_loc, grad_raw, None, None, None, [None] * len(table), None, None, None, None


_forward_op.register_autograd(_forward_autograd, setup_context=_forward_context)


def _batched(op: Any, num_tensors: int) -> Any:
    """vmap rule: fold vmap's axis into the batch axis of the first ``num_tensors`` arguments."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        tensors, options = args[:num_tensors], args[num_tensors:]
        dims = in_dims[:num_tensors]
        inner = philox.batches_of(tensors, dims)
        total = info.batch_size * inner
        folded = [
            x if x is None else philox.fold_batch(x, dim, info.batch_size, inner)
            for x, dim in zip(tensors, dims, strict=True)
        ]
        # Key and origin may stay alone for all batches; the others may not.
        for i, x in enumerate(folded):
            if i not in (2, 3) and x is not None:
                folded[i] = x.expand(total, *x.shape[1:])
        results = op(*folded, *options)
        # The log-determinant is empty, without a batch axis, where there is no table.
        return tuple(
            x.unflatten(0, (info.batch_size, inner)) if x.dim() > 1 else x for x in results
        ), tuple(0 if x.dim() > 1 else None for x in results)

    return rule


_forward_op.register_vmap(_batched(_forward_op, 5))
_backward_op.register_vmap(_batched(_backward_op, 8))


# ------------------------------------------------------------------------------- public functions


def sample(
    loc: Tensor,
    raw_scale: Tensor,
    key: Tensor,
    origin: Tensor,
    num_particles: int,
    scale_map: ScaleMap = "exp",
    estimator: Estimator = "pathwise",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples of a mean-field normal and their log density.

    Args:
        loc: ``[F, D]``.
        raw_scale: ``[F, D]``, unconstrained.
        key, origin: see :mod:`philox`; the noise of particle ``p`` of fit ``f`` has these
            coordinates added to the origin's.
        num_particles: ``P``.
        scale_map: scale = exp(raw_scale), softplus(raw_scale), or raw_scale as it is.
        estimator: what the gradient of log q is; see the head of this file.
        noise: ``[F, P, D]``, used in place of the drawn numbers if given.

    Returns:
        z ``[F, P, D]`` and log q ``[F, P]``, differentiable in loc and raw_scale.

    Raises:
        KernelError: shapes, dtypes or devices disagree, or an option is unknown.

    >>> loc, raw_scale = torch.zeros(1, 3), torch.zeros(1, 3)
    >>> z, log_q = sample(loc, raw_scale, philox.derive_key(0, 0), philox.make_origin(), 4)
    >>> expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    >>> torch.allclose(log_q, expected)
    True
    """
    options: Any = (num_particles, scale_map, estimator)
    z, log_q, _ = _sample("normal.sample", loc, raw_scale, key, origin, noise, None, options)
    return z, log_q


def sample_constrained(
    loc: Tensor,
    raw_scale: Tensor,
    key: Tensor,
    origin: Tensor,
    num_particles: int,
    table: SegmentTable,
    scale_map: ScaleMap = "exp",
    estimator: Estimator = "pathwise",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples as :func:`sample` draws them, in constrained space.

    Args:
        table: the constraint of each of the ``D`` elements; the other arguments are those of
            :func:`sample`.

    Returns:
        y ``[F, P, D]``, constrained; log q ``[F, P]`` of the unconstrained z, as from
        :func:`sample`; and log|det dy/dz| ``[F, P]``. The density of y is ``log_q - log_det``.

    Raises:
        KernelError: as :func:`sample`, or the table is for another number of elements or dtype.

    >>> from fastsvi.kernels.segment_table import EXP, IDENTITY
    >>> table = SegmentTable.build([IDENTITY, EXP], [2, 1])
    >>> at = philox.derive_key(0, 0), philox.make_origin()
    >>> y, log_q, log_det = sample_constrained(torch.zeros(1, 3), torch.zeros(1, 3), *at, 4, table)
    >>> torch.allclose(log_det, y[..., 2].log(), atol=1e-6)
    True
    """
    op = "normal.sample_constrained"
    if table.num_elements != loc.shape[-1] or table.shift.dtype != loc.dtype:
        raise dispatch.error(
            op, "the table must be for the elements and the dtype of loc", table=table, loc=loc
        )
    options: Any = (num_particles, scale_map, estimator)
    y, log_q, log_det = _sample(op, loc, raw_scale, key, origin, noise, table, options)
    return y, log_q, torch.zeros_like(log_q) if log_det is None else log_det


def _sample(
    op: str,
    loc: Tensor,
    raw_scale: Tensor,
    key: Tensor,
    origin: Tensor,
    noise: Tensor | None,
    table: SegmentTable | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    check(op, loc, raw_scale, *options, noise)
    philox.check(op, key, origin)
    if table is not None and table.is_identity:
        table = None
    if dispatch.choose(op, loc, raw_scale, key, origin) == "torch":
        return _sample_reference(loc, raw_scale, key, origin, noise, table, options)
    tensors, kinds = [], 0
    if table is not None:
        tensors = [table.segments.ids, table.kinds, table.shift, table.scale]
        kinds = table.kinds_in_use
    batch = (x if x is None else x[None] for x in (loc, raw_scale, key, origin, noise))
    value, log_q, log_det = _forward_op(*batch, tensors, kinds, *options)
    # Not by an index, whose backward pass would write everything into zeros.
    return value.squeeze(0), log_q.squeeze(0), None if table is None else log_det.squeeze(0)


def check(
    op: str,
    loc: Tensor,
    raw_scale: Tensor,
    num_particles: int,
    scale_map: str,
    estimator: str,
    noise: Tensor | None,
) -> None:
    if loc.dim() != 2 or loc.shape != raw_scale.shape:
        raise dispatch.error(
            op, "loc and raw_scale must both be [F, D]", loc=loc, raw_scale=raw_scale
        )
    if loc.dtype != raw_scale.dtype or loc.dtype not in (torch.float32, torch.float64):
        raise dispatch.error(
            op,
            "loc and raw_scale must share a dtype, float32 or float64",
            loc=loc,
            raw_scale=raw_scale,
        )
    if num_particles < 0:
        raise dispatch.error(op, "a count is negative", num_particles=num_particles)
    if scale_map not in SCALE_MAPS:
        raise dispatch.error(op, f"scale_map is one of {SCALE_MAPS}", scale_map=scale_map)
    if estimator not in ESTIMATORS:
        raise dispatch.error(op, f"estimator is one of {ESTIMATORS}", estimator=estimator)
    if noise is not None:
        fits, elements = loc.shape
        expected = (fits, num_particles, elements)
        if noise.shape != expected or noise.dtype != loc.dtype or noise.device != loc.device:
            raise dispatch.error(op, f"noise must be {expected} and like loc", noise=noise, loc=loc)
