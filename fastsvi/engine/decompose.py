"""Operations that a recorded graph states in simpler ones.

torch has such a table too, but using it imports Dynamo and SymPy, which takes a second and a half:
longer than many a fit. Here are the ones that models and their backward passes meet; for what is
missing, torch's table is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsvi.engine import decompose_linear, decompose_networks

aten = torch.ops.aten


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta if beta != 1 else x
    value = scaled.exp().log1p()  # which native loops write without overflow
    return torch.where(scaled > threshold, x, value / beta if beta != 1 else value)


def _softplus_backward(grad: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    scaled = x * beta if beta != 1 else x
    return torch.where(scaled > threshold, grad, grad * scaled.sigmoid())


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.clamp(x, max=0) - (-x.abs()).exp().log1p(), x.new_zeros(0)


def _log_sigmoid_backward(grad: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return grad * (-x).sigmoid()


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = (x - x.amax(dim, keepdim=True)).exp()
    return shifted / shifted.sum(dim, keepdim=True)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    scaled = grad * y
    return scaled - y * scaled.sum(dim, keepdim=True)


def _log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return grad - y.exp() * grad.sum(dim, keepdim=True)


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    top = x.amax(dim, keepdim=True)
    # An all -inf slice must give -inf, not nan.
    top = torch.where(top.abs() == torch.inf, 0.0, top)
    total = (x - top).exp().sum(dim, keepdim=True).log() + top
    return total if keepdim else total.squeeze(dim)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    top = torch.maximum(a, b)
    same = (a == b) & (a.abs() == torch.inf)
    return torch.where(same, a, top + (-(a - b).abs()).exp().log1p())


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a.mm(b) if alpha == 1 else a.mm(b) * alpha
    return product + (bias if beta == 1 else bias * beta)


def _addmv(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a.mv(b) if alpha == 1 else a.mv(b) * alpha
    return product + (bias if beta == 1 else bias * beta)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a.bmm(b) if alpha == 1 else a.bmm(b) * alpha
    return product + (bias if beta == 1 else bias * beta)


def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    return x + (a * b if value == 1 else a * b * value)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    return x + (a / b if value == 1 else a / b * value)


def _lerp(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    return a + (b - a) * weight


def _embedding(weight: Tensor, indices: Tensor, *options: Any) -> Tensor:
    return aten.index.Tensor(weight, [indices])


def _select_backward(grad: Tensor, sizes: Any, dim: int, index: int) -> Tensor:
    return aten.select_scatter(grad.new_zeros(sizes), grad, dim, index)


def _slice_backward(grad: Tensor, sizes: Any, dim: int, start: Any, end: Any, step: int) -> Tensor:
    return aten.slice_scatter(grad.new_zeros(sizes), grad, dim, start, end, step)


def _diagonal_backward(grad: Tensor, sizes: Any, offset: int, dim1: int, dim2: int) -> Tensor:
    return aten.diagonal_scatter(grad.new_zeros(sizes), grad, offset, dim1, dim2)


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, k) for k in range(x.shape[dim])]


def _split_sizes(x: Tensor, sizes: Any, dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    length = x.shape[dim]
    return _split_sizes(x, [min(size, length - k) for k in range(0, length, size)], dim)


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


def _constant_pad(x: Tensor, pad: list[int], value: float = 0) -> Tensor:
    for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        size = list(x.shape)
        start, end = max(0, -before), size[-dim] - max(0, -after)
        parts = [x.narrow(-dim, start, end - start)]
        for count, place in ((before, 0), (after, len(parts))):
            if count > 0:
                size[-dim] = count
                parts.insert(place and len(parts), x.new_full(size, value))
        x = torch.cat(parts, -dim) if len(parts) > 1 else parts[0]
    return x


def _threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    return torch.where(x <= threshold, 0.0, grad)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _variance(x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Tensor:
    dims = list(range(x.dim())) if dim is None else dim
    centred = x - x.mean(dims, keepdim=True)
    count = x.numel() // max(1, x.sum(dims).numel())
    free = count - (1 if correction is None else correction)
    return (centred * centred).sum(dims, keepdim=keepdim) / free


def _logit(x: Tensor) -> Tensor:
    return (x / (1 - x)).log()


def _deviation(x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance(x, dim, correction, keepdim).sqrt()


def _variance_and_mean(
    x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if dim is None else dim
    return _variance(x, dim, correction, keepdim), x.mean(dims, keepdim)


def _triangle(x: Tensor, diagonal: int, lower: bool) -> Tensor:
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    distance = columns - rows.unsqueeze(-1)
    kept = distance <= diagonal if lower else distance >= diagonal
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _repeat(x: Tensor, times: Any) -> Tensor:
    shape = (1,) * (len(times) - x.dim()) + tuple(x.shape)
    spread = [n for pair in zip(times, shape, strict=True) for n in pair]
    ones = [n for size in shape for n in (1, size)]
    whole = [t * n for t, n in zip(times, shape, strict=True)]
    return x.reshape(ones).expand(spread).reshape(whole)


def _roll(x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % max(1, x.shape[dim])
        x = torch.cat([x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)], dim)
    return x


def _embedding_backward(
    grad: Tensor, indices: Tensor, rows: int, padding: int, by_frequency: bool
) -> Any:
    if by_frequency:
        return NotImplemented
    if padding >= 0:
        grad = torch.where((indices == padding).unsqueeze(-1), 0.0, grad)
    zeros = grad.new_zeros((rows, grad.shape[-1]))
    places = [indices.reshape(-1)]
    return aten.index_put.default(zeros, places, grad.reshape(-1, grad.shape[-1]), True)


def _diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    shape, n = list(x.shape[:-1]), x.shape[-1] + abs(offset)
    for dim in sorted(d % (x.dim() + 1) for d in (dim1, dim2)):
        shape.insert(dim, n)
    return aten.diagonal_scatter(x.new_zeros(shape), x, offset, dim1, dim2)


def _multigamma(x: Tensor, p: int) -> Tensor:
    steps = torch.arange(p, dtype=x.dtype, device=x.device) * -0.5
    return (x.unsqueeze(-1) + steps).lgamma().sum(-1) + p * (p - 1) / 4 * math.log(math.pi)


_OWN: dict[Any, Callable[..., Any]] = {
    aten.softplus.default: _softplus,
    aten.softplus_backward.default: _softplus_backward,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.log_sigmoid_backward.default: _log_sigmoid_backward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.logsumexp.default: _logsumexp,
    aten.logaddexp.default: _logaddexp,
    aten.addmm.default: _addmm,
    aten.addmv.default: _addmv,
    aten.baddbmm.default: _baddbmm,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
    aten.embedding.default: _embedding,
    aten.select_backward.default: _select_backward,
    aten.slice_backward.default: _slice_backward,
    aten.diagonal_backward.default: _diagonal_backward,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.stack.default: _stack,
    aten.constant_pad_nd.default: _constant_pad,
    aten.threshold_backward.default: _threshold_backward,
    aten.sigmoid_backward.default: lambda grad, y: grad * (y * (1 - y)),
    aten.tanh_backward.default: lambda grad, y: grad * (1 - y * y),
    aten.dot.default: _sum_of_products,
    aten.rsub.Tensor: lambda x, y, alpha=1: torch.neg(x * alpha) + y,
    aten.rsub.Scalar: lambda x, y, alpha=1: torch.neg(x * alpha) + y,
    aten.square.default: lambda x: x * x,
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.var.correction: _variance,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.diag_embed.default: _diag_embed,
    aten.mvlgamma.default: _multigamma,
    aten.var_mean.correction: _variance_and_mean,
    aten.std.correction: _deviation,
    aten.tril.default: lambda x, diagonal=0: _triangle(x, diagonal, lower=True),
    aten.triu.default: lambda x, diagonal=0: _triangle(x, diagonal, lower=False),
    aten.trace.default: lambda x: x.diagonal().sum(),
    aten.repeat.default: _repeat,
    aten.roll.default: _roll,
    aten.logit.default: lambda x, eps=None: _logit(x if eps is None else x.clamp(eps, 1 - eps)),
    aten.masked_fill.Scalar: lambda x, mask, value: torch.where(mask, value, x),
    aten.masked_fill.Tensor: lambda x, mask, value: torch.where(mask, value, x),
    aten.relu.default: lambda x: torch.where(x > 0, x, 0.0),
    aten.index_select.default: lambda x, dim, index: aten.index.Tensor(x, [None] * dim + [index]),
}

# Stated by torch's own table, at the price of the import.
_FROM_TORCH = [
    "norm",
    "mish",
    "mish_backward",
    "nan_to_num",
    "sinc",
    "native_dropout",
    "logit_backward",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_backward",
    "native_group_norm",
    "logcumsumexp",
]


def _lazily(op: Any) -> Callable[..., Any]:
    def decomposed(*args: Any, **kwargs: Any) -> Any:
        from torch._decomp import decomposition_table

        function = decomposition_table.get(op)
        return NotImplemented if function is None else function(*args, **kwargs)

    return decomposed


@lru_cache(maxsize=1)
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decomposition by ATen operation."""
    table: dict[Any, Callable[..., Any]] = {}
    for name in _FROM_TORCH:
        packet = getattr(aten, name, None)
        if packet is None:  # not in this version of torch
            continue
        for overload in packet.overloads():
            if "out" not in overload:
                op = getattr(packet, overload)
                table[op] = _lazily(op)
    return table | decompose_linear.DECOMPOSITIONS | decompose_networks.DECOMPOSITIONS | _OWN
