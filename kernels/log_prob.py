"""Log-densities of the common families, summed over event dimensions in one pass.

Every family is one entry of :data:`FAMILIES`, an elementwise formula; one skeleton takes care of
numbers, dtypes, broadcasting and sums. Each gradient has the shape of its argument.

The formulas are arranged so that nothing overflows on the way to a finite result, forward or
backward: no squared scale (torch squares it and returns NaN for a float32 scale below 1e-23), no
difference of two large gamma functions where a series gives the digits. In each ``where`` the
branch that is not taken gets a harmless argument, for 0 * inf would be NaN in the backward pass.

Sums are torch's pairwise sums. Over n float32 terms their error is at most about
``eps * log2(n) / 2 * sum|terms|``: 2e-6 of that sum for n = 1e8, where a running sum has stopped
growing long before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsvi.kernels import dispatch, double_backward

_Number = Tensor | float

# ---------------------------------------------------------------------------------------- constants

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_LOG_PI = math.log(math.pi)
_LOG_2 = math.log(2.0)

# From here on the series for lgamma(a + 1/2) - lgamma(a) has all its digits in float64.
_SERIES_FROM = 16.0


class Family(NamedTuple):
    """A family: the names of its parameters, and its elementwise log-density (value, *params)."""

    params: tuple[str, ...]
    log_density: Callable[..., Tensor]


# ---------------------------------------------------------------------------------- torch reference


def _log1p_square(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``log(1 + t^2)`` of ``t = numerator / denominator``, where ``t^2`` may overflow.

    From ``1 / sqrt(eps)`` on this is ``2 log|t|`` to rounding; the logarithm of each is then taken
    by itself, for the derivative of the quotient would overflow too.
    """
    size = numerator.abs()
    small = size < torch.finfo(size.dtype).eps ** -0.5 * denominator
    t = torch.where(small, numerator, 0.0) / torch.where(small, denominator, 1.0)
    log_t = torch.where(small, 1.0, size).log() - torch.where(small, 1.0, denominator).log()
    return t.square().log1p() + 2.0 * log_t


def _lgamma_half_step(a: Tensor) -> Tensor:
    """``lgamma(a + 1/2) - lgamma(a)``, whose terms cancel for large a."""
    large = a.clamp(min=_SERIES_FROM)
    r = large.reciprocal()
    s = r * r
    tail = 1 / 8 - s * (1 / 192 - s * (1 / 640 - s * (17 / 14336 - s * (31 / 18432))))
    series = 0.5 * large.log() - r * tail
    return torch.where(a < _SERIES_FROM, torch.lgamma(a + 0.5) - torch.lgamma(a), series)


def _on_half_line(value: Tensor, inside: Tensor) -> Tensor:
    # Asked this way round, a NaN value stays NaN.
    return torch.where(value < 0, -math.inf, inside)


