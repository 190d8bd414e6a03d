"""DCTAdam: ClippedAdam that also moves time series in the frequency domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import torch
from torch.nn.functional import pad

from fastsvi.optim.decaying import DecayingOptimizer

Index = EllipsisType | tuple[torch.Tensor, ...]


class DCTAdam(DecayingOptimizer):
    """:class:`~fastsvi.optim.clipped_adam.ClippedAdam` for parameters of time series. Experimental.

    A tensor with an attribute ``_pyro_dct_dim`` (its time dimension, counted from the right) gets
    moments for its gradient in time and for the gradient's cosine transform, and moves by the sum
    of both steps: slow trends are then learned as fast as single time points.

    Args:
        params: tensors or groups of tensors.
        lr, betas, eps, clip_norm, lrd: as for ClippedAdam.
        subsample_aware: update moments and values only of those elements that the plates around
            the parameter selected in this step.

    >>> x = torch.zeros(4, requires_grad=True)
    >>> x._pyro_dct_dim = -1
    >>> x.sum().backward()
    >>> DCTAdam([x], lr=0.1).step()
    >>> x  # -0.1 from the time domain, and -0.1 / 2 from the constant cosine
    tensor([-0.1500, -0.1500, -0.1500, -0.1500], requires_grad=True)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
        subsample_aware: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_norm": clip_norm,
            "lrd": lrd,
            "subsample_aware": subsample_aware,
        }
        super().__init__(params, defaults)

    @staticmethod
    def _update(p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        time_dim = getattr(p, "_pyro_dct_dim", None)
        chosen = getattr(p, "_pyro_subsample", {}) if group["subsample_aware"] else {}
        here = _grid(p.shape, chosen, p.device)
        grad = p.grad[here].clamp(-group["clip_norm"], group["clip_norm"])  # type: ignore[index]
        if time_dim is not None:
            grad = torch.cat([grad, dct(_padded(grad, time_dim), time_dim)], time_dim)

        if not state:
            shape = list(p.shape)
            if time_dim is not None:
                shape[time_dim] = grad.shape[time_dim]
            state["step"] = p.new_zeros(shape) if chosen else 0
            state["exp_avg"] = p.new_zeros(shape)
            state["exp_avg_sq"] = p.new_zeros(shape)
        at = _grid(state["exp_avg"].shape, chosen, p.device)
        if isinstance(state["step"], torch.Tensor):  # elements have been seen equally often or not
            state["step"][at] += 1
            step = state["step"][at]
        else:
            step = state["step"] = state["step"] + 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"][at].mul(beta1).add_(grad, alpha=1 - beta1)
        square = state["exp_avg_sq"][at].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"][at], state["exp_avg_sq"][at] = mean, square

        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        move = mean / square.sqrt().add_(group["eps"]) * (correction * group["lr"])
        if time_dim is not None:
            duration = p.shape[time_dim]
            in_time = move.narrow(time_dim, 0, duration)
            waves = move.narrow(time_dim, duration, move.shape[time_dim] - duration)
            move = in_time + idct(waves, time_dim).narrow(time_dim, 0, duration)
        p[here] = p[here] - move


def dct(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Orthonormal discrete cosine transform of type II, as ``scipy.fft.dct(norm="ortho")``.

    By a Fourier transform of the same length (Makhoul 1980).

    >>> torch.allclose(dct(torch.ones(4)), torch.tensor([2.0, 0.0, 0.0, 0.0]), atol=1e-6)
    True
    """
    x = x.movedim(dim, -1)
    size = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    waves = (torch.fft.fft(folded) * _quarter_turns(x).conj()).real * math.sqrt(2 / size)
    waves[..., 0] *= math.sqrt(0.5)
    return waves.movedim(-1, dim)


def idct(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Inverse of :func:`dct`."""
    x = x.movedim(dim, -1).clone()
    size = x.shape[-1]
    x[..., 0] *= math.sqrt(2)
    mirrored = pad(x[..., 1:].flip(-1), (1, 0))
    spectrum = torch.complex(x, -mirrored) * _quarter_turns(x) * math.sqrt(size / 2)
    folded = torch.fft.ifft(spectrum).real
    out = torch.empty_like(folded)
    half = (size + 1) // 2
    out[..., ::2] = folded[..., :half]
    out[..., 1::2] = folded[..., half:].flip(-1)
    return out.movedim(-1, dim)


def _quarter_turns(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1]
    angle = torch.arange(size, dtype=x.dtype, device=x.device) * (math.pi / (2 * size))
    return torch.polar(torch.ones_like(angle), angle)


def _padded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` with zeros after it up to a length of small prime factors, on which the FFT is fast."""
    size = x.shape[dim]
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            break
        size += 1
    return pad(x, (0, 0) * (-1 - dim) + (0, size - x.shape[dim]))


def _grid(shape: torch.Size, chosen: Mapping[int, torch.Tensor], device: torch.device) -> Index:
    """Index of the elements whose position along each dimension in ``chosen`` is one of those."""
    if not chosen:
        return ...
    full = range(-len(shape), 0)
    axes = [chosen.get(dim, torch.arange(shape[dim], device=device)) for dim in full]
    return torch.meshgrid(*axes, indexing="ij")
