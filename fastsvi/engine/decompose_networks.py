"""Activations, losses and norms of neural networks, stated in simpler operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


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


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.silu_backward.default: _silu_backward,
    aten.elu.default: _elu,
    aten.elu_backward.default: _elu_backward,
    aten.celu.default: lambda x, alpha=1.0: _elu(x, alpha, 1, 1 / alpha),
    aten.leaky_relu.default: lambda x, slope=0.01: torch.where(x > 0, x, x * slope),
    aten.leaky_relu_backward.default: lambda grad, x, slope, is_result: torch.where(
        x > 0, grad, grad * slope
    ),
    aten.hardtanh.default: lambda x, low=-1.0, high=1.0: x.clamp(low, high),
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.mse_loss.default: lambda x, target, reduction=1: _reduced(
        (x - target) * (x - target), reduction
    ),
    aten.mse_loss_backward.default: _mse_loss_backward,
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}
