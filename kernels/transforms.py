"""Elementwise constraints of a whole flat buffer at once: unconstrained <-> constrained.

Every elementwise constraint is ``y = shift + scale * f(x)`` with one of four functions ``f``; a
:class:`~fastsvi.kernels.segment_table.SegmentTable` says which of them each segment has. The values
agree with ``torch.distributions.transform_to``: in particular the sigmoid keeps away from exactly 0
and 1 as torch's does, by the smallest normal number below and by one ``eps`` above. Its gradient
there is the true one all the same (torch's is 0), so a parameter that ran into a bound can return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsvi.kernels import dispatch, double_backward
from fastsvi.kernels.segment_table import (
    EXP,
    IDENTITY,
    SIGMOID,
    SOFTPLUS,
    Kind,
    Plan,
    Run,
    SegmentTable,
)

__all__ = [
    "EXP", "IDENTITY", "SIGMOID", "SOFTPLUS", "Kind", "SegmentTable",
    "constrain", "constrain_with_log_det", "unconstrain",
]  # fmt: skip

# ---------------------------------------------------------------------------------------- constants

# softplus(x) is x to rounding from here on, in float64 too. torch's default of 20 is right for
# float32 only: it is off by 2e-9 in float64.
_SOFTPLUS_LINEAR = 40.0

# ---------------------------------------------------------------------------------- torch reference


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid inside (0, 1), with a derivative that keeps its digits in both tails.

    torch's backward is ``y * (1 - y)``, which in float32 has lost every digit at x = 16. From the
    smaller tail it is exact. The clip is added as a constant, so that it stops no gradient.
    """
    y = torch.where(x < 0, torch.sigmoid(x), 1.0 - torch.sigmoid(-x))
    info = torch.finfo(x.dtype)
    value = y.detach()
    return y + (value.clamp(min=info.tiny, max=1.0 - info.eps) - value)


def _forward(kind: Kind, x: Tensor) -> Tensor:
    if kind == EXP:
        return x.exp()
    if kind == SOFTPLUS:
        return F.softplus(x, threshold=_SOFTPLUS_LINEAR)
    if kind == SIGMOID:
        return _sigmoid(x)
    return x


def _log_derivative(kind: Kind, x: Tensor) -> Tensor:
    if kind == EXP:
        return x
    if kind == SOFTPLUS:
        return F.logsigmoid(x)
    if kind == SIGMOID:
        return F.logsigmoid(x) + F.logsigmoid(-x)
    return torch.zeros_like(x)


def _inverse(kind: Kind, u: Tensor) -> Tensor:
    if kind == EXP:
        return u.log()
    if kind == SOFTPLUS:
        # log(exp(u) - 1) without the overflow for large u nor the cancellation for tiny u.
        return u + torch.log(-torch.expm1(-u))
    if kind == SIGMOID:
        info = torch.finfo(u.dtype)
        u = u.clamp(min=info.tiny, max=1.0 - info.eps)
        return u.log() - torch.log1p(-u)
    return u


def _pieces(x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    if plan.order is not None:
        x = x.index_select(-1, plan.order)
    return x.split(plan.sizes, -1) if len(plan.runs) > 1 else (x,)


def _join(pieces: list[Tensor], plan: Plan) -> Tensor:
    whole = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]
    return whole if plan.inverse is None else whole.index_select(-1, plan.inverse)


def _constrain_piece(run: Run, x: Tensor) -> Tensor:
    y = _forward(run.kind, x)
    if run.affine is None:
        return y
    shift, scale = run.affine
    return torch.addcmul(shift, scale, y)


def _constrain_reference(x: Tensor, table: SegmentTable) -> Tensor:
    plan = table.plan
    pieces = [_constrain_piece(run, x) for run, x in zip(plan.runs, _pieces(x, plan), strict=True)]
    return _join(pieces, plan)