def _normal(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    z = (value - loc) / scale
    return -torch.addcmul(scale.log() + _HALF_LOG_2PI, z, z, value=0.5)


def _bernoulli_logits(value: Tensor, logits: Tensor) -> Tensor:
    # value * logits - softplus(logits) would cancel for a large positive logit and value 1.
    return value * F.logsigmoid(logits) + (1.0 - value) * F.logsigmoid(-logits)


def _poisson(value: Tensor, rate: Tensor) -> Tensor:
    return torch.xlogy(value, rate) - rate - torch.lgamma(value + 1.0)


def _student_t(value: Tensor, df: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    log1p_square = _log1p_square(value - loc, scale * df.sqrt())
    normalizer = _lgamma_half_step(0.5 * df) - 0.5 * (df.log() + _LOG_PI) - scale.log()
    return normalizer - 0.5 * (df + 1.0) * log1p_square


def _log_normal(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    # -z^2/2 - log(value) with log(value) = loc + z * scale put in: -inf and not NaN at value 0.
    z = (value.log() - loc) / scale
    return -z * (0.5 * z + scale) - loc - scale.log() - _HALF_LOG_2PI


def _half_normal(value: Tensor, scale: Tensor) -> Tensor:
    z = value.clamp(min=0.0) / scale
    offset = scale.log() + (_HALF_LOG_2PI - _LOG_2)
    return _on_half_line(value, -torch.addcmul(offset, z, z, value=0.5))


def _half_cauchy(value: Tensor, scale: Tensor) -> Tensor:
    offset = scale.log() + (_LOG_PI - _LOG_2)
    return _on_half_line(value, -(offset + _log1p_square(value, scale)))


def _gamma(value: Tensor, concentration: Tensor, rate: Tensor) -> Tensor:
    powers = torch.xlogy(concentration, rate) + torch.xlogy(concentration - 1.0, value)
    return powers - rate * value - torch.lgamma(concentration)


def _beta(value: Tensor, concentration1: Tensor, concentration0: Tensor) -> Tensor:
    powers = torch.xlogy(concentration1 - 1.0, value)
    powers = powers + torch.special.xlog1py(concentration0 - 1.0, -value)
    normalizer = torch.lgamma(concentration1) + torch.lgamma(concentration0)
    return powers + torch.lgamma(concentration1 + concentration0) - normalizer


FAMILIES: dict[str, Family] = {
    "normal": Family(("loc", "scale"), _normal),
    "bernoulli_logits": Family(("logits",), _bernoulli_logits),
    "poisson": Family(("rate",), _poisson),
    "student_t": Family(("df", "loc", "scale"), _student_t),
    "log_normal": Family(("loc", "scale"), _log_normal),
    "half_normal": Family(("scale",), _half_normal),
    "half_cauchy": Family(("scale",), _half_cauchy),
    "gamma": Family(("concentration", "rate"), _gamma),
    "beta": Family(("concentration1", "concentration0"), _beta),
}


# ------------------------------------------------------------------------------------- registration


@torch.library.custom_op("fastsvi::log_prob", mutates_args=())
def _log_prob_op(
    family: str, value: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None, event_ndims: int
) -> Tensor:
    from fastsvi.kernels.triton import log_prob as kernels

    args = [arg for arg in (value, a, b, c) if arg is not None]
    return kernels.forward(family, args, event_ndims)


@_log_prob_op.register_fake
def _(family: str, *args: Any) -> Tensor:
    *tensors, event_ndims = args
    given = [arg for arg in tensors if arg is not None]
    shape = torch.broadcast_shapes(*(arg.shape for arg in given))
    return given[0].new_empty(shape[: len(shape) - event_ndims])


@torch.library.custom_op("fastsvi::log_prob_backward", mutates_args=())
def _log_prob_backward_op(
    family: str,
    grad: Tensor,  # [*batch]
    value: Tensor,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    event_ndims: int,
    wanted: int,  # bit i: the gradient of argument i
) -> list[Tensor]:
    from fastsvi.kernels.triton import log_prob as kernels

    args = [arg for arg in (value, a, b, c) if arg is not None]
    return kernels.backward(family, grad, args, event_ndims, _bits(wanted, len(args)))


@_log_prob_backward_op.register_fake
def _(family: str, grad: Tensor, *args: Any) -> list[Tensor]:
    *tensors, _, wanted = args
    given = [arg for arg in tensors if arg is not None]
    asked = zip(given, _bits(wanted, len(given)), strict=True)
    return [arg.new_empty(arg.shape) for arg, want in asked if want]


def _bits(number: int, count: int) -> list[bool]:
    return [bool(number >> i & 1) for i in range(count)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.family, *args, ctx.event_ndims = inputs
    ctx.save_for_backward(*args)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    needs = ctx.needs_input_grad[1:5]
    wanted = sum(1 << i for i, need in enumerate(needs) if need)
    found = iter(
        _log_prob_backward_op(ctx.family, grad, *ctx.saved_tensors, ctx.event_ndims, wanted)
    )
    return None, *(next(found) if need else None for need in needs), None


_log_prob_op.register_autograd(_autograd, setup_context=_context)


def _backward_twin(family: str, grad: Tensor, *args: Any) -> Sequence[Tensor]:
    *tensors, event_ndims, wanted = args
    leaves = [double_backward.as_leaf(arg) for arg in tensors if arg is not None]
    asked = [leaf for leaf, want in zip(leaves, _bits(wanted, len(leaves)), strict=True) if want]
    density = _summed(FAMILIES[family].log_density(*leaves), event_ndims)
    return double_backward.pull_back([density], [grad], asked)


double_backward.register(_log_prob_backward_op, _backward_twin)


def _lined_up(
    info: Any, in_dims: Sequence[int | None], args: Sequence[Tensor | None], expand: bool
) -> list[Tensor | None]:
    """Batch axes moved in front of the widest argument, so that they line up.

    An argument without one broadcasts, or, if ``expand``, is given one.
    """
    pairs = list(zip(args, in_dims, strict=True))
    rank = max(arg.dim() - (dim is not None) for arg, dim in pairs if arg is not None)
    lined_up: list[Tensor | None] = []
    for arg, dim in pairs:
        if arg is not None and (dim is not None or expand):
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            arg = arg.reshape(arg.shape[:1] + (1,) * (rank + 1 - arg.dim()) + arg.shape[1:])
        lined_up.append(arg)
    return lined_up


@_log_prob_op.register_vmap
def _(info: Any, in_dims: Any, family: str, *args: Any) -> Any:
    lined_up = _lined_up(info, in_dims[1:5], args[:4], expand=False)
    return _log_prob_op(family, *lined_up, args[4]), 0


@_log_prob_backward_op.register_vmap
def _(info: Any, in_dims: Any, family: str, grad: Tensor, *args: Any) -> Any:
    *tensors, event_ndims, wanted = args
    dim = in_dims[1]
    grad = grad.expand(info.batch_size, *grad.shape) if dim is None else grad.movedim(dim, 0)
    # Each entry of the batch has its own gradients, also of what it shares with the others.
    lined_up = _lined_up(info, in_dims[2:6], tensors, expand=True)
    found = _log_prob_backward_op(family, grad, *lined_up, event_ndims, wanted)
    shapes = [
        arg.shape if dim is None else arg.movedim(dim, 0).shape[1:]
        for i, (arg, dim) in enumerate(zip(tensors, in_dims[2:6], strict=True))
        if arg is not None and wanted >> i & 1
    ]
    grads = [x.view(info.batch_size, *shape) for x, shape in zip(found, shapes, strict=True)]
    return grads, [0] * len(grads)


# --------------------------------------------------------------------------------- public functions


def log_prob(
    family: str,
    value: _Number,
    *params: _Number,
    event_ndims: int = 0,
    batch_shape: Sequence[int] | None = None,
) -> Tensor:
    """Log-density of a family by name; each function below calls it with its own.

    Args:
        family: a key of :data:`FAMILIES`.
        value: where to evaluate. Integers, booleans and Python numbers are taken in the dtype of
            the other arguments.
        params: the family's parameters, constrained, broadcastable with the value. At least one
            argument is a floating point tensor, and all of those have one dtype.
        event_ndims: how many dimensions on the right of the broadcast shape to sum over.
        batch_shape: instead of that, the part of the broadcast shape to keep, from the left.

    Returns:
        ``[*batch]``, differentiable in every floating point tensor. Below 0, the half-line
        families give ``-inf``; elsewhere values outside the support are not looked for.

    Raises:
        KernelError: the family is unknown, dtypes differ, or the shapes do not fit.

    >>> log_prob("normal", torch.zeros(3, 2), torch.zeros(2), 1.0, event_ndims=1)
    tensor([-1.8379, -1.8379, -1.8379])
    """
    entry = FAMILIES.get(family)
    if entry is None:
        raise dispatch.error(
            "log_prob.log_prob", f"unknown family; the known ones are {sorted(FAMILIES)}",
            family=family,
        )  # fmt: skip
    op = f"log_prob.{family}"
    args = _as_tensors(op, entry, (value, *params))
    if dispatch.choose(op, *args) != "torch":
        shape = _broadcast(op, entry, args)
        event_ndims = _event_ndims(op, shape, event_ndims, batch_shape)
        padded = [*args, *[None] * (4 - len(args))]
        return _log_prob_op(family, *padded, event_ndims)
    try:
        terms = entry.log_density(*args)
    except RuntimeError:
        _broadcast(op, entry, args)
        raise
    event_ndims = _event_ndims(op, terms.shape, event_ndims, batch_shape)
    return _summed(terms, event_ndims)


def _summed(terms: Tensor, event_ndims: int) -> Tensor:
    return terms.sum(tuple(range(-event_ndims, 0))) if event_ndims else terms


def _event_ndims(
    op: str, shape: torch.Size, event_ndims: int, batch_shape: Sequence[int] | None
) -> int:
    if batch_shape is not None:
        batch = tuple(batch_shape)
        event_ndims = len(shape) - len(batch)
        if tuple(shape[: len(batch)]) != batch:
            raise dispatch.error(
                op, f"batch_shape must start the broadcast shape {tuple(shape)}", batch_shape=batch
            )
    if not 0 <= event_ndims <= len(shape):
        raise dispatch.error(
            op, f"event_ndims must lie between 0 and {len(shape)}", event_ndims=event_ndims
        )
    return event_ndims


def _as_tensors(op: str, entry: Family, args: tuple[Any, ...]) -> list[Tensor]:
    if len(args) != len(entry.params) + 1:
        raise dispatch.error(op, f"takes a value and {entry.params}", arguments=args)
    floats = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not floats or any(arg.dtype is not floats[0].dtype for arg in floats):
        raise dispatch.error(
            op,
            "needs floating point tensors of one dtype; convert the data to the parameters' dtype",
            **dict(zip(("value", *entry.params), args, strict=True)),
        )
    like = floats[0]
    return [
        arg.to(like.dtype) if isinstance(arg, Tensor) else like.new_full((), arg) for arg in args
    ]


def _broadcast(op: str, entry: Family, args: list[Tensor]) -> torch.Size:
    try:
        return torch.broadcast_shapes(*(arg.shape for arg in args))
    except RuntimeError:
        named = dict(zip(("value", *entry.params), args, strict=True))
        raise dispatch.error(op, "the arguments do not broadcast", **named) from None


def normal(value: _Number, loc: _Number, scale: _Number, **over: Any) -> Tensor:
    """Normal; see :func:`log_prob` for ``over`` (what to sum over), shapes and errors.

    >>> normal(torch.tensor([0.0, 1.0]), 0.0, 1.0)
    tensor([-0.9189, -1.4189])
    """
    return log_prob("normal", value, loc, scale, **over)


def bernoulli_logits(value: _Number, logits: _Number, **over: Any) -> Tensor:
    """Bernoulli with log-odds ``logits``; a value between 0 and 1 interpolates."""
    return log_prob("bernoulli_logits", value, logits, **over)


def poisson(value: _Number, rate: _Number, **over: Any) -> Tensor:
    """Poisson."""
    return log_prob("poisson", value, rate, **over)


def student_t(value: _Number, df: _Number, loc: _Number, scale: _Number, **over: Any) -> Tensor:
    """Student's t with ``df`` degrees of freedom."""
    return log_prob("student_t", value, df, loc, scale, **over)


def log_normal(value: _Number, loc: _Number, scale: _Number, **over: Any) -> Tensor:
    """The exponential of a Normal(loc, scale)."""
    return log_prob("log_normal", value, loc, scale, **over)


def half_normal(value: _Number, scale: _Number, **over: Any) -> Tensor:
    """The magnitude of a Normal(0, scale)."""
    return log_prob("half_normal", value, scale, **over)


def half_cauchy(value: _Number, scale: _Number, **over: Any) -> Tensor:
    """The magnitude of a Cauchy(0, scale)."""
    return log_prob("half_cauchy", value, scale, **over)


def gamma(value: _Number, concentration: _Number, rate: _Number, **over: Any) -> Tensor:
    """Gamma with mean ``concentration / rate``."""
    return log_prob("gamma", value, concentration, rate, **over)


def beta(value: _Number, concentration1: _Number, concentration0: _Number, **over: Any) -> Tensor:
    """Beta with mean ``concentration1 / (concentration1 + concentration0)``."""
    return log_prob("beta", value, concentration1, concentration0, **over)
