"""Operations that a recorded graph states in simpler ones.

torch has such a table too, but using it imports Dynamo and SymPy, which takes a second and a half:
longer than many a fit. Here are the ones that models and their backward passes meet; for what is
missing, torch's table is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta if beta != 1 else x
    value = scaled.exp().log1p()
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
    aten.threshold_backward.default: _threshold_backward,
    aten.sigmoid_backward.default: lambda grad, y: grad * (y * (1 - y)),
    aten.tanh_backward.default: lambda grad, y: grad * (1 - y * y),
    aten.dot.default: _sum_of_products,
    aten.rsub.Tensor: lambda x, y, alpha=1: torch.neg(x * alpha) + y,
    aten.rsub.Scalar: lambda x, y, alpha=1: torch.neg(x * alpha) + y,
    aten.square.default: lambda x: x * x,
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.var.correction: _variance,
    aten.masked_fill.Scalar: lambda x, mask, value: torch.where(mask, value, x),
    aten.masked_fill.Tensor: lambda x, mask, value: torch.where(mask, value, x),
    aten.relu.default: lambda x: torch.where(x > 0, x, 0.0),
    aten.index_select.default: lambda x, dim, index: aten.index.Tensor(x, [None] * dim + [index]),
}

# Stated by torch's own table, at the price of the import.
_FROM_TORCH = [
    "gelu",
    "gelu_backward",
    "native_layer_norm",
    "native_layer_norm_backward",
    "silu_backward",
    "leaky_relu",
    "leaky_relu_backward",
    "elu",
    "elu_backward",
    "var_mean",
    "std",
    "std_mean",
    "mse_loss",
    "mse_loss_backward",
    "binary_cross_entropy_with_logits",
    "nll_loss_forward",
    "nll_loss_backward",
    "hardtanh",
    "tril",
    "triu",
    "trace",
    "logit",
    "norm",
    "linalg_vector_norm",
    "mish",
    "nan_to_num",
    "sinc",
    "native_dropout",
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
        packet = getattr(aten, name)
        for overload in packet.overloads():
            if "out" not in overload:
                op = getattr(packet, overload)
                table[op] = _lazily(op)
    return table | _OWN
