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
    return x.reshape(ones).expand(spread).reshape([t * n for t, n in zip(times, shape, strict=True)])


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


# ---- determinants and systems of equations, by the factorization that torch keeps for gradients


def _factored(a: Tensor) -> tuple[Tensor, Tensor, bool]:
    """LU factors, pivots, and whether they are of the transpose: torch then saves a copy."""
    turned = a.is_contiguous()
    factors, pivots, _ = aten.linalg_lu_factor_ex(a.mT if turned else a)
    return factors, pivots, turned


def _parity(factors: Tensor, pivots: Tensor) -> Tensor:
    stay = torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    return torch.where(pivots == stay, 1.0, -1.0).to(factors.dtype).prod(-1)


def _determinant(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factors, pivots, _ = _factored(a)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    return _parity(factors, pivots) * diagonal.prod(-1), factors, pivots


def _log_determinant(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors, pivots, _ = _factored(a)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    sign = _parity(factors, pivots) * diagonal.sign().prod(-1)
    return sign, diagonal.abs().log().sum(-1), factors, pivots


def _solve(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors, pivots, turned = _factored(a)
    is_vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    columns = b.unsqueeze(-1) if is_vector else b
    found = aten.linalg_lu_solve(factors, pivots, columns, left=left, adjoint=turned)
    found = found.squeeze(-1) if is_vector else found
    return found, factors, pivots, pivots.new_zeros(a.shape[:-2], dtype=torch.int32)


# ---- activations and losses of neural networks

_HALF_ROOT = math.sqrt(0.5)
_DENSITY = 1 / math.sqrt(2 * math.pi)
_CUBIC = 0.044715


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + (2 * _DENSITY * (x + _CUBIC * x * x * x)).tanh())
    return 0.5 * x * (1 + (x * _HALF_ROOT).erf())


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        squeezed = (2 * _DENSITY * (x + _CUBIC * x * x * x)).tanh()
        slope = 2 * _DENSITY * (1 + 3 * _CUBIC * x * x)
        return grad * (0.5 * (1 + squeezed) + 0.5 * x * (1 - squeezed * squeezed) * slope)
    return grad * (0.5 * (1 + (x * _HALF_ROOT).erf()) + x * (x * x * -0.5).exp() * _DENSITY)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = x.sigmoid()
    return grad * gate * (1 + x * (1 - gate))


def _elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(x > 0, x * scale, (x * input_scale).expm1() * (alpha * scale))


def _elu_backward(
    grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    grown = x + alpha * scale if is_result else (x * input_scale).exp() * (alpha * scale)
    return grad * torch.where(x > 0, scale, grown * input_scale)


def _hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x <= low) | (x >= high), 0.0, grad)


def _reduced(x: Tensor, reduction: int) -> Tensor:
    return (x, x.mean(), x.sum())[reduction] if reduction else x


def _mse_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    return grad * (x - target) * (2 / x.numel() if reduction == 1 else 2)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Tensor:
    below = torch.ops.aten.log_sigmoid_forward(x)[0]
    factor = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - factor * below
    return _reduced(loss if weight is None else loss * weight, reduction)


def _nll_loss(
    x: Tensor, target: Tensor, weight: Any, reduction: int, ignore: int
) -> tuple[Tensor, Tensor]:
    chosen = -x.gather(-1, _valid(target, ignore).unsqueeze(-1)).squeeze(-1)
    share = _shares(x, target, weight, ignore)
    total = share.sum()
    loss = chosen * share
    return (loss, loss.sum() / total, loss.sum())[reduction], total


def _valid(target: Tensor, ignore: int) -> Tensor:
    return torch.where(target == ignore, 0, target)


def _shares(x: Tensor, target: Tensor, weight: Any, ignore: int) -> Tensor:
    kept = (target != ignore).to(x.dtype)
    return kept if weight is None else kept * aten.index.Tensor(weight, [_valid(target, ignore)])


def _nll_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Any, reduction: int, ignore: int, total: Tensor
) -> Tensor:
    share = _shares(x, target, weight, ignore) * -(grad / total if reduction == 1 else grad)
    places = _valid(target, ignore).unsqueeze(-1)
    hit = torch.arange(x.shape[-1], device=x.device) == places
    return torch.where(hit, share.unsqueeze(-1), 0.0)


def _vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    dims = list(range(x.dim())) if dim is None else dim
    if ord == 2:
        return (x * x).sum(dims, keepdim).sqrt()
    if abs(ord) == torch.inf:
        return x.abs().amax(dims, keepdim) if ord > 0 else x.abs().amin(dims, keepdim)
    if ord == 1:
        return x.abs().sum(dims, keepdim)
    return x.abs().pow(ord).sum(dims, keepdim).pow(1 / ord)


def _layer_norm(
    x: Tensor, shape: Any, weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    rate = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    out = centred * rate
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rate


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, mean: Tensor, rate: Tensor, weight: Any, bias: Any,
    wanted: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    inner = list(range(x.dim() - len(shape), x.dim()))
    outer = list(range(x.dim() - len(shape)))
    normed = (x - mean) * rate
    scaled = grad if weight is None else grad * weight
    average = scaled.mean(inner, keepdim=True)
    along = normed * (scaled * normed).mean(inner, keepdim=True)
    for_weight, for_bias = grad * normed, grad
    return (
        (scaled - average - along) * rate if wanted[0] else None,
        (for_weight.sum(outer) if outer else for_weight) if wanted[1] else None,
        (for_bias.sum(outer) if outer else for_bias) if wanted[2] else None,
    )


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
    aten._linalg_det.default: _determinant,
    aten._linalg_slogdet.default: _log_determinant,
    aten._linalg_solve_ex.default: _solve,
    # What cannot be factored shows as NaN; nothing is read back to be told sooner.
    aten._linalg_check_errors.default: lambda *args, **kwargs: None,
    aten.var_mean.correction: _variance_and_mean,
    aten.std.correction: _deviation,
    aten.tril.default: lambda x, diagonal=0: _triangle(x, diagonal, lower=True),
    aten.triu.default: lambda x, diagonal=0: _triangle(x, diagonal, lower=False),
    aten.trace.default: lambda x: x.diagonal().sum(),
    aten.repeat.default: _repeat,
    aten.roll.default: _roll,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.silu_backward.default: _silu_backward,
    aten.elu.default: _elu,
    aten.elu_backward.default: _elu_backward,
    aten.celu.default: lambda x, alpha=1.0: _elu(x, alpha, 1, 1 / alpha),
    aten.leaky_relu.default: lambda x, slope=0.01: torch.where(x > 0, x, x * slope),
    aten.leaky_relu_backward.default: lambda grad, x, slope, is_result: (
        torch.where(x > 0, grad, grad * slope)
    ),
    aten.hardtanh.default: lambda x, low=-1.0, high=1.0: x.clamp(low, high),
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.mse_loss.default: lambda x, target, reduction=1: (
        _reduced((x - target) * (x - target), reduction)
    ),
    aten.mse_loss_backward.default: _mse_loss_backward,
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
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
    return table | _OWN