def _log_det_reference(x: Tensor, table: SegmentTable) -> Tensor:
    plan = table.plan
    pieces = [
        _log_derivative(run.kind, x) for run, x in zip(plan.runs, _pieces(x, plan), strict=True)
    ]
    log_det = table.segments.sum(_join(pieces, plan))
    return log_det if table.log_scale is None else log_det + table.log_scale


def _unconstrain_reference(y: Tensor, table: SegmentTable) -> Tensor:
    plan = table.plan
    pieces = []
    for run, piece in zip(plan.runs, _pieces(y, plan), strict=True):
        if run.affine is not None:
            shift, scale = run.affine
            piece = (piece - shift) / scale
        pieces.append(_inverse(run.kind, piece))
    return _join(pieces, plan)


def by_element(
    x: Tensor,  # [..., N]
    kinds: Tensor,  # [N]; so are the others
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Constrained values and log|dy/dx|, both ``[..., N]``, where only tensors tell the kinds.

    Each function is evaluated for every element, away from what would overflow: slow but traceable.
    """
    y, log_slope = x, scale.abs().log().expand_as(x)
    for kind in (EXP, SOFTPLUS, SIGMOID):
        chosen = kinds == kind
        own = torch.where(chosen, x, 0.0)
        y = torch.where(chosen, _forward(kind, own), y)
        log_slope = log_slope + torch.where(chosen, _log_derivative(kind, own), 0.0)
    return torch.addcmul(shift, scale, y), log_slope


def slopes_by_element(x: Tensor, kinds: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of both results of :func:`by_element`."""
    one, above, below = torch.ones_like(x), torch.sigmoid(x), torch.sigmoid(-x)
    slope, log_slope = one, torch.zeros_like(x)
    for kind, own, log_own in (
        (EXP, torch.where(kinds == EXP, x, 0.0).exp(), one),
        (SOFTPLUS, above, below),
        (SIGMOID, above * below, below - above),
    ):
        chosen = kinds == kind
        slope = torch.where(chosen, own, slope)
        log_slope = torch.where(chosen, log_own, log_slope)
    return scale * slope, log_slope


# ------------------------------------------------------------------------------------- registration
#
# The Triton form, as operations that eager code, vmap, captures and Inductor all know. ``table`` is
# the tensors of a SegmentTable: an operation takes no Python objects.


@torch.library.custom_op("fastsvi::constrain", mutates_args=())
def _constrain_op(
    x: Tensor,  # [..., N]
    kinds: Tensor,
    shift: Tensor,
    scale: Tensor,
    chunks: Tensor,
    chunk_offsets: Tensor,
    with_log_det: bool,
) -> tuple[Tensor, Tensor]:
    from fastsvi.kernels.triton import transforms as kernels

    return kernels.constrain(x, kinds, shift, scale, chunks, chunk_offsets, with_log_det)


@_constrain_op.register_fake
def _(x: Tensor, kinds: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    num_segments = kinds.shape[0] if args[-1] else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((*x.shape[:-1], num_segments))


@torch.library.custom_op("fastsvi::constrain_backward", mutates_args=())
def _constrain_backward_op(
    grad_y: Tensor | None,  # [..., N]
    grad_log_det: Tensor | None,  # [..., S]
    x: Tensor,  # [..., N]
    kinds: Tensor,
    shift: Tensor,
    scale: Tensor,
    chunks: Tensor,
) -> Tensor:
    from fastsvi.kernels.triton import transforms as kernels

    return kernels.transform(
        "constrain_backward", x, grad_y, grad_log_det, None, kinds, shift, scale, chunks
    )


@torch.library.custom_op("fastsvi::unconstrain", mutates_args=())
def _unconstrain_op(
    y: Tensor, kinds: Tensor, shift: Tensor, scale: Tensor, chunks: Tensor
) -> Tensor:
    from fastsvi.kernels.triton import transforms as kernels

    return kernels.transform("unconstrain", y, None, None, None, kinds, shift, scale, chunks)


@torch.library.custom_op("fastsvi::unconstrain_backward", mutates_args=())
def _unconstrain_backward_op(
    grad: Tensor, y: Tensor, kinds: Tensor, shift: Tensor, scale: Tensor, chunks: Tensor
) -> Tensor:
    from fastsvi.kernels.triton import transforms as kernels

    return kernels.transform(
        "unconstrain_backward", y, grad, None, None, kinds, shift, scale, chunks
    )


def _like(position: int) -> Any:
    """Shape rule of an operation whose result is like one of its arguments."""

    def rule(*args: Any) -> Tensor:
        return torch.empty_like(args[position], memory_format=torch.contiguous_format)

    return rule


_constrain_backward_op.register_fake(_like(2))
_unconstrain_op.register_fake(_like(0))
_unconstrain_backward_op.register_fake(_like(0))


def _constrain_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, kinds, shift, scale, chunks, _, ctx.with_log_det = inputs
    ctx.save_for_backward(x, kinds, shift, scale, chunks)
    ctx.set_materialize_grads(False)


def _constrain_autograd(ctx: Any, grad_y: Tensor | None, grad_log_det: Tensor | None) -> Any:
    if not ctx.with_log_det:
        grad_log_det = None
    rest = (None,) * 6
    if grad_y is None and grad_log_det is None:
        return None, *rest
    return _constrain_backward_op(grad_y, grad_log_det, *ctx.saved_tensors), *rest


def _unconstrain_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _unconstrain_autograd(ctx: Any, grad: Tensor) -> Any:
    return _unconstrain_backward_op(grad, *ctx.saved_tensors), None, None, None, None


_constrain_op.register_autograd(_constrain_autograd, setup_context=_constrain_context)
_unconstrain_op.register_autograd(_unconstrain_autograd, setup_context=_unconstrain_context)


def _segment_ids(chunks: Tensor, num_elements: int) -> Tensor:
    """Segment of each element ``[N]``, from the chunks."""
    counts = chunks[:, 2] - chunks[:, 1]
    return torch.repeat_interleave(chunks[:, 0], counts, output_size=num_elements)


def _constrain_backward_twin(
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    kinds: Tensor,
    shift: Tensor,
    scale: Tensor,
    chunks: Tensor,
) -> Sequence[Tensor]:
    ids = _segment_ids(chunks, x.shape[-1])
    slope, log_slope = slopes_by_element(x, kinds[ids], scale[ids])
    grad = torch.zeros_like(x) if grad_y is None else grad_y * slope
    if grad_log_det is not None:
        grad = grad + grad_log_det.index_select(-1, ids) * log_slope
    return [grad]


def _unconstrain_backward_twin(
    grad: Tensor, y: Tensor, kinds: Tensor, shift: Tensor, scale: Tensor, chunks: Tensor
) -> Sequence[Tensor]:
    ids = _segment_ids(chunks, y.shape[-1])
    y = double_backward.as_leaf(y)
    u = (y - shift[ids]) / scale[ids]
    x = u
    for kind in (EXP, SOFTPLUS, SIGMOID):
        chosen = kinds[ids] == kind
        x = torch.where(chosen, _inverse(kind, torch.where(chosen, u, 0.5)), x)
    return double_backward.pull_back([x], [grad], [y])


double_backward.register(_constrain_backward_op, _constrain_backward_twin)
double_backward.register(_unconstrain_backward_op, _unconstrain_backward_twin)


def _batched(num_buffers: int, op: Any) -> Any:
    """vmap rule: the operations take leading dimensions, so the batch becomes one of them."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        buffers = [
            arg
            if arg is None
            else arg.expand(info.batch_size, *arg.shape)
            if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args[:num_buffers], in_dims, strict=False)
        ]
        result = op(*buffers, *args[num_buffers:])
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    return rule


_constrain_op.register_vmap(_batched(1, _constrain_op))
_constrain_backward_op.register_vmap(_batched(3, _constrain_backward_op))
_unconstrain_op.register_vmap(_batched(1, _unconstrain_op))
_unconstrain_backward_op.register_vmap(_batched(2, _unconstrain_backward_op))


# --------------------------------------------------------------------------------- public functions


def constrain(x: Tensor, table: SegmentTable) -> Tensor:
    """Unconstrained buffer ``[..., N]`` to constrained values ``[..., N]``.

    Differentiable in ``x``; works under ``torch.func.vmap`` and ``make_fx``. A buffer of identity
    segments only is returned as it is, not copied. NaN stays NaN in its own element; infinities
    map to the bounds.

    Raises:
        KernelError: the last dimension or the dtype of ``x`` is not the table's.

    >>> table = SegmentTable.build([EXP, SIGMOID], [1, 1], shifts=[0.0, -1.0], scales=[1.0, 2.0])
    >>> constrain(torch.zeros(2), table)
    tensor([1., 0.])
    """
    form = _check("transforms.constrain", x, table)
    if _nothing_to_do(table):
        return x
    if form == "torch":
        return _constrain_reference(x, table)
    y, _ = _constrain_op(x, *table.tensors, table.segments.chunk_offsets, False)
    return y


def constrain_with_log_det(x: Tensor, table: SegmentTable) -> tuple[Tensor, Tensor]:
    """Constrained values ``[..., N]`` and ``log|det dy/dx|`` summed per segment, ``[..., S]``.

    The same conditions as for :func:`constrain` hold.

    >>> table = SegmentTable.build([EXP, IDENTITY], [2, 3])
    >>> constrain_with_log_det(torch.ones(5), table)[1]
    tensor([2., 0.])
    """
    form = _check("transforms.constrain_with_log_det", x, table)
    if _nothing_to_do(table):
        return x, x.new_zeros((*x.shape[:-1], len(table)))
    if form == "torch":
        return _constrain_reference(x, table), _log_det_reference(x, table)
    y, log_det = _constrain_op(x, *table.tensors, table.segments.chunk_offsets, True)
    return y, log_det


def unconstrain(y: Tensor, table: SegmentTable) -> Tensor:
    """Constrained values ``[..., N]`` back to the unconstrained buffer ``[..., N]``.

    Values are taken as they are; whether they satisfy their constraint is for the caller to check.
    On a bound, ``EXP`` and ``SOFTPLUS`` give ``-inf``; ``SIGMOID`` gives the finite value of the
    nearest number inside, and takes what lies outside as lying on the bound, as torch does.

    Raises:
        KernelError: the last dimension or the dtype of ``y`` is not the table's.

    >>> table = SegmentTable.build([EXP], [1], shifts=[3.0], scales=[-1.0])  # less_than(3)
    >>> unconstrain(torch.tensor([2.0]), table)
    tensor([0.])
    """
    form = _check("transforms.unconstrain", y, table)
    if _nothing_to_do(table):
        return y
    if form == "torch":
        return _unconstrain_reference(y, table)
    return _unconstrain_op(y, *table.tensors)


def _nothing_to_do(table: SegmentTable) -> bool:
    return table.is_identity or table.num_elements == 0


def _check(op: str, x: Tensor, table: SegmentTable) -> str:
    """Check the arguments and return the back end."""
    if x.dim() == 0 or x.shape[-1] != table.num_elements:
        raise dispatch.error(
            op,
            f"the last dimension must be the {table.num_elements} elements of {table!r}; "
            "rebuild the table after the layout has changed",
            buffer=x,
        )
    if x.dtype is not table.scale.dtype:
        raise dispatch.error(
            op,
            f"the table was built for {table.scale.dtype}; build it with the buffer's dtype",
            buffer=x,
        )
    return dispatch.choose(op, x, table.scale)
